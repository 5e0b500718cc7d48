"""Checks of the exercises of chapter 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import Endless, NotYet, exercise, expect


@exercise("logits of any size become probabilities, at any temperature.", gives="a tensor of probabilities")
def check_softmax(attempt: Callable[[Any, float], Any]) -> None:
    """``attempt(logits, temperature)``: probabilities of a tensor of logits ``[vocab_size]``."""
    import torch

    for values, temperature, why in (
        ([2.0, 0.7, -1.3], 1.0, "at temperature 1 these are not softmax's numbers"),
        ([0.3, 1.9, -0.4, 1.1], 0.5, "temperature 0.5 changes too little or too much: divide by it"),
        (
            [1000.0, 999.0],
            1.0,
            "only differences matter: subtract the largest logit, and 1,000 is no trouble",
        ),
        (
            [1000.0, 999.0],
            0.5,
            "at temperature 0.5 it is too much again: subtract before dividing, or subtract the largest of the divided "
            "logits",
        ),
        ([1000.0, 0.0], 2.0, "1,000 beside 0 is still too much: subtract the largest logit, not the average"),
        ([-1000.0, -1001.5], 1.0, "logits of -1,000 all vanish: move the largest of them to 0 before you take exp"),
    ):
        logits = torch.tensor(values)
        got = torch.as_tensor(attempt(logits, temperature), dtype=torch.float64)
        right = (torch.tensor(values).double() / temperature).softmax(0)
        total = float(got.sum())
        expect(math.isfinite(total), f"your probabilities of {values} sum to {total}; {why}.")
        expect(not abs(total - 1) > 1e-4, f"probabilities sum to 1, yours to {total:.3f}.")
        expect(got.shape == right.shape, f"{len(values)} logits give {len(values)} probabilities, not {got.shape}.")
        expect(torch.allclose(got, right, atol=1e-4), f"{why}.")
        expect(logits.tolist() == torch.tensor(values).tolist(), "your code changed the logits that it was given.")


@exercise("the token that crosses p stays, and so at least one always does.", gives="a list of token ids")
def check_top_p(attempt: Callable[[list[float], float], list[int]]) -> None:
    """``attempt(probs, p)``: token ids that stay, likeliest first."""
    probs = [0.25, 0.125, 0.0625, 0.5, 0.0625]
    got = list(attempt(kept := list(probs), 0.7))
    expect(kept == probs, "your code changed the list that it was given.")
    expect(len(got) > 0, "it keeps nothing: at least the likeliest token always stays.")
    expect(got != [3], "at p = 0.7 token 3 has only 0.5: the token that crosses the line stays too.")
    expect(sorted(got) != [0.25, 0.5], "token ids are asked for, and yours gives probabilities.")
    expect(sorted(got) == [0, 3], f"at p = 0.7 tokens 3 and 0 stay (0.5 + 0.25), yours keeps {got}.")
    for other, p, right, why in (
        (probs, 0.7, [3, 0], "the likeliest comes first"),
        ([0.125, 0.25, 0.625], 0.4, [2], "the likeliest token alone crosses 0.4"),
        (probs, 0.5, [3], "token 3 reaches 0.5 exactly, and no other is needed"),
        ([0.125, 0.25, 0.625], 0.9, [2, 1, 0], "0.625 + 0.25 is less than 0.9, so the third stays too"),
        ([0.25, 0.125], 1.0, [0, 1], "probabilities that sum to less than p all stay"),
    ):
        before = list(other)
        try:
            got = list(attempt(other, p))
        except Endless:
            raise NotYet(f"of {before} at p = {p} {right} stay: {why}; yours does not come to an end.") from None
        expect(got == right, f"of {before} at p = {p} {right} stay: {why}; yours keeps {got}.")
        expect(other == before, "your code changed the list that it was given.")
    got = list(attempt([0.25, 0.5, 0.25], 1.0))
    expect(got in ([1, 0, 2], [1, 2, 0]), f"of two tokens with the same probability both stay, yours keeps {got}.")


@exercise("it walks up the staircase until it is above u.", gives="a token id")
def check_draw(attempt: Callable[[list[float], float], int]) -> None:
    """``attempt(probs, u)``: the token whose slice ``u`` falls into."""
    probs = [0.25, 0.0, 0.5, 0.25]
    for other, u, right in ((probs, 0.1, 0), (probs, 0.6, 2), ([0.125, 0.875], 0.2, 1), (probs, 0.99, 3)):
        got = attempt(other, u)
        expect(got == right, f"of {other} u = {u} falls into the slice of token {right}, yours says {got!r}.")
    got = attempt(probs, 0.25)
    expect(got != 1, "token 1 has probability 0 and was drawn: a slice holds its lower end, not its upper one.")
    expect(got == 2, f"u = 0.25 is the lower end of token 2's slice, yours says {got!r}.")
    got = attempt([0.0, 1.0], 0.0)
    expect(got == 1, f"of [0.0, 1.0] only token 1 can be drawn, also by u = 0; yours says {got!r}.")
