"""What only a GPU can show: ``python tests/gpu/run.py [PART …] [--report FILE]``.

Parts, all of them when none is named; together they take under ten minutes on an H100:

backends     attention, fused operations, the sampler, few bits and guesses on the GPU: against float64, and against the
             CPU's tokens
integration  the integration and property tests of the engine, on "cuda"
captured     captured steps: the tokens of eager ones
notebooks    every page run again on the GPU and compared with what it stores
speed        synchronizations and kernels per step, tokens per second, the share of the memory bandwidth

Each part is a run of pytest in a process of its own, with a limit of time, so that one which fails costs the others
nothing. What was found is written to one report, which says of each part whether it passed, of each failure why, and
of each figure what was measured. The exit status is 0 if all passed. Without a CUDA device nothing runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "gpu_report.md"
WORKERS = str(min(8, os.cpu_count() or 1))
TAIL_LINES = 30
"""Lines of output that the report keeps of a part that did not come to its end."""


@dataclass(frozen=True)
class Part:
    """One run of pytest: its arguments, and after how many seconds it is stopped."""

    limit: int
    arguments: tuple[str, ...]


# test_soak.py and others replace the model, or look at files: a GPU changes nothing there.
INTEGRATION = ("engine", "owners", "decoder", "embedded_model")
ALONE = ("backends", "fused", "sampling", "features")
PARTS = {
    "backends": Part(140, ("-n", WORKERS, "--dist=load", *(f"tests/gpu/test_{name}.py" for name in ALONE))),
    "integration": Part(
        85, ("-n", WORKERS, "--dist=load", *(f"tests/integration/test_{name}.py" for name in INTEGRATION))
    ),
    "captured": Part(75, ("tests/gpu/test_captured.py",)),
    "notebooks": Part(155, ("-n", WORKERS, "--nbval", "notebooks")),
    "speed": Part(140, ("tests/gpu/test_speed.py",)),
}


@dataclass
class Result:
    """What came of one part."""

    name: str
    seconds: float = 0.0
    passed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """The name of each test that failed, and what it said."""
    skipped: Counter[str] = field(default_factory=Counter)
    """How many tests were skipped, by reason."""
    measured: list[tuple[str, str]] = field(default_factory=list)
    """What tests have recorded with ``record_property``."""

    @property
    def ok(self) -> bool:
        """Whether some test ran, and none failed."""
        return self.passed > 0 and not self.failures


def read_results(result: Result, junit: Path) -> None:
    """Adds what pytest's XML says of each test."""
    for case in ElementTree.parse(junit).iter("testcase"):
        wrong = [*case.findall("failure"), *case.findall("error")]
        skip = case.find("skipped")
        name = f"{case.get('classname', '')}.{case.get('name', '')}".lstrip(".")
        result.failures += [(name, what.text or what.get("message", "")) for what in wrong]
        if skip is not None:
            result.skipped[skip.get("message", "")] += 1
        elif not wrong:
            result.passed += 1
        found = case.iterfind("properties/property")
        result.measured += [(prop.get("name", ""), prop.get("value", "")) for prop in found]


def run_part(name: str, part: Part) -> Result:
    """Runs a part, and ends it when its time is over."""
    result, start, late = Result(name), time.perf_counter(), False
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", "-o", "junit_family=xunit1"]  # the family that has properties
        process = subprocess.Popen(
            [*command, *part.arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "FOLOVLLM_TEST_DEVICE": "cuda"}, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=part.limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # pytest's workers and the notebooks' kernels, too
        if late:
            output, _ = process.communicate()
        tail = "\n".join(output.splitlines()[-TAIL_LINES:])
        if junit.exists():
            read_results(result, junit)
        if late:
            result.failures.append((f"the limit of {part.limit} s", tail))
        elif not junit.exists() or (process.returncode != 0 and not result.failures):
            result.failures.append((f"pytest ended with exit status {process.returncode}", tail))
        elif not result.passed:
            result.failures.append(("no test ran", tail))
    result.seconds = time.perf_counter() - start
    return result


def describe_machine() -> str:
    """The card, and the software that the figures belong to."""
    import torch

    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}; "
        f"CUDA {torch.version.cuda}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )


def format_report(machine: str, results: Sequence[Result], num_missing: int = 0) -> str:
    """The report: a verdict for each part, then figures, failures and skips.

    Args:
        machine: what everything was run on.
        results: of the parts that have run.
        num_missing: parts that have not.
    """
    verdict = "passed" if all(result.ok for result in results) else "FAILED"
    lines = [f"# On a GPU: {f'not finished, {num_missing} parts missing' if num_missing else verdict}", "", machine, ""]
    lines += ["| part | | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
    for result in results:
        counts = f"{result.passed} | {len(result.failures)} | {result.skipped.total()} | {result.seconds:.0f}"
        lines.append(f"| {result.name} | {'passed' if result.ok else 'FAILED'} | {counts} |")
    if measured := [row for result in results for row in result.measured]:
        lines += ["", "## Measured", "", "| what | measured |", "|---|---|"]
        lines += [f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in measured]
    if any(result.failures for result in results):
        lines += ["", "## Failed"]
    for result in results:
        for name, text in result.failures:
            lines += ["", f"### {result.name}: {name}", "", "~~~text", text.strip(), "~~~"]
    if any(result.skipped for result in results):
        lines += ["", "## Skipped", ""]
    for result in results:
        lines += [f"- {result.name}, {count} x: {reason}" for reason, count in result.skipped.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts named on the command line, or all, and writes the report. Returns the exit status."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all when none is named")
    parser.add_argument("--report", type=Path, default=REPORT, help="the file to write (default: %(default)s)")
    args = parser.parse_args(arguments)
    names = args.parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run, and no report was written", file=sys.stderr)
        return 1
    machine, results = describe_machine(), []
    for name in names:
        results.append(run_part(name, PARTS[name]))
        args.report.write_text(format_report(machine, results, len(names) - len(results)), encoding="utf-8")
        print(f"{name}: {'passed' if results[-1].ok else 'FAILED'} in {results[-1].seconds:.0f} s", flush=True)
    print(f"The report is in {args.report}")
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
