"""Attention over a gathered copy, and the CPU's own way: blocks are brought together, then multiplied. Chapters 10, 14.

The cache of a layer is ``[2, num_kv_heads, num_blocks, block_size, head_dim]``: keys, then values. A step's new keys
and values are written to their slots first (slot = block * block_size + place in the block). Then sequences with one
new token are computed together: the blocks of all of them are gathered from the cache, whole, and two batched matrix
products do the rest. Those with more new tokens are `folovllm.attention.prompts`' subject: short prompts of like length
are computed together, long ones and those with a past one by one.

Why, on a CPU (two cores, float32): gathering whole blocks by ``index_select`` takes a fifth of the time of gathering
tokens. Heads come before blocks in the layout, so the gathered blocks are a batch of matrices without another copy. The
products take 69 microseconds where ``scaled_dot_product_attention`` takes 190 (36 sequences of 96 tokens, 2 heads of
32), which is made for many queries; they are on a par for 16 sequences of 512 tokens and 8 heads of 128. Where much
is gathered, only some heads are done at a time: for 16 sequences of 600 tokens each layer takes 9.2 ms with all heads
at once and 4.0 ms with two at a time, since the gathered blocks are then still in the processor's cache when they are
read. Keeping them for the next step was tried and gained nothing: with 36 sequences and blocks of 16, some table grows
in nearly every step.

Blocks that all decoding sequences begin with, as they do after a system prompt that prefix caching has found, are
gathered once and multiplied with the queries of all sequences in one product. 64 sequences of about 600 tokens, 512 of
them shared, generate 1.4 times as many tokens per second for it. Juravsky et al. 2024 (arXiv 2402.05099) call it
Hydragen; vLLM had it as cascade attention, and in 0.32 has it no more.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.attention.prompts import attend_to_prompts
from folovllm.utils import cdiv
from folovllm.utils.onednn import product_dtype
from folovllm.utils.transfer import copy_to_device

GATHER_BYTES = 2**24
"""Most bytes of keys gathered at once on a CPU (16 MiB), so that they stay in its cache; at least one head's. Those of
16 bits count as the floats that they are multiplied as."""

FEW_NUMBERS = 2**18
"""Up to so many numbers of gathered keys are few: on a CPU values of 16 bits are multiplied in float32 then, as keys
are, since a product of 16 bits needs some 30 microseconds before it begins. With AVX-512 a layer of one sequence of
SmolLM2-135M takes 94 microseconds instead of 133; 16 sequences of Qwen3-0.6B's shape would take 900 instead of 750."""

LONG_BYTES = 2**18
"""A prompt whose keys, as floats, have so many bytes (256 KiB) is long: on a CPU it is computed by itself, as a slice
of the batch, of which nothing has to be gathered, and its matrices are large enough. 16 prompts of 107 to 213 tokens,
8 key heads of 128, take 22 ms so and 31 together; 16 of 64 to 128, 2 key heads of 32, 3.5 and 1.7 (two cores)."""

SHARED_TOKENS = 2048
"""Blocks that decoding sequences share are computed together from this number of tokens on that need no second copy."""


class GatherAttention(AttentionBackend):
    """Attention over copies of the blocks, for any device, dtype and shape."""

    reads_whole_blocks = True

    def __init__(self, kv_cache: Tensor) -> None:
        super().__init__(kv_cache)
        # index_select is fast along the first dimension only, so blocks are numbered across heads.
        self._head_starts = torch.arange(self.num_kv_heads, device=kv_cache.device).unsqueeze(1) * self.num_blocks
        # Scratch buffers for gathered blocks: allocating them for each layer would double the cost. Keys and values use
        # them in turn, since a smaller buffer is more likely to stay in the processor's cache.
        self._scratch = {dtype: kv_cache.new_empty(0, dtype=dtype) for dtype in (kv_cache.dtype, torch.float32)}
        key_bytes = self.num_kv_heads * kv_cache.shape[-1] * torch.float32.itemsize
        self._long_prompt = LONG_BYTES / key_bytes if kv_cache.device.type == "cpu" else math.inf

    def begin(self, metadata: AttentionMetadata) -> None:
        """Sorts a step's sequences: those with one new token, short prompts by length, and all others."""
        self.metadata = metadata
        query_lens, seq_lens = np.diff(metadata.query_start_loc_cpu), metadata.seq_lens_cpu
        decodes = np.flatnonzero(query_lens == 1)
        self._num_decodes = len(decodes)
        is_short = (query_lens == seq_lens) & (query_lens < self._long_prompt)
        self._alone = [self._locate(i) for i in np.flatnonzero((query_lens > 1) & ~is_short).tolist()]
        groups = _alike(np.flatnonzero((query_lens > 1) & is_short), query_lens)
        places = [indices for group in groups for indices in self._pad(group)]
        rows = [decodes, metadata.query_start_loc_cpu[decodes].astype(np.int64)] if len(groups) or self._alone else []
        found = copy_to_device([*rows, *places], self.kv_cache.device)
        self._decode_rows: Tensor | None = found[0] if rows else None
        self._decode_tokens: Tensor | None = found[1] if rows else None
        pairs = found[len(rows) :]
        self._groups = list(zip(map(len, groups), pairs[::2], pairs[1::2]))
        if len(decodes):
            self._begin_decodes(seq_lens[decodes])

    def _pad(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A group of prompts as a padded batch: the flat batch's row for each of its places, and which of its places
        are real tokens."""
        starts = self.metadata.query_start_loc_cpu
        firsts, ends = starts[group, None], starts[group + 1, None]
        places = firsts + np.arange((ends - firsts).max())
        # Padding is on the right, where causal attention never looks, so any token will do.
        return np.minimum(places, ends - 1).flatten().astype(np.int64), np.flatnonzero(places < ends)

    def _locate(self, i: int) -> tuple[slice, Tensor | None, int]:
        """A sequence with several new tokens: the slice of these in the batch, its blocks if it has earlier ones too,
        and how many it has in all."""
        start, end = self.metadata.query_start_loc_cpu[i : i + 2].tolist()
        num_tokens = int(self.metadata.seq_lens_cpu[i])
        blocks = self.metadata.block_table[i, : cdiv(num_tokens, self.block_size)]
        return slice(start, end), blocks if end - start < num_tokens else None, num_tokens

    def _begin_decodes(self, lens_cpu: np.ndarray) -> None:
        """Prepares the sequences with one new token: the blocks that all share, those of each, and what each sees."""
        table, lens = self.metadata.block_table, self.metadata.seq_lens
        if self._decode_rows is not None:
            table, lens = table[self._decode_rows], lens[self._decode_rows]
        longest, shortest = int(lens_cpu.max()), int(lens_cpu.min())
        table = table[:, : cdiv(longest, self.block_size)]
        num_shared = count_shared_blocks(table, shortest, self.block_size)
        self._num_shared_tokens = num_shared * self.block_size
        # If a block is longer than any sequence, only its beginning is read.
        self._width = self.block_size if num_shared else min(self.block_size, longest)
        num_keys = (table.shape[1] - num_shared) * self._width  # of each sequence's own blocks
        num_heads = self._heads_at_once(max(len(table) * num_keys, self._num_shared_tokens))
        self._num_heads_at_once, starts = num_heads, self._head_starts[:num_heads]
        if num_shared:
            self._shared_blocks = (starts + table[0, :num_shared]).flatten()
            table = table[:, num_shared:]
        self._own_blocks = (starts + table.flatten()).flatten()
        # [num_layers, 2, num_kv_heads / num_heads, num_heads * num_blocks, width, head_dim]
        self._readable = self.kv_cache.unflatten(2, (-1, num_heads)).flatten(3, 4)[:, :, :, :, : self._width]
        numbers = num_heads * len(table) * num_keys * self.kv_cache.shape[-1]
        is_narrow = self.kv_cache.device.type == "cpu" and self.kv_cache.itemsize < torch.float32.itemsize
        are_few = is_narrow and not num_shared and numbers <= FEW_NUMBERS
        self._value_dtype = torch.float32 if are_few else product_dtype(self.kv_cache)
        places = torch.arange(self._num_shared_tokens, self._num_shared_tokens + num_keys, device=lens.device)
        unseen = (places >= lens.unsqueeze(1)).repeat(num_heads, 1).unsqueeze(1)
        mask = torch.zeros(unseen.shape, dtype=torch.float32, device=lens.device)
        # [num_heads * num_decodes, 1, num_keys]
        self._decode_mask = mask.masked_fill_(unseen, -math.inf)

    def _heads_at_once(self, num_keys: int) -> int:
        """How many key heads to compute at once, if ``num_keys`` keys are gathered per head."""
        if self.kv_cache.device.type != "cpu":
            return self.num_kv_heads
        head_bytes = num_keys * self.kv_cache.shape[-1] * max(self.kv_cache.itemsize, torch.float32.itemsize)
        fitting = (
            n for n in range(2, self.num_kv_heads + 1) if self.num_kv_heads % n == 0 and n * head_bytes <= GATHER_BYTES
        )
        return max(fitting, default=1)

    def _scratch_view(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A view of a scratch buffer in the given shape."""
        size = math.prod(shape)
        if len(self._scratch[dtype]) < size:  # grow by half, so reallocation is rare
            self._scratch[dtype] = self._scratch[dtype].new_empty(size + size // 2)
        return self._scratch[dtype][:size].view(shape)

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention: `folovllm.model.decoder.Attend`."""
        self.write(layer, kv, self.metadata.slot_mapping)
        if self._decode_rows is None:
            return self._decode(layer, q)
        out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if self._num_decodes:
            out[self._decode_tokens] = self._decode(layer, q[self._decode_tokens])
        for num_rows, places, real in self._groups:
            queries, both = (x[places].unflatten(0, (num_rows, -1)).transpose(1, 2) for x in (q, kv))
            found = attend_to_prompts(queries, *both.chunk(2, dim=1))
            out[places[real]] = found.transpose(1, 2).flatten(0, 1).flatten(1)[real]
        for new, blocks, num_tokens in self._alone:
            if blocks is None:
                keys, values = kv[new].transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
            else:
                keys, values = self.kv_cache[layer][:, :, blocks].flatten(2, 3)[:, None, :, :num_tokens]
            found = attend_to_prompts(q[new].transpose(0, 1).unsqueeze(0), keys, values)
            out[new].view(-1, *q.shape[1:]).copy_(found[0].transpose(0, 1))
        return out

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """All sequences with one new token at once, ``[num_decodes, num_heads * head_dim]``."""
        num_rows, num_heads, head_dim = q.shape
        num_parts, num_matrices = self._readable.shape[2], len(self._decode_mask)
        # The heads that share a key are rows of one matrix, so no key is repeated.
        grouped = q.view(num_rows, self.num_kv_heads, -1, head_dim).transpose(0, 1)
        grouped = grouped.reshape(num_parts, num_matrices, -1, head_dim)
        # Contiguous, or torch would compute the products one by one: three times as slow for 256 sequences.
        out = torch.empty_like(grouped, dtype=self._value_dtype, memory_format=torch.contiguous_format)
        for part in range(num_parts):
            self._decode_part(layer, part, grouped[part], out[part])
        out = out.to(q.dtype).view(self.num_kv_heads, num_rows, -1, head_dim).transpose(0, 1)
        return out.reshape(num_rows, num_heads * head_dim)

    def _decode_part(self, layer: int, part: int, q: Tensor, out: Tensor) -> None:
        """Some of the key heads, ``q`` and ``out`` ``[num_matrices, heads per key head, head_dim]``."""
        num_shared, scale = self._num_shared_tokens, q.shape[-1] ** -0.5
        # Rounded to 16 bits, a score would change its token's weight by up to some percent.
        queries, keys = q.float(), self._gather(layer, 0, part, self._own_blocks, len(q), torch.float32)
        scores = torch.baddbmm(self._decode_mask, queries, keys.transpose(1, 2), alpha=scale)
        if num_shared:
            num_heads = self._num_heads_at_once
            keys = self._gather(layer, 0, part, self._shared_blocks, num_heads, torch.float32)
            shared = torch.bmm(queries.reshape(num_heads, -1, q.shape[-1]), keys.transpose(1, 2)).mul_(scale)
            scores = torch.cat([shared.view(*scores.shape[:2], num_shared), scores], dim=-1)
        probs = scores.softmax(dim=-1).to(self._value_dtype)
        values = self._gather(layer, 1, part, self._own_blocks, len(q), self._value_dtype)
        torch.bmm(probs[:, :, num_shared:], values, out=out)
        if num_shared:
            values = self._gather(layer, 1, part, self._shared_blocks, num_heads, self._value_dtype)
            out += torch.bmm(probs[:, :, :num_shared].reshape(num_heads, -1, num_shared), values).view_as(out)

    def _gather(
        self, layer: int, index: int, part: int, blocks: Tensor, num_matrices: int, dtype: torch.dtype
    ) -> Tensor:
        """The keys (``index`` 0) or values (1) in some blocks of one part of the heads, in this dtype.

        ``[num_matrices, num_keys, head_dim]``, overwritten by the next call.
        """
        shape = len(blocks), self._width, self.kv_cache.shape[-1]
        gathered = self._scratch_view(self.kv_cache.dtype, *shape)
        torch.index_select(self._readable[layer, index, part], 0, blocks, out=gathered)
        if gathered.device.type != "cpu":  # where memory is short, and allocated in no time
            gathered = gathered.to(dtype)
        elif dtype is not gathered.dtype:
            gathered = self._scratch_view(dtype, *shape).copy_(gathered)
        return gathered.view(num_matrices, -1, shape[-1])


def count_shared_blocks(block_table: Tensor, shortest: int, block_size: int) -> int:
    """How many blocks all of a step's decoding sequences begin with, if computing them together saves enough; else 0.

    Args:
        block_table: of these sequences.
        shortest: tokens of the shortest, whose newest is in a block of its own.
        block_size: tokens of a block.
    """
    if block_table.device.type != "cpu":  # to know it, the CPU would have to wait for the device
        return 0
    rows = block_table[:, : (shortest - 1) // block_size].numpy()
    num_shared = int(np.logical_and.accumulate((rows == rows[0]).all(axis=0)).sum())
    return num_shared if num_shared * block_size * (len(rows) - 1) >= SHARED_TOKENS else 0


def _alike(rows: np.ndarray, lens: np.ndarray) -> list[np.ndarray]:
    """Groups rows so that none is less than half as long as its group's longest: padding at most doubles the work."""
    rows = rows[np.argsort(-lens[rows], kind="stable")]
    groups = []
    while len(rows):
        num_alike = np.count_nonzero(2 * lens[rows] >= lens[rows[0]])
        groups.append(rows[:num_alike])
        rows = rows[num_alike:]
    return groups
