"""Runs the notebooks and stores their outputs: ``python tests/book/refresh.py [notebook …]``.

Run twice, the second time changes no byte: what varies from run to run (times, the kernel's own description) is not
stored, and a cell that is not compared because it measures the machine keeps what it showed. To measure again, clear
that cell's output or change its source. The sources of the cells are left as they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PLAIN = re.compile(r"\x1b\[[\d;]*m")
"""What colours a text in a terminal."""
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def refresh(path: Path) -> bool:
    """Runs one notebook and stores its outputs; says whether the file changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    measured = {cell.id: (cell.source, cell.outputs) for cell in notebook.cells if is_measured(cell)}
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", record_timing=False, resources={"metadata": {"path": path.parent}}
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        merge_streams(cell)
        shorten_tracebacks(cell)
        source, outputs = measured.get(cell.id, (None, []))
        if source == cell.source:
            cell.outputs = [renumbered(output, cell.execution_count) for output in outputs]
    after = nbformat.writes(notebook, indent=1) + "\n"
    path.write_text(after, encoding="utf-8")
    return after != before


def is_measured(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell shows what is different each time, and has shown it already."""
    return "nbval-ignore-output" in cell.metadata.get("tags", []) and bool(cell.get("outputs"))


def renumbered(output: nbformat.NotebookNode, execution_count: int) -> nbformat.NotebookNode:
    """An output of an earlier run, with the cell's number in this one."""
    if "execution_count" in output:
        output.execution_count = execution_count
    return output


def shorten_tracebacks(cell: nbformat.NotebookNode) -> None:
    """Keeps of a traceback the cell's own lines and the error: the rest names folders of this machine."""
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            *frames, error = output.traceback
            output.traceback = [frame for frame in frames if not PLAIN.sub("", frame).startswith("File ")] + [error]


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
