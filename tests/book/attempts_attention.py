"""Attempts at the exercises of chapter 14, wrong and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folovllm.attention.sdpa import SdpaAttention
from folovllm.book import faults
from folovllm.book.in_place import InPlaceAttention, OnlineSoftmax


def online(
    least: float = -1e30,
    shift: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    factor: Callable[[Tensor], Tensor | float] = torch.exp,
    normal: bool = True,
    parts: tuple[bool, bool] = (True, True),
) -> Callable[[Any], Tensor]:
    """An online softmax; each part may be got wrong."""

    def attempt(pieces: Any) -> Tensor:
        maximum, total, output = torch.tensor(least), torch.tensor(0.0), torch.tensor(0.0)
        for scores, values in pieces:
            new = shift(maximum, scores.max())
            weights, old = (scores - new).exp(), factor(maximum - new)
            olds = [old if part else 1 for part in parts]
            total, output, maximum = total * olds[0] + weights.sum(), output * olds[1] + weights @ values, new
        return output / total if normal else output

    return attempt


def all_at_once(pieces: Any) -> Tensor:
    scores, values = zip(*pieces)
    return torch.cat(scores).softmax(dim=0) @ torch.cat(values)


def mean_of_averages(pieces: Any) -> Tensor:
    return torch.stack([scores.softmax(dim=0) @ values for scores, values in pieces]).mean(dim=0)


def last_piece(pieces: Any) -> Tensor:
    for scores, values in pieces:
        found = scores.softmax(dim=0) @ values
    return found


def own_maxima(pieces: Any) -> Tensor:
    total, output = torch.tensor(0.0), torch.tensor(0.0)
    for scores, values in pieces:
        weights = (scores - scores.max()).exp()
        total, output = total + weights.sum(), output + weights @ values
    return output / total


def without_maximum(pieces: Any) -> Tensor:
    total, output = 0.0, 0.0
    for scores, values in pieces:
        total, output = total + scores.exp().sum(), output + scores.exp() @ values
    return output / total


def join(weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A join by certain weights of the parts."""
    return lambda averages, log_sums: (averages * weigh(log_sums).unsqueeze(-1)).sum(dim=0)


def join_in_place(averages: Tensor, log_sums: Tensor) -> Tensor:
    return averages.mul_(log_sums.softmax(dim=0).unsqueeze(-1)).sum(dim=0)


def splits(
    indices: Callable[[int, int, int], range] = lambda i, num, size: range(i, size, num),
    factor: Callable[[Tensor], Tensor] = torch.exp,
    maximum: Callable[..., Any] = torch.amax,
) -> type:
    """Attention in parts; each step may be got wrong."""

    class Split(InPlaceAttention):
        num_splits = 4

        def average(self, layer: int, rows: Tensor, positions: Tensor, block_table: Any) -> Tensor:
            num = self.num_splits
            parts = [
                self.read(layer, rows, positions, block_table, indices(i, num, len(block_table))) for i in range(num)
            ]
            most = maximum(torch.stack([part.maximum for part in parts]), dim=0)
            factors = [factor(part.maximum - most) for part in parts]
            total = sum(part.total * old for part, old in zip(parts, factors))
            output = sum(part.output * old.unsqueeze(-1) for part, old in zip(parts, factors))
            return output / total.unsqueeze(-1)

    return Split


def neighbours(i: int, num: int, size: int) -> range:
    each = -(-size // num)
    return range(min(i * each, size), min((i + 1) * each, size))


def all_the_rest(i: int, num: int, size: int) -> range:
    """The rest of a division is the last part's."""
    return range(i * (size // num), size if i == num - 1 else (i + 1) * (size // num))


class JoinsByKeywords(InPlaceAttention):
    num_splits = 4

    def average(self, layer: int, rows: Tensor, positions: Tensor, block_table: Any) -> Tensor:
        joined = self.softmax_cls(shape=rows.shape[:2], head_dim=rows.shape[2], device=rows.device)
        for i in range(self.num_splits):
            part = self.read(layer, rows, positions, block_table, range(i, len(block_table), self.num_splits))
            maximum = torch.maximum(joined.maximum, part.maximum)
            old, new = (joined.maximum - maximum).exp(), (part.maximum - maximum).exp()
            joined.total = joined.total * old + part.total * new
            joined.output = joined.output * old[..., None] + part.output * new[..., None]
            joined.maximum = maximum
        return joined.result()


class ForgetsToReturn(InPlaceAttention):
    num_splits = 4

    def average(self, layer: int, rows: Tensor, positions: Tensor, block_table: Any) -> Any:
        self.read(layer, rows, positions, block_table, range(len(block_table)))


class MeanOfParts(InPlaceAttention):
    num_splits = 4

    def average(self, layer: int, rows: Tensor, positions: Tensor, block_table: Any) -> Tensor:
        n = self.num_splits
        ranges = [range(i, len(block_table), n) for i in range(min(n, len(block_table)))]
        return torch.stack([self.read(layer, rows, positions, block_table, r).result() for r in ranges]).mean(dim=0)


class OneRead(InPlaceAttention):
    num_splits = 4


class RescalesTheSumOnly(OnlineSoftmax):
    def rescale(self, maximum: Tensor) -> None:
        self.total = self.total * torch.exp(self.maximum - maximum)
        self.maximum = maximum


class SumOnly(faults.NeverRescales):
    softmax_cls = RescalesTheSumOnly


class ByHand(faults.KeepsOldWeights):
    def rescale(self, maximum: Tensor) -> None:
        factor = (self.maximum - maximum).exp()
        self.total = self.total * factor
        self.output = self.output * factor[..., None]
        super().rescale(maximum)


WRONG: dict[str, dict[str, Any]] = {
    "check_online_softmax": {
        "all pieces at once": all_at_once,
        "the mean of averages": mean_of_averages,
        "the last piece": last_piece,
        "no maximum": without_maximum,
        "each its own maximum": own_maxima,
        "never rescaled": online(factor=lambda _: 1.0),
        "the maximum begins at 0": online(least=0.0),
        "the maximum begins at -inf": online(least=-torch.inf),
        "the newest maximum": online(shift=lambda old, new: new),
        "not divided": online(normal=False),
        "the sum of weights alone": online(parts=(True, False)),
        "the sum of values alone": online(parts=(False, True)),
        "upside down": online(factor=lambda difference: (-difference).exp()),
        "a number": lambda pieces: 1.0,
    },
    "check_join": {
        "the mean": lambda averages, log_sums: averages.mean(dim=0),
        "the sum": lambda averages, log_sums: averages.sum(dim=0),
        "over heads": join(lambda log_sums: log_sums.softmax(dim=1)),
        "logarithms as weights": join(lambda log_sums: log_sums / log_sums.sum(dim=0)),
        "not normal": join(lambda log_sums: (log_sums - log_sums.amax(dim=0)).exp()),
        "overflow": join(lambda log_sums: log_sums.exp() / log_sums.exp().sum(dim=0)),
        "over all": join(lambda log_sums: log_sums.flatten().softmax(dim=0).view_as(log_sums)),
        "the logarithms of the weights": join(lambda log_sums: log_sums.log_softmax(dim=0)),
        "the first part": lambda averages, log_sums: averages[0],
        "in place": join_in_place,
        "weights": lambda averages, log_sums: log_sums.softmax(dim=0),
    },
    "check_split": {
        "another class": SdpaAttention,
        "an object": OneRead(torch.zeros(1, 2, 1, 1, 1, 8)),
        "one part": OneRead,
        "the mean of parts": MeanOfParts,
        "never rescaled": splits(factor=torch.ones_like),
        "by the least maximum": splits(maximum=torch.amin),
        "every block but the last": splits(indices=lambda i, num, size: range(i, size - 1, num)),
        "all blocks in each part": splits(indices=lambda i, num, size: range(size)),
        "without what is left over": splits(
            indices=lambda i, num, size: range(i * (size // num), (i + 1) * (size // num))
        ),
        "the rest in one part": splits(indices=all_the_rest),
        "no return": ForgetsToReturn,
    },
    "check_rescaled": {
        "still not": type("Same", (faults.NeverRescales,), {}),
        "the sum only": SumOnly,
        "another class": InPlaceAttention,
        "an object for a class": type("Object", (faults.NeverRescales,), {"softmax_cls": OnlineSoftmax((), 8)}),
    },
}

SAYS: dict[str, dict[str, str]] = {
    "check_online_softmax": {
        "all pieces at once": "keep nothing of it but sums",
        "each its own maximum": "relative to its own maximum",
        "the newest maximum": "never let it fall",
        "the sum of weights alone": "the weighted sum of values is not",
        "the sum of values alone": "the sum of weights is not",
        "upside down": "are never above 1",
    },
    "check_join": {
        "over heads": "the softmax runs over heads",
        "over all": "the weights of each head should add up to 1",
        "the logarithms of the weights": "these are the logarithms of the weights",
    },
    "check_split": {
        "without what is left over": "7 blocks in 4 parts: each block is to be read once, yours reads [1, 1, 1, 1]",
        "the rest in one part": "7 blocks in 4 parts are at most 2 blocks for each `read`, yours reads [1, 1, 1, 4]",
        "no return": "as if a return were missing",
        "the mean of parts": "relative to its own maximum",
    },
    "check_rescaled": {"an object for a class": "the engine cannot work with what your class gives"},
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_online_softmax": {"as in the chapter": online(), "from a smaller number": online(least=-3e38)},
    "check_join": {
        "a softmax": join(lambda log_sums: log_sums.softmax(dim=0)),
        "by hand": join(lambda log_sums: (log_sums - log_sums.logsumexp(dim=0)).exp()),
    },
    "check_split": {
        "every fourth": splits(),
        "neighbours": splits(indices=neighbours),
        "by keywords": JoinsByKeywords,
    },
    "check_rescaled": {
        "ours": type("Mended", (faults.NeverRescales,), {"softmax_cls": OnlineSoftmax}),
        "by hand": type("Mended", (faults.NeverRescales,), {"softmax_cls": ByHand}),
    },
}

SAME: dict[str, dict[str, str]] = {
    "check_online_softmax": {
        "maximum, total, output = (torch.tensor(least), 0, 0) → maximum, total, output = (torch.tensor(least), "
        f"{total}, {output})": "the first piece's maximum makes it 0"
        for total, output in ((1, 0), (-1, 0), (0, 1), (0, -1))
    },
}
