"""The KV cache's blocks: which sequences use them, and which can be reused. Chapters 10 and 13.

A sequence's table (``Sequence.block_ids``) lists its blocks in order; a block holds ``block_size`` tokens. A block may
be in several tables: answers to one prompt share it until one of them writes (copy-on-write, Kwon et al. 2023,
section 4.4), and requests with the same beginning share full blocks (prefix caching). This module handles block numbers
only; `folovllm.worker.model_runner` has the tensors. As in vLLM (``v1/core/block_pool.py``,
``v1/core/kv_cache_manager.py``, 0.33.0).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from folovllm.request import Sequence
from folovllm.utils import cdiv


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of a full block, chained through ``parent``, so it covers all earlier tokens.

    16 bytes of BLAKE2b: finding two prefixes with the same hash takes about 2**64 tries, with vLLM's default, SHA-256,
    2**128. Users who must not learn about each other's prompts from response times each get a ``cache_salt``, which is
    hashed in front of the first block.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def _before_the_first(cache_salt: str | None) -> bytes:
    """The parent of a first block; with a salt 64 bytes, so that no salt can be taken for the hash of a block."""
    return hashlib.blake2b(cache_salt.encode()).digest() if cache_salt else b""


class BlockPool:
    """Blocks by number, how many tables each is in, and the hashes by which full blocks are found again.

    A free block keeps its contents. Free blocks without a hash are handed out first, the one freed last before the
    others, since its memory is still in the processor's cache; then those with a hash, least recently used first.
    Every operation takes constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to be handed out is first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that are in no table."""
        return len(self._free)

    def allocate(self) -> int:
        """Takes a free block for one table; its old contents can no longer be found. There must be a free block."""
        block_id, _ = self._free.popitem(last=False)
        self.forget(block_id)
        self.ref_counts[block_id] = 1
        return block_id

    def touch(self, block_id: int) -> None:
        """Counts one more table for the block; a free block leaves the queue with its contents."""
        if self.ref_counts[block_id] == 0:
            del self._free[block_id]
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        """Counts one table less for the block; with none left it is free and joins the queue."""
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self._free[block_id] = None
            if self._hashes[block_id] is None:
                self._free.move_to_end(block_id, last=False)

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """Makes a full block findable by its hash, unless another block has the same hash already."""
        if block_hash not in self._by_hash and self._hashes[block_id] is None:
            self._by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def get_cached_block(self, block_hash: bytes) -> int | None:
        """The block with this hash, used or free; None if there is none."""
        return self._by_hash.get(block_hash)

    def forget(self, block_id: int) -> None:
        """Removes a block's hash, so that it is no longer found."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block_id] = None

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Recounts everything.

        Raises:
            RuntimeError: if a block is lost, free and used at once, or counted wrong.
        """
        counted = Counter(block_id for table in tables for block_id in table)
        for block_id, count in enumerate(self.ref_counts):
            if count != counted[block_id] or (count == 0) != (block_id in self._free):
                raise RuntimeError(
                    f"block {block_id} has reference count {count}, stands in {counted[block_id]} tables and is "
                    f"{'' if block_id in self._free else 'not '}free; this is a bug in the engine"
                )


@dataclass
class _Prefix:
    """The hashes of a sequence's full blocks, and how many of its blocks have been given to `BlockPool.cache_block`."""

    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0
    num_found_blocks: int = 0
    """Those at its beginning that others have computed."""
    reads_cache: bool = True
    """Whether it may find such blocks; no longer when some were spoiled."""


class KVCacheManager:
    """Gives sequences their blocks and takes them back.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        enable_prefix_caching: whether later sequences can reuse full blocks.
        num_swap_blocks: blocks in CPU memory, for preempted sequences.
    """

    block_pool_cls: type[BlockPool] = BlockPool
    """The class of both pools; a subclass may set its own."""
    hash_block = staticmethod(hash_block)
    """(hash of the previous block, token ids) -> the block's hash; a subclass may set its own."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = False, num_swap_blocks: int = 0
    ) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.pool, self.swap_pool = self.block_pool_cls(num_blocks), self.block_pool_cls(num_swap_blocks)
        self.copies: list[tuple[int, int]] = []
        """``(from, to)``: blocks to copy before the next forward pass writes."""
        self._prefixes: defaultdict[str, _Prefix] = defaultdict(_Prefix)
        self._swapped: dict[str, list[int]] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks needed for ``num_tokens`` tokens."""
        return cdiv(num_tokens, self.block_size)

    def allocate_slots(self, seq: Sequence, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        """Makes sure the first ``num_tokens`` tokens of ``seq`` have slots, those to be written in unshared blocks.

        Other sequences can find the blocks that these tokens fill from now on, before they are written. That is safe
        even in the same step, since each layer writes all new keys and values before it reads any.

        Args:
            seq: the sequence.
            num_tokens: tokens that must have a slot, guesses behind its own ones included.
            full_sequence_must_fit: whether there must be enough free blocks for all of its tokens, not only these.

        Returns:
            False, with nothing changed, if there are too few free blocks.
        """
        table, pool = seq.block_ids, self.pool
        num_new = self.num_blocks_for(num_tokens) - len(table)
        num_needed = self.num_blocks_for(seq.get_len()) - len(table) if full_sequence_must_fit else num_new
        # Only a partly filled block can be both shared and written: the last one of a fork.
        first_written = seq.num_computed_tokens // self.block_size
        shared = first_written < len(table) and pool.ref_counts[table[first_written]] > 1
        if max(num_needed, 0) + shared > pool.num_free:
            return False
        if shared:
            old, table[first_written] = table[first_written], pool.allocate()
            self.copies.append((old, table[first_written]))
            pool.release(old)
        for _ in range(num_new):
            table.append(pool.allocate())
        self.cache_blocks(seq, min(num_tokens, seq.get_len()))  # guesses are not its tokens yet
        return True

    def count_slots_left(self, seq: Sequence, num_tokens: int) -> int:
        """How many more tokens than ``num_tokens`` can have slots, in its blocks and all that are free."""
        return (len(seq.block_ids) + self.pool.num_free) * self.block_size - num_tokens

    def release_unused(self, seq: Sequence) -> None:
        """Frees the blocks behind the last computed token, which were allocated for guesses that were wrong."""
        for _ in range(len(seq.block_ids) - self.num_blocks_for(seq.num_computed_tokens)):
            self.pool.release(seq.block_ids.pop())

    def get_computed_blocks(self, seq: Sequence) -> int:
        """Fills an empty table with the cached blocks of the sequence's longest known prefix.

        The last token is always computed: its logits are needed, and the cache holds none.

        Returns:
            the number of tokens in these blocks, which need not be computed.
        """
        if not self.enable_prefix_caching or seq.sampling_params.skip_reading_prefix_cache:
            return 0
        prefix = self._prefixes[seq.seq_id]
        if not prefix.reads_cache:
            return 0
        for block_hash in self._hash_blocks(seq, (seq.get_len() - 1) // self.block_size):
            block_id = self.pool.get_cached_block(block_hash)
            if block_id is None:
                break
            self.pool.touch(block_id)
            seq.block_ids.append(block_id)
        prefix.num_cached_blocks = prefix.num_found_blocks = len(seq.block_ids)
        return len(seq.block_ids) * self.block_size

    def distrust(self, seq: Sequence) -> bool:
        """Makes nobody find the blocks of a sequence whose logits were no numbers, since theirs may be none either.

        Returns:
            whether it has found some of them itself, so that another's tokens may be to blame.
        """
        for block_id in seq.block_ids:
            self.pool.forget(block_id)
        prefix = self._prefixes[seq.seq_id]
        prefix.reads_cache = False  # so that it begins anew once, and not again by the next one's blocks
        return prefix.num_found_blocks > 0

    def cache_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Makes the blocks that the first ``num_tokens`` tokens of ``seq`` fill findable by later sequences."""
        if not self.enable_prefix_caching:
            return
        num_full = num_tokens // self.block_size
        prefix = self._prefixes[seq.seq_id]
        if num_full > prefix.num_cached_blocks:
            block_hashes = self._hash_blocks(seq, num_full)
            for i in range(prefix.num_cached_blocks, num_full):
                self.pool.cache_block(seq.block_ids[i], block_hashes[i])
            prefix.num_cached_blocks = num_full

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """The hashes of a sequence's first ``num_blocks`` blocks; each is computed once."""
        block_hashes = self._prefixes[seq.seq_id].block_hashes
        for i in range(len(block_hashes), num_blocks):
            parent = block_hashes[-1] if block_hashes else _before_the_first(seq.cache_salt)
            tokens = seq.data.get_token_ids(i * self.block_size, (i + 1) * self.block_size)
            block_hashes.append(self.hash_block(parent, tokens))
        return block_hashes[:num_blocks]

    def reset(self) -> None:
        """Makes all blocks free and empty, as at the beginning; the tables of sequences are no longer valid."""
        self.pool, self.swap_pool = (self.block_pool_cls(pool.num_blocks) for pool in (self.pool, self.swap_pool))
        self.copies.clear()
        self._prefixes.clear()
        self._swapped.clear()

    def reset_prefix_cache(self) -> bool:
        """Removes the hashes of all blocks, if none is in use (as vLLM: running sequences would go on from old blocks).

        Returns:
            whether the cache was reset.
        """
        if self.pool.num_free < self.pool.num_blocks or self._swapped:
            return False
        for block_id in range(self.pool.num_blocks):
            self.pool.forget(block_id)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Counts ``child``, a fork of ``parent``, as one more user of its blocks."""
        for block_id in child.block_ids:
            self.pool.touch(block_id)
        prefix = self._prefixes[parent.seq_id]
        self._prefixes[child.seq_id] = replace(prefix, block_hashes=list(prefix.block_hashes))

    def release(self, seq: Sequence) -> None:
        """Frees the blocks of a sequence that will run again; its hashes are kept."""
        # The tail first: of blocks that can be found again the one freed first is reused first, and beginnings are
        # shared more often than ends.
        for block_id in reversed(seq.block_ids):
            self.pool.release(block_id)
        seq.block_ids.clear()
        prefix = self._prefixes[seq.seq_id]
        prefix.num_cached_blocks = prefix.num_found_blocks = 0

    def free(self, seq: Sequence) -> None:
        """Frees everything that a sequence has, on the device and in CPU memory."""
        self.release(seq)
        for block_id in self._swapped.pop(seq.seq_id, []):
            self.swap_pool.release(block_id)
        self._prefixes.pop(seq.seq_id, None)

    def swap_out(self, seq: Sequence) -> list[tuple[int, int]] | None:
        """Moves a sequence's blocks to CPU memory.

        Returns:
            ``(block, CPU block)`` of each, or None, with nothing changed, if there is no room.
        """
        used = seq.block_ids[: self.num_blocks_for(seq.num_computed_tokens)]
        if len(used) > self.swap_pool.num_free:
            return None
        pairs = [(block_id, self.swap_pool.allocate()) for block_id in used]
        self.release(seq)
        self._swapped[seq.seq_id] = [cpu_id for _, cpu_id in pairs]
        return pairs

    def swap_in(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Moves a sequence's blocks back from CPU memory, and allocates slots for its first ``num_tokens`` tokens.

        Returns:
            ``(CPU block, block)`` of each, or None, with nothing changed, if there are too few free blocks.
        """
        if self.num_blocks_for(num_tokens) > self.pool.num_free:
            return None
        cpu_ids = self._swapped.pop(seq.seq_id)
        for cpu_id in cpu_ids:
            seq.block_ids.append(self.pool.allocate())
            self.swap_pool.release(cpu_id)
        pairs = list(zip(cpu_ids, seq.block_ids))
        self.allocate_slots(seq, num_tokens)
        return pairs

    def check_integrity(self, seqs: Iterable[Sequence]) -> None:
        """Recounts all blocks of all unfinished sequences.

        Raises:
            RuntimeError: if a reference count is wrong.
        """
        self.pool.check_integrity(seq.block_ids for seq in seqs)
        self.swap_pool.check_integrity(self._swapped.values())
