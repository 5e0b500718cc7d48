"""The numbers that chapters 6 and 7 quote in their text, computed again."""

from __future__ import annotations

import pytest
import torch
from book_helpers import assert_says
from torch import Tensor

from folovllm import LLM, SamplingParams
from folovllm.book.tracing import PassTrace, look_back, trace_pass
from folovllm.simulator.cost import Efficiency, Roofline
from folovllm.simulator.presets import GPUS, MODELS
from folovllm.tales import EMBEDDED_MODEL

MODEL, GPU = MODELS["qwen3-8b"], GPUS["h100"]
IDEAL, REACHED = Roofline(MODEL, GPU, Efficiency.data_sheet()), Roofline(MODEL, GPU)
TALE = (
    "Once upon a time, in the valley, there lived a quiet fox named Oskar."
    " Oskar loved to bake bread. One afternoon in the valley, Oskar"
)
OSKARS = 15, 17, 29
"""Where the name stands in the tale."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(EMBEDDED_MODEL), dtype="float32", max_model_len=256, max_num_seqs=1)


@pytest.fixture(scope="module")
def trace(llm: LLM) -> PassTrace:
    return trace_pass(llm.engine.decoder, llm.engine.tokenizer.encode(TALE))


def step_ms(num_seqs: int, context: int, roofline: Roofline = IDEAL) -> float:
    return 1000 * roofline.step([1] * num_seqs, [context] * num_seqs).total


def test_who_looks_at_whom(trace: PassTrace) -> None:
    name, (first, second, third) = "06_inside_a_pass", OSKARS
    row = trace.probs[3, 3, second]
    assert_says(name, 'gives nearly half of its attention to the first one, a third to the word before "valley"')
    assert row[first] == pytest.approx(0.44, abs=0.01) and row[6] == pytest.approx(0.37, abs=0.01)
    assert_says(name, "In one head of layer 1 the comma gives 99 % of its attention to the two places")
    found = trace.probs[1, :, third - 1, [first, second]].sum(-1)
    assert found.max() == pytest.approx(0.99, abs=0.005) and found.min() > 0.9
    assert_says(name, "It stands eleven tokens after the second")
    assert third - 1 - second == 11
    assert_says(name, '(Two rows further up "the" finds the "valley" that it is about to name again.)')
    assert trace.probs[1, int(found.argmax()), third - 3, 7] > 0.9


def test_what_the_look_at_the_first_name_changes(llm: LLM) -> None:
    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, dim=1)
        out, probs = look_back(q, k, v)
        if layer == 3:
            row = probs[3, second].clone()
            row[first] = 0
            out.unflatten(1, (4, -1))[second, 3] = row / row.sum() @ v[:, 3 // 2]
        return out

    decoder, (first, second, _) = llm.engine.decoder, OSKARS
    tokens = torch.tensor(llm.engine.tokenizer.encode(TALE))
    with torch.inference_mode():
        plain, without = (
            decoder.compute_logits(decoder(tokens, torch.arange(len(tokens)), look))[second].log_softmax(-1)
            for look in (lambda _, q, kv: look_back(q, *kv.chunk(2, dim=1))[0], attend)
        )
    assert_says("06_inside_a_pass", 'without the look at the first "Oskar" the model predicts the same here')
    assert 0 < (plain.exp() * (plain - without)).sum() < 1e-5


def test_what_the_stream_says(llm: LLM, trace: PassTrace) -> None:
    decoder, tokenizer = llm.engine.decoder, llm.engine.tokenizer
    (name_id,) = tokenizer.encode(" Oskar")
    probs = decoder.compute_logits(decoder.norm(trace.stream[:, OSKARS[2] - 1])).softmax(-1)
    assert_says("06_inside_a_pass", 'After layer 0 it leans towards "Oskar", but only as to some name: call the hero')
    assert_says("06_inside_a_pass", "Layer 1, whose heads have just looked at the name, knows which")
    assert int(probs[1].argmax()) == name_id and 0.3 < probs[1, name_id] < 0.6 and probs[2, name_id] > 0.95
    mira = trace_pass(decoder, [tokenizer.encode(" Mira")[0] if i == name_id else i for i in tokenizer.encode(TALE)])
    found = decoder.compute_logits(decoder.norm(mira.stream[:, OSKARS[2] - 1])).argmax(-1)
    assert tokenizer.convert_ids_to_tokens(found[1:3].tolist()) == ["ĠOskar", "ĠMira"]
    last = decoder.compute_logits(decoder.norm(trace.stream[-1, -1])).argmax()
    assert_says("06_inside_a_pass", "It expects `lost`")
    assert tokenizer.decode([int(last)]) == " lost"


def test_how_much_of_the_reading_is_used(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200)
    (output,) = llm.generate(TALE, params, use_tqdm=False)
    tale = llm.engine.tokenizer.encode(TALE) + output.outputs[0].token_ids[:-1]
    row = trace_pass(llm.engine.decoder, tale).probs[:, :, -1]
    small = row < 1 / len(tale)
    assert_says("06_inside_a_pass", "Each of the sixteen heads reads a hundred keys. Four fifths of them get less than")
    assert_says("06_inside_a_pass", "and all these together a fifth of the attention")
    assert len(tale) == pytest.approx(100, abs=10) and small.float().mean() == pytest.approx(0.8, abs=0.02)
    assert (row * small).sum() / row.sum() == pytest.approx(0.2, abs=0.02)
    share = 4 * 32 * 128 * 100_000 / (4 * 32 * 128 * 100_000 + 2 * MODEL.num_layer_params / MODEL.num_layers)
    assert_says("06_inside_a_pass", "at a hundred thousand it is four fifths of all")
    assert share == pytest.approx(0.8, abs=0.02)


def test_the_weights() -> None:
    name = "07_how_long_is_a_step"
    read_ms = 1000 * IDEAL.weight_bytes / GPU.bandwidth
    token_ms = read_ms / IDEAL.ridge
    assert_says(name, "reads for four and a half milliseconds and computes for 0.015 of one")
    assert (round(read_ms, 1), round(token_ms, 3)) == (4.5, 0.015)
    assert_says(name, "idle for 99.7 % of the step")
    assert_says(name, "idle for 95 % of it")
    assert (round(100 * (1 - token_ms / read_ms), 1), round(100 * (1 - 16 * token_ms / read_ms))) == (99.7, 95)
    assert_says(name, "up to 295 tokens")
    assert round(IDEAL.ridge) == 295


def test_the_cache() -> None:
    name = "07_how_long_is_a_step"
    assert_says(name, "About 103,000 tokens")
    assert_says(name, "64 texts of 1,600 tokens")
    tokens = IDEAL.weight_bytes / MODEL.kv_token_bytes
    assert round(tokens, -3) == 103_000 and round(tokens / 64, -2) == 1600
    assert_says(name, "some 11,000 tokens per second")
    assert round(GPU.bandwidth / IDEAL.kv_bytes(2000), -3) == 11_000
    assert_says(name, "(two vectors, 36 layers, 8 heads, 128 numbers, two bytes: 147,456)")
    assert 2 * 36 * 8 * 128 * 2 == MODEL.kv_token_bytes == 147_456


def test_what_a_batch_gains_and_costs() -> None:
    name = "07_how_long_is_a_step"
    assert_says(name, "gains twelve times the tokens, and each user waits only 1.3 times as long")
    wait = step_ms(16, 2000) / step_ms(1, 2000)
    assert (round(wait, 1), round(16 / wait)) == (1.3, 12)
    assert_says(name, "the engine gains 1.3 times the tokens, and everybody waits 1.6 times as long")
    wait = step_ms(128, 2000) / step_ms(64, 2000)
    assert (round(wait, 1), round(2 / wait, 1)) == (1.6, 1.3)
    assert_says(name, "it takes about four times as long as a step of one text")
    for roofline in (IDEAL, REACHED):
        prompt = 1000 * roofline.step([1188], [0]).total
        assert prompt / step_ms(1, 2000, roofline) == pytest.approx(4, abs=0.35)


def test_an_interviews_estimate() -> None:
    name = "07_how_long_is_a_step"
    assert_says(name, "Attention takes 1 ms at least, and the host 1.5. About 16 ms, or some 60 tokens per second.")
    cost = Roofline(MODELS["llama-3.1-70b"], GPU, tensor_parallel_size=4).step([1], [100])
    assert cost.attention == pytest.approx(0.001, abs=1e-4) and 0.0155 < cost.total < 0.0165
    assert 1 / cost.total == pytest.approx(60, abs=2)
