"""The operations of which every layer is made: the product with a weight, and the norm. Chapter 7 is about this module.

Nearly all of a model's FLOPs are matrix products. On a CPU their weights are packed once, after loading: oneDNN stores
them in the order in which its kernels read them. torch's own ``linear`` calls MKL, which reorders the weight at each
call; for the few rows of a decode step that takes longer than the product. On two cores with AVX-512, 11
rows, a weight of 6,144 x 1,024 in float32: MKL 3.6 ms, oneDNN on the weight as it is 1.6 ms, packed 1.0 ms, of which
reading the weight from memory takes 0.8 ms. As in vLLM (``vllm/model_executor/layers/utils.py``,
``dispatch_cpu_unquantized_gemm``, 0.33.0), which has bindings of its own to oneDNN; the two functions of torch's used
here are those that its compiler calls (``torch/_inductor/fx_passes/mkldnn_fusion.py``).

Layers are plain objects and their weights plain tensors: nothing here is trained, and with few rows the overhead of
each call (of a ``torch.nn.Module``, of each operation) is a good part of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.utils.onednn import has_onednn, product_dtype

PACK_FOR_ROWS = 16
"""Number of rows the packed order is chosen for; measured, the order is as good for 5 and for 661 rows."""

ROWS_FOR_FLOATS, OUTPUTS_AT_ONCE = 32, 4096
"""Where a CPU has no product of 16 bits, a weight is turned into float32 for each product of so many rows or more, some
of its outputs at a time. As it is, one row takes it a third of that time, 32 the same and 256 four times as much."""


class LinearBase:
    """A product, ``x @ weight.T + bias``, however its weight is stored.

    Args:
        weight: ``[num_out, num_in]``, or something else where that is not how it is stored.
        bias: ``[num_out]``, if there is one.
        shards: the modules of the checkpoint whose outputs lie one after the other in it, and how many each has.
    """

    kernel = "floats"
    """How it is computed."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shards: Mapping[str, int] | None) -> None:
        self.weight, self.bias, self.shards = weight, bias, shards or {}

    def places(self) -> dict[str, Place]:
        """Where each tensor of a checkpoint goes, by its name there: the views of weight and bias."""
        return {**self.split("weight", self.weight), **self.split("bias", self.bias)}

    def split(self, name: str, whole: Tensor | None) -> dict[str, Tensor]:
        """The views of a fused tensor that belong to the modules of the checkpoint, as ``module.name``."""
        parts = whole.split(list(self.shards.values())) if whole is not None and self.shards else ()
        return {f"{module}.{name}": part for module, part in zip(self.shards, parts)}

    @property
    def num_out(self) -> int:
        """Outputs of the product."""
        return sum(self.shards.values()) if self.shards else len(self.weight)  # a tied head is no module of its own

    @property
    def num_bytes(self) -> int:
        """Bytes that weight and bias take, once they are loaded."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def num_bytes_meanwhile(self) -> int:
        """Bytes taken beside them while `process_weights_after_loading` runs: those of the weight in its new order."""
        return self.weight.nbytes

    def process_weights_after_loading(self) -> None:
        """Stores the weight as it is used."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """What a kernel computes of it, which a compiler takes as one operation unless rows are few: ``[num_tokens,
        num_out]``, in the dtype of ``x``, or float32 if those are whole numbers."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """``[num_tokens, num_in]`` to ``[num_tokens, num_out]``; in some a kernel has something before and after it."""
        return self.multiply(x)


class Linear(LinearBase):
    """A product whose weight is floats.

    Args:
        weight: ``[num_out, num_in]``.
        bias: ``[num_out]``, if there is one.
        shards: see `LinearBase`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, shards: Mapping[str, int] | None = None) -> None:
        super().__init__(weight, bias, shards)
        self._use_onednn = has_onednn(weight)

    def process_weights_after_loading(self) -> None:
        """Stores the weight in oneDNN's own order, if it has one."""
        if self._use_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_FOR_ROWS)

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        if self._use_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if len(x) >= ROWS_FOR_FLOATS and product_dtype(x) is not x.dtype:
            wide, out = x.float(), x.new_empty(len(x), len(self.weight))
            for part, rows in zip(out.split(OUTPUTS_AT_ONCE, dim=1), self.weight.split(OUTPUTS_AT_ONCE)):
                part.copy_(F.linear(wide, rows.float()))
            return out if self.bias is None else out.add_(self.bias)
        return F.linear(x, self.weight, self.bias)


class Place(Protocol):
    """Where a tensor of a checkpoint goes: a tensor, or what keeps it in fewer bits."""

    @property
    def shape(self) -> torch.Size:
        """That of the checkpoint's tensor."""

    def copy_(self, tensor: Tensor, /) -> object:
        """Takes the tensor's numbers."""


class LinearMethod:
    """Makes a model's products: here with weights of floats; `folovllm.model.quantized_layers` has others.

    As vLLM's ``LinearMethodBase`` (``vllm/model_executor/layers/linear.py``, 0.33.0).

    Args:
        dtype: of weights and activations.
        device: where they are; "meta" only tells their shapes and bytes.
        target: the device whose kernels compute with them; None: the same.
        has_compiled_steps: see `folovllm.model.checkpoint.Checkpoint`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        target: torch.device | None = None,
        has_compiled_steps: bool = False,
    ) -> None:
        self.dtype, self.device, self.target = dtype, device, target or device
        self.has_compiled_steps = has_compiled_steps

    @property
    def packs_floats(self) -> bool:
        """Whether a weight of floats is stored in an order of its own, so that a tied head is a copy."""
        return self.target.type == "cpu" and has_onednn(torch.empty(0, dtype=self.dtype, device="cpu"))

    def create(self, shards: Mapping[str, int], num_in: int, bias: bool = False) -> LinearBase:
        """A product whose weights are not loaded yet; see `LinearBase`."""
        return Linear(self.empty(sum(shards.values()), num_in), self.create_bias(shards, bias), shards)

    def create_head(self, shards: Mapping[str, int], embedding: Tensor, tied: bool) -> LinearBase:
        """The product that makes the logits, with the embedding's own weight if the two are tied."""
        return Linear(embedding) if tied else self.create(shards, embedding.shape[1])

    def create_bias(self, shards: Mapping[str, int], bias: bool) -> Tensor | None:
        """Room for the bias of all outputs, if there is one."""
        return self.empty(sum(shards.values())) if bias else None

    def empty(self, *shape: int) -> Tensor:
        """Room for floats."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class RMSNorm:
    """``x / sqrt(mean(x * x) + eps) * weight`` along the last dimension (Zhang and Sennrich 2019).

    Args:
        weight: ``[size]``, or the last several dimensions of ``x``.
        eps: avoids a division by zero for a row of zeros.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._scaled: Tensor | None = None

    def process_weights_after_loading(self) -> None:
        """On a CPU, computes what is the same for all rows.

        With ``size`` numbers in ``x``, and its length ``|x|``, the norm is also ``x / sqrt(|x|**2 + size * eps)`` times
        ``sqrt(size) * weight``: four operations, where torch's own takes eight. On a GPU torch's is one kernel.
        """
        if self.weight.device.type == "cpu":
            size = self.weight.shape[-1]
            self._scaled = self.weight * math.sqrt(size)
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self._shortest = torch.tensor(math.sqrt(size * self.eps), dtype=wide, device=self.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The shape and dtype of ``x``."""
        if self._scaled is None:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self._shortest.dtype)
        return (x / length.hypot_(self._shortest)).mul_(self._scaled).to(x.dtype)
