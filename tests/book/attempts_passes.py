"""Attempts at the exercises of chapter 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.book.exercises.passes import _attention, _rotated, _rotated_neighbours


def mask(sees: Callable[[int, int, int], bool], width: Callable[[int, int], int] = lambda old, new: old + new) -> Any:
    """Rows in which query ``i`` sees key ``j`` if ``sees(i, j, num_cached)``."""
    return lambda old, new: [[sees(i, j, old) for j in range(width(old, new))] for i in range(new)]


def softmax_first(q: Tensor, k: Tensor, v: Tensor, fill: float = 0.0, dim: int = -1, mixed: bool = False) -> Tensor:
    """Attention whose mask comes after the softmax, if nothing else is wrong with it."""
    group, causal = q.shape[1] // k.shape[1], torch.ones(len(q), len(k)).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if fill or dim != -1 or mixed:
        weights = scores.masked_fill(causal == 0, fill).softmax(dim)
    else:
        weights = scores.softmax(dim) * causal
    out = weights @ v
    return out.reshape(out.shape[1], -1) if mixed else out.transpose(0, 1).flatten(1)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right, but it scales the caller's keys in place."""
    k *= q.shape[-1] ** -0.5
    return _attention(q, k, v, scale=1.0)


WRONG: dict[str, dict[str, Any]] = {
    "check_mask": {
        "everything": mask(lambda i, j, old: True),
        "nothing": mask(lambda i, j, old: False),
        "not itself": mask(lambda i, j, old: j < old + i),
        "one too many": mask(lambda i, j, old: j <= old + i + 1),
        "the cache forgotten": mask(lambda i, j, old: j <= i),
        "the cache only": mask(lambda i, j, old: j < old or j == old + i),
        "no column for the cache": mask(lambda i, j, old: j <= i, lambda old, new: new),
        "upside down": mask(lambda i, j, old: j >= old + i),
        "all rows": lambda old, new: [[j <= i for j in range(old + new)] for i in range(old + new)],
        "new tokens first": lambda old, new: [[j <= i for j in range(new)] + [True] * old for i in range(new)],
        "only what is seen": lambda old, new: [[True] * (old + i + 1) for i in range(new)],
        "as texts": lambda old, new: [[str(j <= old + i) for j in range(old + new)] for i in range(new)],
        "as scores": lambda old, new: torch.zeros(new, old + new).masked_fill(
            torch.ones(new, old + new).tril(old) == 0, -torch.inf
        ),
        "as numbers of who is seen": lambda old, new: [old + i + 1 for i in range(new)],
    },
    "check_rope": {
        "nothing": lambda x, positions, theta: x,
        "the other way round": lambda x, positions, theta: _rotated(x, -positions, theta),
        "neighbours": _rotated_neighbours,
        "rows for positions": lambda x, positions, theta: _rotated(x, torch.arange(len(x)), theta),
        "from one": lambda x, positions, theta: _rotated(x, positions + 1, theta),
        "a fixed base": lambda x, positions, theta: _rotated(x, positions, 10_000.0),
        "twice the exponents": lambda x, positions, theta: _rotated(x, positions, theta**2),
        "half the exponents": lambda x, positions, theta: _rotated(x, positions, theta**0.5),
        "neighbours, then halves": lambda x, positions, theta: torch.cat(
            [_rotated_neighbours(x, positions, theta)[..., i::2] for i in (0, 1)], dim=-1
        ),
        "the new a for b": lambda x, positions, theta: _rotated(x, positions, theta, a_twice=True),
        "no minus": lambda x, positions, theta: _rotated(x, positions, 1 / theta),
        "two halves": lambda x, positions, theta: _rotated(x, positions, theta).chunk(2, dim=-1),
        "only the cosine": lambda x, positions, theta: (
            (_rotated(x, positions, theta) + _rotated(x, -positions, theta)) / 2
        ),
        "flat": lambda x, positions, theta: _rotated(x, positions, theta).flatten(1),
        "a list": lambda x, positions, theta: _rotated(x, positions, theta).tolist(),
    },
    "check_attention": {
        "the values": lambda q, k, v: v.flatten(1),
        "sees the future": lambda q, k, v: _attention(q, k, v, causal=False),
        "queries from the beginning": lambda q, k, v: _attention(q, k, v, offset=0),
        "no scale": lambda q, k, v: _attention(q, k, v, scale=1.0),
        "scaled by head_dim": lambda q, k, v: _attention(q, k, v, scale=1 / q.shape[-1]),
        "heads tiled": lambda q, k, v: _attention(q, k, v, tile=True),
        "not normalized": lambda q, k, v: _attention(q, k, v, normalize=False),
        "not flat": lambda q, k, v: _attention(q, k, v).view(q.shape),
        "changes the keys": scaled,
        "one query": lambda q, k, v: _attention(q[-1:], k, v),
        "masked after the softmax": softmax_first,
        "masked with a small number": lambda q, k, v: softmax_first(q, k, v, fill=-1.0),
        "softmax over the queries": lambda q, k, v: softmax_first(q, k, v, fill=-torch.inf, dim=1),
        "softmax over the heads": lambda q, k, v: softmax_first(q, k, v, fill=-torch.inf, dim=0),
        "heads before queries": lambda q, k, v: softmax_first(q, k, v, fill=-torch.inf, mixed=True),
        "keys for values": lambda q, k, v: _attention(q, k, k),
        "not even itself": lambda q, k, v: _attention(q, k, v, offset=len(k) - len(q) - 1),
        "a pair": lambda q, k, v: (_attention(q, k, v), q),
        "without masking itself": lambda q, k, v: _attention(q, k, v, offset=len(k) - len(q) + 1),
    },
}

SAYS: dict[str, dict[str, str]] = {
    "check_attention": {"softmax over the heads": "it goes over the keys", "not even itself": "each token sees itself"},
}

SAME: dict[str, dict[str, str]] = {
    "check_rope": {
        "half = x.shape[-1] // 2 → half = x.shape[-1] / 2": "head_dim is even, and arange counts to a float, too",
    },
}
"""Small changes of a solution that mean the same."""

RIGHT: dict[str, dict[str, Any]] = {
    "check_mask": {
        "numbers": lambda old, new: [[int(j <= old + i) for j in range(old + new)] for i in range(new)],
        "a tensor": lambda old, new: torch.ones(new, old + new).tril(old),
    },
    "check_rope": {"complex numbers": lambda x, positions, theta: _with_complex_numbers(x, positions, theta)},
    "check_attention": {
        "torch's own": lambda q, k, v: (
            scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in (q, k, v)),
                attn_mask=torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)),
                enable_gqa=True,
            )
            .transpose(0, 1)
            .flatten(1)
        )
    },
}


def _with_complex_numbers(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** -(torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
