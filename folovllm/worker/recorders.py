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


def load_recorder(device: torch.device, backend_cls: type[AttentionBackend]) -> Callable[[], Recorder]:
    """What makes the recorder of a device.

    Args:
        device: where the model is.
        backend_cls: the attention of its steps.

    Raises:
        ValueError: if steps cannot be recorded there.
    """
    require(
        device.type in RECORDERS,
        f"enforce_eager=False records decode steps on {' and '.join(RECORDERS)}, and the model is on {device.type}: "
        "set enforce_eager=True",
    )
    module, _, name = RECORDERS[device.type].rpartition(".")
    recorder_cls = getattr(import_module(module), name)
    why_not = recorder_cls.unsupported(backend_cls)
    require(why_not is None, f"enforce_eager=False cannot be served: {why_not}, or set enforce_eager=True")
    return recorder_cls
