"""Seeds, ids, devices and memory: small helpers for all other modules. Chapter 4 uses them.

torch is imported inside the functions that need it, so that making a request id does not take two seconds.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 2**30
"""Bytes in one GiB."""


def set_random_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, those of every CUDA device included.

    Args:
        seed: in [0, 2**32 - 1], the range that NumPy takes.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # seeds the CUDA devices too


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up, without leaving the integers (as ``vllm/utils/math_utils.py``)."""
    return -(-a // b)


def generate_request_id() -> str:
    """A new unique id (uuid4)."""
    return str(uuid.uuid4())


def is_cuda_available() -> bool:
    """Whether torch can compute on a GPU here."""
    import torch

    return torch.cuda.is_available()


def get_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on.

    Args:
        device: "cpu", "cuda", "cuda:1", …; None takes CUDA if there is one, else the CPU.

    Raises:
        ValueError: if the name means nothing to torch.
        RuntimeError: if it names a GPU that this machine does not have.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            found = f"{count} CUDA GPU{'s' if count > 1 else ''}" if count else "no CUDA GPU"
            raise RuntimeError(f"device {str(resolved)!r} was asked for, but torch sees {found} here; use device='cpu'")
    return resolved


@contextmanager
def without_autocast() -> Iterator[None]:
    """In it a caller's ``torch.autocast``, which gives products another dtype, does nothing."""
    import torch

    with ExitStack() as stack:
        for device_type in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def move_to_device(tensors: Any, device: str | torch.device) -> Any:
    """The same structure (dicts, lists, tuples, to any depth) with every tensor on ``device``.

    What is not a tensor is passed through.
    """
    import torch

    if isinstance(tensors, torch.Tensor):
        return tensors.to(device)
    if hasattr(tensors, "items"):  # a dict, or what a tokenizer gives
        return {key: move_to_device(value, device) for key, value in tensors.items()}
    if isinstance(tensors, tuple) and hasattr(tensors, "_fields"):  # a named tuple takes its fields one by one
        return type(tensors)(*(move_to_device(value, device) for value in tensors))
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(move_to_device(value, device) for value in tensors)
    return tensors


def _memory_info(allocated: int, reserved: int, free: int, total: int) -> dict[str, float]:
    """Bytes as GiB, rounded to 2 decimals."""
    values = {"allocated_gb": allocated, "reserved_gb": reserved, "free_gb": free, "total_gb": total}
    return {name: round(num_bytes / GIB, 2) for name, num_bytes in values.items()}


def get_gpu_memory_info(device: int = 0) -> dict[str, float]:
    """Memory of a GPU in GiB: ``allocated_gb``, ``reserved_gb``, ``free_gb``, ``total_gb``; {} without CUDA.

    ``allocated_gb`` is what tensors take, ``reserved_gb`` what torch's caching allocator has taken from the driver;
    ``free_gb`` is the driver's figure, so what other processes use counts.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return _memory_info(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free, total)


def get_cpu_memory_info() -> dict[str, float]:
    """The same figures for the CPU: this process's resident memory (both allocated and reserved), and the machine's."""
    import psutil

    resident = psutil.Process().memory_info().rss
    machine = psutil.virtual_memory()
    return _memory_info(resident, resident, machine.available, machine.total)


def print_gpu_memory_info(device: int = 0) -> None:
    """Prints the memory of a GPU, or of the CPU where there is no GPU."""
    gpu = get_gpu_memory_info(device)
    where = f"GPU {device}" if gpu else "CPU"
    info = gpu or get_cpu_memory_info()
    print(f"{where}: " + ", ".join(f"{value:.2f} GiB {name.removesuffix('_gb')}" for name, value in info.items()))
