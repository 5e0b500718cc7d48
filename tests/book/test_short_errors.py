"""Errors in a notebook are as short for readers as on the page."""

from __future__ import annotations

import re
import sys

import nbformat
import pytest
from book_helpers import signal_handlers_kept
from nbclient import NotebookClient

CELLS = (
    "import json\nimport folovllm.book",
    "text = '{'\njson.loads(text)",
    "def mine(x):\n    return 1 / x\n\n\nsorted([0], key=mine)",
    "1 +",
    "%xmode Verbose\njson.loads('{')",
)


@pytest.fixture(scope="module")
def errors() -> list[list[str]]:
    """The lines of each cell's error, without their colours."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    with signal_handlers_kept():
        NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=60).execute()
    found = []
    for cell in notebook.cells[1:]:
        (error,) = [output for output in cell.outputs if output.output_type == "error"]
        found.append(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).splitlines())
    return found


def test_the_readers_line_and_the_sentence_are_shown(errors: list[list[str]]) -> None:
    assert any(line.startswith("----> 2 json.loads(text)") for line in errors[0])
    assert errors[0][-1].startswith("JSONDecodeError: Expecting property name")
    assert len(errors[0]) <= 8 and not any("json/" in line for line in errors[0])


def test_every_line_of_the_readers_own_functions_is_shown(errors: list[list[str]]) -> None:
    assert any("return 1 / x" in line for line in errors[1])
    assert any("sorted([0], key=mine)" in line for line in errors[1])


def test_a_slip_in_the_syntax_is_shown_as_ever(errors: list[list[str]]) -> None:
    assert errors[2][-1].startswith("SyntaxError")
    assert any("1 +" in line for line in errors[2])


def test_every_frame_is_shown_to_those_who_ask(errors: list[list[str]]) -> None:
    assert len(errors[3]) > 20 and any("json/" in line for line in errors[3])


def test_outside_of_a_notebook_nothing_changes() -> None:
    import folovllm.book  # noqa: F401

    assert sys.excepthook is sys.__excepthook__ or sys.excepthook.__module__ != "folovllm.book.short_errors"
