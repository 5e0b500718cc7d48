"""What a decode step computes, in operations that torch's compiler turns into good loops. Chapter 14.

Inductor, the compiler, writes loops in C++. A sum of products becomes a loop that keeps the sum in a register, and sums
over the same range become one loop that reads its numbers once. So what is read once and used for several sums is
written as several sums here, each of which fills a vector of the processor, or two. And what it would compute anew for
each of its readers is named (`in_memory`).
"""

from __future__ import annotations

import ctypes
import functools
import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from folovllm.model.int8_kernels import OneDnnInt8, round_to_bytes
from folovllm.model.layers import Linear, LinearBase
from folovllm.model.quantized_layers import MAX_ROTATED, Int8Linear, find_largest, hadamard
from folovllm.utils import cdiv

PACKED_OUTPUTS = 64
"""Outputs whose weights lie side by side in oneDNN's order."""

_MEMORY: WeakKeyDictionary[LinearBase, Tensor | None] = WeakKeyDictionary()
"""What `weight_in_memory` has found; it is asked again while a compiler pretends that there are no numbers."""

LANES = 16
"""Floats in a vector of AVX-512; with AVX2 such a part of a sum takes two."""

FEW_ROWS = 2
"""`multiply_few` serves so many rows at most, and each number of them is compiled by itself. It keeps a sum for each
row and each vector of a block in a register. With one row a step of SmolLM2-135M in bfloat16 takes 11.4 ms instead of
18 (two cores with AVX-512). With four it gains little or loses: on a faster machine 11.2 ms instead of 11.8, for
Qwen3-0.6B's shape 29.5 instead of 29.1, and in 8 bits 24.0 instead of 21.6."""

HADAMARD = {size: hadamard(size) for size in (1, 2, 4, 8, LANES)}
"""What `rotate` multiplies by; made here, where no compiler pretends that there are no numbers."""


class TracedAttention:
    """Attention of one layer of a decode step: `folovllm.model.decoder.Attend`.

    Each key is multiplied with all queries that share it, and each value with all their weights, in float32. As matrix
    products of what is gathered first, as in `folovllm.attention.gather`, a layer of 8 sequences of 528 tokens takes
    3.0 ms instead of 1.0 (Qwen3-0.6B's shape in bfloat16, two cores), and one of 16 sequences of 70 tokens 0.57 instead
    of 0.3. Tokens that all sequences begin with are multiplied in one matrix product, as there.

    Args:
        keys: of the cache, one head of one slot after the other: ``[num_rows, head_dim]``.
        values: likewise.
        new_rows: where the new ones go, ``[num_seqs, num_kv_heads]``.
        rows: where those of each token lie, ``[num_keys, num_seqs, num_kv_heads]``; beyond a sequence's end any will
            do that hold no NaN. In this order, those of a sequence's tokens are not side by side (unless there is
            one sequence with one key head), so that the compiler fills its vectors with the numbers of a value and not
            with one number of several tokens.
        mask: 0 where there is a token and minus infinity behind the end, ``[num_seqs, 1, 1, num_keys]``.
        shared_rows: of the tokens that all begin with, ``[num_kv_heads, num_shared]``; None: each has all of its own.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        new_rows: Tensor,
        rows: Tensor,
        mask: Tensor,
        shared_rows: Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.new_rows = keys, values, new_rows
        self.rows, self.mask, self.shared_rows = rows, mask, shared_rows

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """The layer's attention."""
        for cached, new in zip((self.keys, self.values), kv.chunk(2, dim=1)):
            cached.index_put_((self.new_rows,), new)
        # Heads that share a key come apart: [num_seqs, group, num_kv_heads, head_dim].
        queries = in_memory(q.float() * q.shape[-1] ** -0.5).unflatten(1, (self.rows.shape[2], -1)).transpose(1, 2)
        scores = self._score(queries)
        top = scores.amax(dim=-1, keepdim=True)
        if self.shared_rows is not None:
            shared = _multiply_by_head(queries, self.keys[self.shared_rows].float().transpose(1, 2))
            top = torch.maximum(top, shared.amax(dim=-1, keepdim=True))
        # Divided by their sum once they are summed up.
        weights = in_memory((scores - top).exp())
        out, total = self._weigh(weights), weights.sum(dim=-1, keepdim=True)
        if self.shared_rows is not None:
            weights = (shared - top).exp()
            out = out + _multiply_by_head(weights, self.values[self.shared_rows].float())
            total = total + weights.sum(dim=-1, keepdim=True)
        return (out / total).transpose(1, 2).to(q.dtype).flatten(1)

    def _score(self, queries: Tensor) -> Tensor:
        """The scores of each sequence's own keys, ``[num_seqs, group, num_kv_heads, num_keys]``."""
        keys = self.keys[self.rows.transpose(0, 1)].float()  # [num_seqs, num_keys, num_kv_heads, head_dim]
        scores = torch.stack([(query.unsqueeze(1) * keys).sum(dim=-1) for query in queries.unbind(1)], dim=2)
        return in_memory(scores.permute(0, 2, 3, 1)) + self.mask

    def _weigh(self, weights: Tensor) -> Tensor:
        """The sums of each sequence's own values by their weights, ``[num_seqs, group, num_kv_heads, head_dim]``."""
        values = self.values[self.rows.permute(1, 2, 0)].float()  # [num_seqs, num_kv_heads, num_keys, head_dim]
        # As many numbers as a vector of memory holds: of 16 bits, a load of half as many would be an instruction more.
        parts = values.split(LANES * torch.float32.itemsize // self.values.itemsize, dim=-1)
        found = [torch.cat([(x * part).sum(dim=2) for part in parts], dim=-1) for x in weights.unsqueeze(-1).unbind(1)]
        return torch.stack(found, dim=1)


def in_memory(x: Tensor) -> Tensor:
    """``x``, which compiled code computes once and keeps, as only what lies in memory has strides.

    Inductor computes what is made of a few numbers anew wherever it is read: a query would be rotated for each of its
    keys. It keeps things row after row, so that other strides would be wrong ones.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _multiply_by_head(x: Tensor, shared: Tensor) -> Tensor:
    """``[num_seqs, group, num_kv_heads, n]`` times ``[num_kv_heads, n, m]``: one matrix product for each key head."""
    out = torch.bmm(x.permute(2, 0, 1, 3).flatten(1, 2), shared)
    return out.unflatten(1, (-1, x.shape[1])).permute(1, 2, 0, 3)


def locate(
    slot_mapping: Tensor, seq_lens: Tensor, block_table: Tensor, head_starts: Tensor, block_size: int, places: Tensor,
    *shared_places: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `TracedAttention` is given for every layer: ``new_rows``, ``rows``, ``mask`` and, if any, ``shared_rows``.

    Args:
        slot_mapping: as in `AttentionMetadata`.
        seq_lens: likewise.
        block_table: likewise; its columns behind the last place are not read.
        head_starts: the row where each key head begins, ``[num_kv_heads]``.
        block_size: tokens of a block.
        places: in the sequences, ``[num_keys]``; they may be behind the end of one.
        shared_places: those that all begin with, which are none of ``places``: ``[num_shared]``.
    """
    rows = _find_slots(block_table, places, block_size).unsqueeze(2) + head_starts
    mask = torch.where(places >= seq_lens.unsqueeze(1), -math.inf, 0.0).unflatten(1, (1, 1, -1))
    shared = (_find_slots(block_table[:1], some, block_size).T + head_starts.unsqueeze(1) for some in shared_places)
    return slot_mapping.unsqueeze(1) + head_starts, rows, mask, *shared


def _find_slots(block_table: Tensor, places: Tensor, block_size: int) -> Tensor:
    """Where the tokens at some places of sequences lie in the cache, ``[num_places, num_seqs]``."""
    return block_table.T[places // block_size] * block_size + (places % block_size).unsqueeze(1)


def weight_in_memory(linear: LinearBase) -> Tensor | None:
    """The weight of a product as it lies in memory, for compiled code to read while the product is there.

    ``[num_out, num_in]`` unless it is packed. In oneDNN's order, filled up with zeros to whole blocks of outputs, it is
    ``[num_blocks, num_in / num_together, PACKED_OUTPUTS]``: in float32 numbers by themselves; in bfloat16 two inputs
    that lie side by side are one int32, and of 8 bits four. None if oneDNN has chosen another order, or another library
    packs it.
    """
    if linear not in _MEMORY:
        _MEMORY[linear] = _find_weight(linear)
    return _MEMORY[linear]


def _find_weight(linear: LinearBase) -> Tensor | None:
    if isinstance(linear, Int8Linear) and isinstance(linear.product, OneDnnInt8):
        return _find_packed(linear.product.packed, linear.product.packed.to_dense().T)
    if not isinstance(linear, Linear):
        return None
    return _find_packed(linear.weight, linear.weight.to_dense()) if linear.weight.is_mkldnn else linear.weight


def _find_packed(packed: Tensor, weight: Tensor) -> Tensor | None:
    num_out, num_in = weight.shape
    num_bytes, num_together = torch.ops.mkldnn._nbytes(packed), 4 // weight.itemsize
    words = cdiv(num_in, LANES * num_together) * LANES  # inputs are filled up with zeros, too
    shape = cdiv(num_out, PACKED_OUTPUTS), words, PACKED_OUTPUTS
    if num_in % num_together or math.prod(shape) * 4 > num_bytes:
        return None
    buffer = (ctypes.c_uint8 * num_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    memory = torch.frombuffer(buffer, dtype=torch.int32)[: math.prod(shape)]  # behind them may be sums of weights
    # The order is nowhere promised, so it is compared.
    for block, rows in zip(memory.view(weight.dtype).view(*shape, num_together), weight.split(PACKED_OUTPUTS)):
        if not torch.equal(block.transpose(0, 1).flatten(1)[: len(rows), :num_in], rows):
            return None
    return memory.view(torch.float32 if num_together == 1 else torch.int32).view(shape)[:, : num_in // num_together]


def multiply_few(x: Tensor, weight: Tensor, num_out: int) -> Tensor:
    """``x @ weight.T`` for `FEW_ROWS`, ``[num_rows, num_out]``, summed up in float32.

    Such a product takes as long as it takes to read the weight. Of 6,144 x 1,024 in bfloat16, two cores with AVX-512
    read 31 GB a second so, and 22 by oneDNN's kernel for one row; of 1,024 x 3,072 it is 29 and 20. What lies in one
    word is added up before it is added to the sum: with a sum for each of the two numbers of 16 bits, steps of two rows
    take 1.1 to 1.3 times as long, and with one for each of four of 8 bits such a product 1.8 times.

    Args:
        x: ``[num_rows, num_in]``.
        weight: as `weight_in_memory` has it.
        num_out: the outputs that it has without padding.
    """
    rows = in_memory(x.float()).unbind()
    if weight.dim() == 2:  # row after row
        return torch.stack([(weight.float() * row).sum(dim=-1) for row in rows]).to(x.dtype)
    num_together = x.shape[1] // weight.shape[1]
    parts = [_unpack(part, num_together) for part in weight.unflatten(2, (-1, LANES)).unbind(2)]
    found = []
    for row in rows:
        numbers = row.view(1, -1, num_together, 1).unbind(2)
        sums = [functools.reduce(torch.add, map(torch.mul, part, numbers)).sum(dim=1) for part in parts]
        found.append(torch.stack(sums, dim=1).flatten()[:num_out])
    return torch.stack(found).to(x.dtype)


def _unpack(words: Tensor, num_together: int) -> list[Tensor]:
    """The numbers that lie in 32 bits each, the lowest first, as floats."""
    if num_together == 1:
        return [words]
    if num_together == 2:  # a number of 16 bits is the upper half of a float's
        return [(words << 16).view(torch.float32), (words & -(2**16)).view(torch.float32)]
    return [(words << shift >> 24).float() for shift in (24, 16, 8, 0)]


def normalize(x: Tensor, to_bytes: bool) -> tuple[Tensor, Tensor]:
    """`folovllm.model.quantized_layers.Int8Linear.normalize`.

    16 rows of 3,072 numbers take 40 us, and 80 as that does it (two cores with AVX-512, bfloat16).
    """
    rows = rotate(x)
    largest = find_largest(rows)
    if to_bytes:
        return round_to_bytes(rows, largest), largest
    rows = rows / largest
    return rows.where(rows == rows, 0.0), largest  # nan_to_num asks for each number by itself


def rotate(x: Tensor) -> Tensor:
    """`folovllm.model.quantized_layers.rotate` as sums of vectors.

    `hadamard` of 64 is that of 4 for numbers that are a vector apart, and then that of 16 for those within a vector. So
    each number is the sum of 4 and then of 16, instead of 64.
    """
    size = math.gcd(x.shape[-1], MAX_ROTATED)
    within = HADAMARD[math.gcd(size, LANES)]
    across = HADAMARD[size // len(within)]
    blocks = in_memory(x.float()).unflatten(-1, (-1, 1, len(across), len(within)))
    vectors = in_memory((blocks * across[..., None]).sum(dim=3))  # [num_rows, num_blocks, across, within]
    return (vectors.unsqueeze(-1) * within).sum(dim=-2).flatten(1)
