"""How far can the simulator's seconds be trusted? Run by hand::

    python tests/benchmarks/simulator.py published          # against figures that others have published
    python tests/benchmarks/simulator.py cards FOLDER       # against vLLM's times of 300 requests on two cards
    python tests/benchmarks/simulator.py own [CHECKPOINT]   # against this machine's own engine
    python tests/benchmarks/simulator.py switches           # what each switch of the engine does to Qwen3-8B on an H100

Each prints a table in Markdown, as it stands in ``book/simulator.md``. `published` and `switches` compute everything,
so they print the same on every machine; `own` measures. FOLDER holds ``vllm-0.19-rtx4090-llama-3.1-8b.csv`` and
``vllm-0.19-rtxpro6000-llama-3.1-8b.csv``, with arrival, first token and last token of each request, made from
LLMServingSim's ``bench`` folder (MIT licence, github.com/casys-kaist/LLMServingSim).
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from folovllm.simulator.cluster import simulate
from folovllm.simulator.cost import Efficiency, FittedCost, Roofline
from folovllm.simulator.presets import GPUS, MODELS
from folovllm.simulator.report import Report, percentile
from folovllm.simulator.workload import TimedRequest, chats, from_list, poisson, replay

PERCENTS = (10, 50, 90, 99)


# Published figures


def nano_vllm_workload() -> Any:
    """The 256 requests of nano-vllm's ``bench.py``, all at once: 142,827 tokens in, 133,966 out."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    return from_list(TimedRequest(0.0, prompt, length) for prompt, length in zip(prompts, lengths))


@cache
def nano_vllm(gpu: str) -> float:
    """Output tokens per second with its settings: 4,096 tokens per sequence, 16,384 per step, blocks of 256."""
    config = {"max_model_len": 4096, "max_num_batched_tokens": 16_384, "max_num_seqs": 512, "block_size": 256}
    return simulate(nano_vllm_workload(), gpu, "qwen3-0.6b", **config).throughput


def one_user(gpu: str, model: str, bits: int = 16, num_prompt: int = 8, num_output: int = 200) -> float:
    """Tokens per second of one request alone, its prompt included."""
    request = TimedRequest(0.0, [7] * num_prompt, num_output)
    return simulate(from_list([request]), gpu, MODELS[model].with_bits(bits)).throughput


PUBLISHED: list[tuple[str, float, str, Callable[[], float]]] = [
    ("vLLM 0.10, Qwen3-0.6B, 256 requests, A800", 8588, "nano-vllm-triton's issue 1", lambda: nano_vllm("a100")),
    ("nano-vllm-triton, the same", 10_009, "the same issue", lambda: nano_vllm("a100")),
    ("vLLM 0.20, the same, A100 PCIe", 9530, "nano-vllm's issue 245", lambda: nano_vllm("a100")),
    ("nano-vllm, the same, RTX 4070 laptop", 1434, "its README", lambda: nano_vllm("rtx4070-laptop")),
    ("gpt-fast, Llama-2-7B, one user, A100, 16 bits", 104.9, "its README", lambda: one_user("a100", "llama-2-7b")),
    ("gpt-fast, 8 bits", 155.6, "its README", lambda: one_user("a100", "llama-2-7b", 8)),
    ("gpt-fast, 4 bits", 196.8, "its README", lambda: one_user("a100", "llama-2-7b", 4)),
    ("micro-vllm, Qwen3-0.6B, one user, L20", 405.8, "its README", lambda: one_user("l20", "qwen3-0.6b")),
    ("vLLM 0.21, the same", 386.4, "micro-vllm's README", lambda: one_user("l20", "qwen3-0.6b")),
    ("nano-vllm, the same", 335.8, "micro-vllm's README", lambda: one_user("l20", "qwen3-0.6b")),
]
"""What was run, output tokens per second, where that is published, and the same simulated. An A800 is an A100 with
slower links to other cards; nano-vllm's 256 requests are its ``bench.py``."""


def published() -> Iterator[str]:
    """The table of published figures."""
    yield "| what | published, tokens/s | simulated | error |"
    yield "|---|---|---|---|"
    for name, figure, source, run in PUBLISHED:
        yield published_row(name, figure, source, run())


def published_row(name: str, figure: float, source: str, found: float) -> str:
    """A row of the table: a published figure and ours, both in tokens per second."""
    return f"| {name} ({source}) | {figure:,} | {found:,.0f} | {found / figure - 1:+.0%} |"


# Real times of requests

CARDS = {
    "rtx4090": {"num_blocks": 2588, "max_num_seqs": 256},
    "rtxpro6000": {"num_blocks": 35_913, "max_num_seqs": 128},
}
"""What vLLM found room for, and what its run was told; the data shows 128 requests at once on the second card."""
COMMON = {"enable_chunked_prefill": True, "max_num_batched_tokens": 2048, "max_model_len": 32_768}


def read_times(path: Path) -> dict[str, float]:
    """Throughput and percentiles of a measured run."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    values = {
        "ttft": [row["first_token_s"] - row["arrival_s"] for row in rows],
        "tpot": [(row["last_token_s"] - row["first_token_s"]) / (row["output_tokens"] - 1) for row in rows],
        "e2e": [row["last_token_s"] - row["arrival_s"] for row in rows],
    }
    seconds = max(row["last_token_s"] for row in rows) - min(row["arrival_s"] for row in rows)
    found = {"throughput": sum(row["output_tokens"] for row in rows) / seconds}
    return found | {f"{name} p{p}": percentile(values[name], p) for name in values for p in PERCENTS}


def simulated_times(report: Report) -> dict[str, float]:
    """The same of a simulated one."""
    found = {"throughput": report.throughput}
    return found | {f"{name} p{p}": report.percentile(name, p) for name in ("ttft", "tpot", "e2e") for p in PERCENTS}


def run_card(card: str, path: Path, efficiency: Efficiency) -> dict[str, float]:
    """A card's requests, simulated."""
    report = simulate(replay(path), card, "llama-3.1-8b", efficiency=efficiency, **CARDS[card], **COMMON)
    return simulated_times(report)


def fit_card(card: str, path: Path) -> Efficiency:
    """The four factors with which a card's percentiles come out best, by least squares of their logarithms."""
    from scipy.optimize import least_squares

    real = read_times(path)
    names = ("arithmetic", "weights", "kv", "host_s")
    start = [getattr(Efficiency(), name) for name in names]

    def errors(scales: Any) -> list[float]:
        factors = {name: scale * value for name, scale, value in zip(names, scales, start)}
        found = run_card(card, path, Efficiency(**factors))
        return [math.log(found[name] / real[name]) for name in real]

    bounds = [0.3, 0.3, 0.3, 0.1], [1 / start[0], 1 / start[1], 1 / start[2], 5.0]
    scales = least_squares(errors, [0.999] * 4, bounds=bounds, diff_step=0.05, max_nfev=6).x
    return Efficiency(**{name: round(float(scale * value), 5) for name, scale, value in zip(names, scales, start)})


def cards(folder: Path) -> Iterator[str]:
    """The tables of both cards, and how well the factors of one do on the other."""
    paths = {card: folder / f"vllm-0.19-{card}-llama-3.1-8b.csv" for card in CARDS}
    fitted = {card: fit_card(card, path) for card, path in paths.items()}
    other = dict(zip(CARDS, reversed(CARDS)))
    for card, path in paths.items():
        real = read_times(path)
        kinds = [Efficiency.data_sheet(), Efficiency(), fitted[card], fitted[other[card]]]
        columns = [run_card(card, path, efficiency) for efficiency in kinds]
        roofline = Roofline(MODELS["llama-3.1-8b"], GPUS[card])
        yield f"\n{card}: fitted {fitted[card]}; blocks {CARDS[card]['num_blocks']:,}, ours {roofline.num_blocks():,}\n"
        yield f"| {card} | measured | data sheet | default | fitted | other card's |"
        yield "|---|---|---|---|---|---|"
        for name, value in real.items():
            errors = " | ".join(f"{column[name] / value - 1:+.0%}" for column in columns)
            shown = f"{value:,.0f} tokens/s" if name == "throughput" else f"{value * 1e3:,.0f} ms"
            yield f"| {name} | {shown} | {errors} |"
        mean = " | ".join(
            f"{sum(abs(column[name] / value - 1) for name, value in real.items()) / len(real):.1%}"
            for column in columns
        )
        yield f"| mean error | | {mean} |"


# This machine's engine


def own(checkpoint: str) -> Iterator[str]:
    """The engine on this machine: steps fitted on one seed, a workload of another simulated and run."""
    from folovllm.llm import LLM
    from folovllm.simulator.cluster import serve
    from folovllm.simulator.cost import TimedStep
    from folovllm.simulator.runner import charge, record_steps

    llm = LLM(checkpoint, device="cpu", max_num_seqs=16, max_model_len=1024)
    vocab_size = llm.engine.decoder.config.vocab_size

    def run_live(seed: int, rate: float) -> tuple[dict[str, float], list[TimedStep]]:
        """Adds each request when it is due by the machine's clock."""
        workload = poisson(24, rate, (16, 200), (8, 48), seed, vocab_size=vocab_size)
        steps = record_steps(llm.engine)
        begin, due, times = llm.engine.clock.now_us() / 1e6, list(workload.requests), {}
        while due or llm.engine.has_unfinished_requests():
            now = llm.engine.clock.now_us() / 1e6 - begin
            while due and due[0].arrival <= now:
                request = due.pop(0)
                llm.engine.add_request(
                    request.request_id, request.prompt, request.own_params(), begin + request.arrival
                )
            if not llm.engine.has_unfinished_requests() and not llm.engine.scheduler.has_unfinished():
                time.sleep(max(0.0, due[0].arrival - now))
            for output in llm.engine.step():
                metrics = output.metrics
                times[output.request_id] = (
                    metrics.first_token_time - metrics.arrival_time,
                    metrics.finished_time - metrics.arrival_time,
                )
        llm.engine.step_hooks.clear()
        ttft, e2e = zip(*times.values())
        found = {f"ttft p{p}": percentile(ttft, p) for p in (50, 90)} | {
            f"e2e p{p}": percentile(e2e, p) for p in (50, 90)
        }
        return found, steps

    run_live(0, 1000.0)  # warms up
    _, steps = run_live(1, 1000.0)
    _, more = run_live(3, 4.0)
    cost = FittedCost.fit(steps + more)
    yield f"fitted: {cost}\n"
    yield "| load, requests/s | " + " | ".join(f"{name} p{p}" for name in ("ttft", "e2e") for p in (50, 90)) + " |"
    yield "|---|---|---|---|---|"
    errors = []
    clock = llm.engine.clock
    for rate in (2.0, 4.0, 1000.0):
        real, _ = run_live(2, rate)
        charge(llm.engine, cost)
        report = serve([llm.engine], poisson(24, rate, (16, 200), (8, 48), 2, vocab_size=vocab_size))
        llm.engine.runner, llm.engine.clock = llm.engine.runner.runner, clock
        found = {f"{name} p{p}": report.percentile(name, p) for name in ("ttft", "e2e") for p in (50, 90)}
        errors += [abs(found[name] / real[name] - 1) for name in real]
        yield (
            f"| {rate:g} | "
            + " | ".join(f"{real[name] * 1e3:,.0f} ms, {found[name] / real[name] - 1:+.0%}" for name in real)
            + " |"
        )
    yield f"\nmean error {sum(errors) / len(errors):.1%}"


# What each switch does


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def switches() -> Iterator[str]:
    """The table of switches, Qwen3-8B on an H100."""
    yield "| switch | found |"
    yield "|---|---|"
    yield from _batching()
    yield from _chunks()
    yield from _prefixes()
    yield from _blocks()
    yield from _bits_and_cards()
    yield from _routers()


def _batching() -> Iterator[str]:
    flood = poisson(600, math.inf, (100, 900), (50, 500), seed=1)
    steady = poisson(600, 8, (100, 900), (50, 500), seed=1)
    for name in ("static", "continuous"):
        most = simulate(flood, max_num_seqs=64, batching=name).throughput
        wait = simulate(steady, max_num_seqs=64, batching=name).percentile("ttft", 50)
        yield f"| {name} batching, 64 places | {most:,.0f} tokens/s; at 8 requests/s a median TTFT of {_ms(wait)} |"


def _chunks() -> Iterator[str]:
    chat = poisson(240, 4, (100, 900), (100, 300), seed=2).requests
    long = [TimedRequest(2.0 * i, [i + 1] * 12_000, 50, f"long-{i}") for i in range(30)]
    workload = from_list([*chat, *long])
    for budget in (None, 8192, 2048, 512, 256):
        chunked = {"enable_chunked_prefill": budget is not None, "max_num_batched_tokens": budget or 40_960}
        report = simulate(workload, **chunked)
        talks = [request for request in report.requests if not request.request_id.startswith("long")]
        worst = max(max(request.itl) for request in talks)
        p99 = percentile([request.ttft for request in talks], 99)
        name = "not chunked" if budget is None else f"{budget:,} tokens per step"
        yield f"| a prompt of 12,000 tokens every 2 s, {name} | worst ITL {_ms(worst)}, TTFT p99 {_ms(p99)} |"


def _prefixes() -> Iterator[str]:
    workload = poisson(600, 16, (50, 500), (50, 150), seed=3, prefix_tokens=2000)
    for on in (False, True):
        report = simulate(workload, enable_prefix_caching=on)
        ttft, tpot = report.percentile("ttft", 50), report.percentile("tpot", 50)
        yield (
            f"| 2,000 shared tokens, 16 requests/s, prefix caching {'on' if on else 'off'} | median TTFT {_ms(ttft)}, "
            f"TPOT {tpot * 1e3:.1f} ms, {report.hit_rate:.0%} found |"
        )


def _blocks() -> Iterator[str]:
    workload = poisson(400, math.inf, (100, 900), (50, 500), seed=4)
    for size in (16, 64, 256, 1024):
        report = simulate(workload, block_size=size, num_blocks=60_000 // size)
        yield f"| a cache of 60,000 tokens, blocks of {size:,} | {report.throughput:,.0f} tokens/s |"


def _bits_and_cards() -> Iterator[str]:
    full = poisson(512, math.inf, (100, 900), (50, 500), seed=5)
    shape = MODELS["qwen3-8b"]
    for name, model, size in (("16 bits", shape, 1), ("4 bits", shape.with_bits(4), 1), ("4 GPUs", shape, 4)):
        alone = simulate(from_list([TimedRequest(0.0, [7] * 100, 300)]), model=model, tensor_parallel_size=size)
        busy = simulate(full, model=model, tensor_parallel_size=size)
        rate, most = 1 / alone.percentile("tpot", 50), busy.throughput
        money = busy.dollars_per_million_tokens
        yield f"| {name} | one user {rate:,.0f} tokens/s, {most:,.0f} in a full batch, ${money:.3f} a million |"


def _routers() -> Iterator[str]:
    workload = chats(200, 8, 25.0, 500, (20, 100), (50, 200), think=1.0, seed=6)
    config = {"enable_prefix_caching": True, "num_blocks": 1800, "enable_chunked_prefill": True}
    for router in ("round_robin", "prefix_aware"):
        report = simulate(workload, replicas=4, router=router, **config)
        yield (
            f"| chats on four replicas of 28,800 tokens each, {router} | {report.hit_rate:.0%} found, TTFT p99 "
            f"{_ms(report.percentile('ttft', 99))}, {report.num_preemptions} preemptions |"
        )


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("published", "cards", "own", "switches"))
    parser.add_argument("path", nargs="?", help="the folder of the CSV files, or a checkpoint")
    args = parser.parse_args()
    if args.table == "cards":
        lines = cards(Path(args.path))
    elif args.table == "own":
        from folovllm.tales import default_model

        lines = own(args.path or default_model())
    else:
        lines = {"published": published, "switches": switches}[args.table]()
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
