"""Checks of the exercises of chapter 14."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from folovllm.book.exercises.verdict import NotYet, blame_part, exercise, expect, expect_subclass
from folovllm.utils import cdiv

if TYPE_CHECKING:
    from torch import Tensor


GONE = "a piece is gone when the next one comes, so keep nothing of it but sums"
ABOVE_ONE = "exp(old - new) and exp(score - new) are never above 1, so look whether one of yours is the other way round"
OVERFLOW = "exp of a large score is infinite, so take away the largest score so far first"
UNDERFLOW = "exp of a very small score is 0, and so is the sum; take away the largest score so far first"
NOT_SEEN = "-inf minus -inf is not a number, so let the maximum begin at a very small number, and never let it fall"

PIECES: tuple[tuple[tuple[int, ...], float, float, tuple[int, ...], str, str], ...] = (
    ((2, 3, 2), 4, 0, (), "three pieces of 2, 3 and 2 keys", GONE),
    ((4,), 4, 0, (), "a single piece", GONE),
    ((1, 1, 1, 1), 4, 3, (), "four pieces of one key each", GONE),
    ((3, 3), 4, 500, (), "scores of about 500", OVERFLOW),
    ((3, 2), 4, -500, (), "scores of about -500", UNDERFLOW),
    ((4, 3), 100, 0, (), "scores that are hundreds apart", OVERFLOW),
    ((2, 2, 3), 4, 0, (0,), "a first piece whose scores are all -inf, since none of it may be seen", NOT_SEEN),
    ((2, 1, 2), 4, 1, (1,), "a piece in the middle whose scores are all -inf", NOT_SEEN),
)
"""Keys of each piece, how far scores lie apart, around what, which pieces may not be seen, and in words; at last why a
result is not a number."""


@exercise("one look at each piece, in any number of pieces, and the softmax is exact.", gives="a tensor")
def check_online_softmax(attempt: Callable[[Iterator[Any]], Tensor]) -> None:
    """``attempt(pieces)``: pieces are pairs of scores ``[num_keys]`` and values ``[num_keys, head_dim]``, seen once."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for sizes, spread, middle, masked, case, why_not_a_number in PIECES:
        scores = [spread * torch.randn(size, generator=generator) + middle for size in sizes]
        for i in masked:
            scores[i].fill_(-torch.inf)
        values = [torch.randn(size, 5, generator=generator) for size in sizes]
        got = attempt(_seen_once(scores, values))
        expect(
            isinstance(got, torch.Tensor) and got.shape == (5,),
            f"{case}: one average of the values is asked for, a tensor of [5], yours is {_kind(got)}.",
        )
        if _close(got, _average(scores, values)):
            continue
        for wrong, why in _wrong_softmaxes(scores, values):
            expect(not _close(got, wrong), f"{case}: {why}.")
        if not bool(torch.isfinite(got).all()):
            # Where pieces stay, only those who kept them get a number.
            is_kept = why_not_a_number != GONE or bool(torch.isfinite(attempt(zip(scores, values))).all())
            raise NotYet(f"{case}: yours is not a number; {why_not_a_number if is_kept else ABOVE_ONE}.")
        raise NotYet(f"{case}: the average is not the softmax's; work two pieces out by hand.")


def _seen_once(scores: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece; when the next one comes it is gone, as from a processor's own memory."""
    for each, their_values in zip(scores, values):
        piece = each.clone(), their_values.clone()
        yield piece
        for part in piece:
            part.fill_(float("nan"))


def _average(scores: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([*scores]).softmax(dim=0) @ torch.cat([*values])


def _wrong_softmaxes(scores: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[tuple[Tensor, str]]:
    """What comes of the usual mistakes."""
    import torch

    if len(scores) > 1:
        each = [score.softmax(dim=0) @ value for score, value in zip(scores, values)]
        yield each[-1], "that is the average of the last piece alone"
        yield each[0], "that is the average of the first piece alone"
        yield (
            torch.stack(each).mean(dim=0),
            "that is the mean of each piece's own average, and a piece with large scores counts for more",
        )
        yield torch.stack(each).sum(dim=0), "that adds up each piece's own average"
        own = torch.cat([(score - score.max()).exp() for score in scores])
        yield (
            own @ torch.cat([*values]) / own.sum(),
            "what a piece adds is relative to its own maximum; bring it to one that all share first",
        )
        maxima = torch.stack([score.max() for score in scores]).cummax(dim=0).values
        old = torch.cat([(score - most).exp() for score, most in zip(scores, maxima)])
        new = (torch.cat([*scores]) - maxima[-1]).exp()
        for of_values, of_weights, why in (
            (old, old, "what was added up by an old maximum is never rescaled to the new one"),
            (old, new, "the sum of weights is rescaled to a new maximum, and the weighted sum of values is not"),
            (new, old, "the weighted sum of values is rescaled to a new maximum, and the sum of weights is not"),
        ):
            yield of_values @ torch.cat([*values]) / of_weights.sum(), why
    every = torch.cat([*scores])
    weights = (every - every.max()).exp()
    yield weights @ torch.cat([*values]), "the weights should add up to 1: divide by their sum at the end"


@exercise("a softmax over the sums of the parts, and nobody can tell that there were parts.", gives="a tensor")
def check_join(attempt: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``attempt(averages, log_sums)``: ``[num_parts, num_heads, head_dim]``, ``[num_parts, num_heads]`` to the whole's
    ``[num_heads, head_dim]``."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for num_heads, sizes, shift, case in (
        (2, (5, 2, 4), 0.0, "three parts of 5, 2 and 4 keys, two heads"),
        (1, (3, 3), 0.0, "two parts of 3 keys, one head"),
        (3, (4,), 0.0, "a single part"),
        (2, (3, 2), 700.0, "log sums of about 700"),
        (2, (3, 4, 1), -700.0, "log sums of about -700"),
        (4, (4, 0, 2, 3), 0.0, "a part without keys, whose log sum is -inf"),
    ):
        scores = [3 * torch.randn(num_heads, size, generator=generator) + shift for size in sizes]
        values = [torch.randn(num_heads, size, 4, generator=generator) for size in sizes]
        averages = torch.stack([torch.einsum("hk,hkd->hd", s.softmax(dim=1), v) for s, v in zip(scores, values)])
        log_sums = torch.stack([score.logsumexp(dim=1) for score in scores])
        given = averages.clone(), log_sums.clone()
        got = attempt(*given)
        expect(
            isinstance(got, torch.Tensor) and got.shape == averages.shape[1:],
            f"{case}: a tensor of {[*averages.shape[1:]]} is asked for, yours is {_kind(got)}.",
        )
        unchanged = torch.equal(given[0], averages) and torch.equal(given[1], log_sums)
        expect(unchanged, f"{case}: averages or log_sums are another afterwards, and they are not yours to change.")
        right = torch.einsum("hk,hkd->hd", torch.cat(scores, 1).softmax(dim=1), torch.cat(values, 1))
        if _close(got, right):
            continue
        not_finite = not bool(torch.isfinite(got).all())
        expect(not not_finite, f"{case}: yours is not a number; exp(log_sum) may overflow, so take the largest away.")
        for wrong, why in _wrong_joins(averages, log_sums):
            expect(not _close(got, wrong), f"{case}: {why}.")
        raise NotYet(f"{case}: a part counts as much as the sum of its exp(score), and log_sums has the logarithms.")


def _wrong_joins(averages: Tensor, log_sums: Tensor) -> Iterator[tuple[Tensor, str]]:
    yield averages.mean(dim=0), "the parts count alike, whatever their scores"
    yield averages.sum(dim=0), "the averages are added up, and not weighted"
    weights = (log_sums - log_sums.amax(dim=0)).exp()
    yield (averages * weights.unsqueeze(-1)).sum(dim=0), "the weights of the parts should add up to 1"
    for weights, why in (
        (log_sums.softmax(dim=1), "the softmax runs over heads, not over parts"),
        (log_sums.flatten().softmax(dim=0).view_as(log_sums), "the weights of each head should add up to 1"),
        (log_sums / log_sums.sum(dim=0), "log_sums are logarithms: a part's weight is their exp"),
        (log_sums.log_softmax(dim=0), "these are the logarithms of the weights"),
    ):
        yield (averages * weights.unsqueeze(-1)).sum(dim=0), why


STEPS: tuple[tuple[tuple[int, ...], tuple[int, ...], int, int, int, int], ...] = (
    ((10,), (1,), 4, 2, 1, 8),
    ((37, 5, 16), (1, 1, 1), 4, 4, 2, 16),
    ((9, 21, 1), (9, 6, 1), 3, 6, 2, 8),
    ((6, 33), (2, 33), 16, 3, 3, 4),
)
"""Steps to try a backend on: tokens of each text, new ones among them, block size, heads, key heads, head_dim."""


@exercise("each text's keys are read in parts, and the engine writes the same texts.")
def check_split(attempt: type) -> None:
    """``attempt``: an `InPlaceAttention` that reads the blocks of a text in ``num_splits`` parts."""
    from folovllm.book import judges
    from folovllm.book.in_place import InPlaceAttention

    expect_subclass(attempt, InPlaceAttention)
    why = "; the total and the output of a part are relative to its own maximum, and both are 0 if it may see nothing"
    for num_blocks in (12, 7, 3):
        _count_parts(attempt, 4, num_blocks)
    for num_splits in (4, 1, 2, 3):
        _compare_numbers(type("Attempt", (attempt,), {"num_splits": num_splits}), f" in {num_splits} parts", why)
    for num_splits in (2, 4):
        _count_parts(type("Attempt", (attempt,), {"num_splits": num_splits}), num_splits, 12)
    judges.judge_attention(attempt)


@exercise("what was added up by an old maximum is brought to the new one, however long the text.")
def check_rescaled(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.faults.NeverRescales` that rescales."""
    from folovllm.book import faults, judges

    expect_subclass(attempt, faults.NeverRescales)
    _compare_numbers(attempt)
    judges.judge_attention(attempt)


def _compare_numbers(attempt: type, how: str = "", why: str = "") -> None:
    """Compares what a backend makes of random steps with what the reference does; ``why`` they may differ."""
    import torch

    from folovllm.attention.sdpa import SdpaAttention
    from folovllm.book.in_place import make_step

    for seed, (seq_lens, num_new, block_size, num_heads, num_kv_heads, head_dim) in enumerate(STEPS):
        kv_cache, metadata, q, kv = make_step(seq_lens, num_new, block_size, num_heads, num_kv_heads, head_dim, seed)
        q[:, 0] *= 40 if seed % 2 else 1  # a head whose scores are far larger than those of the others
        case = f"blocks of {block_size}{how}"
        right, got = (_attend(cls, case, kv_cache.clone(), metadata, q, kv) for cls in (SdpaAttention, attempt))
        expect(
            isinstance(got, torch.Tensor) and got.shape == right.shape,
            f"{case}: a tensor of {[*right.shape]} is asked for, a row per new token, yours is {_kind(got)}.",
        )
        starts = metadata.query_start_loc.tolist()
        for i, (length, new) in enumerate(zip(seq_lens, num_new)):
            same = _close(got[starts[i] : starts[i + 1]], right[starts[i] : starts[i + 1]], atol=1e-3)
            expect(same, f"{case}: a text of {length} tokens, {new} of them new, gets other numbers than by sdpa{why}.")


def _attend(cls: type, case: str, kv_cache: Tensor, metadata: Any, q: Tensor, kv: Tensor) -> Any:
    """What a backend gives for one layer of a step."""
    try:
        backend = cls(kv_cache)
        backend.begin(metadata)
        return backend(0, q.clone(), kv.clone())
    except Exception as error:
        raise NotYet(f"{case}: {blame_part(error)}.") from error


def _count_parts(attempt: Any, num_splits: int, num_blocks: int) -> None:
    """A text of so many blocks must be read in so many parts: each block once, and as many in each if that can be."""
    from folovllm.book.in_place import OnlineSoftmax, make_step

    read: list[int] = []

    class Counted(OnlineSoftmax):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.number = len(read)
            read.append(0)

        def add(self, scores: Tensor, values: Tensor) -> None:
            read[self.number] += 1
            super().add(scores, values)

    Counted.__name__ = OnlineSoftmax.__name__
    case = f"{num_blocks} blocks in {num_splits} parts"
    _attend(type("Attempt", (attempt,), {"softmax_cls": Counted}), case, *make_step((4 * num_blocks,), (1,), 4))
    most, parts = cdiv(num_blocks, num_splits), [blocks for blocks in read if blocks]
    expect(
        max(parts, default=0) <= most and len(parts) <= num_splits,
        f"{case} are at most {most} blocks for each `read`, yours reads {parts}.",
    )
    expect(sum(parts) == num_blocks, f"{case}: each block is to be read once, yours reads {parts or 'none'}.")


def _kind(got: Any) -> str:
    return str(list(got.shape)) if hasattr(got, "shape") else f"a {type(got).__name__}"


def _close(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    import torch

    return torch.allclose(a.float(), b, atol=atol)
