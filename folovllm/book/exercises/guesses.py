"""Checks of the exercises of chapter 16."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import exercise, expect, expect_subclass
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sample.speculative import NgramProposer

Verify = Callable[[list[int], Callable[[], int]], list[int]]
"""``(guesses, draw) -> tokens``; each call of ``draw`` gives the model's token at the next place."""

LOOKUPS: tuple[tuple[list[int], int, int, int], ...] = (
    ([1, 2, 3, 4, 1, 2], 2, 1, 2),
    ([1, 2, 3, 4, 1, 2], 9, 1, 2),
    ([1, 2, 3, 4, 5, 1, 2], 1, 2, 2),
    ([7, 2, 3, 9, 2, 4, 9, 2], 2, 1, 2),
    ([2, 3, 1, 2, 4, 1, 2], 3, 1, 3),
    ([5, 6, 5, 7, 5], 2, 1, 1),
    ([5, 5, 5, 5], 3, 1, 3),
    ([1, 2, 3], 2, 1, 2),
    ([4], 2, 1, 3),
    ([4, 4], 2, 2, 3),
    ([1, 2, 9, 2], 2, 2, 2),
)
"""``(token_ids, num_tokens, min_n, max_n)``."""

NUM_GUESSES = (3, 1, 4, 2, 3, 5, 2)
"""In each of `folovllm.book.judges.SETTINGS`."""


@exercise("what followed the longest of the last n-grams where it came first.", gives="a list of token ids")
def check_proposer(attempt: Callable[[list[int], int, int, int], list[int]]) -> None:
    """``attempt(token_ids, num_tokens, min_n, max_n)``: guesses of what follows."""
    rng = random.Random(16)
    cases = list(LOOKUPS)
    for _ in range(200):
        min_n = rng.randint(1, 3)
        text = [rng.choice((1, 2, 12)) for _ in range(rng.randint(1, 14))]  # 12 is no 1 and 2 in a row
        cases.append((text, rng.randint(1, 4), min_n, min_n + rng.randint(0, 2)))
    for token_ids, num_tokens, min_n, max_n in cases:
        given = list(token_ids)
        found = list(attempt(given, num_tokens, min_n, max_n))
        expect(given == token_ids, f"the list that you were given is {given} afterwards: leave it as it is.")
        right = NgramProposer(min_n, max_n).propose(token_ids, num_tokens)
        ngram = next((token_ids[-n:] for n in range(max_n, min_n - 1, -1) if _find(token_ids, n) is not None), [])
        why = f"{ngram} came before, first at place {_find(token_ids, len(ngram))}" if ngram else "none came before"
        expect(
            found == right,
            f"after {token_ids}, with n-grams of {min_n} to {max_n} tokens: {why}, so the guesses, at most "
            f"{num_tokens}, are {right}, and yours are {found}.",
        )


def _find(token_ids: list[int], n: int) -> int | None:
    """The first place before the last n-gram at which the same tokens stand, if there is one."""
    return next((i for i in range(len(token_ids) - n) if token_ids[i : i + n] == token_ids[-n:]), None)


@exercise("a pass gives what it should, and no more numbers are drawn than tokens come out.", gives="a list of tokens")
def check_verifier(attempt: Verify) -> None:
    """``attempt(guesses, draw)``: the tokens that a pass gives a sequence, in an engine that guesses."""
    for guesses, model in (
        ([], [7]),
        ([7], [7, 8]),
        ([7], [9, 8]),
        ([7, 8, 9], [7, 8, 9, 4]),
        ([7, 8, 9], [7, 5, 9, 4]),
        ([7, 8, 9], [7, 8, 6, 4]),
        ([7, 7, 7], [7, 7, 8, 7]),
        ([7, 9, 4], [9, 4, 5, 6]),
        ([7, 8, 9], [8, 9, 7, 6]),
    ):
        _try(attempt, guesses, model)

    def make(settings: Mapping[str, Any]) -> LLMEngine:
        engine = judges.make_engine(settings)
        engine.runner.verify = attempt  # type: ignore[attr-defined]
        return engine

    judges.judge_engine(
        make,
        [
            {**settings, "speculative_config": {"method": "ngram", "num_speculative_tokens": num}}
            for settings, num in zip(judges.SETTINGS, NUM_GUESSES)
        ],
    )


def _try(attempt: Verify, guesses: list[int], model: list[int]) -> None:
    """One pass: ``model`` is what it gives at each place if all guesses before are right."""
    num_calls, given = 0, list(guesses)

    def draw() -> int:
        nonlocal num_calls
        expect(
            num_calls < len(model),
            f"with {len(guesses)} guesses a pass has {len(model)} places, and yours draws at one place more.",
        )
        num_calls += 1
        return model[num_calls - 1]

    found = list(attempt(given, draw))
    expect(given == guesses, f"the guesses that you were given are {given} afterwards: leave them as they are.")
    wrong = next((i for i, (guess, token) in enumerate(zip(guesses, model)) if guess != token), len(guesses))
    right = model[: wrong + 1]
    expect(
        found == right,
        f"the guesses are {guesses}: drawn until one of them is wrong, or none is left, the pass's tokens are {right}, "
        f"and yours are {found}.",
    )
    expect(
        num_calls == len(right),
        f"with the guesses {guesses} {num_calls} tokens were drawn and {len(right)} came out: each draw uses up a "
        "random number of the sequence, which its next token should have had.",
    )


@exercise("a guess that was wrong uses up no random number.")
def check_seed_with_guesses(attempt: type) -> None:
    """``attempt``: a mended `folovllm.book.faults.UsesUpNumbers`."""
    expect_subclass(attempt, faults.UsesUpNumbers)
    judges.judge_runner(attempt, guessing=True)
