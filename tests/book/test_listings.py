"""The listings: each is the package's code of today."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
from book_helpers import PATHS, Cell, Chapter, import_names, names_in, read

from folovllm.book import listing
from folovllm.book.listing import FOLD_ABOVE, Listing, show_source

LISTED = [(chapter, cell) for chapter in map(read, PATHS) for cell in chapter.tagged("listing")]
IDS = [f"{chapter.name}-{cell.source.splitlines()[-1]}" for chapter, cell in LISTED]


def listing_of(chapter: Chapter, cell: Cell) -> Listing:
    """What the last line of a cell gives now, run with no more of the chapter than its imports."""
    call = cell.last_expression()
    assert isinstance(call, ast.Call), f"{cell} of {chapter.name} should end with show_source(…)"
    namespace = import_names(chapter.cells[: cell.index + 1], names_in(ast.unparse(call)))
    return eval(compile(ast.Expression(call), str(cell), "eval"), namespace)


@pytest.mark.parametrize("chapter, cell", LISTED, ids=IDS)
def test_a_listing_is_the_code_of_today(chapter: Chapter, cell: Cell) -> None:
    now = listing_of(chapter, cell)
    is_stored = (cell.stored("text/markdown"), cell.stored("text/plain")) == (now._repr_markdown_(), repr(now))
    again = f"run tests/book/refresh.py notebooks/{chapter.path.name}"
    assert is_stored, f"{cell} of {chapter.name} does not show {now.title} as the package has it: {again}"


# How a listing is shown


def short() -> int:
    return 1


class Small:
    @property
    def value(self) -> int:
        return 2


def test_a_short_listing_is_open() -> None:
    shown = show_source(short)
    assert shown.source == "def short() -> int:\n    return 1"
    assert shown.title == f"{__name__}.short"
    assert shown._repr_markdown_() == f"`{__name__}.short`\n\n```python\n{shown.source}\n```"
    assert repr(shown) == f"{__name__}.short (2 lines)"


@pytest.mark.parametrize("num_lines, folded", [(FOLD_ABOVE, False), (FOLD_ABOVE + 1, True)])
def test_a_long_listing_is_folded(num_lines: int, folded: bool) -> None:
    source = "\n".join(["pass"] * num_lines)
    code = f"```python\n{source}\n```"
    summary = f"<details><summary><code>m.x</code> ({num_lines} lines)</summary>"
    shown = f"{summary}\n\n{code}\n\n</details>" if folded else f"`m.x`\n\n{code}"
    assert Listing("m.x", source)._repr_markdown_() == shown


def test_a_property_and_a_method_are_listed_without_their_indent() -> None:
    assert show_source(vars(Small)["value"]).source.startswith("@property\ndef value(self)")
    assert show_source(Listing.__repr__).source.startswith("def __repr__(self)")


def test_a_module_is_listed_whole() -> None:
    shown = show_source(listing)
    assert shown.title == "folovllm.book.listing"
    assert shown.source == inspect.getsource(listing).rstrip()


@pytest.mark.parametrize("value", [1, "text", len, None])
def test_what_has_no_source_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        show_source(value)
