"""Attempts at the exercises of chapter 2, wrong and right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def exponentials(logits: torch.Tensor) -> torch.Tensor:
    return logits.exp() / logits.exp().sum()


def likeliest_first(probs: list[float]) -> list[int]:
    return sorted(range(len(probs)), key=lambda i: -probs[i])


def top_p(stop: Callable[[float, float], bool], cross: bool = True) -> Callable[[list[float], float], list[int]]:
    """Takes tokens until ``stop(total, p)``."""

    def attempt(probs: list[float], p: float) -> list[int]:
        kept, total = [], 0.0
        for token_id in likeliest_first(probs):
            total += probs[token_id]
            if stop(total, p) and not cross:
                break
            kept.append(token_id)
            if stop(total, p):
                break
        return kept

    return attempt


def uses_up(probs: list[float], p: float) -> list[int]:
    """Takes the likeliest of what is left until there is enough, which may never be."""
    left, kept, total = list(probs), [], 0.0
    while total < p:
        token_id = max(range(len(left)), key=left.__getitem__)
        kept.append(token_id)
        total += left[token_id]
        left[token_id] = 0.0
    return kept


def first_above(above: Callable[[float, float], bool]) -> Callable[[list[float], float], int]:
    """Draws the first token at which the cumulative sum is ``above`` u."""

    def attempt(probs: list[float], u: float) -> int:
        return next((i for i, total in enumerate(itertools.accumulate(probs)) if above(total, u)), len(probs) - 1)

    return attempt


WRONG: dict[str, dict[str, Any]] = {
    "check_softmax": {
        "no sum": lambda logits, t: (logits / t).exp(),
        "no temperature": lambda logits, t: logits.softmax(0),
        "times the temperature": lambda logits, t: (logits * t).softmax(0),
        "overflows": lambda logits, t: exponentials(logits / t),
        "subtracts the mean": lambda logits, t: exponentials((logits - logits.mean()) / t),
        "subtracts the undivided maximum": lambda logits, t: exponentials(logits / t - logits.max()),
        "subtracts the undivided maximum, in float64": lambda logits, t: exponentials(
            logits.double() / t - logits.double().max()
        ),
        "no infinities": lambda logits, t: exponentials(logits / t).nan_to_num(0.5),
        "no large ones": lambda logits, t: exponentials((logits / t).clamp(max=80)),
        "no small ones": lambda logits, t: exponentials((logits / t).clamp(-80, 80)),
        "whole steps": lambda logits, t: exponentials((logits - logits.max()) // t),
        "moves the caller's": lambda logits, t: exponentials(logits.sub_(logits.max()) / t),
        "no exponential": lambda logits, t: (logits - logits.min()) / (logits - logits.min()).sum(),
        "logarithms": lambda logits, t: (logits / t).log_softmax(0),
        "forgets the dimension": lambda logits, t: torch.softmax(logits / t),
        "divides the probabilities": lambda logits, t: logits.softmax(0) / t,
        "a column": lambda logits, t: (logits / t).softmax(0)[:, None],
    },
    "check_top_p": {
        "leaves out the one that crosses": top_p(lambda total, p: total >= p, cross=False),
        "goes on when p is met exactly": top_p(lambda total, p: total > p),
        "goes on until there is enough": uses_up,
        "likeliest last": lambda probs, p: top_p(lambda total, p: total >= p)(probs, p)[::-1],
        "in the order of ids": lambda probs, p: sorted(top_p(lambda total, p: total >= p)(probs, p), reverse=True),
        "everything": lambda probs, p: likeliest_first(probs),
        "sorted by id": lambda probs, p: sorted(top_p(lambda total, p: total >= p)(probs, p)),
        "one only": lambda probs, p: likeliest_first(probs)[:1],
        "as min-p": lambda probs, p: [i for i in likeliest_first(probs) if probs[i] >= p * max(probs)],
        "probabilities": lambda probs, p: [probs[i] for i in top_p(lambda total, p: total >= p)(probs, p)],
        "a mask": lambda probs, p: [i in top_p(lambda total, p: total >= p)(probs, p) for i in range(len(probs))],
    },
    "check_draw": {
        "holds its upper end": first_above(lambda total, u: total >= u),
        "the likeliest": lambda probs, u: probs.index(max(probs)),
        "does not add up": lambda probs, u: next((i for i, p in enumerate(probs) if p > u), 0),
        "as many as tokens": lambda probs, u: int(u * len(probs)),
        "one too far": lambda probs, u: first_above(lambda total, u: total > u)(probs, u) + 1,
        "one too early": lambda probs, u: first_above(lambda total, u: total > u)(probs, u) - 1,
        "the probability": lambda probs, u: probs[first_above(lambda total, u: total > u)(probs, u)],
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_softmax": {
        "torch's own": lambda logits, t: torch.softmax(logits / t, 0),
        "a list": lambda logits, t: (logits.double() / t).softmax(0).tolist(),
    },
    "check_top_p": {"a tuple": lambda probs, p: tuple(top_p(lambda total, p: total >= p)(probs, p))},
    "check_draw": {"a tensor": lambda probs, u: torch.tensor(probs).cumsum(0).gt(u).int().argmax()},
}

SAYS: dict[str, dict[str, str]] = {
    "check_softmax": {
        "overflows": "subtract the largest logit",
        "subtracts the mean": "not the average",
        "subtracts the undivided maximum": "subtract before dividing, or subtract the largest of the divided logits",
        "subtracts the undivided maximum, in float64": "subtract before dividing",
    },
    "check_top_p": {"goes on until there is enough": "probabilities that sum to less than p all stay"},
}
"""What is wrong with an attempt, in words that its sentence must have."""
