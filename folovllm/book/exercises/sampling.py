"""Checks of the exercises of chapter 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import exercise, expect


def _tensor(value: Any) -> Any:
    import torch

    return torch.as_tensor(value, dtype=torch.float64)


@exercise("it moves the largest logit to 0 before it takes the exponential.")
def check_softmax(attempt: Callable[[Any, float], Any]) -> None:
    """``attempt(logits, temperature)``: probabilities of a tensor of logits ``[vocab_size]``."""
    import torch

    logits = torch.tensor([2.0, 1.0, -1.0])
    got = _tensor(attempt(logits, 1.0))
    expect(abs(float(got.sum()) - 1) < 1e-4, f"probabilities sum to 1, yours to {float(got.sum()):.3f}.")
    expect(
        torch.allclose(got, _tensor(logits.softmax(0)), atol=1e-4), "at temperature 1 these are not softmax's numbers."
    )
    cold = _tensor(attempt(logits, 0.5))
    expect(
        torch.allclose(cold, _tensor((logits / 0.5).softmax(0)), atol=1e-4),
        "temperature 0.5 changes too little or too much: divide by it.",
    )
    large = _tensor(attempt(torch.tensor([1000.0, 999.0]), 1.0))
    expect(
        bool(large.isfinite().all()),
        "a logit of 1,000 gives nan: only differences matter, so subtract the largest first.",
    )


@exercise("the token that crosses p stays, and so at least one always does.")
def check_top_p(attempt: Callable[[list[float], float], list[int]]) -> None:
    """``attempt(probs, p)``: token ids that stay, likeliest first."""
    probs = [0.1, 0.5, 0.15, 0.25]
    got = list(attempt(probs, 0.7))
    expect(len(got) > 0, "it keeps nothing: at least the likeliest token always stays.")
    expect(got != [1], "at p = 0.7 token 1 has only 0.5: the token that crosses the line stays too.")
    expect(set(got) == {1, 3}, f"at p = 0.7 tokens 1 and 3 stay (0.5 + 0.25), yours keeps {got}.")
    expect(got == [1, 3], f"the likeliest comes first, yours gives {got}.")
    expect(
        list(attempt(probs, 0.4)) == [1],
        f"at p = 0.4 the likeliest token alone crosses, yours keeps {list(attempt(probs, 0.4))}.",
    )
    met = list(attempt(probs, 0.5))
    expect(met == [1], f"at p = 0.5 token 1 reaches the line exactly, and no other is needed; yours keeps {met}.")
    expect(sorted(attempt(probs, 1.0)) == [0, 1, 2, 3], "at p = 1 every token stays.")


@exercise("it walks up the staircase until it is above u.")
def check_draw(attempt: Callable[[list[float], float], int]) -> None:
    """``attempt(probs, u)``: the token whose slice ``u`` falls into."""
    probs = [0.25, 0.0, 0.5, 0.25]
    for u, right in ((0.0, 0), (0.1, 0), (0.6, 2), (0.99, 3)):
        expect(
            attempt(probs, u) == right,
            f"u = {u} falls into the slice of token {right}, yours says {attempt(probs, u)}.",
        )
    expect(
        attempt(probs, 0.25) != 1,
        "token 1 has probability 0 and was drawn: a slice holds its lower end, not its upper one.",
    )
    expect(
        attempt(probs, 0.25) == 2, f"u = 0.25 is the lower end of token 2's slice, yours says {attempt(probs, 0.25)}."
    )
