"""Checks of the exercises of chapter 6."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from folovllm.book.exercises.verdict import exercise, expect

if TYPE_CHECKING:
    from torch import Tensor

    from folovllm.model.decoder import Decoder


@exercise("each new token sees everything before it, and itself.", gives="a list of rows of True and False")
def check_mask(attempt: Callable[[int, int], Any]) -> None:
    """``attempt(num_cached, num_new)``: rows of booleans, ``[num_new][num_cached + num_new]``."""
    for num_cached, num_new in ((0, 3), (3, 1), (2, 3), (5, 2), (0, 1)):
        mask = attempt(num_cached, num_new)
        case = f"{num_cached} tokens in the cache and {num_new} new"
        rows = [list(row) for row in mask]
        expect(len(rows) == num_new, f"{case}: each new token has a row, so {num_new}, yours has {len(rows)}.")
        width = num_cached + num_new
        expect(
            all(len(row) == width for row in rows),
            f"{case}: each row has a place for all {width} tokens, yours have {[len(row) for row in rows]}.",
        )
        odd = [seen for row in rows for seen in row if seen not in (True, False)]
        expect(not odd, f"{case}: True says that it may look and False that it may not, yours has {odd[:1]}.")
        rows = [[bool(seen) for seen in row] for row in rows]
        for i, row in enumerate(rows):
            expect(row[num_cached + i], f"{case}: new token {i} does not see itself.")
            expect(not any(row[num_cached + i + 1 :]), f"{case}: new token {i} sees a token that comes after it.")
            expect(all(row[: num_cached + i]), f"{case}: new token {i} misses a token before it.")


@exercise("the same angles as model/decoder.py, for every pair, position and base.", gives="a tensor")
def check_rope(attempt: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """``attempt(x, positions, theta)``: ``[num_tokens, num_heads, head_dim]`` rotated, in the same shape."""
    import torch

    generator = torch.Generator().manual_seed(0)
    cases = (([0, 1, 2, 3], 2, 8, 10_000.0), ([7, 40, 3], 1, 32, 1e6), ([5], 3, 4, 100.0))
    for places, num_heads, head_dim, theta in cases:
        x, positions = torch.randn(len(places), num_heads, head_dim, generator=generator), torch.tensor(places)
        got = attempt(x.clone(), positions, theta)
        expect(
            isinstance(got, torch.Tensor) and got.shape == x.shape,
            f"the result should be a tensor of {list(x.shape)} like x, yours is {_kind(got)}.",
        )
        right = _rotated(x, positions, theta)
        if _close(got, right):
            continue
        case = f"positions {places}, head_dim {head_dim}, theta {theta:,.0f}"
        turned = _rotated_neighbours(x, positions, theta)
        neighbours = turned, torch.cat([turned[..., ::2], turned[..., 1::2]], dim=-1)
        for wrong, why in (
            (x, "x comes back as it was"),
            (_rotated(x, -positions, theta), "it turns the wrong way: the first half becomes a cos - b sin"),
            (_rotated(x, torch.arange(len(places)), theta), "the angles follow the row, not the position given"),
            (_rotated(x, positions + 1, theta), "the angles are one position too far: position 0 does not turn"),
            (_rotated(x, positions, 10_000.0), "theta is not used"),
            (_rotated(x, positions, theta**2), "exponents run to 2: pair i turns by theta ** (-2 i / head_dim)"),
            (_rotated(x, positions, theta**0.5), "exponents stop at one half: pair i has theta ** (-2 i / head_dim)"),
            (
                _rotated(x, positions, 1 / theta),
                "the exponent has lost its minus: pair i has theta ** (-2 i / head_dim)",
            ),
            (
                _rotated(x, positions, theta, a_twice=True),
                "b is turned with the new a: keep the old one until both are",
            ),
            *((wrong, "that pairs neighbours: pair i is number i with i + head_dim / 2") for wrong in neighbours),
        ):
            expect(not _close(got, wrong), f"{case}: {why}.")
        lengths = torch.allclose(got.norm(dim=-1), x.norm(dim=-1), atol=1e-4)
        expect(lengths, f"{case}: the vectors change their length, and a rotation never does.")
        expect(
            False, f"{case}: the lengths are right and the angles are not; pair i turns by theta ** (-2 i / head_dim)."
        )


@exercise("with your attention the decoder gives the logits that it should.", gives="a tensor")
def check_attention(attempt: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """``attempt(q, k, v)``: outputs ``[num_queries, num_heads * head_dim]`` of a sequence's last tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    cases = ((4, 4, 2, 2, 8), (1, 5, 4, 2, 16), (3, 7, 6, 2, 4), (5, 5, 4, 1, 8), (2, 2, 3, 3, 4))
    for num_queries, num_keys, num_heads, num_kv_heads, head_dim in cases:
        q = 2 * torch.randn(num_queries, num_heads, head_dim, generator=generator)
        k, v = torch.randn(2, num_keys, num_kv_heads, head_dim, generator=generator)
        given = q.clone(), k.clone(), v.clone()
        got = attempt(*given)
        unchanged = all(torch.equal(a, b) for a, b in zip(given, (q, k, v)))
        expect(unchanged, "it changes q, k or v in place, and keys and values belong to the cache.")
        wanted = (num_queries, num_heads * head_dim)
        expect(
            isinstance(got, torch.Tensor) and got.shape == wanted,
            f"the result should be a tensor of {list(wanted)}, a row per query, yours is {_kind(got)}.",
        )
        if _close(got, _attention(q, k, v)):
            continue
        case = f"{num_queries} queries, {num_keys} keys, {num_heads} heads over {num_kv_heads}"
        for wrong, why in (
            (_attention(q, k, v, causal=False), "a token sees tokens that come after it"),
            (_attention(q, k, v, offset=0), "query 0 is not token 0: the queries are the last tokens of the sequence"),
            (_attention(q, k, v, scale=1.0), "the scores are not divided by the root of head_dim"),
            (_attention(q, k, v, scale=1 / head_dim), "the scores are divided by head_dim, and not by its root"),
            (_attention(q, k, v, tile=True), "query heads 0 and 1 share key head 0: repeat each, don't tile them all"),
            (_attention(q, k, v, normalize=False), "the weights of a row should add up to 1"),
        ):
            expect(not _close(got, wrong), f"{case}: {why}.")
        expect(False, f"{case}: {_what_is_mixed_up(attempt, q, k, v)}.")
    difference = _difference_in_the_decoder(attempt)
    expect(
        difference < 1e-3,
        f"put into the decoder it changes the logits by up to {difference:.2g}: is it float32 all the way?",
    )


def _what_is_mixed_up(attempt: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which property attention should have, and this attempt does not, shown by values made for it."""
    import torch

    got, with_ones = attempt(q, k, v), attempt(q, k, torch.ones_like(v))
    later, first, width = v.clone(), v.clone(), q.shape[1] // v.shape[1] * v.shape[2]
    later[-1] += 1  # which only the last query sees
    first[:, 0] += 1  # which only the first group of heads reads
    if got.isnan().any():
        return "some numbers are nan: softmax meets nothing but -inf; it goes over the keys, and each token sees itself"
    if _close(got, with_ones):
        return "v is not used, and the result should be an average of the values"
    if not _close(with_ones, torch.ones_like(with_ones)):
        return "the weights of a query should add up to 1: softmax goes over the keys, after the mask"
    if not _close(attempt(q, k, first)[:, width:], got[:, width:]):
        return "the heads are mixed up: in each row come all numbers of head 0, then those of head 1"
    if not _close(attempt(q, k, later)[:-1], got[:-1]):
        return "a token sees tokens that come after it: a masked score is -inf, since 0 has a weight, too"
    return "the numbers are not those of softmax(q k / sqrt(head_dim)) v, row by row"


def _kind(got: Any) -> str:
    return str(list(got.shape)) if hasattr(got, "shape") else f"a {type(got).__name__}"


def _close(a: Tensor, b: Tensor) -> bool:
    import torch

    return torch.allclose(a.float(), b, atol=1e-4)


def _angles(x: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    import torch

    exponents = torch.arange(0, x.shape[-1], 2) / x.shape[-1]
    angles = torch.outer(positions.float(), theta**-exponents).unsqueeze(1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, positions: Tensor, theta: float, a_twice: bool = False) -> Tensor:
    """RoPE as it should be, or with the new ``a`` in the place of the old one."""
    import torch

    (cos, sin), (a, b) = _angles(x, positions, theta), x.chunk(2, dim=-1)
    new = a * cos - b * sin
    return torch.cat([new, b * cos + (new if a_twice else a) * sin], dim=-1)


def _rotated_neighbours(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    import torch

    (cos, sin), a, b = _angles(x, positions, theta), x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    offset: int | None = None,
    scale: float | None = None,
    tile: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Attention as it should be, or with one thing wrong."""
    import torch

    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, group, 1) if tile else x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        offset = len(k) - len(q) if offset is None else offset
        scores = scores.masked_fill(~torch.ones(len(q), len(k), dtype=torch.bool).tril(offset), -torch.inf)
    weights = scores.softmax(dim=-1) if normalize else scores.exp()
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@functools.cache
def _embedded_decoder() -> tuple[Decoder, Tensor]:
    """The embedded model's decoder, and the tokens of a text."""
    import torch

    from folovllm.config import ModelConfig
    from folovllm.model.decoder import load_decoder
    from folovllm.model_loader import ModelLoader
    from folovllm.tales import EMBEDDED_MODEL

    loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL), dtype="float32"))
    token_ids = loader.load_tokenizer(add_pad_token=False).encode("Once upon a time, in the valley, there lived a fox")
    return load_decoder(loader.open("cpu")), torch.tensor(token_ids)


def _difference_in_the_decoder(attempt: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """The largest difference of a logit between the attempt and attention as it should be."""
    return float((_logits_with(attempt) - _logits_with(_attention)).abs().max())


def _logits_with(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The decoder's logits for a text, ``[num_tokens, vocab_size]``."""
    import torch

    decoder, input_ids = _embedded_decoder()
    with torch.inference_mode():
        hidden = decoder(
            input_ids, torch.arange(len(input_ids)), lambda layer, q, kv: attention(q, *kv.chunk(2, dim=1))
        )
        return decoder.compute_logits(hidden)
