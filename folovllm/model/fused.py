"""What a layer does between its matrix products, in three kernels for GPUs. Chapter 14.

Norms, rotations, gates and sums compute little, but each of torch's operations reads its numbers from the GPU's memory
and writes them back, and each is a launch. Here the residual stream is added up by the norm that reads it; queries and
keys are normalized, rotated and, with the values, written into the cache's slots in one go; and the gate multiplies
while it is computed. So a layer is nine kernels, four products and attention among them, where it was nineteen (ten
where attention splits keys). As in vLLM (``csrc/layernorm_kernels.cu``, ``csrc/activation_kernels.cu``, and
``do_rope_and_kv_cache_update`` in ``v1/attention/backends/triton_attn.py``, 0.33.0).

Everything is computed in float32 and rounded once. Triton is imported when a kernel is first launched, as in
`folovllm.attention.triton`, whose remarks on it hold here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from folovllm.utils import cdiv

if TYPE_CHECKING:
    import triton.language as tl

TILE_HEADS = 8
"""Heads that one program rotates. With one, 16,000 tokens of 32 heads took 310 us; to move their bytes takes 65."""
GATE_TILE = 1024
"""Numbers of the gate that one program computes."""
MAX_WARPS = 16
"""Most warps (32 threads that run together) of a program."""


def is_available(device: torch.device) -> bool:
    """Whether a device can run the kernels."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def add_rms_norm_kernel(
    out: tl.tensor, residual: tl.tensor, x: tl.tensor, weight: tl.tensor,
    eps: tl.float32, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, ADDS: tl.constexpr,
) -> None:  # fmt: skip
    """What one program computes: a token's row. Tensors arrive as pointers."""
    row, dims = tl.program_id(0).to(tl.int64) * SIZE, tl.arange(0, PADDED_SIZE)
    real = dims < SIZE
    stream = tl.load(residual + row + dims, mask=real, other=0.0)
    if ADDS:
        stream += tl.load(x + row + dims, mask=real, other=0.0)
        tl.store(residual + row + dims, stream, mask=real)
    numbers = stream.to(tl.float32)
    length = tl.sqrt(tl.sum(numbers * numbers) / SIZE + eps)
    normed = numbers / length * tl.load(weight + dims, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row + dims, normed.to(stream.dtype), mask=real)


def rotate_and_write_kernel(
    queries: tl.tensor, slots: tl.tensor, qkv: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    positions: tl.tensor, slot_mapping: tl.tensor, eps: tl.float32,
    slot_stride: tl.int64, part_stride: tl.int64, head_stride: tl.int64, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, NORMALIZES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
) -> None:  # fmt: skip
    """What one program computes: a few heads of a token, be they of queries, keys or values.

    Tensors arrive as pointers.
    """
    token, dims = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_HALF)[None, :]
    heads = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    num_all = NUM_HEADS + 2 * NUM_KV_HEADS
    turns = heads < NUM_HEADS + NUM_KV_HEADS  # values are written as they are
    real = (heads < num_all) & (dims < HALF)
    rows = qkv + (token * num_all + heads) * 2 * HALF + dims
    # A pair is a number of the first half and one of the second.
    first = tl.load(rows, mask=real, other=0.0).to(tl.float32)
    second = tl.load(rows + HALF, mask=real, other=0.0).to(tl.float32)
    if NORMALIZES:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        length = tl.where(turns, tl.sqrt(squares / (2 * HALF) + eps), 1.0)
        scales = weight + heads * 2 * HALF + dims
        first = first / length * tl.load(scales, mask=real & turns, other=1.0).to(tl.float32)
        second = second / length * tl.load(scales + HALF, mask=real & turns, other=1.0).to(tl.float32)
    angles = tl.load(positions + token) * 2 * HALF + dims
    c = tl.load(cos + angles, mask=dims < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angles + HALF, mask=dims < HALF, other=0.0).to(tl.float32)
    first, second = (
        tl.where(turns, first * c - second * s, first),
        tl.where(turns, second * c + first * s, second),
    )

    asks = real & (heads < NUM_HEADS)
    places = queries + (token * NUM_HEADS + heads) * 2 * HALF + dims
    tl.store(places, first.to(queries.dtype.element_ty), mask=asks)
    tl.store(places + HALF, second.to(queries.dtype.element_ty), mask=asks)
    kept = real & (heads >= NUM_HEADS)
    kv_heads, slot = heads - NUM_HEADS, tl.load(slot_mapping + token)
    starts = kv_heads // NUM_KV_HEADS * part_stride + kv_heads % NUM_KV_HEADS * head_stride
    places = slots + slot * slot_stride + starts + dims
    tl.store(places, first.to(slots.dtype.element_ty), mask=kept)
    tl.store(places + HALF, second.to(slots.dtype.element_ty), mask=kept)


def silu_and_mul_kernel(out: tl.tensor, gate_up: tl.tensor, SIZE: tl.constexpr, TILE: tl.constexpr) -> None:
    """What one program computes: a tile of a token's row. Tensors arrive as pointers."""
    row, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = dims < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + dims, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + dims, mask=real, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + dims, gated.to(out.dtype.element_ty), mask=real)


@cache
def load_kernel(kernel: Callable[..., None]) -> Any:
    """A kernel of this module as Triton compiles it, or interprets it."""
    global tl
    import triton
    import triton.language as tl

    # Where these begin in a step's one copy changes. Triton would compile a kernel anew for an address of 16 bytes.
    return triton.jit(kernel, do_not_specialize_on_alignment=["positions", "slot_mapping"])


def _on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _padded(size: int) -> int:
    """Triton's tiles have sides that are powers of two."""
    return 1 << (size - 1).bit_length()


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds ``x`` to the residual stream, in place, and gives the norm of the sum; without ``x`` of the stream as it is.

    Args:
        residual: ``[num_tokens, size]``, contiguous, and so is ``x``.
        x: what the last product has made of the stream.
        weight: the norm's, ``[size]``.
        eps: the norm's.
    """
    num_tokens, size = residual.shape
    padded, out = _padded(size), torch.empty_like(residual)
    with _on_device_of(residual):
        load_kernel(add_rms_norm_kernel)[num_tokens,](
            out, residual, residual if x is None else x, weight, eps, size, padded, x is not None,
            num_warps=max(1, min(padded // 256, MAX_WARPS)),
        )  # fmt: skip
    return out


def rotate_and_write(
    qkv: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Normalizes (if ``weight`` is given) and rotates queries and keys, and writes keys and values into the cache.

    Args:
        qkv: ``[num_tokens, num_heads + 2 * num_kv_heads, head_dim]``, contiguous.
        weight: of the norms of queries and keys, ``[num_heads + num_kv_heads, head_dim]``.
        eps: the norms'.
        cos: ``[num_positions, 1, head_dim]``, and so is ``sin``, which carries the sign of a pair's first number.
        sin: of every position.
        positions: int64 ``[num_tokens]``.
        slots: a layer's cache, ``[num_slots, 2, num_kv_heads, head_dim]``; the numbers of a head lie side by side.
        slot_mapping: int64 ``[num_tokens]``.

    Returns:
        the queries, ``[num_tokens, num_heads, head_dim]``.
    """
    num_tokens, num_all, head_dim = qkv.shape
    num_kv_heads, half = slots.shape[2], head_dim // 2
    num_heads = num_all - 2 * num_kv_heads
    queries = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    with _on_device_of(qkv):
        load_kernel(rotate_and_write_kernel)[num_tokens, cdiv(num_all, TILE_HEADS)](
            queries, slots, qkv, qkv if weight is None else weight, cos, sin, positions, slot_mapping, eps,
            *slots.stride()[:3], num_heads, num_kv_heads, half, _padded(half), weight is not None, TILE_HEADS,
        )  # fmt: skip
    return queries


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of both side by side: contiguous ``[num_tokens, 2 * size]`` to ``[num_tokens, size]``."""
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    with _on_device_of(gate_up):
        load_kernel(silu_and_mul_kernel)[num_tokens, cdiv(size, GATE_TILE)](out, gate_up, size, GATE_TILE)
    return out
