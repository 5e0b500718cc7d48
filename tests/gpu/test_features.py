"""What else the engine can do, on the GPU: the tokens of the CPU."""

from __future__ import annotations

import pytest
import torch

from folovllm import LLM, SamplingParams, StructuredOutputsParams
from folovllm.book.few_bits import write_default_model
from folovllm.model import quantized_layers
from folovllm.model.int4_kernels import CudaKernel, has_int4_kernel
from folovllm.model.packing import QuantizedWeight
from folovllm.model.quantized_layers import PackedInt4
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


@pytest.mark.parametrize(("num_out", "num_in", "group_size"), [(64, 96, 32), (128, 576, 64), (4096, 1024, 128)])
@pytest.mark.parametrize("desc_act", [False, True])
def test_packed_weights_of_4_bits(num_out, num_in, group_size, desc_act):
    """By the kernel, and for many rows in floats, within the rounding of bfloat16."""
    torch.manual_seed(0)
    groups = torch.arange(num_in, device=GPU) // group_size
    groups = groups[torch.randperm(num_in, device=GPU)] if desc_act else groups
    values = torch.randint(16, (num_out, num_in), dtype=torch.uint8, device=GPU)
    scales = torch.rand(num_out, num_in // group_size, device=GPU) + 0.5
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8, device=GPU)
    weight = QuantizedWeight(values, scales.bfloat16().float(), zeros, groups)
    packed = PackedInt4(weight)
    assert has_int4_kernel(torch.bfloat16, torch.device(GPU))
    assert torch.equal(CudaKernel.unpack(packed.packed), values[:, groups.argsort(stable=True)].T)
    for num_rows in (1, 16, 127, 128, 300):
        x = torch.randn(num_rows, num_in, device=GPU).bfloat16()
        expected = x.double() @ weight.dequantize(torch.float64).T
        error = (packed(x).double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.01, f"{num_rows} rows: off by {error:.1e}"


def test_a_checkpoint_of_4_bits(tmp_path):
    folder = tmp_path / "model"
    write_default_model(folder)
    assert tell(GPU, "greedy", str(folder)) == tell("cpu", "greedy", str(folder))
