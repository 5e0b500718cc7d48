"""The engine beside transformers, and beside itself: ``python tests/benchmarks/throughput.py [PART …]``.

Parts, all of them when none is named:

a     the embedded model, 64 requests, against ``generate`` on one padded batch
b     a model of Qwen3-0.6B's shape, 16 requests, against ``generate`` on one padded batch; where a step's time goes
c     the workload of b after a shared prefix of 512 tokens, prefix caching on and off
d     a prompt of 1,024 tokens among 16 who decode: the longest gap between two tokens, chunked prefill on and off
e     nano-vllm's workload, on a GPU
cost  what the scheduler and the cache take of a step, for queues of up to 10,000 requests

One process, rounds in turn, medians. Useful tokens are those that somebody asked for; what a padded batch computes
after a row has had its tokens is not.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import alternate, print_table, ratio, verdict
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from folovllm import ModelConfig, SamplingParams, SchedulerConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.stats import StepStats
from folovllm.llm import LLM
from folovllm.model_loader import ModelLoader, kv_cache_bytes_per_token
from folovllm.outputs import RunnerOutput
from folovllm.request import Request
from folovllm.tales import EMBEDDED_MODEL

Workload = list[tuple[list[int], int]]
"""Prompt and number of tokens wanted, of each request."""


def make_workload(
    num: int, prompt: tuple[int, int], output: tuple[int, int], vocab_size: int, seed: int = 0
) -> Workload:
    """Requests with prompts of random tokens, of random lengths."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, vocab_size) for _ in range(rng.randint(*prompt))], rng.randint(*output)) for _ in range(num)
    ]


def run_engine(llm: LLM, work: Workload) -> list[list[int]]:
    """Our side: the tokens of each request."""
    params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=wanted) for _, wanted in work]
    outputs = llm.generate([prompt for prompt, _ in work], params, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert [len(answer) for answer in answers] == [wanted for _, wanted in work]
    return answers


@torch.inference_mode()
def run_padded(model: Any, work: Workload) -> list[list[int]]:
    """The other side: all requests as one batch, padded on the left, until the longest has its tokens. Returns those
    that were asked for."""
    width = max(len(prompt) for prompt, _ in work)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in work])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in work])
    longest = max(wanted for _, wanted in work)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=longest, max_new_tokens=longest, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert out.shape[1] == width + longest
    return [row[width : width + wanted].tolist() for row, (_, wanted) in zip(out, work)]


def make_large_checkpoint(folder: Path) -> None:
    """Random weights in Qwen3-0.6B's exact shape, with the embedded model's tokenizer, which nothing here reads."""
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())


def where_time_goes(steps: list[StepStats]) -> str:
    """The three parts of some steps, as shares."""
    total = sum(sum(step.seconds.values()) for step in steps)
    shares = {name: sum(step.seconds[name] for step in steps) / total for name in steps[0].seconds}
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def arithmetic_share(run: Callable[[], object]) -> float:
    """The share of a run's time that is spent in matrix products and in attention, its picking of blocks included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "mkldnn::_linear",
             "aten::index_select", "aten::index_copy_")  # fmt: skip
    inside = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key.startswith(names))
    return inside / 1e6 / seconds


def against_padded(title: str, llm: LLM, model: Any, work: Workload, rounds: int, target: float) -> None:
    """Measures parts a and b."""
    useful = sum(wanted for _, wanted in work)
    sides = {"folovllm": functools.partial(run_engine, llm, work), "padded": functools.partial(run_padded, model, work)}
    seconds = alternate(sides, rounds)
    faster = ratio(seconds["padded"], seconds["folovllm"])
    longest = max(wanted for _, wanted in work)
    llm.engine.steps.clear()
    sides["folovllm"]()
    steps = llm.engine.stats()
    computed = sum(step.num_prefill_tokens + step.num_decode_tokens for step in steps)
    padded = len(work) * (max(len(prompt) for prompt, _ in work) + longest - 1)
    rows = [
        ["folovllm", f"{useful / statistics.median(seconds['folovllm']):,.0f}", f"{computed:,}", f"{len(steps)}",
         f"{faster:.2f} x", f">= {target} x", verdict(faster >= target)],
        ["padded batch", f"{useful / statistics.median(seconds['padded']):,.0f}", f"{padded:,}", f"{longest}",
         "", "", ""],
    ]  # fmt: skip
    print(f"\n{title}: {useful:,} useful tokens, median of {rounds} rounds\n")
    print_table(["", "useful tokens/s", "tokens computed", "passes", "as fast", "target", ""], rows)
    print(f"\nA step's time: {where_time_goes(steps)}")


def part_a() -> None:
    """The embedded model."""
    llm = LLM(str(EMBEDDED_MODEL), device="cpu", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    work = make_workload(64, (16, 64), (16, 128), llm.engine.decoder.config.vocab_size)
    against_padded("a. The embedded model, 64 requests", llm, model, work, 15, 2.5)


def part_b(folder: Path) -> None:
    """Qwen3-0.6B's shape."""
    llm = LLM(str(folder), device="cpu", dtype="float32", max_model_len=2048)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    work = make_workload(16, (16, 64), (16, 64), llm.engine.decoder.config.vocab_size)
    against_padded("b. Qwen3-0.6B's shape, 16 requests", llm, model, work, 3, 1.6)
    share = arithmetic_share(functools.partial(run_engine, llm, work))
    print(f"Matrix products and attention: {share:.1%} of the time (target: at least 85 %, {verdict(share >= 0.85)})")


def part_c(folder: Path) -> None:
    """A shared prefix: in the cache when the clock starts, as a system prompt is; the rest of each prompt is new."""
    rng = random.Random(0)
    prefix = [rng.randrange(3, 151_936) for _ in range(512)]
    seeds = iter(range(1, 100))

    def run(llm: LLM) -> None:
        work = make_workload(16, (16, 64), (16, 64), 151_936, seed=next(seeds))
        # The lengths are those of seed 0, the same in every round.
        like = make_workload(16, (16, 64), (16, 64), 151_936)
        run_engine(llm, [(prefix + (new * 4)[: len(old)], wanted) for (new, _), (old, wanted) in zip(work, like)])

    settings = {"max_model_len": 2048, "dtype": "float32", "device": "cpu"}
    llms = {on: LLM(str(folder), enable_prefix_caching=on, **settings) for on in (True, False)}
    seconds = alternate({str(on): functools.partial(run, llm) for on, llm in llms.items()}, 1)
    faster = ratio(seconds["False"], seconds["True"])
    steps = llms[True].engine.stats()
    found, asked = sum(s.num_cached_tokens for s in steps), sum(s.num_queried_tokens for s in steps)
    print(f"\nc. The workload of b after a shared prefix of 512 tokens; {found / asked:.0%} of the tokens cached\n")
    rows = [
        ["prefix caching", f"{16 / statistics.median(seconds['True']):.2f}", f"{faster:.2f} x", ">= 3 x",
         verdict(faster >= 3)],
        ["without", f"{16 / statistics.median(seconds['False']):.2f}", "", "", ""],
    ]  # fmt: skip
    print_table(["", "requests/s", "as fast", "target", ""], rows)


def longest_gap(llm: LLM) -> float:
    """Seconds: the longest wait of any of 16 who decode, while a prompt of 1,024 tokens is read."""
    engine, rng = llm.engine, random.Random(0)
    for i in range(16):
        prompt = [rng.randrange(3, engine.decoder.config.vocab_size) for _ in range(16)]
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=40))
    for _ in range(3):
        engine.step()
    prompt = [rng.randrange(3, engine.decoder.config.vocab_size) for _ in range(1024)]
    engine.add_request("long", prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1))
    last, longest = time.perf_counter(), 0.0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if any(output.request_id != "long" for output in outputs):
            longest, last = max(longest, now - last), now
    return longest


def part_d(folder: Path) -> None:
    """A long prompt among those who decode."""
    settings = {"max_model_len": 2048, "dtype": "float32", "device": "cpu"}
    gaps = {
        "whole": longest_gap(LLM(str(folder), **settings)),
        "in chunks of 64": longest_gap(
            LLM(str(folder), enable_chunked_prefill=True, max_num_batched_tokens=16 + 64, **settings)
        ),
    }
    share = gaps["in chunks of 64"] / gaps["whole"]
    print("\nd. 16 decode when a prompt of 1,024 tokens arrives: the longest gap between two tokens of any of them\n")
    rows = [[name, f"{gap:.2f} s", "", "", ""] for name, gap in gaps.items()]
    rows[1][2:] = [f"{share:.2f} x", "<= 0.2 x", verdict(share <= 0.2)]
    print_table(["prompt", "longest gap", "of whole", "target", ""], rows)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device's memory moves, read and written, in a copy of 1 GiB."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def bytes_to_read(folder: Path, lens: list[tuple[int, int]], num_steps: int) -> int:
    """What must come from memory at least: all weights in each step, and for each new token the keys and values before
    it. ``lens``: tokens of prompt and output of each request."""
    checkpoint = ModelLoader(ModelConfig(str(folder), dtype="bfloat16")).open("cpu")
    tokens = sum(sum(range(prompt, prompt + output)) for prompt, output in lens)
    per_token = kv_cache_bytes_per_token(checkpoint.hf_config, checkpoint.dtype)
    return num_steps * checkpoint.num_elements * checkpoint.dtype.itemsize + tokens * per_token


@dataclass(frozen=True)
class NanoVllmRun:
    """How long nano-vllm's workload took, and how long its reads alone would have."""

    num_tokens: int
    seconds: float
    least_seconds: float


def run_nano_vllm(folder: Path, **settings: Any) -> NanoVllmRun:
    """nano-vllm's ``bench.py`` with its settings, on a GPU, once after a warm-up."""
    llm = LLM(
        str(folder), device="cuda", dtype="bfloat16", max_model_len=4096, max_num_batched_tokens=16_384,
        max_num_seqs=512, block_size=256, **settings,
    )  # fmt: skip
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(100, 1024)) for _ in range(256)]
    llm.generate(prompts[:4], SamplingParams(max_tokens=8), use_tqdm=False)
    num_steps = itertools.count()
    llm.engine.step_hooks.append(lambda *_: next(num_steps))
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    lens = [(len(prompt), len(output.outputs[0].token_ids)) for prompt, output in zip(prompts, outputs)]
    device = llm.engine.decoder.device
    del llm  # the copy needs memory, too
    gc.collect()
    torch.cuda.empty_cache()
    least = bytes_to_read(folder, lens, next(num_steps)) / copy_bandwidth(device)
    return NanoVllmRun(sum(num_output for _, num_output in lens), seconds, least)


def part_e(folder: Path) -> None:
    """nano-vllm's workload."""
    print("\ne. nano-vllm's workload: 256 prompts of 100 to 1,024 tokens, outputs of 100 to 1,024, temperature 0.6\n")
    if not torch.cuda.is_available():
        print("No GPU at hand: not measured.")
        return
    run = run_nano_vllm(folder)
    speed = run.num_tokens / run.seconds
    print(f"{run.num_tokens:,} tokens in {run.seconds:.1f} s: {speed:,.0f} tokens/s on {torch.cuda.get_device_name()}")
    share = run.least_seconds / run.seconds
    print(f"Memory bandwidth alone would need {run.least_seconds:.1f} s, {share:.0%} of that")


def schedule_time(num_running: int, num_waiting: int, num_tokens: int) -> float:
    """Microseconds of `Scheduler.schedule` and the cache's part in it, with so many sequences of so many tokens."""
    cache = KVCacheManager((num_running + 1) * (num_tokens // 16 + 40), 16, enable_prefix_caching=True)
    config = SchedulerConfig(max_num_batched_tokens=10**7, max_num_seqs=num_running, max_model_len=10**6)
    scheduler, params = Scheduler(config, cache), SamplingParams(max_tokens=None)
    for i in range(num_running + num_waiting):
        prompt = list(range(num_tokens if i < num_running else 16))
        request = Request(str(i), None, prompt, params, num_pending=1)
        scheduler.add_request(request)
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        output = scheduler.schedule()
        seconds.append(time.perf_counter() - start)
        count = len(output.sampled)
        scheduler.update_from_output(output, RunnerOutput([[1] for _ in range(count)], [None] * count))
    return statistics.median(seconds[1:]) * 1e6


def part_cost() -> None:
    """The scheduler's part of a step."""
    print("\nWhat scheduling a step takes, in microseconds (median of 300 steps)\n")
    rows = [["16", f"{n:,}", "100", f"{schedule_time(16, n, 100):.0f}"] for n in (0, 100, 1000, 10_000)]
    rows += [["16", "0", f"{n:,}", f"{schedule_time(16, 0, n):.0f}"] for n in (1000, 10_000)]
    rows += [[f"{n}", "0", "100", f"{schedule_time(n, 0, 100):.0f}"] for n in (64, 256)]
    print_table(["running", "waiting", "tokens each", "microseconds"], rows)


def main() -> None:
    """Measures the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="a, b, c, d, e or cost; all when none is named")
    parts = parser.parse_args().parts or ["a", "b", "c", "d", "e", "cost"]
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(parts) & {"b", "c", "d"} or torch.cuda.is_available():
            make_large_checkpoint(folder)
        for part in parts:
            run = {"a": part_a, "cost": part_cost}.get(part) or functools.partial(
                {"b": part_b, "c": part_c, "d": part_d, "e": part_e}[part], folder
            )
            run()


if __name__ == "__main__":
    sys.exit(main())
