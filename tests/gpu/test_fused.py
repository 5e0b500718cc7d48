"""The fused operations compiled for real: within rounding of float64, and the tokens of the plain ones."""

from __future__ import annotations

import pytest
import torch
from fused_helpers import ROUNDING, check_add_rms_norm, check_rotate_and_write, check_silu_and_mul

from folovllm import LLM, SamplingParams
from folovllm.attention import load_backend
from folovllm.model import fused
from folovllm.tales import EMBEDDED_MODEL

CUDA = torch.device("cuda")
PROMPTS = ["Once upon a time", "从前", "Long ago, in the swamp", "In the forest 🦊"]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_within_rounding_of_float64(dtype):
    for seed in range(40):
        check_add_rms_norm(seed, dtype, CUDA)
        check_silu_and_mul(seed, dtype, CUDA)
        for name in ("triton", "flash"):
            check_rotate_and_write(seed, dtype, CUDA, load_backend(name))


def test_the_tokens_are_those_of_the_plain_operations(monkeypatch):
    told = []
    for is_fused in (False, True):
        if not is_fused:
            monkeypatch.setattr(fused, "is_available", lambda device: False)
        llm = LLM(str(EMBEDDED_MODEL), device="cuda", dtype="float32", attention_backend="triton", num_blocks=100)
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        told.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)])
        monkeypatch.undo()
    assert told[0] == told[1]
