"""Attempts at the exercises of chapter 16, wrong ones and right ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

from folovllm.book import faults
from folovllm.sample.speculative import NgramProposer
from folovllm.worker.model_runner import ModelRunner

Draw = Callable[[], int]


def look_up(
    ids: list[int], num: int, min_n: int, max_n: int, *, latest: bool = False, shortest: bool = False, end: int = 0
) -> list[int]:
    """The definition, with one thing that may be wrong about it."""
    lengths = range(min_n, max_n + 1) if shortest else range(max_n, min_n - 1, -1)
    for n in lengths:
        starts = range(len(ids) - n + end)
        for start in reversed(starts) if latest else starts:
            if ids[start : start + n] == ids[-n:]:
                return ids[start + n : start + n + num]
    return []


def as_a_string(ids: list[int], num: int, min_n: int, max_n: int) -> list[int]:
    """Right as long as each token has a single digit."""
    text = " ".join(map(str, ids))
    for n in range(max_n, min_n - 1, -1):
        ngram = " ".join(map(str, ids[-n:]))
        if (place := text.find(ngram)) < len(text) - len(ngram):
            return ids[place // 2 + n : place // 2 + n + num]
    return []


def eats_the_list(ids: list[int], num: int, min_n: int, max_n: int) -> list[int]:
    found = look_up(ids, num, min_n, max_n)
    ids.clear()
    return found


def all_or_nothing(guesses: list[int], draw: Draw) -> list[int]:
    tokens = [draw() for _ in [*guesses, None]]
    return tokens if tokens[:-1] == guesses else tokens[:1]


def draws_all(guesses: list[int], draw: Draw) -> list[int]:
    tokens = [draw() for _ in [*guesses, None]]
    right = next((i for i, (a, b) in enumerate(zip(tokens, guesses)) if a != b), len(guesses))
    return tokens[: right + 1]


def without_its_own(guesses: list[int], draw: Draw) -> list[int]:
    tokens: list[int] = []
    for guess in guesses:
        tokens.append(draw())
        if tokens[-1] != guess:
            break
    return tokens


def drops_the_wrong_one(guesses: list[int], draw: Draw) -> list[int]:
    tokens: list[int] = []
    for guess in guesses:
        token = draw()
        if token != guess:
            return tokens
        tokens.append(token)
    return [*tokens, draw()]


def goes_on(guesses: list[int], draw: Draw) -> list[int]:
    tokens = [draw()]
    for guess in guesses:
        if tokens[-1] == guess:
            tokens.append(draw())
    return tokens


def pops(guesses: list[int], draw: Draw) -> list[int]:
    tokens = [draw()]
    while guesses and guesses.pop(0) == tokens[-1]:
        tokens.append(draw())
    return tokens


def is_among_them(guesses: list[int], draw: Draw) -> list[int]:
    tokens = [draw()]
    while tokens[-1] in guesses and len(tokens) <= len(guesses):
        tokens.append(draw())
    return tokens


def recursive(guesses: list[int], draw: Draw) -> list[int]:
    token = draw()
    return [token, *recursive(guesses[1:], draw)] if guesses[:1] == [token] else [token]


class Untouched(faults.UsesUpNumbers):
    pass


class Mended(faults.UsesUpNumbers):
    _verify = ModelRunner._verify


class SavesTheState(faults.UsesUpNumbers):
    """Leaves the fault, and undoes it."""

    def _verify(self, logits: Any, seqs: Any, guesses: Any, draft_probs: Any) -> Any:
        output = ModelRunner._verify(self, logits, seqs, guesses, draft_probs)
        states = [cast(random.Random, seq.generator).getstate() for seq in seqs]
        for seq, state in zip(seqs, states):
            cast(random.Random, seq.generator).setstate(state)
        return output


class StartsAgain(faults.UsesUpNumbers):
    def _verify(self, logits: Any, seqs: Any, guesses: Any, draft_probs: Any) -> Any:
        output = super()._verify(logits, seqs, guesses, draft_probs)
        for seq in seqs:
            seq.generator = None
        return output


class OneTooFew(faults.UsesUpNumbers):
    def _verify(self, logits: Any, seqs: Any, guesses: Any, draft_probs: Any) -> Any:
        states = [cast(random.Random, seq.generator).getstate() if seq.generator else None for seq in seqs]
        output = super()._verify(logits, seqs, guesses, draft_probs)
        for seq, state, token_ids in zip(seqs, states, output.sampled_token_ids):
            if state is not None:
                cast(random.Random, seq.generator).setstate(state)
                for _ in token_ids[1:]:
                    cast(random.Random, seq.generator).random()
        return output


class GuessesNothing(faults.UsesUpNumbers):
    def _verify(self, logits: Any, seqs: Any, guesses: Any, draft_probs: Any) -> Any:
        return self._sample(logits[: len(seqs)], [(seq, 0) for seq in seqs])


WRONG: dict[str, dict[str, Any]] = {
    "check_proposer": {
        "the newest place": lambda ids, num, a, b: look_up(ids, num, a, b, latest=True),
        "the shortest first": lambda ids, num, a, b: look_up(ids, num, a, b, shortest=True),
        "finds itself": lambda ids, num, a, b: look_up(ids, num, a, b, end=1),
        "not the last place": lambda ids, num, a, b: look_up(ids, num, a, b, end=-1),
        "one token too many": lambda ids, num, a, b: look_up(ids, num + 1, a, b),
        "all that follow": lambda ids, num, a, b: look_up(ids, 10**6, a, b),
        "the longest alone": lambda ids, num, a, b: look_up(ids, num, b, b),
        "the shortest alone": lambda ids, num, a, b: look_up(ids, num, a, a),
        "down to one": lambda ids, num, a, b: look_up(ids, num, 1, b),
        "the n-gram as well": lambda ids, num, a, b: ids[-a:] + look_up(ids, num, a, b),
        "nothing": lambda ids, num, a, b: [],
        "the last tokens": lambda ids, num, a, b: ids[-num:],
        "changes the list": eats_the_list,
        "looked up in a string": as_a_string,
        "None where there is none": lambda ids, num, a, b: look_up(ids, num, a, b) or None,
    },
    "check_verifier": {
        "trusts": lambda guesses, draw: [*guesses, draw()],
        "the guesses alone": lambda guesses, draw: list(guesses),
        "one token": lambda guesses, draw: [draw()],
        "all or nothing": all_or_nothing,
        "draws at every place": draws_all,
        "no token after the last guess": without_its_own,
        "drops the wrong one": drops_the_wrong_one,
        "goes on after a wrong one": goes_on,
        "empties the list": pops,
        "any guess will do": is_among_them,
        "nothing": lambda guesses, draw: [],
        "a number": lambda guesses, draw: draw(),
    },
    "check_seed_with_guesses": {
        "nothing mended": Untouched,
        "a new generator each step": StartsAgain,
        "a number too few": OneTooFew,
        "checks no guess": GuessesNothing,
        "from scratch": ModelRunner,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_proposer": {
        "ours": lambda ids, num, a, b: NgramProposer(a, b).propose(ids, num),
        "the definition": look_up,
    },
    "check_verifier": {"recursive": recursive},
    "check_seed_with_guesses": {"the engine's own": Mended, "state put back": SavesTheState},
}

SAME: dict[str, dict[str, str]] = {}
"""Changes of a solution that mean the same, and why."""
