"""Decode steps that can be repeated, and what makes them so on which kind of device. Chapter 14."""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.config import EngineConfig
from folovllm.model.decoder import Decoder
from folovllm.validation import require
from folovllm.worker.step_graph import StepOutputs


class RecordedSteps(Protocol):
    """Runs the decode steps of a model over a cache by fewer calls than there are operations."""

    num_reserved_blocks: ClassVar[int]
    """Blocks at the end of the cache that no sequence may have."""

    @classmethod
    def unsupported(cls, backend_cls: type[AttentionBackend]) -> str | None:
        """A sentence that says why steps with such attention cannot be repeated; None if they can."""
        ...

    def __init__(self, decoder: Decoder, attention: AttentionBackend, config: EngineConfig) -> None: ...

    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether a step is one that these serve."""
        ...

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> StepOutputs:
        """A step with one new token for each sequence."""
        ...


RECORDED_STEPS = {
    "cuda": "folovllm.worker.step_graph.StepGraphs",
    "cpu": "folovllm.worker.compiled_step.CompiledSteps",
}
"""Where those of each kind of device live; the module is imported when it is asked for."""


def choose_recorded_steps(
    enforce_eager: bool | None, device: torch.device, backend_cls: type[AttentionBackend]
) -> type[RecordedSteps] | None:
    """What runs an engine's decode steps; None: they are eager.

    Args:
        enforce_eager: the config's. None: they are recorded on a GPU, if their attention allows it. On a CPU they are
            not, since compiling takes its time.
        device: where the model is.
        backend_cls: the attention of the steps.

    Raises:
        ValueError: if steps shall be recorded that cannot be.
    """
    if enforce_eager or (enforce_eager is None and device.type != "cuda"):
        return None
    require(
        device.type in RECORDED_STEPS,
        f"enforce_eager=False records decode steps on {' and '.join(RECORDED_STEPS)}, and the model is on "
        f"{device.type}: set enforce_eager=True",
    )
    module, _, name = RECORDED_STEPS[device.type].rpartition(".")
    steps_cls: type[RecordedSteps] = getattr(import_module(module), name)
    why_not = steps_cls.unsupported(backend_cls)
    if why_not is not None and enforce_eager is None:
        return None
    require(why_not is None, f"enforce_eager=False cannot be served: {why_not}, or set enforce_eager=True")
    return steps_cls
