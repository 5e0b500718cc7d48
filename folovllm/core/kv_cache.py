"""Where keys and values live: blocks, who uses them, and which can be used again. Chapter 6 is about this module.

A sequence's table (``Sequence.block_ids``) lists its blocks in order; a block holds ``block_size`` tokens. A block may
stand in several tables: answers to one prompt share it until one of them writes (copy-on-write, Kwon et al. 2023,
section 4.4), and requests that begin alike share full blocks (prefix caching). This module moves numbers only; the
tensors are those of `folovllm.worker.model_runner`. As in vLLM (``v1/core/block_pool.py``,
``v1/core/kv_cache_manager.py``, 0.33.0).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from folovllm.request import Sequence


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """The name of a full block: of its tokens and of everything before them, which ``parent`` stands for.

    16 bytes of BLAKE2b, so that two different beginnings never meet, even when somebody tries.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks by number, how many tables each stands in, and the contents that are worth finding again.

    A block that nobody uses keeps its contents. Those that can be found again by their name are handed out last, the
    one that has waited longest first (least recently used); before them the others, the newest first, since its memory
    is the warmest. Every operation takes constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to be handed out stands first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that stand in no table."""
        return len(self._free)

    def allocate(self) -> int:
        """A block for one table; what it held is forgotten. There must be a free one."""
        block_id, _ = self._free.popitem(last=False)
        old = self._hashes[block_id]
        if old is not None:
            del self._by_hash[old]
            self._hashes[block_id] = None
        self.ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Adds the block to one more table; a free one is taken out of the queue, with its contents."""
        if self.ref_counts[block_id] == 0:
            del self._free[block_id]
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        """Takes the block out of one table; out of its last one, it joins the queue."""
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self._free[block_id] = None
            if self._hashes[block_id] is None:
                self._free.move_to_end(block_id, last=False)

    def remember(self, block_id: int, name: bytes) -> None:
        """Lets a full block be found by its name, unless another block has the same contents already."""
        if name not in self._by_hash and self._hashes[block_id] is None:
            self._by_hash[name] = block_id
            self._hashes[block_id] = name

    def find(self, name: bytes) -> int | None:
        """The block with these contents, used or free."""
        return self._by_hash.get(name)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Counts everything again.

        Raises:
            RuntimeError: if a block is lost, free and used at once, or counted wrong.
        """
        counted = Counter(block_id for table in tables for block_id in table)
        for block_id, count in enumerate(self.ref_counts):
            if count != counted[block_id] or (count == 0) != (block_id in self._free):
                raise RuntimeError(
                    f"block {block_id} has reference count {count}, stands in {counted[block_id]} tables and is "
                    f"{'' if block_id in self._free else 'not '}free; this is a bug of the engine's"
                )


@dataclass
class _Names:
    """The names of a sequence's full blocks, and how many of them the pool knows."""

    chain: list[bytes] = field(default_factory=list)
    num_remembered: int = 0


class KVCacheManager:
    """Gives sequences their blocks and takes them back.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens in one.
        enable_prefix_caching: whether full blocks are found again by later sequences.
        num_swap_blocks: blocks in CPU memory for sequences that had to make room.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = False, num_swap_blocks: int = 0
    ) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.pool, self.swap_pool = BlockPool(num_blocks), BlockPool(num_swap_blocks)
        self.copies: list[tuple[int, int]] = []
        """``(from, to)``: blocks to copy before the next forward pass writes."""
        self._names: dict[str, _Names] = {}
        self._swapped: dict[str, list[int]] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Gives ``seq`` room for its first ``num_tokens`` tokens, those not yet computed in blocks of its own.

        Returns:
            False, with nothing changed, if there are too few free blocks.
        """
        table, pool = seq.block_ids, self.pool
        num_new = self.num_blocks_for(num_tokens) - len(table)
        # Only a partly filled block can be both shared and written: the last one of a fork.
        first_written = seq.num_computed_tokens // self.block_size
        shared = first_written < len(table) and pool.ref_counts[table[first_written]] > 1
        if max(num_new, 0) + shared > pool.num_free:
            return False
        if shared:
            old, table[first_written] = table[first_written], pool.allocate()
            self.copies.append((old, table[first_written]))
            pool.release(old)
        for _ in range(num_new):
            table.append(pool.allocate())
        return True

    def take_prefix(self, seq: Sequence) -> int:
        """Fills the table of a sequence that has none with the cached blocks of its first tokens.

        The last token is never taken from the cache: somebody has to compute the logits after it.

        Returns:
            how many tokens that saves.
        """
        if not self.enable_prefix_caching or seq.sampling_params.prompt_logprobs is not None:
            return 0  # the log probabilities of a prompt are those of its own forward pass
        chain = self._name_blocks(seq, (seq.get_len() - 1) // self.block_size)
        for name in chain:
            block_id = self.pool.find(name)
            if block_id is None:
                break
            self.pool.share(block_id)
            seq.block_ids.append(block_id)
        self._names[seq.seq_id].num_remembered = len(seq.block_ids)
        return len(seq.block_ids) * self.block_size

    def remember(self, seq: Sequence) -> None:
        """Makes the blocks that ``seq`` has filled since the last call known to later sequences."""
        if not self.enable_prefix_caching:
            return
        num_full = seq.num_computed_tokens // self.block_size
        names = self._names.setdefault(seq.seq_id, _Names())
        if num_full > names.num_remembered:
            chain = self._name_blocks(seq, num_full)
            for i in range(names.num_remembered, num_full):
                self.pool.remember(seq.block_ids[i], chain[i])
            names.num_remembered = num_full

    def _name_blocks(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """The names of the first blocks of a sequence; each is worked out once."""
        chain = self._names.setdefault(seq.seq_id, _Names()).chain
        for i in range(len(chain), num_blocks):
            tokens = seq.data.get_token_ids(i * self.block_size, (i + 1) * self.block_size)
            chain.append(hash_block(chain[-1] if chain else b"", tokens))
        return chain[:num_blocks]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets ``child``, a fork of ``parent``, share its blocks."""
        for block_id in child.block_ids:
            self.pool.share(block_id)
        if parent.seq_id in self._names:
            names = self._names[parent.seq_id]
            self._names[child.seq_id] = _Names(list(names.chain), names.num_remembered)

    def release(self, seq: Sequence) -> None:
        """Takes back the blocks of a sequence that will need some again."""
        # The tail first: what waits longest is reused first, and beginnings are shared more often than ends.
        for block_id in reversed(seq.block_ids):
            self.pool.release(block_id)
        seq.block_ids.clear()

    def free(self, seq: Sequence) -> None:
        """Takes back everything that a sequence has, wherever it is."""
        self.release(seq)
        for block_id in self._swapped.pop(seq.seq_id, []):
            self.swap_pool.release(block_id)
        self._names.pop(seq.seq_id, None)

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
        """Brings a sequence's blocks back, and reserves room for its first ``num_tokens`` tokens.

        Returns:
            ``(CPU block, block)`` of each, or None, with nothing changed, if there are too few free blocks.
        """
        if self.num_blocks_for(num_tokens) > self.pool.num_free:
            return None
        cpu_ids = self._swapped.pop(seq.seq_id)
        if seq.seq_id in self._names:
            self._names[seq.seq_id].num_remembered = 0  # the pool does not know the new blocks
        for cpu_id in cpu_ids:
            seq.block_ids.append(self.pool.allocate())
            self.swap_pool.release(cpu_id)
        pairs = list(zip(cpu_ids, seq.block_ids))
        self.reserve(seq, num_tokens)
        return pairs

    def check_integrity(self, seqs: Iterable[Sequence]) -> None:
        """Counts all blocks of all unfinished sequences again.

        Raises:
            RuntimeError: if the books are wrong.
        """
        self.pool.check_integrity(seq.block_ids for seq in seqs)
        self.swap_pool.check_integrity(self._swapped.values())
