"""The shapes of models people serve, without their weights: enough to count parameters and bytes exactly.

The numbers are those of the ``config.json`` that each model's authors published; a model built from them on torch's
``meta`` device has every weight's shape and none of its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
_LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8_192}

REAL_MODELS: dict[str, Any] = {
    "Qwen3 0.6B": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "Qwen3 8B": Qwen3Config(
        **_QWEN3, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12_288
    ),
    "Qwen3 32B": Qwen3Config(
        **_QWEN3, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25_600
    ),
    "Llama 3 8B": LlamaConfig(
        **_LLAMA3, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14_336
    ),
    "Llama 3 70B": LlamaConfig(
        **_LLAMA3, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28_672
    ),
}
"""Name -> transformers' config of that model."""


def build_empty(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model with all its shapes and none of its memory (torch's ``meta`` device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(REAL_MODELS[name], dtype=dtype)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights, tied ones counted once; also for one on the ``meta`` device."""
    return sum(p.nbytes for p in model.parameters())
