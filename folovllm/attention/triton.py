"""Attention where the blocks lie: a kernel of our own in Triton, for GPUs of any kind. Chapter 14.

Nothing is gathered. A program of the grid takes a tile of one sequence's queries and goes through that sequence's keys
and values a tile at a time, finding each in its block through the block table. It never holds a whole row of scores:
the softmax is computed on the way (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), in
float32 whatever the dtype. Prompts, chunks and decodes are the same to it, since every query knows its position.

Few sequences that decode would leave most of a GPU idle, so their keys are split into parts, which several programs
read at the same time, and a second kernel joins what they have found (Flash-Decoding, Dao et al. 2023). That rounds
sums otherwise in a small batch than in a large one, as a GPU's products of 16 bits do anyway; in float32 keys are not
split. Lengths are read on the device, so a captured step can be replayed.

Triton is an extra that Linux alone has, so it is imported when the kernel is first asked for: this module and its
listing need it not. Without a GPU the kernel runs under Triton's interpreter, slowly, and is tested that way. Names as
in vLLM (``v1/attention/ops/triton_unified_attention.py``), where they are not the book's.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from folovllm.attention import AttentionMetadata, KernelBackend
from folovllm.utils import cdiv

if TYPE_CHECKING:
    import triton.language as tl

LOG2_E = math.log2(math.e)
"""``exp(x)`` is ``2**(LOG2_E * x)``, and powers of 2 are what a GPU computes."""
MIN_TILE = 16
"""A product of tiles has at least so many rows, columns and numbers to add up."""
MAX_TILE_ROWS = 64
"""Most rows (a query of one head is a row) of a tile: its scores and sums are in registers."""
QUERY_TILE_BYTES = 2**14
"""Most bytes of a tile of queries."""
KEY_TILE_BYTES = 2**13
"""Bytes of a tile of keys: with its values, and the next tile on its way, it fits the shared memory of any GPU."""
DECODE_KEY_TILE_BYTES = 2**14
"""The same for few rows of 16 bits, which leave room for more: 256 sequences of 800 tokens 214 us instead of 241."""
ENOUGH_PROGRAMS = 512
"""Four for each processor of a large GPU, so that a long sequence among short ones does not keep all waiting: with
fewer, keys are split."""
MAX_PARTS = 16
"""Most parts of a sequence's keys."""


def attend_to_tiles(
    queries: tl.tensor, seen: tl.tensor, keys: tl.tensor, values: tl.tensor, blocks: tl.tensor, first: int, last: int,
    running_max: tl.tensor, running_sum: tl.tensor, weighted: tl.tensor, scale: tl.float32, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE_KEYS: tl.constexpr, ALL_SEEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The online softmax of a tile of queries over one tile of keys after the other, from ``first`` to before ``last``.

    ``queries`` and ``weighted`` are ``[TILE_ROWS, PADDED_DIM]``, ``seen`` is ``[TILE_ROWS]``; ``keys`` and ``values``
    are the addresses of a head's, ``blocks`` that of the text's block table. A query sees the first ``seen`` keys of
    its text. Where every query sees all, nothing has to be compared.
    """
    dims = tl.arange(0, PADDED_DIM)
    for start in range(first, last, TILE_KEYS):
        places = start + tl.arange(0, TILE_KEYS)
        there = (places < last) | ALL_SEEN
        slots = tl.load(blocks + places // BLOCK_SIZE, mask=there, other=0).to(tl.int64) * BLOCK_SIZE
        kv_places = (slots + places % BLOCK_SIZE)[:, None] * HEAD_DIM + dims[None, :]
        real = there[:, None] & ((dims < HEAD_DIM) | (HEAD_DIM == PADDED_DIM))[None, :]
        k = tl.load(keys + kv_places, mask=real, other=0.0)
        v = tl.load(values + kv_places, mask=real, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # "ieee": float32 stays float32
        if not ALL_SEEN:
            scores = tl.where(places[None, :] < seen[:, None], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        rescale = tl.exp2(running_max - new_max)  # what was added up so far was relative to the old maximum
        weights = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * rescale[:, None], input_precision="ieee")
        running_max = new_max
    return running_max, running_sum, weighted


_compiled_loop: Any = None  # the function above as Triton compiles it, which only a kernel can call


def paged_attention_kernel(
    out: tl.tensor, log_sums: tl.tensor, q: tl.tensor, keys: tl.tensor, values: tl.tensor,
    block_table: tl.tensor, query_start_loc: tl.tensor, seq_lens: tl.tensor,
    q_token_stride: tl.int64, q_head_stride: tl.int64, kv_head_stride: tl.int64, table_stride: tl.int64,
    scale: tl.float32, QUERIES_PER_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr, NUM_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """What one program of `paged_attention` computes: a tile of a sequence's rows, a key head, a part of the keys."""
    program, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile, part = program // NUM_PARTS, program % NUM_PARTS
    start, stop = tl.load(query_start_loc + seq), tl.load(query_start_loc + seq + 1)
    num_new, past = stop - start, tl.load(seq_lens + seq) - (stop - start)
    if tile * TILE_ROWS >= num_new * QUERIES_PER_KV:
        return  # the grid is as long as the longest of the batch needs
    # The query heads that share a key head are rows of one tile, so that a key is read once for all of them.
    rows, dims = tile * TILE_ROWS + tl.arange(0, TILE_ROWS), tl.arange(0, PADDED_DIM)
    tokens, heads = rows // QUERIES_PER_KV, kv_head * QUERIES_PER_KV + rows % QUERIES_PER_KV
    out_rows = ((start + tokens) * tl.num_programs(1) * QUERIES_PER_KV + heads) * NUM_PARTS + part
    end = past + tl.minimum(num_new, (tile * TILE_ROWS + TILE_ROWS - 1) // QUERIES_PER_KV + 1)  # what the last row sees
    part_len = tl.cdiv(end, NUM_PARTS * TILE_KEYS) * TILE_KEYS  # in whole tiles, so that the last parts may be empty
    first, last = part * part_len, tl.minimum(end, (part + 1) * part_len)
    if first >= last:
        tl.store(log_sums + out_rows, tl.full([TILE_ROWS], float("-inf"), tl.float32), mask=tokens < num_new)
        return
    real = (tokens < num_new)[:, None] & (dims < HEAD_DIM)[None, :]
    q_places = (start + tokens)[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    queries = tl.load(q + q_places, mask=real, other=0.0)
    seen, blocks = past + tokens + 1, block_table + seq * table_stride
    keys, values = keys + kv_head * kv_head_stride, values + kv_head * kv_head_stride
    m, s = tl.full([TILE_ROWS], float("-inf"), tl.float32), tl.zeros([TILE_ROWS], tl.float32)  # maximum and sum
    weighted = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    seen_by_all = (past + tile * TILE_ROWS // QUERIES_PER_KV + 1) // TILE_KEYS * TILE_KEYS  # in whole tiles
    border = tl.maximum(first, tl.minimum(last, seen_by_all))
    m, s, weighted = _compiled_loop(
        queries, seen, keys, values, blocks, first, border, m, s, weighted, scale,
        BLOCK_SIZE, HEAD_DIM, PADDED_DIM, TILE_KEYS, True,
    )  # fmt: skip
    m, s, weighted = _compiled_loop(
        queries, seen, keys, values, blocks, border, last, m, s, weighted, scale,
        BLOCK_SIZE, HEAD_DIM, PADDED_DIM, TILE_KEYS, False,
    )  # fmt: skip
    if NUM_PARTS > 1:  # each part has a row of ``out`` of its own, and a weight
        tl.store(log_sums + out_rows, m + tl.log2(s), mask=tokens < num_new)
    out_places = out_rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + out_places, (weighted / s[:, None]).to(out.dtype.element_ty), mask=real)


def join_parts_kernel(
    out: tl.tensor, averages: tl.tensor, log_sums: tl.tensor,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NUM_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """What one program computes: the attention of one head of a token, from that over each part of its keys.

    ``averages`` are ``[num_rows, NUM_PARTS, HEAD_DIM]``, ``log_sums`` ``[num_rows, NUM_PARTS]``, with a row for each
    head of each token.
    """
    row, dims = tl.program_id(0), tl.arange(0, PADDED_DIM)
    parts = row * NUM_PARTS + tl.arange(0, NUM_PARTS)
    sums = tl.load(log_sums + parts)
    weights = tl.exp2(sums - tl.max(sums, axis=0))
    real = (dims < HEAD_DIM)[None, :] & (weights > 0)[:, None]  # an empty part weighs nothing, and has no average
    found = tl.load(averages + parts[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    joined = tl.sum(found * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * HEAD_DIM + dims, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@cache
def load_kernels() -> tuple[Any, Any]:
    """Both kernels as Triton compiles them, or interprets them if ``TRITON_INTERPRET=1`` was set before its import."""
    global tl, _compiled_loop
    import triton
    import triton.language as tl

    # These change from step to step. Triton would compile a kernel anew for a stride of 1 or a multiple of 16, and for
    # an address that is one.
    addresses = ["block_table", "query_start_loc", "seq_lens"]
    _compiled_loop = triton.jit(attend_to_tiles)
    attend = triton.jit(
        paged_attention_kernel, do_not_specialize=["table_stride"], do_not_specialize_on_alignment=addresses
    )
    return attend, triton.jit(join_parts_kernel)


def is_interpreted() -> bool:
    """Whether Triton was imported to interpret kernels on the CPU instead of compiling them."""
    load_kernels()
    import triton

    # Triton's own functions, of which the kernel calls some, were decorated when it was imported.
    return not isinstance(tl.max, triton.JITFunction)


def choose_tiles(head_dim: int, num_rows: int, itemsize: int) -> tuple[int, int, int]:
    """Numbers of a padded head, and how many queries and how many keys are a tile.

    Args:
        head_dim: numbers of a head.
        num_rows: the most queries that share a key head and a sequence.
        itemsize: bytes of a number.
    """
    padded_dim = max(MIN_TILE, 1 << (head_dim - 1).bit_length())  # Triton's tiles have sides that are powers of two
    row_bytes = padded_dim * itemsize
    if num_rows <= MIN_TILE:
        key_bytes = KEY_TILE_BYTES if itemsize > 2 else DECODE_KEY_TILE_BYTES
        return padded_dim, MIN_TILE, max(MIN_TILE, key_bytes // row_bytes)
    tile_rows = max(MIN_TILE, min(MAX_TILE_ROWS, QUERY_TILE_BYTES // row_bytes))
    return padded_dim, tile_rows, max(MIN_TILE, KEY_TILE_BYTES // row_bytes)


def choose_num_parts(num_programs: int, dtype: torch.dtype, max_query_len: int) -> int:
    """How many parts to split keys into, a power of two.

    Args:
        num_programs: that there are with one part.
        dtype: of the queries; in float32 there is one part always.
        max_query_len: the most tokens that a sequence may have. With several there is one part, since a query might see
            no key of a part; a step that checks guesses of a long text pays for that.
    """
    if dtype == torch.float32 or max_query_len > 1:
        return 1
    wanted = min(max(ENOUGH_PROGRAMS // num_programs, 1), MAX_PARTS)
    return 1 << (wanted.bit_length() - 1)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
) -> Tensor:
    """Launches the kernels.

    Args:
        q: ``[num_tokens, num_heads, head_dim]``; the numbers of a head lie side by side.
        keys: one layer's, ``[num_kv_heads, num_blocks, block_size, head_dim]``; each head's lie in one piece.
        values: as ``keys``.
        block_table: as in `AttentionMetadata`, and so are the next two.
        query_start_loc: on the device.
        seq_lens: on the device.
        max_query_len: the most tokens that a sequence may have in this step.

    Returns:
        ``[num_tokens, num_heads * head_dim]``.
    """
    num_heads, num_kv_heads, (_, block_size, head_dim) = q.shape[1], len(keys), keys.shape[1:]
    num_rows = max_query_len * (num_heads // num_kv_heads)
    padded_dim, tile_rows, tile_keys = choose_tiles(head_dim, num_rows, q.itemsize)
    num_tiles = cdiv(num_rows, tile_rows)
    num_parts = choose_num_parts(num_tiles * num_kv_heads * len(seq_lens), q.dtype, max_query_len)
    out = torch.empty(len(q), num_heads * head_dim, dtype=q.dtype, device=q.device)
    averages, log_sums = out, out  # one part is the whole, and writes no sums
    if num_parts > 1:
        averages = torch.empty(len(q), num_heads, num_parts, head_dim, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(len(q), num_heads, num_parts, dtype=torch.float32, device=q.device)
    attend, join = load_kernels()
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend[num_tiles * num_parts, num_kv_heads, len(seq_lens)](
            averages, log_sums, q, keys, values, block_table, query_start_loc, seq_lens,
            q.stride(0), q.stride(1), keys.stride(0), block_table.stride(0), LOG2_E * head_dim**-0.5,
            num_heads // num_kv_heads, block_size, head_dim, padded_dim, tile_rows, tile_keys, num_parts,
            num_stages=2, enable_fp_fusion=True,  # the default, of which Triton 3.9 warns that it will change
        )  # fmt: skip
        if num_parts > 1:
            join[len(q) * num_heads,](out, averages, log_sums, head_dim, padded_dim, num_parts, num_warps=1)
    return out


class TritonAttention(KernelBackend):
    """Attention through block tables by our own kernel, for GPUs, any block size and any head size."""

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
        """A sentence that says why it cannot serve such a cache; None if it can."""
        if importlib.util.find_spec("triton") is None:
            return 'Triton is not installed: on Linux, ./setup_env.sh --triton or pip install "folovllm[triton]" does'
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the kernel computes in float32 and 16 bits only, not in {str(dtype).removeprefix('torch.')}"
        if device.type not in ("cpu", "cuda"):
            return f"Triton compiles for GPUs under CUDA or ROCm only, not for {device.type}"
        if is_interpreted():
            if dtype == torch.bfloat16:
                return "Triton's interpreter computes wrong numbers in bfloat16; float32 and float16 are right"
        elif device.type == "cpu":
            return "a CPU runs it only if TRITON_INTERPRET=1 is set before Triton is imported, which it is not"
        elif dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            return "bfloat16 needs a GPU of compute capability 8.0 or newer"
        return None

    def begin(self, metadata: AttentionMetadata) -> None:
        """Notes the step: what the kernel needs to know is on the device already."""
        self.metadata, self._max_query_len = metadata, metadata.max_query_len

    def read(self, layer: int, q: Tensor) -> Tensor:
        """One layer's attention, once the step's keys and values are in their slots."""
        step = self.metadata
        keys, values = self.kv_cache[layer]
        return paged_attention(
            q, keys, values, step.block_table, step.query_start_loc, step.seq_lens, self._max_query_len
        )
