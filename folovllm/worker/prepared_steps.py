"""Steps that were recorded or compiled beforehand, and which kind of device has which. Chapter 14."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.config import EngineConfig
from folovllm.model.decoder import Decoder
from folovllm.validation import require


class StepOutputs(NamedTuple):
    """What a decode step gives for each of its rows; the next step may overwrite it."""

    hidden: Tensor
    """``[num_rows, hidden_size]``."""
    logits: Tensor
    """``[num_rows, vocab_size]``."""
    token_ids: Tensor
    """The likeliest token, int64 ``[num_rows]``: what a greedy request takes."""
    largest: Tensor
    """Its logit, ``[num_rows]``."""


class PreparedSteps(ABC):
    """Runs a model's steps over a cache by fewer calls than they have operations.

    Args:
        decoder: the model, its head included.
        attention: over the cache.
        config: with ``max_model_len`` and ``max_num_batched_tokens`` filled in.
    """

    how: ClassVar[str]
    """The word for what was done to them."""
    num_reserved_blocks: ClassVar[int] = 0
    """Blocks at the end of the cache that no sequence may have."""
    decoder: Callable[[Tensor, Tensor, AttentionBackend, Tensor | None], Tensor]
    """What computes the hidden states of steps that are not taken whole: `Decoder.__call__`."""

    @classmethod
    @abstractmethod
    def unsupported(cls, backend_cls: type[AttentionBackend]) -> str | None:
        """A sentence that says why steps with such attention cannot be prepared; None if they can."""

    @abstractmethod
    def __init__(self, decoder: Decoder, attention: AttentionBackend, config: EngineConfig) -> None: ...

    @abstractmethod
    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether `run` serves such a step, which must be a decode step."""

    @abstractmethod
    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> StepOutputs:
        """A step with one new token for each sequence."""


PREPARED_STEPS = {
    "cuda": "folovllm.worker.step_graph.RecordedSteps",
    "cpu": "folovllm.worker.compiled_step.CompiledSteps",
}
"""Where those of each kind of device live; the module is imported when it is asked for."""


def choose_prepared_steps(
    enforce_eager: bool | None, device: torch.device, backend_cls: type[AttentionBackend]
) -> type[PreparedSteps] | None:
    """What runs an engine's steps; None: they are eager.

    Args:
        enforce_eager: the config's. None: steps are prepared on a GPU, if their attention allows it. On a CPU they are
            not, since compiling takes its time.
        device: where the model is.
        backend_cls: the attention of the steps.

    Raises:
        ValueError: if steps shall be prepared that cannot be.
    """
    if enforce_eager or (enforce_eager is None and device.type != "cuda"):
        return None
    require(
        device.type in PREPARED_STEPS,
        f"enforce_eager=False prepares steps on {' and '.join(PREPARED_STEPS)}, and the model is on {device.type}: set "
        "enforce_eager=True",
    )
    module, _, name = PREPARED_STEPS[device.type].rpartition(".")
    steps_cls: type[PreparedSteps] = getattr(import_module(module), name)
    why_not = steps_cls.unsupported(backend_cls)
    if why_not is not None and enforce_eager is None:
        return None
    require(why_not is None, f"enforce_eager=False cannot be served: {why_not}, or set enforce_eager=True")
    return steps_cls
