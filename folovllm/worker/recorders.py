"""What makes decode steps repeatable on which kind of device: CUDA graphs, or a compiler. Chapter 14."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from folovllm.attention import AttentionBackend
from folovllm.validation import require
from folovllm.worker.step_graph import Recorder

RECORDERS = {
    "cuda": "folovllm.worker.step_graph.CudaGraphs",
    "cpu": "folovllm.worker.compiled_step.CompiledSteps",
}
"""Where the recorder of each kind of device lives; its module is imported when it is asked for."""


def choose_recorder(
    enforce_eager: bool | None, device: torch.device, backend_cls: type[AttentionBackend]
) -> Callable[[], Recorder] | None:
    """What makes the recorder of an engine's steps; None: they are eager.

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
        device.type in RECORDERS,
        f"enforce_eager=False records decode steps on {' and '.join(RECORDERS)}, and the model is on {device.type}: "
        "set enforce_eager=True",
    )
    module, _, name = RECORDERS[device.type].rpartition(".")
    recorder_cls = getattr(import_module(module), name)
    why_not = recorder_cls.unsupported(backend_cls)
    if why_not is not None and enforce_eager is None:
        return None
    require(why_not is None, f"enforce_eager=False cannot be served: {why_not}, or set enforce_eager=True")
    return recorder_cls
