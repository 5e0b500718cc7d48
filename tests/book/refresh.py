"""Runs the notebooks and stores their outputs: ``python tests/book/refresh.py [notebook …]``.

Run twice, the second time changes no byte: what varies from run to run (times, the kernel's own description) is not
stored, and a cell that is not compared because it measures the machine keeps what it showed. To measure again, clear
that cell's output or change its source. The sources of the cells are left as they are.

Figures are drawn for a dark page as well, and these pictures are kept in ``book/dark`` (see dark_pictures.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dark_pictures
import nbformat
from nbclient import NotebookClient

from folovllm.book.plotting.book_figure import ASK_FOR_DARK, DARK_PICTURE

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def refresh(path: Path) -> bool:
    """Runs one notebook and stores its outputs; says whether the file changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    measured = {cell.id: (cell.source, cell.outputs) for cell in notebook.cells if is_measured(cell)}
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", record_timing=False, resources={"metadata": {"path": path.parent}}
    ).execute(env=os.environ | {ASK_FOR_DARK: "1"})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.get("mystnb", {}).pop("image", None)  # the alternative text, which the figure makes
        merge_streams(cell)
        source, outputs = measured.get(cell.id, (None, []))
        if source == cell.source:
            cell.outputs = [renumbered(output, cell.execution_count) for output in outputs]
        keep_dark_pictures(cell)
    after = nbformat.writes(notebook, indent=1) + "\n"
    path.write_text(after, encoding="utf-8")
    return after != before


def is_measured(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell shows what is different each time, and has shown it already, its dark picture included."""
    if "nbval-ignore-output" not in cell.metadata.get("tags", []) or not cell.get("outputs"):
        return False
    lights = [light for output in cell.outputs if (light := output.get("data", {}).get("image/png"))]
    return all(dark_pictures.read_stamp(figure_name(cell)) == dark_pictures.stamp_for(light) for light in lights)


def figure_name(cell: nbformat.NotebookNode) -> str:
    """The name that links to a cell's figure."""
    return cell.metadata.get("mystnb", {}).get("figure", {}).get("name", "")


def keep_dark_pictures(cell: nbformat.NotebookNode) -> None:
    """Moves the dark picture of a cell's figure from its outputs to a file."""
    for output in cell.get("outputs", []):
        dark = output.get("data", {}).pop(DARK_PICTURE, None)
        if dark is not None and figure_name(cell):
            dark_pictures.write(figure_name(cell), dark, output.data["image/png"])


def renumbered(output: nbformat.NotebookNode, execution_count: int) -> nbformat.NotebookNode:
    """An output of an earlier run, with the cell's number in this one."""
    if "execution_count" in output:
        output.execution_count = execution_count
    return output


def merge_streams(cell: nbformat.NotebookNode) -> None:
    """Joins what was printed in several pieces: where a stream is cut depends on the moment."""
    merged: list[nbformat.NotebookNode] = []
    for output in cell.get("outputs", []):
        last = merged[-1] if merged else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    if cell.cell_type == "code":
        cell.outputs = merged


def main() -> None:
    """Refreshes the notebooks named on the command line, or all."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"{path.name}: {'changed' if refresh(path) else 'as it was'}", flush=True)


if __name__ == "__main__":
    main()
