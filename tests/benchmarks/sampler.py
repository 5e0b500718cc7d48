"""Our `Sampler` beside transformers' logits processors: ``python tests/benchmarks/sampler.py [--threads N]``.

64 rows of 151,936 float32 logits (Qwen3's vocabulary) to one token a row, on the CPU. The other side does what
``generate`` does: the processors, then softmax and `torch.multinomial`. In one process, in turn. Before that the sets
of tokens that both sides keep are compared, and after it every stage of ours is timed inside `Sampler`'s own call.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from side_by_side import alternate, print_table, ratio, verdict
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from folovllm import SamplingParams
from folovllm.sample import sampler
from folovllm.sample.sampler import Sampler, SamplingMetadata

NUM_ROWS, VOCAB_SIZE, NUM_HEAD = 64, 151_936, 1000
ROUNDS = 7
TARGET = 2.0  # times as fast, for the first case

CASES: dict[str, dict[str, Any]] = {
    "temperature 0.8, top_k 50, top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.9, temperature 2 (a long nucleus)": {"top_p": 0.9, "temperature": 2.0},
    "top_k 50": {"top_k": 50},
    "temperature 0.8": {"temperature": 0.8},
    "greedy": {"temperature": 0.0},
}


def make_logits() -> Tensor:
    """Logits as a model has them, the same on every machine: ``[64, 151936]``.

    In every row 1,000 tokens at random places stand out: the n-th has 20 - 1.6 ln n, plus noise of deviation 0.5. The
    others are normal with mean 2 and deviation 2.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) * 2 + 2
    head = 20 - 1.6 * torch.arange(1, NUM_HEAD + 1).log()
    for row in logits:
        places = torch.randperm(VOCAB_SIZE, generator=generator)[:NUM_HEAD]
        row[places] = head + 0.5 * torch.randn(NUM_HEAD, generator=generator)
    return logits


def describe(logits: Tensor) -> str:
    """What the distribution is like."""
    probs = logits.softmax(dim=-1)
    entropy = -(probs * probs.log()).sum(dim=-1).mean()
    nucleus = ((probs.sort(dim=-1, descending=True).values.cumsum(dim=-1) < 0.9).sum(dim=-1) + 1).tolist()
    return (
        f"likeliest token {probs.amax(dim=-1).mean():.2f} on average, entropy {entropy:.2f} nats, "
        f"{min(nucleus)} to {max(nucleus)} tokens reach 0.9"
    )


def warp(logits: Tensor, case: dict[str, Any]) -> Tensor:
    """transformers' processors, those that ``generate`` would make for these settings."""
    if case.get("temperature", 1.0) != 1.0:
        logits = TemperatureLogitsWarper(case["temperature"])(None, logits)
    if "top_k" in case:
        logits = TopKLogitsWarper(case["top_k"])(None, logits)
    if "top_p" in case:
        logits = TopPLogitsWarper(case["top_p"])(None, logits)
    return logits


def sample_with_transformers(logits: Tensor, case: dict[str, Any]) -> Tensor:
    """The other side: a token a row."""
    if case.get("temperature") == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(warp(logits, case).softmax(dim=-1), num_samples=1)


def count_differing_rows(logits: Tensor, case: dict[str, Any]) -> int:
    """Rows in which the two sides keep different tokens.

    There can be a few under top_p: both sum float32, one from the likeliest down and one from the least likely up, and
    may differ over the token at which 0.9 is reached to within the sixth digit. More than that is an error.
    """
    if case.get("temperature") == 0:
        ours = torch.tensor(Sampler()(logits, make_metadata(case)).token_ids)
        return int((ours != logits.argmax(dim=-1)).sum())
    ours = sampler.truncate(logits, make_metadata(case).params)
    differing = (ours.isinf() != warp(logits, case).isinf()).sum(dim=-1)
    if differing.max() > 2:
        sys.exit(f"{case}: the two sides keep different tokens, up to {differing.max()} in a row")
    return int((differing > 0).sum())


def make_metadata(case: dict[str, Any]) -> SamplingMetadata:
    """One request a row, each with a seed of its own."""
    return SamplingMetadata([SamplingParams(**case, seed=row) for row in range(NUM_ROWS)])


@contextlib.contextmanager
def stages_timed() -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each stage, wherever `Sampler` calls it; a stage inside a stage counts as that."""
    seconds: dict[str, float] = {}
    running: list[str] = []

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if running:
                return function(*args, **kwargs)
            running.append(stage)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[running.pop()] = seconds.get(stage, 0.0) + time.perf_counter() - start

        return run

    with contextlib.ExitStack() as stack:
        for stage, owner, name in (
            ("constraints", sampler, "_constrain"),
            ("temperature", sampler, "apply_temperature"),
            ("top_k", sampler, "apply_top_k"),
            ("top_p", sampler, "apply_top_p"),
            ("softmax", Tensor, "softmax"),
            ("draw", sampler, "draw"),
        ):
            seconds[stage] = 0.0
            stack.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name))))
        yield seconds


def time_stages(logits: Tensor, case: dict[str, Any]) -> list[list[str]]:
    """Milliseconds of each stage, medians over the rounds; "the rest" is what the call takes beyond them."""
    metadata, rounds = make_metadata(case), []
    for _ in range(ROUNDS):
        with stages_timed() as seconds:
            start = time.perf_counter()
            Sampler()(logits, metadata)
            whole = time.perf_counter() - start
        rounds.append({**seconds, "the rest": whole - sum(seconds.values()), "in all": whole})
    return [[stage, f"{statistics.median(r[stage] for r in rounds) * 1000:.1f}"] for stage in rounds[0]]


def compare(name: str, case: dict[str, Any], logits: Tensor) -> list[str]:
    """One row of the table."""
    metadata = make_metadata(case)
    sides = {
        "folovllm": partial(Sampler(), logits, metadata),
        "transformers": partial(sample_with_transformers, logits, case),
    }
    seconds = alternate(sides, ROUNDS)
    ours, theirs = seconds["folovllm"], seconds["transformers"]
    times = ratio(theirs, ours)
    main_case = name == next(iter(CASES))
    return [
        name,
        *(f"{statistics.median(side) * 1000:.0f} ms" for side in (ours, theirs)),
        f"{times:.2f} x",
        f">= {TARGET:g} x" if main_case else "",
        verdict(times >= TARGET) if main_case else "",
        str(count_differing_rows(logits, case)),
    ]


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch (%(default)s)")
    torch.set_num_threads(parser.parse_args().threads)
    logits = make_logits()
    print(f"{NUM_ROWS} rows of {VOCAB_SIZE:,} logits, threads: {torch.get_num_threads()}; {describe(logits)}.")
    print(f"Median of {ROUNDS} rounds; the last column counts rows in which the two keep different tokens.\n")
    rows = [compare(name, case, logits) for name, case in CASES.items()]
    print_table(["", "folovllm", "transformers", "as fast", "target", "", "differ"], rows)
    name, case = next(iter(CASES.items()))
    print(f"\nThe stages of ours for {name}:\n")
    print_table(["", "ms"], time_stages(logits, case))


if __name__ == "__main__":
    main()
