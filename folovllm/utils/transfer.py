"""One copy to a device for all that a step needs, and one back for all that it has found. Chapter 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folovllm.utils import cdiv

ALIGNMENT = 8
"""Bytes: each array begins at a multiple of it, so that its numbers can be read where they are."""


def copy_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device, brought there in one copy that nobody waits for.

    A copy costs some microseconds however little it carries, and one from ordinary memory makes the CPU wait for the
    GPU, so all are packed into one pinned buffer. On a CPU nothing is copied: the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(cdiv(array.nbytes, ALIGNMENT) * ALIGNMENT for array in arrays)])
    packed = np.empty(starts[-1], dtype=np.uint8)
    for array, start in zip(arrays, starts):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = torch.from_numpy(packed)
    if torch.cuda.is_available():
        buffer = buffer.pin_memory()
    there = buffer.to(device, non_blocking=True) if len(buffer) else torch.empty(0, dtype=torch.uint8, device=device)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts.tolist())
    ]


def copy_to_host(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """The numbers of tensors of one device as lists, brought from there in one copy.

    This is where the CPU waits for a GPU, until all that it was given is done.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = packed.split([tensor.nbytes for tensor in tensors])
    # A part is copied, so that its numbers begin where numbers of their width may begin.
    return [part.clone().view(tensor.dtype).view(tensor.shape).tolist() for part, tensor in zip(parts, tensors)]
