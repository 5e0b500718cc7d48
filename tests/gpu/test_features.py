"""What else the engine can do, on the GPU: the tokens of the CPU."""

from __future__ import annotations

import pytest

from folovllm import LLM, SamplingParams, StructuredOutputsParams
from folovllm.book.few_bits import write_default_model
from folovllm.model import quantized_layers
from folovllm.tales import EMBEDDED_DRAFT, EMBEDDED_MODEL

GPU = "cuda"
PROMPTS = ["Once upon a time", "从前", "Long ago, in the swamp", "In the forest 🦊"]
DRAFT = {"method": "draft_model", "model": str(EMBEDDED_DRAFT), "num_speculative_tokens": 3}
SETTINGS = {
    "8 bits": {"quantization": "int8"},
    "guesses that are looked up": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
    "guesses of a draft model": {"speculative_config": DRAFT, "enable_prefix_caching": True},
    "guesses beside captured steps": {"speculative_config": DRAFT, "enforce_eager": False},
}
GREEDY = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
KINDS = {
    "greedy": GREEDY,
    "with logprobs": {**GREEDY, "logprobs": 2, "prompt_logprobs": 1},
    "a structure": {**GREEDY, "structured_outputs": StructuredOutputsParams(regex="[a-z ]{20,30}\\.")},
}


def tell(device: str, kind: str, model: str = str(EMBEDDED_MODEL), **settings) -> list[list[int]]:
    llm = LLM(model, device=device, dtype="float32", max_model_len=256, num_blocks=100, **settings)
    outputs = llm.generate(PROMPTS, SamplingParams(**KINDS[kind]), use_tqdm=False)
    llm.engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(autouse=True)
def _a_cpu_computes_8_bits_as_a_gpu_does(monkeypatch):
    monkeypatch.setattr(quantized_layers, "has_int8_kernel", lambda device: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_those_of_the_cpu(name, kind):
    # Guesses change no token, and a CPU needs neither them nor recorded steps.
    plain = {key: value for key, value in SETTINGS[name].items() if key == "quantization"}
    assert tell(GPU, kind, **SETTINGS[name]) == tell("cpu", kind, **plain)


def test_a_checkpoint_of_4_bits(tmp_path):
    write_default_model(tmp_path)
    assert tell(GPU, "greedy", str(tmp_path)) == tell("cpu", "greedy", str(tmp_path))
