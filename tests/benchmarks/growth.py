"""How a step's time grows: ``python tests/benchmarks/growth.py [--plot FILE]``.

On a model of Qwen3-0.6B's shape in float32, the time of a decode step against

running   the sequences in the batch, 1 to 256, each after 64 tokens
context   the tokens before the new one, 16 to 8,192, of one sequence
waiting   the requests in the queue, 0 to 10,000, behind 16 that run

Every step is one of the whole engine: schedule, forward pass, sampling, text. Only the prompts are not computed, since
it does not matter here what stands in the cache. The work of a step is a constant, the weights, and a part that grows
with the sequences, or with the context. So at twice as many a step may take twice as long, and no longer; and a queue
is no work at all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from side_by_side import print_table, verdict
from throughput import make_large_checkpoint

from folovllm import SamplingParams
from folovllm.core.scheduler import SchedulerOutput
from folovllm.llm import LLM
from folovllm.outputs import RunnerOutput

ROUNDS, TURNS = 7, 3
"""Steps of which the median is taken, and how often a curve is measured, of which the least is taken: others may use
the machine for a while."""
TOLERANCE = 1.05
"""How many times what is allowed a time may be: it wanders by some per cent."""
POINTS = {
    "running": [2**i for i in range(9)],
    "context": [2**i for i in range(4, 14)],
    "waiting": [0, 10, 100, 1_000, 10_000],
}


@contextmanager
def prompts_for_free(llm: LLM) -> Iterator[None]:
    """Steps that compute nothing and give each sampled sequence token 5."""
    run = llm.engine.runner.run

    def pretend(scheduler_output: SchedulerOutput) -> RunnerOutput:
        count = len(scheduler_output.sampled)
        return RunnerOutput([5] * count, [None] * count)

    llm.engine.runner.run = pretend
    try:
        yield
    finally:
        llm.engine.runner.run = run


def time_step(llm: LLM, num_running: int, num_tokens: int, num_waiting: int) -> float:
    """Milliseconds of a decode step, the median of `ROUNDS`, after one that is not measured."""
    engine = llm.engine
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ROUNDS + 3, detokenize=False)
    for i in range(num_running):
        engine.add_request(f"running {i}", [7] * num_tokens, params)
    with prompts_for_free(llm):
        while engine.scheduler.waiting:
            engine.step()
    for i in range(num_waiting):
        engine.add_request(f"waiting {i}", [7] * 64, params)
    engine.step()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
        assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (num_running, num_waiting)
    for name in list(engine.scheduler.requests):
        engine.abort_request(name)
    engine.step()
    return statistics.median(seconds) * 1e3


def measure(folder: Path) -> dict[str, list[float]]:
    """Milliseconds at the points of each curve."""
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 8_300, "max_num_batched_tokens": 20_000}
    llm = LLM(str(folder), max_num_seqs=256, num_blocks=1_400, **settings)
    turns: dict[str, list[list[float]]] = {name: [] for name in POINTS}
    for _ in range(TURNS):
        turns["running"].append([time_step(llm, count, 64, 0) for count in POINTS["running"]])
        turns["context"].append([time_step(llm, 1, count, 0) for count in POINTS["context"]])
    llm = LLM(str(folder), max_num_seqs=16, num_blocks=1_400, **settings)
    for _ in range(TURNS):
        turns["waiting"].append([time_step(llm, 16, 64, count) for count in POINTS["waiting"]])
    return {name: [min(times) for times in zip(*found)] for name, found in turns.items()}


def allowed(name: str, before: int, after: int) -> float:
    """How many times as long a step may take at a point as at the one before."""
    return 1.0 if name == "waiting" else after / before


def report(found: dict[str, list[float]]) -> None:
    """Prints a table for each curve: the time, what one more costs, and whether it grew too fast."""
    for name, milliseconds in found.items():
        points, rows = POINTS[name], []
        for i, (point, time_here) in enumerate(zip(points, milliseconds)):
            row = [f"{point:,}", f"{time_here:.1f}", "", "", ""]
            if i:
                times, more = time_here / milliseconds[i - 1], (time_here - milliseconds[i - 1]) * 1e3
                limit = allowed(name, points[i - 1], point)
                each = more / (point - points[i - 1])
                row[2:] = [f"{each:,.1f}", f"{times:.2f} x", verdict(times <= limit * TOLERANCE)]
            rows.append(row)
        print(f"\nA decode step against {name}; one more costs so many microseconds\n")
        print_table([name, "ms", "µs for one more", "of the last", ""], rows)


def plot(found: dict[str, list[float]], path: Path) -> None:
    """Draws the curves side by side, both axes logarithmic, with the line of proportional growth."""
    from matplotlib.figure import Figure

    titles = {"running": "running sequences", "context": "tokens of context", "waiting": "waiting requests"}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for ax, (name, milliseconds) in zip(figure.subplots(1, 3), found.items()):
        ax.plot(POINTS[name], milliseconds, "o-")
        if name == "waiting":
            ax.set_xscale("symlog", linthresh=10)
            ax.set_ylim(0, 1.5 * max(milliseconds))
        else:
            last = milliseconds[-1] / POINTS[name][-1]
            ax.plot(POINTS[name], [last * point for point in POINTS[name]], "--", color="gray", label="proportional")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_ylim(min(milliseconds) / 2, 2 * max(milliseconds))
            ax.legend(frameon=False)
        ax.set_xlabel(titles[name])
        ax.set_ylabel("milliseconds of a decode step")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures and prints, and draws where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, help="the picture's file")
    parser.add_argument("--model", type=Path, help="a checkpoint; without it one of Qwen3-0.6B's shape is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            make_large_checkpoint(Path(scratch))
        found = measure(options.model or Path(scratch))
    report(found)
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
