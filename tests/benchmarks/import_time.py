"""What ``import folovllm; SamplingParams()`` adds to the start of a Python: ``python tests/benchmarks/import_time.py``.

Fresh processes in turn; a bare ``python -c pass`` is subtracted round by round. torch and transformers for scale.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial

from side_by_side import ROOT, alternate, print_table, verdict

ROUNDS = 11
TARGET = 0.1  # seconds over a bare start
PROGRAMS = {
    "bare": "pass",
    "import folovllm; SamplingParams()": "import folovllm; folovllm.SamplingParams()",
    "import torch": "import torch",
    "import transformers": "import transformers",
}


def start(program: str) -> None:
    """Runs a program in a Python of its own, to its end."""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def main() -> None:
    """Measures, and prints the table."""
    seconds = alternate({name: partial(start, program) for name, program in PROGRAMS.items()}, ROUNDS)
    bare = seconds.pop("bare")
    over = {name: statistics.median(s - b for s, b in zip(times, bare)) for name, times in seconds.items()}
    rows = [[name, f"{value:.3f} s", "", ""] for name, value in over.items()]
    rows[0][2:] = [f"<= {TARGET} s", verdict(over["import folovllm; SamplingParams()"] <= TARGET)]
    print(f"Over a bare start of Python ({statistics.median(bare):.3f} s), median of {ROUNDS} rounds:\n")
    print_table(["", "over bare", "target", ""], rows)


if __name__ == "__main__":
    main()
