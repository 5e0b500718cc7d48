"""Torch's own products with weights of 4 bits, one class for each kind of device that has one. Chapter 15.

All of them multiply rows of bfloat16 and compute ``(value - 8) * scale + zero`` for each weight; they differ in the
order in which they want the values, and torch promises none. `unpack` knows it all the same, since a CPU's is checked
and a GPU's is found out, so that a product of many rows can be one of floats without a second copy of the weight.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

GROUP_SIZES = (256, 128, 64, 32)
"""Input columns that may share a scale."""
OUTPUTS = 16
"""The outputs must be a multiple of this, and the input columns of the smallest group."""


class Int4Kernel(Protocol):
    """How a kind of device multiplies weights of 4 bits."""

    rows_for_floats: int
    """From so many rows on a weight is turned into floats for this one product, because that is faster."""
    floats: torch.dtype
    """Those that the device multiplies fastest."""

    @classmethod
    def is_available(cls, device: torch.device) -> bool:
        """Whether such a device has the kernel."""
        ...

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        """Numbers of 4 bits, uint8 ``[num_out, num_in]``, in the order of the kernel."""
        ...

    @staticmethod
    def multiply(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """``x @ weight.T``; x is bfloat16 ``[num_rows, num_in]``, scales and zeros ``[num_groups, num_out, 2]``."""
        ...

    @classmethod
    def unpack(cls, packed: Tensor) -> Tensor | None:
        """The values as ``[num_in, num_out]``; None: they are in no order that is known."""
        ...


class CpuKernel:
    """The product of a CPU with AVX2 or AVX-512. Others fall back to a loop of single numbers, which nobody wants."""

    # One core with AVX-512, weight 3,072 x 1,024, milliseconds for 64 / 96 / 128 / 256 / 1,024 rows: by the kernel 4.8
    # / 7.1 / 9.5 / 19 / 76, in floats 5.2 / 6.2 / 7.4 / 11 / 35. With AVX2 7.5 / 11 / 15 / 30 / 121 and 8.0 / 10 / 13
    # / 21 / 81.
    rows_for_floats = 96
    floats = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

    @classmethod
    def is_available(cls, device: torch.device) -> bool:
        """See `Int4Kernel`."""
        return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        """See `Int4Kernel`."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)

    @staticmethod
    def multiply(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """See `Int4Kernel`."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)

    @classmethod
    def unpack(cls, packed: Tensor) -> Tensor | None:
        """See `Int4Kernel`."""
        return cls._unpack(packed) if cls.knows_order() else None

    @classmethod
    @functools.cache
    def knows_order(cls) -> bool:
        """Whether this torch packs as `_unpack` unpacks."""
        values = torch.arange(2 * 112).view(112, 2) // 3 % 16
        return torch.equal(cls._unpack(cls.pack(values)), values.T.to(torch.uint8))

    @staticmethod
    def _unpack(packed: Tensor) -> Tensor:
        """Uint8 ``[num_out, num_in / 2]`` to ``[num_in, num_out]``.

        Blocks of outputs lie one after the other, 64 with AVX-512 and 32 with AVX2; in a block the columns, and of each
        the values of the outputs, the first half of them in the lower bits of its bytes and the second in the upper
        ones. Outputs that fill no block are the last, in pairs (torch's ``aten/src/ATen/native/cpu/int4mm_kernel.cpp``,
        2.13).
        """
        block = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
        (num_out, num_in), parts = (packed.shape[0], 2 * packed.shape[1]), []
        whole = num_out - num_out % block
        if whole:
            pairs = packed[:whole].view(-1, num_in, block // 2)
            parts.append(torch.cat([pairs & 15, pairs >> 4], dim=-1).transpose(0, 1).flatten(1))
        if whole < num_out:
            pairs = packed[whole:].reshape(num_in, -1)
            parts.append(torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1))
        return torch.cat(parts, dim=-1)


class CudaKernel:
    """The product of a GPU of compute capability 8.0 or newer, made for few rows."""

    # On an H200, weight 4,096 x 1,024, microseconds for 1 / 16 / 64 / 256 rows: 6 / 10 / 27 / 87; in bfloat16 14 / 11 /
    # 9 / 12, and to make bfloat16 of 4 bits takes some 40.
    rows_for_floats = 128
    floats = torch.bfloat16
    tile_outputs = 8

    @classmethod
    def is_available(cls, device: torch.device) -> bool:
        """See `Int4Kernel`."""
        return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        """See `Int4Kernel`."""
        tiles = next(num for num in (8, 4, 2) if values.shape[1] % (16 * num) == 0)
        pairs = values[:, ::2] << 4 | values[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.to(torch.uint8).contiguous(), tiles)

    @staticmethod
    def multiply(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """See `Int4Kernel`."""
        return torch.ops.aten._weight_int4pack_mm(x, packed, group_size, scales_and_zeros)

    @classmethod
    def unpack(cls, packed: Tensor) -> Tensor | None:
        """See `Int4Kernel`. ``packed`` is int32 ``[num_out / 8, num_in / columns, 32, columns / 32]``."""
        num_out, num_columns = cls.tile_outputs * len(packed), packed.shape[3] * 32
        values = _nibbles(packed)[..., cls.order(num_columns, packed.device)]
        return values.view(*packed.shape[:2], cls.tile_outputs, num_columns).permute(1, 3, 0, 2).reshape(-1, num_out)

    @classmethod
    @functools.cache
    def order(cls, num_columns: int, device: torch.device) -> Tensor:
        """Where the kernel has each value of a tile of ``num_columns`` columns of 8 outputs, as places in `_nibbles`.

        The tile's values are packed as numbers that say where they are, four bits of each at a time.
        """
        places = torch.arange(cls.tile_outputs * num_columns, device=device)
        digits = [places >> shift & 15 for shift in (0, 4, 8)]
        found = [_nibbles(cls.pack(digit.view(cls.tile_outputs, -1))).flatten().long() for digit in digits]
        return (found[0] | found[1] << 4 | found[2] << 8).argsort()


def _nibbles(packed: Tensor) -> Tensor:
    """Numbers of four bits of int32 ``[a, b, c, d]``, the lower bits first: uint8 ``[a, b, c * d * 8]``."""
    pairs = packed.flatten(2).view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(2)


KERNELS: dict[str, type[Int4Kernel]] = {"cpu": CpuKernel, "cuda": CudaKernel}
"""By kind of device."""


def has_int4_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a fast product with weights of 4 bits for these activations."""
    return dtype is torch.bfloat16 and device.type in KERNELS and KERNELS[device.type].is_available(device)
