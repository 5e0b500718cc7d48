"""The books of the cache: blocks handed out, shared, found again, swapped, and all there at the end."""

from __future__ import annotations

import pytest

from folovllm import SamplingParams, Sequence, SequenceData
from folovllm.core.kv_cache import BlockPool, KVCacheManager, hash_block


def make(name="a", num_tokens=10, start=0, cache_salt=None, **params):
    data = SequenceData(list(range(start, start + num_tokens)))
    return Sequence(name, name, data, SamplingParams(**params), cache_salt=cache_salt)


def computed(cache, seq, num_tokens=None):
    """Allocates and computes a sequence, to its end or to ``num_tokens``."""
    num_tokens = num_tokens or seq.get_len()
    assert cache.allocate_slots(seq, num_tokens)
    seq.num_computed_tokens = num_tokens
    return seq


class TestHash:
    def test_it_depends_on_the_tokens_and_on_what_is_before_them(self):
        names = {hash_block(b"", [1, 2]), hash_block(b"", [2, 1]), hash_block(b"x", [1, 2]), hash_block(b"", [1, 2, 0])}
        assert len(names) == 4 and hash_block(b"", [1, 2]) in names


class TestBlockPool:
    def test_of_blocks_worth_finding_the_one_freed_first_is_used_first(self):
        pool = BlockPool(3)
        assert [pool.allocate() for _ in range(3)] == [0, 1, 2] and pool.num_free == 0
        for block_id in (1, 0, 2):
            pool.cache_block(block_id, bytes([block_id]))
            pool.release(block_id)
        assert [pool.allocate() for _ in range(3)] == [1, 0, 2]

    def test_blocks_with_nothing_to_find_are_used_before_all_others(self):
        pool = BlockPool(4)
        for _ in range(4):
            pool.allocate()
        pool.cache_block(1, b"hash")
        for block_id in (1, 0, 2):
            pool.release(block_id)
        assert [pool.allocate() for _ in range(3)] == [2, 0, 1]

    def test_a_free_block_is_found_until_it_is_handed_out(self):
        pool = BlockPool(2)
        block_id = pool.allocate()
        pool.cache_block(block_id, b"hash")
        pool.release(block_id)
        assert pool.get_cached_block(b"hash") == block_id and pool.num_free == 2
        pool.touch(block_id)
        assert pool.num_free == 1 and pool.ref_counts[block_id] == 1
        pool.release(block_id)
        pool.allocate(), pool.allocate()
        assert pool.get_cached_block(b"hash") is None

    def test_the_first_of_two_equal_blocks_keeps_the_hash(self):
        pool = BlockPool(2)
        for block_id in (pool.allocate(), pool.allocate()):
            pool.cache_block(block_id, b"hash")
        assert pool.get_cached_block(b"hash") == 0
        pool.release(1), pool.allocate()
        assert pool.get_cached_block(b"hash") == 0

    @pytest.mark.parametrize("tables", [[], [[0], [0]], [[0, 1]]])
    def test_wrong_books_are_noticed(self, tables):
        pool = BlockPool(2)
        pool.allocate()
        pool.check_integrity([[0]])
        with pytest.raises(RuntimeError, match="has reference count"):
            pool.check_integrity(tables)


class TestManager:
    def test_blocks_grow_with_the_tokens(self):
        cache, seq = KVCacheManager(4, 4), make()
        for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (10, 3)):
            assert cache.allocate_slots(seq, num_tokens) and len(seq.block_ids) == num_blocks
        assert not cache.allocate_slots(seq, 17) and len(seq.block_ids) == 3
        cache.free(seq)
        assert cache.pool.num_free == 4

    def test_a_fork_shares_and_the_first_who_writes_copies(self):
        cache, seq = KVCacheManager(8, 4), make(num_tokens=6)
        computed(cache, seq)
        child = seq.fork("b")
        cache.fork(seq, child)
        assert child.block_ids == seq.block_ids == [0, 1] and cache.pool.num_free == 6
        assert cache.allocate_slots(child, 7)
        assert (child.block_ids, cache.copies) == ([0, 2], [(1, 2)])
        assert cache.allocate_slots(seq, 7) and seq.block_ids == [0, 1] and cache.copies == [(1, 2)]
        cache.check_integrity([seq, child])

    def test_a_copy_needs_a_free_block(self):
        cache, seq = KVCacheManager(2, 4), make(num_tokens=6)
        computed(cache, seq)
        child = seq.fork("b")
        cache.fork(seq, child)
        assert not cache.allocate_slots(child, 7) and child.block_ids == [0, 1] and not cache.copies

    def test_a_full_shared_block_is_not_copied(self):
        cache, seq = KVCacheManager(4, 4), make(num_tokens=8)
        computed(cache, seq)
        child = seq.fork("b")
        cache.fork(seq, child)
        assert cache.allocate_slots(child, 9) and child.block_ids == [0, 1, 2] and not cache.copies

    @pytest.mark.parametrize("num_tokens, saved", [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8)])
    def test_full_blocks_but_never_the_last_token_come_from_the_cache(self, num_tokens, saved):
        cache = KVCacheManager(8, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make()))
        again = make("b", num_tokens)
        assert cache.get_computed_blocks(again) == saved and again.block_ids == [0, 1][: saved // 4]

    def test_another_beginning_is_another_block(self):
        cache = KVCacheManager(8, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make()))
        assert cache.get_computed_blocks(make("b", start=1)) == 0

    def test_nothing_is_found_when_caching_is_off_or_the_prompts_logprobs_are_asked_for(self):
        for cache, params in (
            (KVCacheManager(8, 4), {}),
            (KVCacheManager(8, 4, enable_prefix_caching=True), {"prompt_logprobs": 0}),
            (KVCacheManager(8, 4, enable_prefix_caching=True), {"skip_reading_prefix_cache": True}),
        ):
            cache.free(computed(cache, make()))
            assert cache.get_computed_blocks(make("b", **params)) == 0

    def test_whoever_says_so_finds_cached_blocks_though_prompt_logprobs_are_asked_for(self):
        cache = KVCacheManager(8, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make()))
        assert cache.get_computed_blocks(make("b", prompt_logprobs=0, skip_reading_prefix_cache=False)) == 8

    def test_no_salt_passes_for_the_hash_of_a_block(self):
        class Readable(KVCacheManager):
            hash_block = staticmethod(lambda parent, token_ids: parent + repr(token_ids).encode())

        cache = Readable(8, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make()))
        second_block_alone = make("b", num_tokens=6, start=4, cache_salt="[0, 1, 2, 3]")
        assert cache.get_computed_blocks(second_block_alone) == 0

    @pytest.mark.parametrize("salt, other, saved", [("x", "x", 8), ("x", "y", 0), ("x", None, 0), (None, "x", 0)])
    def test_only_those_with_the_same_salt_find_each_other(self, salt, other, saved):
        cache = KVCacheManager(8, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make(cache_salt=salt)))
        assert cache.get_computed_blocks(make("b", cache_salt=other)) == saved

    def test_a_block_is_found_from_the_moment_it_is_allocated_for_a_step(self):
        cache, seq, other = KVCacheManager(8, 4, enable_prefix_caching=True), make(), make("b")
        assert cache.allocate_slots(seq, 10) and seq.num_computed_tokens == 0
        assert cache.get_computed_blocks(other) == 8 and other.block_ids == seq.block_ids[:2]

    def test_after_a_reset_nothing_is_in_use_and_nothing_is_found(self):
        cache, seq, other = KVCacheManager(8, 4, enable_prefix_caching=True, num_swap_blocks=4), make(), make("b")
        assert cache.allocate_slots(seq, 10) and cache.allocate_slots(other, 10)
        other.num_computed_tokens = 10
        assert cache.swap_out(other)
        cache.reset()
        cache.check_integrity([])
        assert cache.get_computed_blocks(make("c")) == 0

    def test_the_whole_must_fit_though_only_a_part_is_allocated(self):
        cache, seq = KVCacheManager(2, 4), make(num_tokens=9)
        assert not cache.allocate_slots(seq, 4, full_sequence_must_fit=True) and seq.block_ids == []
        assert cache.allocate_slots(seq, 4) and seq.block_ids == [0]

    def test_the_prefix_cache_is_reset_only_when_no_block_is_in_use(self):
        cache, seq = KVCacheManager(8, 4, enable_prefix_caching=True), make()
        computed(cache, seq)
        assert not cache.reset_prefix_cache()
        cache.free(seq)
        assert cache.reset_prefix_cache() and cache.get_computed_blocks(make("b")) == 0

    def test_nor_while_a_swapped_sequence_has_its_blocks_elsewhere(self):
        cache = KVCacheManager(2, 4, enable_prefix_caching=True, num_swap_blocks=2)
        assert cache.swap_out(computed(cache, make(num_tokens=4))) is not None
        assert not cache.reset_prefix_cache()

    def test_a_tail_is_reused_before_its_head(self):
        cache = KVCacheManager(4, 4, enable_prefix_caching=True)
        cache.free(computed(cache, make(num_tokens=12)))
        computed(cache, make("other", 8, start=50))
        assert cache.get_computed_blocks(make("again", 12)) == 8

    def test_out_and_in_again(self):
        cache, seq = KVCacheManager(4, 4, True, num_swap_blocks=2), make(num_tokens=6)
        computed(cache, seq)
        assert cache.swap_out(seq) == [(0, 0), (1, 1)] and seq.block_ids == [] and cache.pool.num_free == 4
        other = computed(cache, make("b", 6, start=9))
        assert cache.swap_out(other) is None and other.block_ids == [1, 2]
        assert cache.swap_in(seq, 9) is None and cache.swap_pool.num_free == 0
        assert cache.swap_in(seq, 7) == [(0, 3), (1, 0)] and seq.block_ids == [3, 0]
        assert cache.swap_pool.num_free == 2 and cache.pool.num_free == 0
        cache.check_integrity([seq, other])

    def test_the_cost_of_a_step_does_not_grow_with_the_history(self):
        """Counted, not timed: hashing a new block touches that block's tokens only."""
        cache = KVCacheManager(2000, 4, enable_prefix_caching=True)
        seq = computed(cache, make(num_tokens=4000))
        asked = []
        original = seq.data.get_token_ids
        seq.data.get_token_ids = lambda start=0, end=None: asked.append((start, end)) or original(start, end)
        for _ in range(8):
            seq.add_token_id(1)
            computed(cache, seq)
        assert asked == [(4000, 4004), (4004, 4008)]

    def test_a_subclass_may_have_its_own_pool_and_its_own_hash(self):
        class Pool(BlockPool):
            pass

        class Manager(KVCacheManager):
            block_pool_cls = Pool

            @staticmethod
            def hash_block(parent, token_ids):
                return bytes(token_ids)  # forgets what is before a block

        cache = Manager(8, 4, enable_prefix_caching=True)
        assert type(cache.pool) is type(cache.swap_pool) is Pool
        cache.free(computed(cache, make("a", 8)))
        table = cache.get_computed_blocks(make("b", 8, start=4))
        assert table == 4  # tokens 4 to 7, found though others stand before them
