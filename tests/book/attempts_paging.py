"""Attempts at the exercises of chapter 10, wrong and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book import faults
from folovllm.core.kv_cache import BlockPool, KVCacheManager


def slots(slot: Callable[[list[int], int, int], int]) -> Callable[[list[int], int, int, int], list[int]]:
    """A slot mapping by a formula for one position."""
    return lambda table, first, num, size: [slot(table, p, size) for p in range(first, first + num)]


class ListPool:
    """A pool that is right; each of those below has one thing wrong."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.ref_counts, self.free = num_blocks, [0] * num_blocks, list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self) -> int:
        block_id = self.free.pop(0)
        self.ref_counts[block_id] = 1
        return block_id

    def touch(self, block_id: int) -> None:
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        self.ref_counts[block_id] -= 1
        if not self.ref_counts[block_id]:
            self.free.append(block_id)


class FreesAtOnce(ListPool):
    def release(self, block_id: int) -> None:
        self.ref_counts[block_id] -= 1
        self.free.append(block_id)


class NeverFrees(ListPool):
    def release(self, block_id: int) -> None:
        self.ref_counts[block_id] -= 1


class StoresNumFree(ListPool):
    num_free = 0

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.num_free = num_blocks


class CountsNothing(ListPool):
    def allocate(self) -> int:
        return self.free.pop()


class HandsOutTwice(ListPool):
    def allocate(self) -> int:
        self.ref_counts[self.free[0]] = 1
        return self.free[0]


class TouchIsForgotten(ListPool):
    def touch(self, block_id: int) -> None:
        pass


class NumFreeIsAMethod(ListPool):
    def num_free(self) -> int:  # type: ignore[override]
        return len(self.free)


class FromOne(ListPool):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.ref_counts, self.free = [0] * (num_blocks + 1), list(range(1, num_blocks + 1))


class CountsInADict(ListPool):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.ref_counts = {}  # type: ignore[assignment]


class NoListOfFree:
    """Right, and slower."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.ref_counts, self.num_free = num_blocks, [0] * num_blocks, num_blocks

    def allocate(self) -> int:
        block_id = self.ref_counts.index(0)
        self.ref_counts[block_id] = 1
        self.num_free -= 1
        return block_id

    def touch(self, block_id: int) -> None:
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        self.ref_counts[block_id] -= 1
        self.num_free += self.ref_counts[block_id] == 0


class AsksTheEngine(KVCacheManager):
    def allocate_slots(self, seq: Any, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        return super().allocate_slots(seq, num_tokens, full_sequence_must_fit)


class CopiesAll(KVCacheManager):
    """Copies whatever is shared, full blocks too."""

    def allocate_slots(self, seq: Any, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        table, pool = seq.block_ids, self.pool
        shared = [i for i, block_id in enumerate(table) if pool.ref_counts[block_id] > 1]
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new + len(shared) > pool.num_free:
            return False
        for i in shared:
            old, table[i] = table[i], pool.allocate()
            self.copies.append((old, table[i]))
            pool.release(old)
        table += [pool.allocate() for _ in range(num_new)]
        return True


def writing(
    room: Callable[[int, bool], int] = lambda num_new, shared: num_new + shared,
    pair: Callable[[int, int], tuple[int, int]] = lambda old, new: (old, new),
    release: bool = True,
    note: Callable[[list[Any], tuple[int, int]], list[Any]] = lambda copies, pair: [*copies, pair],
    last: Callable[[Any, int], int] = lambda seq, size: seq.num_computed_tokens // size,
) -> type:
    """A manager that copies on write; each part may be got wrong."""

    class Manager(KVCacheManager):
        def allocate_slots(self, seq: Any, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
            table, pool = seq.block_ids, self.pool
            num_new, index = self.num_blocks_for(num_tokens) - len(table), last(seq, self.block_size)
            shared = index < len(table) and pool.ref_counts[table[index]] > 1
            if room(num_new, shared) > pool.num_free:
                return False
            if shared:
                old, table[index] = table[index], pool.allocate()
                self.copies = note(self.copies, pair(old, table[index]))
                if release:
                    pool.release(old)
            table += [pool.allocate() for _ in range(num_new)]
            return True

    return Manager


class NoSecondFree(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        for block_id in seq.block_ids:
            self.pool.release(block_id)


class HeadFirst(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        seq.block_ids.reverse()
        KVCacheManager.release(self, seq)


class LastOneLast(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        last = seq.block_ids[-1:]
        super().release(seq)
        for block_id in last:
            self.pool.release(block_id)


class NoEmptyTable(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        self.pool.release(seq.block_ids[-1])
        super().release(seq)


class LastOneFirst(faults.LeaksABlock):
    """Right, and lets the faulty method do the rest."""

    def release(self, seq: Any) -> None:
        for block_id in seq.block_ids[-1:]:
            self.pool.release(block_id)
        super().release(seq)


class ByHand(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        while seq.block_ids:
            self.pool.release(seq.block_ids.pop())


class Mended(faults.LeaksABlock):
    def release(self, seq: Any) -> None:
        KVCacheManager.release(self, seq)


WRONG: dict[str, dict[str, Any]] = {
    "check_slot_mapping": {
        "positions": lambda table, first, num, size: list(range(first, first + num)),
        "the block only": slots(lambda table, p, size: table[p // size]),
        "the table by position": slots(lambda table, p, size: table[p % len(table)] * size),
        "no place in the block": slots(lambda table, p, size: table[p // size] * size),
        "the first block only": slots(lambda table, p, size: table[0] * size + p),
        "as if blocks were neighbours": slots(lambda table, p, size: table[0] * size + p % (size * len(table))),
        "from 0": lambda table, first, num, size: slots(lambda t, p, s: t[p // s] * s + p % s)(table, 0, num, size),
        "one too many": lambda table, first, num, size: [
            table[min(p // size, len(table) - 1)] * size + p % size for p in range(first, first + num + 1)
        ],
        "16 everywhere": slots(lambda table, p, size: table[p // 16] * 16 + p % 16),
    },
    "check_block_pool": {
        "frees at once": FreesAtOnce,
        "never frees": NeverFrees,
        "a number that never changes": StoresNumFree,
        "counts nothing": CountsNothing,
        "hands out twice": HandsOutTwice,
        "no second table": TouchIsForgotten,
        "a method for a property": NumFreeIsAMethod,
        "an object": ListPool(3),
        "numbers from 1": FromOne,
        "counts in a dict": CountsInADict,
        "the engine's own": BlockPool,
        "a child of the engine's": type("Mine", (BlockPool,), {}),
    },
    "check_allocate_slots": {
        "never copies": faults.WritesIntoShared,
        "forgets the contents": faults.CopyIsForgotten,
        "copies full blocks too": CopiesAll,
        "no room for the copy": writing(room=lambda num_new, shared: num_new),
        "the pair the wrong way round": writing(pair=lambda old, new: (new, old)),
        "the old block is never released": writing(release=False),
        "copies are not noted": writing(note=lambda copies, pair: copies),
        "only the newest copy is noted": writing(note=lambda copies, pair: [pair]),
        "the engine's own": KVCacheManager,
        "asks the engine": AsksTheEngine,
        "looks at the last block": writing(last=lambda seq, size: max(len(seq.block_ids) - 1, 0)),
        "an object": writing()(4, 4),
        "another class": ListPool,
    },
    "check_leak": {
        "still leaks": type("Same", (faults.LeaksABlock,), {}),
        "the table is kept": NoSecondFree,
        "the head first": HeadFirst,
        "the last one last": LastOneLast,
        "no empty table": NoEmptyTable,
        "another class": KVCacheManager,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_slot_mapping": {
        "by divmod": slots(lambda table, p, size: table[divmod(p, size)[0]] * size + divmod(p, size)[1]),
        "a tuple": lambda table, first, num, size: tuple(
            table[p // size] * size + p % size for p in range(first, first + num)
        ),
    },
    "check_block_pool": {"a list": ListPool, "no list": NoListOfFree},
    "check_allocate_slots": {"in parts": writing()},
    "check_leak": {"the real one": Mended, "the last one first": LastOneFirst, "by hand": ByHand},
}

SAME: dict[str, dict[str, str]] = {
    "check_allocate_slots": {
        "allocate_slots: full_sequence_must_fit as in the first call": "the exercise allows to ignore it",
        "def allocate_slots(self, seq, num_tokens, full_sequence_must_fit=False): → "
        "def allocate_slots(self, seq, num_tokens, full_sequence_must_fit=True):": "the exercise allows to ignore it",
    },
}
