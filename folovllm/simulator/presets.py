"""Cards and models by name. Chapter 7.

Prices are RunPod's per card and hour, of March 2026, as listed at deploybase.ai/articles/runpod-gpu-pricing; where it
has none, that of a comparable card. They change by the month, so take them as proportions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from folovllm.simulator.cost import Gpu, ModelShape

_T = TypeVar("_T")

# name, FLOPs/s, bytes/s, bytes as the driver reports them, bytes/s to another card and to the CPU, $/h, source
_GPUS = [
    Gpu("h100", 989.4e12, 3.35e12, 84.9e9, 450e9, 64e9, 2.69, "NVIDIA H100 SXM data sheet"),
    Gpu("h200", 989.4e12, 4.8e12, 150.1e9, 450e9, 64e9, 3.59, "NVIDIA H200 SXM data sheet"),
    Gpu("b200", 2250e12, 8.0e12, 191.5e9, 900e9, 64e9, 5.98, "NVIDIA DGX B200 data sheet, an eighth of it"),
    Gpu("a100", 312e12, 2.039e12, 84.9e9, 300e9, 32e9, 1.39, "NVIDIA A100 80GB SXM data sheet"),
    Gpu("l40s", 362e12, 0.864e12, 47.7e9, 32e9, 32e9, 0.79, "NVIDIA L40S data sheet"),
    Gpu("l20", 119.5e12, 0.864e12, 47.7e9, 32e9, 32e9, 0.69, "NVIDIA L20 data sheet; the price is an L40's"),
    Gpu("l4", 121e12, 0.300e12, 23.7e9, 32e9, 32e9, 0.44, "NVIDIA L4 data sheet"),
    Gpu("rtx4090", 165.2e12, 1.008e12, 25.25e9, 32e9, 32e9, 0.34, "NVIDIA Ada GPU architecture, appendix A"),
    Gpu("rtxpro6000", 503.8e12, 1.792e12, 102.0e9, 64e9, 64e9, 0.89, "NVIDIA RTX Blackwell PRO architecture, appendix"),
    Gpu("rtx4070-laptop", 40e12, 0.256e12, 8.3e9, 16e9, 16e9, 0.22, "NVIDIA GeForce 40 laptops, 321 AI TOPS / 8"),
]
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}
"""By name: NVIDIA's data sheets, with 16-bit numbers, accumulated in 32 bits, without sparsity."""

# name, layers, hidden, intermediate, heads, key heads, head dimension, vocabulary, tied, longest
_MODELS = [
    ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151_936, True, 40_960),
    ModelShape("qwen3-1.7b", 28, 2048, 6144, 16, 8, 128, 151_936, True, 40_960),
    ModelShape("qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151_936, True, 40_960),
    ModelShape("qwen3-8b", 36, 4096, 12_288, 32, 8, 128, 151_936, False, 40_960),
    ModelShape("qwen3-14b", 40, 5120, 17_408, 40, 8, 128, 151_936, False, 40_960),
    ModelShape("qwen3-32b", 64, 5120, 25_600, 64, 8, 128, 151_936, False, 40_960),
    ModelShape("llama-2-7b", 32, 4096, 11_008, 32, 32, 128, 32_000, False, 4096),
    ModelShape("llama-3.1-8b", 32, 4096, 14_336, 32, 8, 128, 128_256, False, 131_072),
    ModelShape("llama-3.1-70b", 80, 8192, 28_672, 64, 8, 128, 128_256, False, 131_072),
    ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49_152, True, 8192),
]
MODELS: dict[str, ModelShape] = {model.name: model for model in _MODELS}
"""By name, from the ``config.json`` of each checkpoint."""


def get_gpu(name: str) -> Gpu:
    """The card of this name.

    Raises:
        ValueError: if there is none; the sentence names the nearest.
    """
    return _find("gpu", name, GPUS)


def get_model(name: str) -> ModelShape:
    """The model of this name, or the one in a checkpoint's folder.

    Raises:
        ValueError: if there is neither; the sentence names the nearest.
    """
    if name not in MODELS and (Path(name) / "config.json").is_file():
        return ModelShape.from_config(name)
    return _find("model", name, MODELS, ", or the folder of a checkpoint")


def _find(kind: str, name: str, known: Mapping[str, _T], other: str = "") -> _T:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0)[0]
    raise ValueError(f"{kind} must be one of {', '.join(known)}{other}, got {name!r}; the nearest is {near!r}")
