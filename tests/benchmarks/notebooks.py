"""Run time and peak memory of the notebooks: ``python tests/benchmarks/notebooks.py [notebook …]``.

Each runs as `tests/book/refresh.py` runs it, in a fresh kernel, and nothing is stored. The time is from before the
kernel starts until the last cell is done; the memory is the most the kernel's process has had resident, without the
processes that a cell starts. The last column is what the strip under the chapter's title quotes.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from side_by_side import ROOT, print_table, verdict

ROUNDS = 3
TARGET = 20  # seconds each
ASK = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import side_by_side; side_by_side.peak_memory()"


def run(path: Path) -> tuple[float, float]:
    """Runs one notebook: seconds, and peak MiB of its kernel."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    last = nbformat.v4.new_code_cell(ASK)
    notebook.cells.append(last)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.extra_arguments = ["--log-level=ERROR"]  # else each kernel warns that it talks over TCP
    client.execute()
    return time.perf_counter() - start, float(last.outputs[0].data["text/plain"])


def main() -> None:
    """Measures the notebooks named on the command line, or all, and prints the table."""
    paths = [Path(name).resolve() for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    rounds = [[run(path) for path in paths] for _ in range(ROUNDS)]
    rows = []
    for path, measured in zip(paths, zip(*rounds)):
        seconds, memory = (statistics.median(values) for values in zip(*measured))
        strip = f"{max(1, round(seconds))} s with {round(memory, -1):.0f} MiB"
        rows.append([path.stem, f"{seconds:.1f} s", f"{memory:.0f} MiB", f"< {TARGET} s", verdict(seconds < TARGET)])
        rows[-1].append(strip)
    print(f"Median of {ROUNDS} rounds:\n")
    print_table(["", "time", "peak memory", "target", "", "in the strip"], rows)


if __name__ == "__main__":
    main()
