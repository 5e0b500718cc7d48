"""Eight numbers of 4 bits in one of 32: how files of quantized weights lay them out. Chapter 15 is about this module.

A weight of 4 bits is ``(value - zero) * scale``. The value is the weight's own; scale and zero are shared by a group of
the input columns of one output row. Two layouts are known, both packed along the input: that of GPTQ (AutoGPTQ,
GPTQModel), which stores the weight transposed, and that of compressed-tensors (llm-compressor), which does not. As in
vLLM (``vllm/model_executor/layers/quantization/utils/quant_utils.py``, 0.33.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from folovllm.model.quantization import PACK_FACTOR
from folovllm.utils import cdiv
from folovllm.validation import require

SYMMETRIC_ZERO = 8
"""The zero of a symmetric weight, whose values stand for -8 to 7."""
GPTQ_ZEROS_OFFSET = 0x1111_1111
"""What version 1 of GPTQ's format subtracts from its packed zeros: one from each."""
GPTQ_SYMMETRIC_ZEROS = 0x8888_8888 - 2**32
"""An int32 of eight symmetric zeros."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of 4 bits with its scales, one number to a place.

    Raises:
        ValueError: if the shapes do not belong together, or a column names a group that there is not.
    """

    values: Tensor
    """uint8 ``[num_out, num_in]``, 0 to 15."""
    scales: Tensor
    """Floats ``[num_out, num_groups]``."""
    zeros: Tensor
    """uint8 ``[num_out, num_groups]``, the value that stands for 0; 8 everywhere where the weight is symmetric."""
    g_idx: Tensor
    """int32 ``[num_in]``, the group of each input column."""

    def __post_init__(self) -> None:
        (num_out, num_in), num_groups = self.values.shape, self.scales.shape[-1]
        for name, wanted in (("scales", (num_out, num_groups)), ("zeros", (num_out, num_groups)), ("g_idx", (num_in,))):
            found = tuple(getattr(self, name).shape)
            require(found == wanted, f"{name} must have shape {list(wanted)}, got {list(found)}")
        first, last = (int(end) for end in self.g_idx.aminmax()) if num_in else (0, 0)
        require(
            0 <= first <= last < num_groups,
            f"g_idx must name groups from 0 to {num_groups - 1}, got {first if first < 0 else last}",
        )

    @property
    def is_in_order(self) -> bool:
        """Whether the groups are of equal size, and their columns lie one after the other."""
        num_groups, num_in = self.scales.shape[1], self.values.shape[1]
        if num_in % num_groups:
            return False
        return bool((self.g_idx == column_groups(num_in, num_groups, self.g_idx.device)).all())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, ``[num_out, num_in]``; computed in float32, rounded once."""
        return dequantize(self.values, self.scales, self.zeros, self.g_idx, dtype)


def dequantize(values: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`QuantizedWeight.dequantize` for its parts; ``g_idx`` None: groups of equal size, in order, which is faster."""
    scales, zeros, steps = scales.to(torch.float32), zeros.to(torch.float32), values.to(torch.float32)
    if g_idx is not None:
        return steps.sub_(zeros.index_select(1, g_idx)).mul_(scales.index_select(1, g_idx)).to(dtype)
    groups = steps.unflatten(-1, (zeros.shape[1], -1))
    return groups.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).flatten(-2).to(dtype)


def column_groups(num_in: int, num_groups: int, device: torch.device | str = "cpu") -> Tensor:
    """The group of each input column, int32 ``[num_in]``, where groups are of equal size and in order."""
    require(
        num_groups > 0 and num_in % num_groups == 0,
        f"{num_in} input columns cannot be shared out among {num_groups} groups",
    )
    return torch.arange(num_in, dtype=torch.int32, device=device) // (num_in // num_groups)


def pack_int4(values: Tensor) -> Tensor:
    """Packs the last dimension: the first of eight values into the lowest bits; ``[..., n]`` to int32 ``[..., n/8]``.

    A last group of fewer than eight is filled up with zero bits.
    """
    missing = -values.shape[-1] % PACK_FACTOR
    eights = torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, PACK_FACTOR)).to(torch.int32)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (eights << shifts).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor, num_values: int) -> Tensor:
    """The other way: int32 ``[..., n/8]`` to uint8 ``[..., num_values]``.

    Raises:
        ValueError: if there are not so many values in it.
    """
    require(
        packed.dtype == torch.int32 and packed.shape[-1] == cdiv(num_values, PACK_FACTOR),
        f"{num_values} values of 4 bits are {cdiv(num_values, PACK_FACTOR)} numbers of int32, "
        f"got {packed.shape[-1]} of {str(packed.dtype).removeprefix('torch.')}",
    )
    # `contiguous` leaves the strides of a single column as they are, and such bytes cannot be taken apart.
    packed = packed.clone(memory_format=torch.contiguous_format)
    pairs = packed.view(torch.uint8)  # two values in each; the lowest byte of an int32 is its first
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)[..., :num_values]


def pack_gptq(weight: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """A weight's tensors in GPTQ's layout.

    Args:
        weight: sizes must be multiples of eight.
        version: 1 stores each zero less one ("gptq"), 2 as it is ("gptq_v2").

    Returns:
        ``qweight`` int32 ``[num_in / 8, num_out]``, ``qzeros`` int32 ``[num_groups, num_out / 8]``, ``scales``
        ``[num_groups, num_out]``, ``g_idx`` int32 ``[num_in]``.

    Raises:
        ValueError: if a size is no multiple of eight.
    """
    for name, size in zip(("outputs", "inputs"), weight.values.shape, strict=True):
        require(size % PACK_FACTOR == 0, f"GPTQ's layout needs a multiple of {PACK_FACTOR} {name}, got {size}")
    qzeros = pack_int4(weight.zeros.T)
    return {
        "qweight": pack_int4(weight.values).T.contiguous(),
        # As whole numbers, as GPTQModel does: one of eight zeros that is 0 borrows from the next, and gets it back.
        "qzeros": qzeros - GPTQ_ZEROS_OFFSET if version == 1 else qzeros,
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.g_idx,
    }


def unpack_gptq(tensors: Mapping[str, Tensor], version: int) -> QuantizedWeight:
    """The weight of `pack_gptq`'s tensors; without ``g_idx`` the groups are in order.

    Raises:
        ValueError: if their shapes do not belong together, or a column names a group that there is not.
    """
    qweight, scales = tensors["qweight"], tensors["scales"].T.contiguous()
    num_in, (num_out, num_groups) = PACK_FACTOR * qweight.shape[0], scales.shape
    qzeros = tensors["qzeros"] + GPTQ_ZEROS_OFFSET if version == 1 else tensors["qzeros"]
    return QuantizedWeight(
        unpack_int4(qweight.T, num_in),
        scales,
        unpack_int4(qzeros, num_out).T.contiguous(),
        tensors["g_idx"] if "g_idx" in tensors else column_groups(num_in, num_groups, scales.device),
    )


def is_mislabelled(qzeros: Tensor, version: int) -> bool:
    """Whether the zeros of a symmetric weight are stored as the other version of GPTQ's format stores them.

    Files that say 1 and store 8 are about (vLLM's issue 38966); read as version 1 every weight is one step off.
    """
    return bool((qzeros == GPTQ_SYMMETRIC_ZEROS - (GPTQ_ZEROS_OFFSET if version == 2 else 0)).all())


def pack_compressed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A weight's tensors in the layout ``pack-quantized`` of compressed-tensors, whose values stand for -8 to 7.

    Returns:
        ``weight_packed`` int32 ``[num_out, num_in / 8]``, ``weight_scale`` ``[num_out, num_groups]``, ``weight_shape``
        int64 ``[2]``; where the weight is not symmetric ``weight_zero_point`` int32 ``[num_out / 8, num_groups]``, and
        where its groups are not in order ``weight_g_idx`` int32 ``[num_in]``. Sizes are rounded up to whole int32.
    """
    tensors = {
        "weight_packed": pack_int4(weight.values),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if bool((weight.zeros != SYMMETRIC_ZERO).any()):
        tensors["weight_zero_point"] = pack_int4(weight.zeros.T).T.contiguous()
    if not weight.is_in_order:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def unpack_compressed(tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of `pack_compressed`'s tensors. A ``weight_g_idx`` of -1 means groups in order, as in its library.

    Raises:
        ValueError: if their shapes do not belong together, or a column names a group that there is not.
    """
    scales = tensors["weight_scale"]
    num_out, num_in = tensors["weight_shape"].tolist()
    zeros, g_idx = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    values = unpack_int4(tensors["weight_packed"], num_in)  # first, since it refuses a width that no memory would hold
    require(len(values) == num_out, f"weight_shape says {num_out} outputs, and weight_packed has {len(values)}")
    if g_idx is None or bool((g_idx == -1).all()):
        g_idx = column_groups(num_in, scales.shape[1], scales.device)
    return QuantizedWeight(
        values,
        scales,
        torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device)
        if zeros is None
        else unpack_int4(zeros.T, num_out).T.contiguous(),
        g_idx,
    )
