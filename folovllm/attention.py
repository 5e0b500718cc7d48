"""Attention through block tables: how a token looks at those before it, wherever their keys lie. Chapter 6.

The cache of a layer is ``[2, num_kv_heads, num_blocks, block_size, head_dim]``: keys, then values. A step's new keys
and values are written to their slots first (slot = block * block_size + place in the block). Then sequences with one
new token are computed together: the blocks of all of them are picked from the cache, whole, and two batched matrix
products do the rest. Those with more new tokens are computed one by one, by torch's ``scaled_dot_product_attention``.

Why so, on a CPU (two cores, float32): picking whole blocks by ``index_select`` takes a fifth of the time of picking
tokens. Heads stand before blocks, so that what was picked is a batch of matrices without another copy; with it, the
products take 69 microseconds where ``scaled_dot_product_attention`` takes 190 (36 sequences of 96 tokens, 2 heads of
32), since that is made for many queries, and are on a par for 16 sequences of 512 tokens and 8 heads of 128.
As in vLLM, where the table is read is the backend's affair (``v1/attention/backends/``, 0.33.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class AttentionMetadata:
    """Whose token is whose in a flat batch, and where the cache has each."""

    query_start_loc: list[int]
    """Where each sequence's tokens begin in the batch, and where the last one's end: ``num_seqs + 1`` numbers."""
    seq_lens: list[int]
    """Tokens of each sequence so far, those of this step included."""
    slot_mapping: Tensor
    """The cache slot of each token of the batch, ``[num_tokens]``."""
    block_table: Tensor
    """The blocks of each sequence, ``[num_seqs, most blocks of any]``; what is behind its last one is arbitrary."""


class PagedAttention:
    """One step's attention, layer by layer, over one cache.

    Args:
        kv_cache: ``[num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim]``.
    """

    def __init__(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        self._slots = kv_cache.flatten(3, 4)  # [num_layers, 2, num_kv_heads, num_slots, head_dim]
        self._blocks = kv_cache.flatten(1, 3)  # [num_layers, 2 * num_kv_heads * num_blocks, block_size, head_dim]
        # Memory of our own for the blocks that were picked: fresh memory for each layer would cost as much again.
        self._picked = kv_cache.new_empty(0)

    def begin(self, metadata: AttentionMetadata) -> None:
        """Takes in a step: what is the same in all of its layers is worked out here."""
        starts, self.metadata = metadata.query_start_loc, metadata
        query_lens = [end - start for start, end in pairwise(starts)]
        self._decodes = [i for i, length in enumerate(query_lens) if length == 1]
        self._prefills = [i for i, length in enumerate(query_lens) if length > 1]
        if not self._decodes:
            return
        device, block_size, num_kv_heads = self.kv_cache.device, self.kv_cache.shape[4], self.kv_cache.shape[2]
        lens = [metadata.seq_lens[i] for i in self._decodes]
        num_blocks = -(-max(lens) // block_size)
        self._width = min(block_size, max(lens))  # of a block longer than any sequence only the beginning is read
        self._decode_blocks = metadata.block_table[:, :num_blocks]
        self._decode_tokens = None
        if self._prefills:
            self._decode_blocks = self._decode_blocks[torch.tensor(self._decodes, device=device)]
            self._decode_tokens = torch.tensor([starts[i] for i in self._decodes], device=device)
        # index_select is fast along the first dimension only, so a head's blocks follow those of the head before it.
        firsts = torch.arange(2 * num_kv_heads, device=device) * self.kv_cache.shape[3]
        self._decode_blocks = (firsts.unsqueeze(1) + self._decode_blocks.flatten()).flatten()
        places = torch.arange(num_blocks * self._width, device=device)
        unseen = places >= torch.tensor(lens, device=device).unsqueeze(1)
        mask = torch.zeros(unseen.shape, dtype=self.kv_cache.dtype, device=device).masked_fill_(unseen, -torch.inf)
        self._decode_mask = mask.repeat(num_kv_heads, 1).unsqueeze(1)  # [num_kv_heads * num_decodes, 1, num_keys]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention: `folovllm.decoder.Attend`."""
        keys, values = self._slots[layer]
        keys.index_copy_(1, self.metadata.slot_mapping, k.transpose(0, 1))
        values.index_copy_(1, self.metadata.slot_mapping, v.transpose(0, 1))
        if not self._prefills:
            return self._decode(layer, q)
        out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if self._decodes:
            out[self._decode_tokens] = self._decode(layer, q[self._decode_tokens])
        for i in self._prefills:
            start, end = self.metadata.query_start_loc[i : i + 2]
            out[start:end] = self._prefill(layer, i, *(x[start:end].transpose(0, 1) for x in (q, k, v)))
        return out

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """All sequences with one new token at once, ``[num_decodes, num_heads * head_dim]``."""
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads = self.kv_cache.shape[2]
        k, v = self._pick(layer).view(2, num_kv_heads * num_rows, -1, head_dim)
        # The heads that share a key are rows of one matrix, so no key is repeated.
        grouped = q.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(len(k), -1, head_dim)
        scores = torch.baddbmm(self._decode_mask, grouped, k.transpose(1, 2), alpha=head_dim**-0.5)
        out = torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)
        return out.view(num_kv_heads, num_rows, -1, head_dim).transpose(0, 1).reshape(num_rows, num_heads * head_dim)

    def _pick(self, layer: int) -> Tensor:
        """The blocks of all decoding sequences, ``[2 * num_kv_heads * num_decodes * num_blocks, width, head_dim]``."""
        blocks = self._blocks[layer][:, : self._width]
        shape = (len(self._decode_blocks), *blocks.shape[1:])
        size = math.prod(shape)
        if len(self._picked) < size:
            self._picked = blocks.new_empty(size)
        return torch.index_select(blocks, 0, self._decode_blocks, out=self._picked[:size].view(shape))

    def _prefill(self, layer: int, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence with several new tokens: heads before tokens in, ``[num_tokens, num_heads * head_dim]`` out."""
        num_new, num_tokens = q.shape[1], self.metadata.seq_lens[i]
        mask = None
        if num_new < num_tokens:
            blocks = self.metadata.block_table[i, : -(-num_tokens // self.kv_cache.shape[4])]
            k, v = self.kv_cache[layer][:, :, blocks].flatten(2, 3)[:, :, :num_tokens]
            mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=q.device).tril(num_tokens - num_new)
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)
