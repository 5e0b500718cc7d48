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

import torch
from torch import Tensor
from torch.nn import functional as F

PACK_FOR_ROWS = 16
"""Number of rows the packed order is chosen for; measured, the order is as good for 5 and for 661 rows."""


class Linear:
    """``x @ weight.T + bias``.

    Args:
        weight: ``[num_out, num_in]``.
        bias: ``[num_out]``, if there is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._use_onednn = has_onednn(weight)

    def process_weights_after_loading(self) -> None:
        """Stores the weight in oneDNN's own order, if it has one; only oneDNN can read it afterwards."""
        if self._use_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_FOR_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """``[num_tokens, num_in]`` to ``[num_tokens, num_out]``."""
        if self._use_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def has_onednn(weight: Tensor) -> bool:
    """Whether torch has oneDNN, and oneDNN has products in this weight's dtype, on its device."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32 or bool(bfloat16)


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
            self._shortest = torch.tensor(math.sqrt(size * self.eps), dtype=torch.float32, device=self.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The shape and dtype of ``x``."""
        if self._scaled is None:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / length.hypot_(self._shortest)).mul_(self._scaled).to(x.dtype)
