"""Checks of the exercises of chapter 11."""

from __future__ import annotations

from collections.abc import Callable

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import exercise, expect, expect_subclass, shown
from folovllm.config import SchedulerConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.request import Sequence, SequenceData
from folovllm.sampling_params import SamplingParams

TIGHT: tuple[dict[str, object], ...] = (
    {"max_num_seqs": 6, "block_size": 4, "num_blocks": 18, "max_num_batched_tokens": 70},
    {"max_num_seqs": 5, "block_size": 1, "num_blocks": 66},
    {"max_num_seqs": 6, "block_size": 4, "num_blocks": 20, "preemption_mode": "swap", "swap_space": 12.0},
)
"""Engines that run out of blocks; the last one swaps, and has no room for everybody."""


@exercise("the last to come makes room, and if nobody comes after it, it makes room itself.", gives="a list of numbers")
def check_victims(attempt: Callable[[list[int], list[int], int], list[int]]) -> None:
    """``attempt(held, needed, free)``: which sequences are preempted in a step, in that order."""
    cases: tuple[tuple[tuple[list[int], list[int], int], list[int], str], ...] = (
        (([2, 2, 2], [0, 0, 0], 0), [], "nobody needs a block"),
        (([2, 3, 1], [1, 0, 0], 1), [], "the free block is enough"),
        (([2, 3, 1], [1, 0, 0], 0), [2], "0 needs a block, and the last to come is 2"),
        (([2, 2, 2], [1, 1, 1], 2), [2], "the two free blocks go to 0 and 1, and 2 makes room itself"),
        (([2, 1, 1], [1, 1, 0], 0), [2, 1], "0 takes the block of 2, and nothing is left for 1 but to leave"),
        (([4, 1, 1, 3], [2, 2, 0, 1], 0), [3, 2], "of the three blocks of 3 one is left for 1, which needs two"),
        (([1, 1, 1, 1], [3, 1, 1, 1], 0), [3, 2, 1], "one block each is freed until there are three"),
        (([3, 1, 5], [0, 1, 0], 0), [2], "five blocks are freed, and one is needed"),
    )
    for (held, needed, free), right, why in cases:
        given = (list(held), list(needed))
        got = list(attempt(*given, free))
        asked = f"held {held}, needed {needed}, {free} free"
        expect(got == right, f"{asked}: {right} ({why}), yours says {got}.")
        expect(given == (held, needed), f"{asked}: right, but the lists you were given have been changed.")


@exercise("what fits beside the others' weights is nearly free to compute again, and swapping goes there and back.")
def check_cheaper(attempt: Callable[[int, int, float, float], str]) -> None:
    """``attempt(num_tokens, room, compute_us, move_us)``: "recompute" or "swap", whichever takes less time."""
    cases = (
        ((100, 250, 25.0, 3.0), "recompute", "100 tokens fit into the room and cost nothing"),
        ((400, 300, 20.0, 2.0), "swap", "100 tokens of 20 us are 2,000 us; 400 tokens twice over the bus are 1,600"),
        ((400, 300, 15.0, 2.0), "recompute", "100 tokens of 15 us are 1,500 us; moving takes 1,600, there and back"),
        ((4000, 200, 2.0, 3.0), "recompute", "the bus is slower for each token, so computing is always cheaper"),
        ((600, 200, 9.0, 3.0), "recompute", "both take 3,600 us, and then nothing need be moved"),
        ((1000, 900, 25.0, 1.0), "swap", "100 tokens of 25 us are 2,500 us, and moving takes 2,000"),
        ((10, 10, 25.0, 0.5), "recompute", "all 10 tokens fit into the room"),
        ((50, 0, 5.0, 2.0), "swap", "without room each of the 50 tokens costs 5 us, and 4 to move"),
    )
    for (num_tokens, room, compute_us, move_us), right, why in cases:
        got = attempt(num_tokens, room, compute_us, move_us)
        asked = (
            f"{num_tokens:,} tokens, room for {room}, {compute_us:g} us to compute one and {move_us:g} us to move it"
        )
        expect(got == right, f"{asked}: {right!r} ({why}), yours says {got!r}.")


@exercise("whoever has least to lose makes room, and nobody's text changes.")
def check_victim(attempt: type) -> None:
    """``attempt``: a `Scheduler` whose ``_choose_victim`` takes the one with the fewest computed tokens."""
    expect_subclass(attempt, Scheduler)
    cases = (
        ([9, 4, 6], 1, "4 tokens are the fewest"),
        ([3, 8, 12], 0, "3 tokens are the fewest, though it came first"),
        ([5, 7, 2], 2, "2 tokens are the fewest"),
        ([6, 4, 4, 5], 2, "of the two with 4 tokens the later one leaves"),
        ([8], 0, "there is nobody else"),
    )
    for computed, right, why in cases:
        cache = KVCacheManager(20, 4)
        scheduler = attempt(SchedulerConfig(max_num_batched_tokens=64, max_model_len=64), cache)
        candidates = [
            Sequence(f"s{i}", f"s{i}", SequenceData([5] * 20), SamplingParams(), num_computed_tokens=num)
            for i, num in enumerate(computed)
        ]
        served = Sequence("served", "served", SequenceData([5] * 20), SamplingParams(), num_computed_tokens=1)
        for seq in candidates:
            cache.allocate_slots(seq, 20 - seq.num_computed_tokens)
        given, scheduler.running, num_free = list(candidates), [served, *candidates], cache.pool.num_free
        victim = scheduler._choose_victim(given)
        where = next((i for i, seq in enumerate(candidates) if seq is victim), None)
        asked = f"candidates with {computed} computed tokens"
        expect(victim is not served, f"{asked}: yours chose one that this step has served and that is no candidate.")
        expect(where is not None, f"{asked}: one of the candidates is asked for, yours is {shown(victim)}.")
        expect(where == right, f"{asked}: number {right} ({why}), yours is number {where}.")
        kept = given == candidates and scheduler.running == [served, *candidates] and cache.pool.num_free == num_free
        expect(kept, f"{asked}: right, but only choose; the engine takes the victim's blocks and its place itself.")
    judges.judge_scheduler(attempt, settings=TIGHT)


@exercise("a sequence without blocks has nothing computed, and says so.")
def check_rambling(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.faults.KeepsItsCount` that is mended."""
    expect_subclass(attempt, faults.KeepsItsCount)
    judges.judge_scheduler(attempt, same_steps=True, settings=TIGHT)
