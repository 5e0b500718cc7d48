"""The numbers that chapters 14 and 15 quote in their text, computed again."""

from __future__ import annotations

from collections import Counter

import pytest
from book_helpers import assert_says

from folovllm import LLM, SamplingParams
from folovllm.attention.gather import GatherAttention
from folovllm.book.counting import OperationCounter
from folovllm.book.in_place import make_step
from folovllm.simulator.cost import Roofline
from folovllm.simulator.presets import GPUS, MODELS
from folovllm.tales import EMBEDDED_MODEL

FOURTEEN, FIFTEEN = "14_attention_backends", "15_fewer_bits"
NUM_LAYERS = 4
"""Of the embedded model."""


def test_the_operations_of_a_layer() -> None:
    llm = LLM(str(EMBEDDED_MODEL), dtype="float32", max_model_len=512, num_blocks=128, max_num_seqs=4)
    for i in range(4):
        llm.engine.add_request(str(i), "Once upon a time", SamplingParams(temperature=0, max_tokens=40))
    llm.engine.step()
    with OperationCounter() as counter:
        llm.engine.step()
    found: Counter[str] = Counter(
        operation.part.split(".")[0] for operation in counter.operations if "begin" not in operation.part
    )
    assert found["RMSNorm"] == 4 * 13 and found["Linear"] == 4 * NUM_LAYERS + 1
    norms, attention, rest = 4 * 3, found["GatherAttention"] // NUM_LAYERS, found["DecoderLayer"] // NUM_LAYERS
    layer = 4 + norms + attention + rest
    assert_says(FOURTEEN, f"it comes to {layer} operations for each: four products, {norms} in norms, {attention} of")
    assert_says(FOURTEEN, f"attention, and {rest} for the rotation, the gate and the sums")
    assert_says(FOURTEEN, f"(On a GPU it is {4 + norms // 2 + 2 + rest}, since torch computes a norm in two")


def test_which_gpu_waits() -> None:
    work = {}
    for name in ("qwen3-0.6b", "qwen3-8b", "qwen3-32b"):
        cost = Roofline(MODELS[name], GPUS["h100"]).step([1] * 4, [1000] * 4)
        work[name] = cost.linear + cost.attention, 19 * MODELS[name].num_layers * 5e-6
    busy, launches = work["qwen3-0.6b"]
    assert_says(FOURTEEN, "has 0.75 ms of work, and for nearly 2 ms of the step it waits")
    assert 1000 * busy == pytest.approx(0.75, abs=0.005) and 1.8 < 1000 * (launches - busy) < 2
    assert_says(FOURTEEN, "With 8 billion weights the launches would hide behind the work")
    assert work["qwen3-8b"][1] < work["qwen3-8b"][0]
    assert_says(FOURTEEN, "launches of 8 billion weights, ten for each of 36 layers, take some 14 ms")
    measured = 10 * MODELS["qwen3-8b"].num_layers * 11e-3 / 284  # a step of 28 layers has 284 kernels
    assert measured == pytest.approx(0.014, abs=2e-4) and measured > 2 * work["qwen3-8b"][0]
    assert_says(FOURTEEN, "with 32 billion they are a quarter of it")
    assert work["qwen3-32b"][1] / work["qwen3-32b"][0] == pytest.approx(0.25, abs=0.02)


def test_what_filling_up_moves() -> None:
    lens = [512] + [16] * 7
    kv_cache, metadata, q, kv = make_step(lens, [1] * 8)
    backend = GatherAttention(kv_cache)
    with OperationCounter() as counter:
        backend.begin(metadata)
        backend(0, q, kv)
    token_bytes = 2 * 2 * 32 * 4
    assert_says(FOURTEEN, "and those of `gather` twenty times, most of it behind the ends of seven short texts")
    assert 3 * counter.bytes_gathered / (sum(lens) * token_bytes) == pytest.approx(20, abs=0.5)
    assert 7 * (512 - 16) * token_bytes > counter.bytes_gathered / 2


def test_what_fewer_bits_gain() -> None:
    steps = {bits: Roofline(MODELS["qwen3-8b"].with_bits(bits), GPUS["h100"]) for bits in (16, 4)}

    def gain(num_seqs: int, context: int) -> float:
        before, after = (steps[bits].step([1] * num_seqs, [context] * num_seqs).total for bits in (16, 4))
        return before / after

    assert_says(FIFTEEN, "For a short text a step becomes 1.8 times as fast")
    assert_says(FIFTEEN, "By the formula 64 short texts gain as much, as 64 rows are below the ridge")
    assert gain(1, 100) == pytest.approx(1.8, abs=0.05) and gain(64, 100) == pytest.approx(gain(1, 100), abs=0.01)
    assert steps[4].ridge > 64
    assert_says(FIFTEEN, "With 64 texts of 2,000 tokens it is 1.3 times")
    assert gain(64, 2000) == pytest.approx(1.3, abs=0.05)
    assert_says(FIFTEEN, "That is nearly four times as many tokens")
    four, sixteen = (Roofline(MODELS["qwen3-8b"].with_bits(bits), GPUS["l4"]).num_blocks() for bits in (4, 16))
    assert 3.6 < four / sixteen < 4
