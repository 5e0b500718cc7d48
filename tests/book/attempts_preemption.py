"""Attempts at the exercises of chapter 11, wrong and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book import faults
from folovllm.core.scheduler import Scheduler
from folovllm.request import SequenceStatus


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


class GivesItsBlocksBack(Scheduler):
    def _choose_victim(self, candidates: list[Any]) -> Any:
        victim = min(reversed(candidates), key=lambda seq: seq.num_computed_tokens)
        self.cache.release(victim)
        return victim


class LeavesTheQueue(Scheduler):
    def _choose_victim(self, candidates: list[Any]) -> Any:
        victim = min(reversed(candidates), key=lambda seq: seq.num_computed_tokens)
        self.running.remove(victim)
        return victim


class KeepsItsStatus(faults.KeepsItsCount):
    def _put_back(self, seq: Any) -> None:
        seq.num_computed_tokens = 0
        self._enqueue(self.waiting, seq)


class ToTheEnd(faults.KeepsItsCount):
    def _put_back(self, seq: Any) -> None:
        seq.num_computed_tokens, seq.status = 0, SequenceStatus.WAITING
        self.waiting.append(seq)


class CountSetLater(faults.KeepsItsCount):
    def _put_back(self, seq: Any) -> None:
        super()._put_back(seq)
        seq.num_computed_tokens = 0


def victims_by_sums(held: list[int], needed: list[int], free: int) -> list[int]:
    left, num = [], len(held)
    while sum(needed[:num]) > free:
        num -= 1
        left.append(num)
        free += held[num]
    return left


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
        "their number": lambda held, needed, free: len(victims_by_sums(held, needed, free)),
        "what those who left would need, too": lambda held, needed, free: [
            i for i in reversed(range(len(held))) if sum(needed) > free + sum(held[i + 1 :])
        ],
        "one at most": lambda held, needed, free: victims_by_sums(held, needed, free)[:1],
    },
    "check_cheaper": {
        "always recompute": lambda *_: "recompute",
        "always swap": lambda *_: "swap",
        "one way": cheaper(swap=lambda num, move: num * move),
        "no room": cheaper(again=lambda num, room, compute: num * compute),
        "room for moving, too": lambda num, room, compute, move: cheaper()(max(0, num - room), 0, compute, move),
        "only what fits": lambda num, room, compute, move: "recompute" if num <= room else "swap",
        "capitals": lambda *args: cheaper()(*args).capitalize(),
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
        "takes it out of the queue": LeavesTheQueue,
        "takes its blocks": GivesItsBlocksBack,
        "the one with fewest blocks": choosing(lambda c: min(reversed(c), key=lambda seq: len(seq.block_ids))),
        "the whole line": choosing(lambda c: sorted(c, key=lambda seq: seq.num_computed_tokens)[:1]),
        "never the one that asks": choosing(lambda c: min(reversed(c[1:]), key=lambda seq: seq.num_computed_tokens)),
    },
    "check_rambling": {
        "as it was": type("Same", (faults.KeepsItsCount,), {}),
        "the prompt is not computed again": CountsLater,
        "the status is kept": KeepsItsStatus,
        "behind those who came later": ToTheEnd,
        "another class": Scheduler,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_victims": {"with a list of those still there": victims(), "by sums": victims_by_sums},
    "check_cheaper": {
        "two costs": cheaper(),
        "less than nothing": lambda num, room, compute, move: (
            "recompute" if (num - room) * compute <= 2 * num * move else "swap"
        ),
    },
    "check_victim": {
        "sorted by both": choosing(lambda c: min(enumerate(c), key=lambda p: (p[1].num_computed_tokens, -p[0]))[1])
    },
    "check_rambling": {"the real methods": RealOnes, "the count afterwards": CountSetLater},
}

SAME: dict[str, dict[str, str]] = {
    "check_cheaper": {
        "again = max(0, num_tokens - room) * compute_us → again = max(-1, num_tokens - room) * compute_us": (
            "a cost below nothing is below that of moving, as nothing is"
        ),
    },
}
