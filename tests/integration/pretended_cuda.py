"""A GPU that is not there: torch's fake tensors on "cuda:0", which have shapes, dtypes and a device but no numbers.

What runs here runs the engine's own code up to the kernels, so tensors of two devices that meet are an error, as they
are on a GPU, and everything that waits for the device or brings something there can be counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention import triton
from folovllm.model import fused
from folovllm.model.int4_kernels import CudaKernel
from folovllm.model.quantized_layers import hadamard

aten = torch.ops.aten
INSTEAD = {
    Tensor.__invert__: aten.bitwise_not,
    Tensor.copy_: aten.copy_,
    Tensor.contiguous: lambda x: x if x.is_contiguous() else aten.clone(x, memory_format=torch.contiguous_format),
}
"""Methods that look for a real GPU before they do anything, and what they come to."""
READS = {"tolist": None, "item": None, "__bool__": bool, "is_nonzero": bool, "__int__": int, "__float__": float}
"""What makes something of Python's out of a tensor, and of which type; None: as the tensor's."""


def pretend(module: Any, name: str, shape: Callable[..., Tensor], *mutated: str) -> Any:
    """Stands for one of our kernels, which need numbers: an operator of torch's that gives a tensor of this shape."""
    operator = torch.library.custom_op(f"pretended::{name}", getattr(module, name), mutates_args=mutated)
    operator.register_fake(shape)
    return mock.patch.object(module, name, operator)


KERNELS = (
    pretend(triton, "paged_attention", lambda q, *_: q.new_empty(len(q), q.shape[1] * q.shape[2])),
    pretend(fused, "add_rms_norm", lambda residual, *_: torch.empty_like(residual), "residual"),
    pretend(
        fused, "rotate_and_write",
        lambda qkv, *args: qkv.new_empty(len(qkv), qkv.shape[1] - 2 * args[5].shape[2], qkv.shape[2]), "slots",
    ),
    pretend(fused, "silu_and_mul", lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)),
)  # fmt: skip
COPIES = {aten.to: 0, aten._to_copy: 0, aten.copy_: 1}
"""What may bring a tensor to another device, and which of its arguments is brought."""


class Indexing(TorchFunctionMode):
    """Indexing in aten's words, since Python's looks for a real GPU; what reads a tensor gives zeros and is counted."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INSTEAD:
            return INSTEAD[func](*args)
        if func is Tensor.__getitem__:
            x, places = select(*args)
            return aten.index(x, places) if places else x
        if func is Tensor.__setitem__:
            (x, places), value = select(*args[:2]), args[2]
            value = value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)
            return aten.index_put_(x, places, value) if places else aten.copy_(x, value)
        name = getattr(func, "__name__", "")
        if name in READS:
            self.counts["waits"] += args[0].is_cuda
            kind = READS[name] or (float if args[0].is_floating_point() else int)
            return zeros(args[0].shape, kind())
        return func(*args, **(kwargs or {}))


def select(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that an index's integers, slices, None and ... take, and what is left: an index tensor per dimension."""
    index = index if isinstance(index, tuple) else (index,)
    dim, places = 0, {}
    for item in index:
        if item is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif item is Ellipsis:
            dim = x.ndim - sum(i is not None for i in index[index.index(item) + 1 :])
        elif isinstance(item, slice):
            x, dim = aten.slice(x, dim, *item.indices(x.shape[dim])), dim + 1
        elif isinstance(item, int):
            x = aten.select(x, dim, item)
        else:
            places[dim], dim = torch.as_tensor(item).to(x.device), dim + 1
    return x, [places.get(dim) for dim in range(max(places, default=-1) + 1)]


def zeros(shape: torch.Size, zero: float) -> Any:
    """Zeros of this shape in lists; a number for no dimensions."""
    return [zeros(shape[1:], zero) for _ in range(shape[0])] if shape else zero


class Copies(TorchDispatchMode):
    """Counts what goes to a device and comes from there; "loose" is what does not go by `copy_to_device`."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        which = COPIES.get(func.overloadpacket)
        if which is not None and (source := args[which].device) != out.device:
            if source.type == "cuda":
                self.counts["waits"] += 1
            else:
                self.counts["packed" if is_running("copy_to_device") else "loose"] += 1
        return out


def is_running(name: str) -> bool:
    """Whether a function of this name has been called and has not returned."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Counter[str]]:
    """Inside, "cuda:0" can be computed on. Gives counts: "waits" for it, "packed" and "loose" copies to it."""
    counts: Counter[str] = Counter()
    tolist = mock.patch.object(FakeTensor, "tolist", Tensor.tolist)  # its own reads one number after the other
    try:
        with (
            contextlib.ExitStack() as kernels,
            tolist,
            FakeTensorMode(allow_non_fake_inputs=True),
            Copies(counts),
            Indexing(counts),
        ):
            for kernel in KERNELS:
                kernels.enter_context(kernel)
            yield counts
    finally:
        hadamard.cache_clear()  # what these keep for "cuda:0" is pretended
        CudaKernel.order.cache_clear()
