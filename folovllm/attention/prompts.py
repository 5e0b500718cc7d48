"""Causal attention of sequences with several new tokens, a block of queries at a time. Chapter 14.

A query sees the keys up to its own and no others, so of all products of a prompt half would be thrown away. Here some
neighbouring queries are multiplied with the keys up to the last of them, and only their own places need a mask. The
scores are float32, and so few at a time that they are still in the processor's cache for the softmax and the product
with the values.

torch's ``scaled_dot_product_attention``, which does this for few queries and on other devices, multiplies 512 keys at a
time on a CPU, of which a query may see few, and turns numbers of 16 bits into float32 for both products. 8 prompts of
512 tokens, 16 heads of 128, in bfloat16, take it 112 ms a layer and 61 to 80 here; 2 of 1,024 take 80 and 60 to 75, 16
of 96 tokens (9 heads of 64) 3.6 and 3.0, and 64 of 40 in float32 (4 heads of 32) 1.6 and 1.1. One of 4,096 takes as
long in both, some 480 ms; where it loses are long prompts of small heads in 16 bits: 16 of 500, 4 heads of 32, 20 and
28 (two cores with AVX-512).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.utils.onednn import product_dtype

FEW_QUERIES = 32
"""Fewer are left to torch's kernel: guesses that are checked see nearly all keys, so there is little to leave out. 16
sequences of 104 tokens with 4 new ones take it 0.9 ms and 3.3 here; from 16 new ones on the two are on a par."""

QUERIES_AT_ONCE = 64
"""Queries of one sequence that are multiplied with the same keys."""

SCORE_BYTES = 2**21
"""Most bytes of scores at once (2 MiB), or those of one key head; two cores have as large a cache of their own."""


def attend_to_prompts(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last tokens of sequences of one length; each sees all before it, and itself.

    Args:
        queries: of the new tokens, ``[num_seqs, num_heads, num_new, head_dim]``.
        keys: ``[num_seqs, num_kv_heads, num_tokens, head_dim]``.
        values: likewise.

    Returns:
        The shape of ``queries``.
    """
    num_heads, num_new = queries.shape[1:3]
    num_tokens = keys.shape[2]
    if queries.device.type != "cpu" or num_new < FEW_QUERIES:
        mask = None
        if num_new < num_tokens:
            mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=queries.device).tril(num_tokens - num_new)
        return scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, enable_gqa=True)
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    seq_bytes = num_heads * min(num_new, QUERIES_AT_ONCE) * num_tokens * torch.float32.itemsize
    seqs_at_once, group = max(SCORE_BYTES // seq_bytes, 1), num_heads // keys.shape[1]
    heads_at_once = max(keys.shape[1] * SCORE_BYTES // seq_bytes, 1)  # all, unless there is one sequence at a time
    sizes = heads_at_once * group, heads_at_once * group, heads_at_once, heads_at_once
    for some in zip(*(x.split(seqs_at_once) for x in (out, queries, keys, values))):
        for parts in zip(*(x.split(size, dim=1) for x, size in zip(some, sizes))):
            _attend(*parts)
    return out


def _attend(out: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> None:
    """`attend_to_prompts` of few sequences, or of few heads of one."""
    num_kv_heads, num_new, head_dim = keys.shape[1], *queries.shape[2:]
    past = keys.shape[2] - num_new
    # The heads that share a key are rows of one matrix: [num_seqs * num_kv_heads, group, num_new, head_dim].
    out, queries = (x.unflatten(1, (num_kv_heads, -1)) for x in (out, queries))
    out, queries = out.flatten(0, 1), _copy(queries, torch.float32).mul_(head_dim**-0.5)
    keys, values = _copy(keys, torch.float32).transpose(1, 2), _copy(values, product_dtype(values))
    most = min(num_new, QUERIES_AT_ONCE)
    # Minus infinity where a key is hidden.
    later = torch.full((most, most), -math.inf, dtype=torch.float32, device=keys.device).triu(1)
    for start in range(0, num_new, QUERIES_AT_ONCE):
        some = queries[:, :, start : start + QUERIES_AT_ONCE]
        num, seen = some.shape[2], past + start + some.shape[2]
        scores = torch.bmm(some.flatten(1, 2), keys[:, :, :seen])
        scores.unflatten(1, (-1, num))[..., past + start :].add_(later[:num, :num])
        found = torch.bmm(scores.softmax(dim=-1).to(values.dtype), values[:, :seen])
        out[:, :, start : start + num] = found.unflatten(1, (-1, num))


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One matrix after the other, each row after row."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)
