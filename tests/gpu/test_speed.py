"""What a decode step asks of the GPU, and tokens per second beside what others have published.

Everything runs random weights in Qwen3-0.6B's shape, in bfloat16. Figures are recorded for the report and not judged:
what can be reached depends on the card. Judged is how often a step makes the CPU wait.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import throughput
import torch
from side_by_side import alternate, ratio
from simulator import PUBLISHED
from torch.profiler import ProfilerActivity, profile

from folovllm import LLM, SamplingParams
from folovllm.engine.llm_engine import LLMEngine
from folovllm.tales import EMBEDDED_MODEL

MODES = {"eager": True, "captured": False}
MOST_SYNCHRONIZATIONS = 2
"""How often a step may wait for the GPU: for its tokens, and for their log probabilities."""
NUM_STEPS = 10
NUM_TOKENS = 64
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "greedy, with logprobs": {"temperature": 0.0, "logprobs": 3},
    "sampled, with logprobs": {"temperature": 0.8, "top_k": 50, "logprobs": 3},
}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


@pytest.mark.parametrize("mode", MODES)
def test_nano_vllms_workload(large_checkpoint, mode, record_property):
    run = throughput.run_nano_vllm(large_checkpoint, enforce_eager=MODES[mode])
    assert run.num_tokens == 133_966  # as its bench.py has it
    record_property(
        f"nano-vllm's workload, Qwen3-0.6B's shape, {mode}: tokens/s", f"{run.num_tokens / run.seconds:,.0f}"
    )
    record_property(f"the same, {mode}: share of the memory bandwidth", f"{run.least_seconds / run.seconds:.0%}")
    if mode == list(MODES)[-1]:
        for name, figure, source, _ in itertools.islice(PUBLISHED, 4):
            record_property(f"published: {name} ({source})", f"{figure:,}")


@pytest.fixture(scope="module")
def llms(large_checkpoint):
    """An engine that calls operations one by one, and one that replays captured steps."""
    made = {
        mode: LLM(
            str(large_checkpoint), device="cuda", dtype="bfloat16", max_model_len=512, block_size=256, num_blocks=66,
            max_num_seqs=64, enforce_eager=is_eager,
        )
        for mode, is_eager in MODES.items()
    }  # fmt: skip
    yield made
    made.clear()
    gc.collect()


def begin_decoding(engine: LLMEngine, num_requests: int, **params) -> None:
    """Adds requests and computes their prompts, so that the next steps decode."""
    rng = random.Random(0)
    for i in range(num_requests):
        prompt = [rng.randrange(3, 1000) for _ in range(32)]
        engine.add_request(str(i), prompt, SamplingParams(ignore_eos=True, max_tokens=100, seed=i, **params))
    while engine.scheduler.waiting:
        engine.step()
    for _ in range(2):  # the first decode steps may compile something
        engine.step()


def end_decoding(engine: LLMEngine, num_requests: int) -> None:
    for i in range(num_requests):
        engine.abort_request(str(i))
    engine.step()


def find_synchronizations(run) -> list[str]:
    """The lines at which the CPU waited for the GPU while ``run`` ran, as far as torch notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]


def test_a_synchronization_is_noticed():
    x = torch.ones(2, device="cuda")
    assert len(find_synchronizations(x.tolist)) == 1 and find_synchronizations(lambda: x + x) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_seldom_waits_for_the_gpu(llms, mode, kind, record_property):
    engine = llms[mode].engine
    begin_decoding(engine, 8, **KINDS[kind])
    found = find_synchronizations(lambda: [engine.step() for _ in range(NUM_STEPS)])
    end_decoding(engine, 8)
    record_property(f"{kind}, {mode}: synchronizations per decode step", f"{len(found) / NUM_STEPS:g}")
    assert len(found) <= MOST_SYNCHRONIZATIONS * NUM_STEPS, Counter(found).most_common()


def count_events(engine: LLMEngine) -> Counter[str]:
    """How often the profiler saw each event in some decode steps of eight greedy requests."""
    begin_decoding(engine, 8, temperature=0.0)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_STEPS):
            engine.step()
    end_decoding(engine, 8)
    return Counter({event.key: event.count for event in profiler.key_averages()})


def test_fused_operations_launch_less(llms, monkeypatch, record_property):
    engine, launches = llms["eager"].engine, {}
    for name, is_fused in (("plain", False), ("fused", True)):
        monkeypatch.setattr(engine.decoder, "_has_fused", is_fused)
        counts = count_events(engine)
        launches[name] = sum(counts[launch] for launch in LAUNCHES) / NUM_STEPS / engine.decoder.config.num_layers
        record_property(f"greedy, eager, {name}: kernels launched per layer", f"{launches[name]:.1f}")
    assert launches["fused"] <= launches["plain"] - 8  # the operations that three kernels stand for are many more


@pytest.mark.parametrize("mode", MODES)
def test_what_a_decode_step_launches(llms, mode, record_property):
    counts = count_events(llms[mode].engine)
    launches, graphs = sum(counts[name] for name in LAUNCHES), counts["cudaGraphLaunch"]
    record_property(f"greedy, {mode}: kernels launched per decode step", f"{launches / NUM_STEPS:g}")
    record_property(f"greedy, {mode}: graphs launched per decode step", f"{graphs / NUM_STEPS:g}")
    record_property(f"greedy, {mode}: copies per decode step", f"{counts['cudaMemcpyAsync'] / NUM_STEPS:g}")
    assert launches > 0 and graphs == (0 if mode == "eager" else NUM_STEPS)


@pytest.mark.parametrize("num_requests", [1, 16, 64])
def test_decode_steps_per_second(llms, large_checkpoint, num_requests, record_property):
    per_step = {mode: [] for mode in MODES}

    def run(mode: str) -> None:
        engine = llms[mode].engine
        begin_decoding(engine, num_requests, temperature=0.0)
        start = time.perf_counter()
        for _ in range(NUM_TOKENS):
            engine.step()
        per_step[mode].append((time.perf_counter() - start) / NUM_TOKENS)
        end_decoding(engine, num_requests)

    alternate({mode: functools.partial(run, mode) for mode in MODES}, 3)
    what = f"Qwen3-0.6B's shape, bfloat16, {num_requests} decoding"
    record_property(f"{what}: captured beside eager", f"{ratio(per_step['eager'], per_step['captured']):.2f} x as fast")
    least = throughput.bytes_to_read(large_checkpoint, [(32, NUM_TOKENS)] * num_requests, NUM_TOKENS) / NUM_TOKENS
    bandwidth = throughput.copy_bandwidth(torch.device("cuda"))
    for mode, found in per_step.items():
        seconds = statistics.median(found)
        record_property(f"{what}, {mode}: tokens/s", f"{num_requests / seconds:,.0f}")
        share = f"{least / seconds / bandwidth:.0%} of the {bandwidth / 1e9:,.0f} GB/s that a copy reads and writes"
        record_property(f"{what}, {mode}: share of the memory bandwidth", share)


def test_the_embedded_model_has_a_speed_too(record_property):
    llm = LLM(str(EMBEDDED_MODEL), device="cuda", dtype="float32", num_blocks=2000)
    work = throughput.make_workload(64, (16, 64), (16, 128), llm.engine.decoder.config.vocab_size)
    seconds = alternate({"ours": functools.partial(throughput.run_engine, llm, work)}, 3)["ours"]
    useful = sum(wanted for _, wanted in work)
    what = "the book's model, float32, 64 requests (part a of throughput.py): tokens/s"
    record_property(what, f"{useful / statistics.median(seconds):,.0f}")
