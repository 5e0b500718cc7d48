"""What oneDNN has, the library that multiplies matrices for torch on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_onednn(x: Tensor) -> bool:
    """Whether torch has oneDNN, and oneDNN has fast products in this tensor's dtype, on its device.

    bfloat16 needs AVX-512, or an ARM CPU with instructions for it.
    """
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype is torch.float32 or bool(bfloat16)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which such numbers are multiplied in matrices: on a CPU, 16 bits only where `has_onednn` says so.

    (It is not asked for float16, which the newest CPUs have.)

    Where it has not, torch multiplies 16 bits number by number: 256 rows by a weight of 6,144 x 1,024 in 84 ms, and in
    23 in float32, the weight's conversion included; and 8 prompts of 512 tokens attend (16 heads of 128) in 7 s instead
    of 80 ms (two cores that torch was told have AVX2 and no AVX-512).
    """
    return x.dtype if x.device.type != "cpu" or has_onednn(x) else torch.promote_types(x.dtype, torch.float32)
