"""Torch's own products with weights of 8 bits on a CPU, which multiply whole numbers. Chapter 15.

There are two. One rounds activations itself: fbgemm's on x86, QNNPACK's on ARM. torch means to remove it with its
quantized tensors, and `DynamicInt8` is all that knows of them. The other one, oneDNN's, is given activations that are
rounded already, and serves compiled steps, which do that on the way, on x86 with VNNI: instructions that multiply four
pairs of numbers and add them up in 32 bits.

Cold weights of 6,144 x 1,024 take oneDNN 180 / 188 / 201 / 213 / 530 / 1,745 / 4,588 us for 1 / 4 / 8 / 16 / 64 / 256 /
657 rows on two cores of Zen 5, and fbgemm 185 / 188 / 226 / 239 / 610 / 2,409 / 6,495. A call of oneDNN's takes 6 to 9
us more, and to round eagerly is two operations more: one text of SmolLM2-135M is written eagerly in 16 ms a token by
oneDNN and in 12 by fbgemm. (Of compiled steps those of one and two rows are loops.)
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor

from folovllm.model.layers import PACK_FOR_ROWS

STEPS, ZERO = 127, 128
"""Of activations that are rounded to 8 bits: the steps from 0 to 1, and the number that means 0."""


@functools.cache
def int8_max() -> int:
    """The largest weight of 8 bits; the smallest is its negative, so that zero is in the middle.

    x86 before VNNI adds up two products in 16 bits, in which two of 255 * 127 have no room. Weights of 7 bits cost
    less quality than activations of 7 bits (torch's ``reduce_range``): SmolLM2-135M loses 0.002 nats per token with
    such weights alone, and 0.006 with such activations alone.
    """
    return 127 if torch.backends.quantized.engine == "qnnpack" or torch.cpu._is_vnni_supported() else 64


def has_int8_kernel(device: torch.device) -> bool:
    """Whether torch has products of whole numbers on this device."""
    return device.type == "cpu" and torch.backends.quantized.engine != "none"


def round_to_bytes(rows: Tensor, largest: Tensor) -> Tensor:
    """Rows as steps of a 127th of their largest numbers, uint8, as `OneDnnInt8` takes them.

    Those of a row of zeros, or with one that is not a number, may be any.
    """
    return (rows / (largest / STEPS)).add_(ZERO + 0.5).to(torch.uint8)


class OneDnnInt8:
    """oneDNN's product.

    Args:
        weight: int8 ``[num_out, num_in]``.
        scales: what its outputs' weights are to be multiplied by, float32 ``[num_out]``.
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, [PACK_FOR_ROWS, weight.shape[1]])
        self._multiply = torch.ops.onednn.qlinear_pointwise.default._op  # as in `DynamicInt8`
        zeros, output = torch.zeros(1, dtype=torch.int32, device="cpu"), (1.0, 0, torch.float32)
        # Of activations, weight, bias and output, and of what might be done with that.
        self._others: tuple[Any, ...] = 1 / STEPS, ZERO, self.packed, scales, zeros, None, *output, "none", [], ""

    @classmethod
    @functools.cache
    def is_available(cls) -> bool:
        """Whether this CPU has it, and it loses nothing of large sums: told to do without VNNI, it does."""
        if not torch.cpu._is_vnni_supported() or not torch.backends.mkldnn.is_available():
            return False
        ones = torch.ones(1, 64, dtype=torch.float32, device="cpu")
        product = cls((ones * int8_max()).to(torch.int8), ones[0, :1])
        return math.isclose(product(round_to_bytes(ones, ones[:, :1])).item(), 64 * int8_max(), rel_tol=1e-6)

    def __call__(self, steps: Tensor) -> Tensor:
        """``x @ weight.T`` of rows as `round_to_bytes` gives them; float32."""
        return cast(Tensor, self._multiply(steps, *self._others))


class DynamicInt8:
    """The product of torch's quantized tensors, which finds its activations' largest and smallest number by itself.

    Args:
        weight: int8 ``[num_out, num_in]``.
        scales: what its outputs' weights are to be multiplied by, float32 ``[num_out]``.
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deprecated", UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.int64, device=scales.device)
            quantized = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, rows: Tensor) -> Tensor:
        """``x @ weight.T`` of rows of floats; float32."""
        # Without `_op` torch asks at each call whether the weight is one that a compiler pretends, which takes 3
        # percent of a step of SmolLM2-135M with one row.
        return cast(Tensor, torch.ops.quantized.linear_dynamic.default._op(rows, self._packed))
