"""FoloVLLM: an LLM inference engine small enough to read, and the book that explains it.

Reading a config or sampling params must not pay for torch and transformers (several seconds), so the names that
need them are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from folovllm.outputs import BeamSearchOutput, CompletionOutput, RequestOutput
from folovllm.request import Request, RequestStatus, Sequence, SequenceData, SequenceStatus
from folovllm.sampling_params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)
from folovllm.utils import generate_request_id, get_device, get_gpu_memory_info, is_cuda_available, set_random_seed

if TYPE_CHECKING:
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.llm import LLM
    from folovllm.model_loader import ModelLoader, get_model_and_tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CacheConfig",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "ModelConfig",
    "ModelLoader",
    "Request",
    "RequestOutput",
    "RequestOutputKind",
    "RequestStatus",
    "SamplingParams",
    "SamplingType",
    "SchedulerConfig",
    "Sequence",
    "SequenceData",
    "SequenceStatus",
    "SpeculativeConfig",
    "StructuredOutputsParams",
    "__version__",
    "generate_request_id",
    "get_device",
    "get_gpu_memory_info",
    "get_model_and_tokenizer",
    "is_cuda_available",
    "set_random_seed",
]

_LAZY = {
    "LLM": "llm",
    "LLMEngine": "engine.llm_engine",
    "ModelLoader": "model_loader",
    "get_model_and_tokenizer": "model_loader",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"folovllm.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'folovllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
