"""A cell that is run twice does no harm: every cell of every chapter, twice in a row in one kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from book_helpers import PATHS, signal_handlers_kept
from nbclient import NotebookClient
from refresh import merge_streams

KERNEL_ROOM = {"resources": {"metadata": {"path": str(PATHS[0].parent)}}, "record_timing": False, "timeout": 120}


def run_twice(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, list[Any], list[Any]]]:
    """Each code cell, and what it showed the first and the second time."""
    client = NotebookClient(notebook, kernel_name="python3", allow_errors=True, **KERNEL_ROOM)
    found = []
    with signal_handlers_kept(), client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            shown = [what_it_shows(client.execute_cell(copy.deepcopy(cell), index)) for _ in range(2)]
            found.append((cell, *shown))
    return found


def what_it_shows(cell: nbformat.NotebookNode) -> list[Any]:
    """The outputs of a cell without what may differ: the cell's number, the pixels, and all that was measured."""
    merge_streams(cell)
    is_measured = "nbval-ignore-output" in cell.metadata.get("tags", [])
    return [
        output.output_type
        if is_measured
        else (
            output.output_type,
            output.get("text") or output.get("evalue"),
            {mime: "" if mime.startswith("image/") else data for mime, data in output.get("data", {}).items()},
        )
        for output in cell.outputs
    ]


def differences(notebook: nbformat.NotebookNode) -> list[str]:
    """A sentence for each cell that shows something else the second time."""
    return [
        f"cell {cell.id} shows {second} the second time, and showed {first}"
        for cell, first, second in run_twice(notebook)
        if first != second
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_cell_shows_the_same_when_it_is_run_again(path: Path) -> None:
    if wrong := differences(nbformat.read(path, as_version=4)):
        pytest.fail("\n  ".join([f"notebooks/{path.name}:", *(text[:600] for text in wrong)]), pytrace=False)


def test_a_cell_that_cannot_be_run_twice_is_noticed() -> None:
    sources = ["names = ['a']", "names.remove('a')", "len(names)", "print('the same'); 1 / 0"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    (wrong,) = differences(notebook)
    assert notebook.cells[1].id in wrong and "not in list" in wrong
