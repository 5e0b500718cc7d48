"""Attempts at the exercises of chapter 11, wrong and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book import faults
from folovllm.core.scheduler import Scheduler


def victims(
    last: Callable[[list[int], list[int]], int] = lambda still, held: still[-1],
    takes: bool = True,
    frees: Callable[[int], int] = lambda held: held,
    stops: bool = True,
) -> Callable[[list[int], list[int], int], list[int]]:
    """Goes through the running sequences; each part may be got wrong."""

    def attempt(held: list[int], needed: list[int], free: int) -> list[int]:
        still, left = list(range(len(held))), []
        for i in range(len(held)):
            while i in still and needed[i] > free and (stops or still[-1] != i):
                victim = last(still, held)
                still.remove(victim)
                left.append(victim)
                free += frees(held[victim])
            if i in still and takes:
                free -= needed[i]
        return left

    return attempt


def choosing(choose: Callable[[list[Any]], Any]) -> type:
    """A scheduler with this rule."""
    return type("Chooses", (Scheduler,), {"_choose_victim": lambda self, candidates: choose(candidates)})


def pops(candidates: list[Any]) -> Any:
    victim = min(reversed(candidates), key=lambda seq: seq.num_computed_tokens)
    candidates.remove(victim)
    return victim


class CountsLater(faults.KeepsItsCount):
    def _put_back(self, seq: Any) -> None:
        super()._put_back(seq)
        seq.num_computed_tokens = seq.get_prompt_len()


class RealOnes(faults.KeepsItsCount):
    _put_back = Scheduler._put_back
    _admit_waiting = Scheduler._admit_waiting


def cheaper(
    again: Callable[[int, int, float], float] = lambda num, room, compute: max(0, num - room) * compute,
    swap: Callable[[int, float], float] = lambda num, move: 2 * num * move,
    tie: str = "recompute",
) -> Callable[[int, int, float, float], str]:
    """Compares two costs; each may be got wrong."""

    def attempt(num_tokens: int, room: int, compute_us: float, move_us: float) -> str:
        one, two = again(num_tokens, room, compute_us), swap(num_tokens, move_us)
        return tie if one == two else "swap" if two < one else "recompute"

    return attempt


WRONG: dict[str, dict[str, Any]] = {
    "check_victims": {
        "the last, whoever asks": lambda held, needed, free: [len(held) - 1] if sum(needed) > free else [],
        "nobody": lambda held, needed, free: [],
        "the first": victims(last=lambda still, held: still[0]),
        "the largest": victims(last=lambda still, held: max(still, key=lambda i: held[i])),
        "nothing is taken": victims(takes=False),
        "one block is freed": victims(frees=lambda held: 1),
        "nobody leaves itself": victims(stops=False),
        "sorted": lambda held, needed, free: sorted(victims()(held, needed, free)),
    },
    "check_cheaper": {
        "always recompute": lambda *_: "recompute",
        "always swap": lambda *_: "swap",
        "one way": cheaper(swap=lambda num, move: num * move),
        "no room": cheaper(again=lambda num, room, compute: num * compute),
        "less than nothing": cheaper(again=lambda num, room, compute: abs(num - room) * compute),
        "swaps at a tie": cheaper(tie="swap"),
        "all once the room is full": cheaper(again=lambda num, room, compute: num * compute if num > room else 0),
    },
    "check_victim": {
        "the last": Scheduler,
        "the oldest": faults.OldestIsVictim,
        "the first of equals": choosing(lambda c: min(c, key=lambda seq: seq.num_computed_tokens)),
        "the one with most to lose": choosing(lambda c: max(c, key=lambda seq: seq.num_computed_tokens)),
        "the shortest text": choosing(lambda c: min(reversed(c), key=lambda seq: seq.get_len())),
        "its number": choosing(lambda c: min(seq.num_computed_tokens for seq in c)),
        "takes it out of the list": choosing(pops),
    },
    "check_rambling": {
        "as it was": type("Same", (faults.KeepsItsCount,), {}),
        "the prompt is not computed again": CountsLater,
        "another class": Scheduler,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_victims": {"with a list of those still there": victims()},
    "check_cheaper": {"two costs": cheaper()},
    "check_victim": {
        "sorted by both": choosing(lambda c: min(enumerate(c), key=lambda p: (p[1].num_computed_tokens, -p[0]))[1])
    },
    "check_rambling": {"the real methods": RealOnes},
}

SAME: dict[str, dict[str, str]] = {
    "check_cheaper": {
        "again = max(0, num_tokens - room) * compute_us → again = max(-1, num_tokens - room) * compute_us": (
            "a cost below nothing is below that of moving, as nothing is"
        ),
    },
}
