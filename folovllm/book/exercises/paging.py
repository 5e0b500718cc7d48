"""Checks of the exercises of chapter 10."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import NotYet, exercise, expect, expect_own, expect_subclass
from folovllm.core.kv_cache import BlockPool, KVCacheManager
from folovllm.request import Sequence, SequenceData
from folovllm.sampling_params import SamplingParams

SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 6, "block_size": 4, "num_blocks": 60},
    {"max_num_seqs": 6, "block_size": 4, "num_blocks": 18, "max_num_batched_tokens": 70},
    {"max_num_seqs": 4, "block_size": 1, "num_blocks": 66, "preemption_mode": "swap", "swap_space": 40.0},
)
"""An engine with enough blocks, one with too few, and one that swaps."""


def _run_engines(manager: type[KVCacheManager]) -> None:
    """Random requests, forks and aborts among them, on engines with this cache manager."""
    for seed, settings in enumerate(SETTINGS):
        judges.run_watched(judges.make_engine, {**settings, "kv_cache_manager_cls": manager}, seed)


@exercise("the table says which block, and the place in the block is the same everywhere.", gives="a list of slots")
def check_slot_mapping(attempt: Callable[[list[int], int, int, int], list[int]]) -> None:
    """``attempt(block_table, first, num_new, block_size)``: the slots of ``num_new`` tokens from position ``first``."""
    cases = (
        (([2], 0, 3, 4), [8, 9, 10], "block 2 begins at slot 8"),
        (([5, 1, 0, 3], 6, 1, 2), [6], "position 6 is the first of its fourth block, and that is block 3"),
        (([7, 2], 2, 4, 3), [23, 6, 7, 8], "position 2 is the last of block 7, position 3 the first of block 2"),
        (([4, 9, 0], 1, 2, 1), [9, 0], "with one token per block a slot is a block"),
        (([1, 0, 6], 0, 10, 4), [4, 5, 6, 7, 0, 1, 2, 3, 24, 25], "blocks may lie in any order"),
    )
    for (table, first, num_new, size), right, why in cases:
        given = list(table)
        got = [int(slot) for slot in attempt(given, first, num_new, size)]
        asked = f"table {table}, blocks of {size}, positions {first} to {first + num_new - 1}"
        expect(got == right, f"{asked}: {right} ({why}), yours says {got}.")
        expect(given == table, f"{asked}: the slots are right, but the table you were given is {given} afterwards.")


class _Recounts:
    """What the engine asks of a pool beside the work itself: to be recounted."""

    num_blocks: int
    num_free: int
    ref_counts: list[int]

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Compares the counts with the tables; raises RuntimeError as the engine's own pool does."""
        counted = Counter(block_id for table in tables for block_id in table)
        for block_id, count in enumerate(self.ref_counts):
            if count != counted[block_id]:
                raise RuntimeError(f"block {block_id} has count {count} and stands in {counted[block_id]} tables")
        free = self.num_blocks - len(counted)
        if self.num_free != free:
            raise RuntimeError(f"{free} blocks are in no table, and num_free is {self.num_free}")


@exercise("a block is free when it stands in no table, and the engine runs on your pool.")
def check_block_pool(attempt: type) -> None:
    """``attempt``: a class with ``num_blocks``, ``num_free``, ``ref_counts``, ``allocate``, ``touch``, ``release``."""
    expect(isinstance(attempt, type), "a class is asked for, and yours is none.")
    is_own = not issubclass(attempt, BlockPool)
    expect(is_own, "a pool of your own is asked for, and yours does its work by the engine's BlockPool.")
    for num_blocks in (1, 3):
        _take_all_and_give_back(attempt(num_blocks), num_blocks)
    _live(attempt(5), 5)

    class Pool(attempt, _Recounts):  # type: ignore[misc, valid-type]
        pass

    class Manager(KVCacheManager):
        block_pool_cls = Pool

    _run_engines(Manager)


def _take(pool: Any, used: Iterable[int]) -> int:
    block_id = pool.allocate()
    valid = isinstance(block_id, int) and 0 <= block_id < len(pool.ref_counts)
    expect(valid, f"allocate gives a block's number below {len(pool.ref_counts)}, yours gave {block_id!r}.")
    expect(block_id not in used, f"allocate gave block {block_id}, which is still in a table.")
    expect(pool.ref_counts[block_id] == 1, f"ref_counts of a new block is 1, yours is {pool.ref_counts[block_id]}.")
    return block_id


def _count(pool: Any, free: int, when: str) -> None:
    found = pool.num_free
    expect(not callable(found), "num_free is asked for as a number: write @property above it.")
    expect(found == free, f"{when}: num_free should be {free}, yours is {found!r}.")


def _take_all_and_give_back(pool: Any, num_blocks: int) -> None:
    """Each block once, then each back; one of them is shared meanwhile."""
    expect(pool.num_blocks == num_blocks, f"num_blocks of a pool of {num_blocks} is {pool.num_blocks!r}.")
    counted = len(pool.ref_counts)
    expect(
        counted == num_blocks, f"a pool of {num_blocks} has as many ref_counts, one for each block; yours {counted}."
    )
    _count(pool, num_blocks, f"in a new pool of {num_blocks}")
    used: list[int] = []
    for _ in range(num_blocks):
        used.append(_take(pool, used))
        _count(pool, num_blocks - len(used), f"after allocating {len(used)} of {num_blocks}")
    shared = used[0]
    pool.touch(shared)
    expect(pool.ref_counts[shared] == 2, f"touched once, a block is in 2 tables, yours says {pool.ref_counts[shared]}.")
    pool.release(shared)
    expect(pool.ref_counts[shared] == 1, f"in 2 tables and released once: 1, yours says {pool.ref_counts[shared]}.")
    _count(pool, 0, "a shared block, released by one of its two tables")
    for given, block_id in enumerate(used, 1):
        pool.release(block_id)
        expect(
            pool.ref_counts[block_id] == 0, f"released by its last table: 0, yours says {pool.ref_counts[block_id]}."
        )
        _count(pool, given, f"after giving back {given} of {num_blocks}")
    expect(_take(pool, ()) in used, "a block that was given back can be handed out again.")


def _live(pool: Any, num_blocks: int, num_steps: int = 200) -> None:
    """Allocates, shares and releases at random, and recounts after each time."""
    rng, counts = random.Random(7), dict.fromkeys(range(num_blocks), 0)
    for _ in range(num_steps):
        used = [block_id for block_id, count in counts.items() if count]
        action = rng.choice(("allocate", "touch", "release", "release"))
        if action == "allocate" and len(used) < num_blocks:
            counts[_take(pool, used)] = 1
        elif action != "allocate" and used:
            block_id = rng.choice(used)
            counts[block_id] += 1 if action == "touch" else -1
            (pool.touch if action == "touch" else pool.release)(block_id)
        right = list(counts.values())
        expect(list(pool.ref_counts) == right, f"after {action}: ref_counts {right}, yours are {pool.ref_counts}.")
        _count(pool, right.count(0), f"with ref_counts {right}")


@exercise("shared blocks are only read, and whoever writes has a copy first.")
def check_allocate_slots(attempt: type) -> None:
    """``attempt``: a `KVCacheManager` with an ``allocate_slots`` of the reader's."""
    expect_subclass(attempt, KVCacheManager)
    expect_own(attempt, KVCacheManager, "allocate_slots")
    for size, num_tokens in ((4, 6), (8, 9)):
        _write_into_a_fork(attempt, size, num_tokens)
    _write_into_three(attempt)
    _grow_beside_a_full_block(attempt)
    _too_few_blocks(attempt)
    _run_engines(attempt)


def _forked(cache: Any, num_tokens: int) -> tuple[Sequence, Sequence]:
    """A sequence whose tokens are computed, and a fork of it, each with one more token to compute."""
    parent = Sequence("a", "a", SequenceData(list(range(3, 3 + num_tokens))), SamplingParams())
    _expect_slots(cache, parent, num_tokens, True)
    parent.num_computed_tokens = num_tokens
    child = parent.fork("b")
    cache.fork(parent, child)
    for seq in (parent, child):
        seq.add_token_id(7)
    return parent, child


def _expect_slots(cache: Any, seq: Sequence, num_tokens: int, enough: bool, why: str = "") -> None:
    asked = f"{num_tokens} tokens in blocks of {cache.block_size}, {cache.pool.num_free} blocks free{why}"
    before, num_before = list(seq.block_ids), len(cache.copies)
    try:
        found = cache.allocate_slots(seq, num_tokens)
    except KeyError:  # from the pool
        raise NotYet(f"{asked}, table {before}: {enough}, yours takes a block where none is free.") from None
    expect(found is enough, f"{asked}, table {before}: {enough}, yours says {found!r}.")
    kept = (before, num_before) == (seq.block_ids, len(cache.copies))
    expect(enough or kept, f"{asked}: False, but the table {before} or the copies have been changed.")
    right = cache.num_blocks_for(num_tokens)
    expect(not enough or len(seq.block_ids) == right, f"{asked}: a table of {right}, yours is {seq.block_ids}.")


def _write_into_a_fork(attempt: type, size: int, num_tokens: int) -> None:
    cache = attempt(6, size)
    parent, child = _forked(cache, num_tokens)
    shared, old = cache.num_blocks_for(num_tokens) - 1, parent.block_ids[-1]
    _expect_slots(cache, parent, num_tokens + 1, True)
    new = parent.block_ids[shared]
    expect(new != old, f"a fork shares block {old}, which is partly full, and the one that writes got no copy of it.")
    expect(cache.copies == [(old, new)], f"copies should be [({old}, {new})], (from, to), yours are {cache.copies}.")
    counts = [cache.pool.ref_counts[block_id] for block_id in (old, new)]
    expect(counts == [1, 1], f"after the copy old and new block are in one table each, yours say {counts}.")
    _expect_slots(cache, child, num_tokens + 1, True)
    alone = child.block_ids[shared] == old and len(cache.copies) == 1
    expect(alone, f"the last to write into block {old} has it alone and needs no copy.")


def _write_into_three(attempt: type) -> None:
    cache = attempt(8, 4)
    parent, child = _forked(cache, 6)
    other = child.fork("c")
    cache.fork(child, other)
    for seq in (parent, child, other):
        _expect_slots(cache, seq, 7, True)
    (_, old), right = other.block_ids, [(other.block_ids[1], seq.block_ids[1]) for seq in (parent, child)]
    expect(
        cache.copies == right,
        f"of three that share block {old} two write in one step: copies should be {right}, yours are {cache.copies}.",
    )


def _grow_beside_a_full_block(attempt: type) -> None:
    cache = attempt(5, 4)
    parent, child = _forked(cache, 8)
    _expect_slots(cache, child, 9, True)
    shared = parent.block_ids == child.block_ids[:2] and not cache.copies
    expect(shared, "full blocks are only read, so they stay shared and nothing is copied.")


def _too_few_blocks(attempt: type) -> None:
    cache = attempt(2, 4)
    parent, child = _forked(cache, 6)
    _expect_slots(cache, parent, 7, False, " and one needed for a copy")
    cache = attempt(3, 4)
    parent, child = _forked(cache, 6)
    _expect_slots(cache, child, 9, False, " and two needed, for a copy and for the ninth token")
    _expect_slots(cache, child, 7, True)
    cache = attempt(3, 4)
    parent, child = _forked(cache, 4)
    _expect_slots(cache, parent, 12, True)
    _expect_slots(cache, child, 5, False)


@exercise("what was taken comes back, to the last block, whatever happens to a request.")
def check_leak(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.faults.LeaksABlock` that leaks no more."""
    expect_subclass(attempt, faults.LeaksABlock)
    _run_engines(attempt)
    cache = attempt(9, 4, True)
    seq = Sequence("a", "a", SequenceData(list(range(3, 15))), SamplingParams())
    cache.allocate_slots(seq, 12)
    order = list(seq.block_ids)
    cache.release(seq)
    expect(not seq.block_ids, f"a sequence without blocks has an empty table, yours is {seq.block_ids}.")
    taken = [cache.pool.allocate() for _ in range(9)][-3:]
    expect(
        taken == order[::-1],
        f"the blocks {order} should be released from the tail, so that the head is found longest: the next to be "
        f"handed out should be {order[::-1]}, with yours it is {taken}.",
    )
