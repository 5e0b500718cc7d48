"""What happens inside one forward pass, kept for looking at: who looks at whom, and the residual stream. Chapter 6.

The decoder is given attention as an argument, so a pass can be watched without touching the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.model.decoder import Decoder


@dataclass
class PassTrace:
    """One pass over all tokens of one text."""

    probs: Tensor
    """How much each token takes from each, ``[num_layers, num_heads, num_queries, num_keys]``."""
    queries: Tensor
    """Rotated, ``[num_layers, num_tokens, num_heads, head_dim]``."""
    keys: Tensor
    """Rotated, ``[num_layers, num_tokens, num_kv_heads, head_dim]``: what a KV cache would hold."""
    values: Tensor
    """``[num_layers, num_tokens, num_kv_heads, head_dim]``."""
    stream: Tensor
    """The residual stream before the first layer and after each, ``[num_layers + 1, num_tokens, hidden_size]``."""


def look_back(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of one sequence, written for reading; the engine's own are `folovllm.attention`'s.

    Args:
        q: ``[num_queries, num_heads, head_dim]``, of the sequence's last tokens.
        k: ``[num_keys, num_kv_heads, head_dim]``, of all its tokens.
        v: shaped as ``k``.

    Returns:
        outputs ``[num_queries, num_heads * head_dim]``, and weights ``[num_heads, num_queries, num_keys]``.
    """
    num_queries, num_keys = len(q), len(k)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    may_see = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    probs = scores.masked_fill(~may_see, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probs, v).flatten(1), probs


@torch.inference_mode()
def trace_pass(decoder: Decoder, token_ids: Sequence[int]) -> PassTrace:
    """Runs the decoder once over a text, without a cache, and keeps what its layers made."""
    made: list[tuple[Tensor, ...]] = []

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, dim=1)
        out, probs = look_back(q, k, v)
        made.append((probs, q.clone(), k.clone(), v.clone()))
        return out

    input_ids = torch.tensor(token_ids, device=decoder.device)
    positions = torch.arange(len(token_ids), device=decoder.device)
    cos, sin = decoder.cos[positions], decoder.sin[positions]
    stream = [F.embedding(input_ids, decoder.embedding)]
    for layer in decoder.layers:
        stream.append(layer(stream[-1], cos, sin, attend))
    probs, queries, keys, values = (torch.stack(parts) for parts in zip(*made))
    return PassTrace(probs, queries, keys, values, torch.stack(stream))
