"""Faults to find: each is a part of the engine with one thing wrong, for the cases at the ends of chapters 8 to 18.

A fault is called by what users would report. Its class is a subclass of the part that it stands for, and overrides as
little as possible, so that it can be found by reading once it is known where to look. That the engine's own tests would
notice each of them is shown by ``tests/book/test_faults.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.book.few_bits import WeightReader, read_decoder
from folovllm.book.in_place import InPlaceAttention, OnlineSoftmax
from folovllm.core.kv_cache import BlockPool, KVCacheManager, hash_block
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.engine.beam_search import BeamSearch
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.llm_engine import LLMEngine
from folovllm.outputs import BeamSearchSequence, RunnerOutput
from folovllm.request import Sequence, SequenceStatus, StructuredOutputGrammar
from folovllm.sample.structured_output import GuidanceBackend
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.validation import require
from folovllm.worker.model_runner import ModelRunner


class ClosedForever(Scheduler):
    """Serves a static batch, and then no other."""

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        if self.config.batching == "continuous" or self._batch_is_open:
            super()._admit(output, budget)


class OverrunsBudget(Scheduler):
    """Gives the whole budget to whoever is admitted, whatever the running sequences have taken of it."""

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        super()._admit(output, self.max_num_batched_tokens)


class LongestFirst(Scheduler):
    """Serves first whoever has most tokens left to compute."""

    def schedule(self) -> SchedulerOutput:
        """Decides the next step."""
        self.running.sort(key=lambda seq: seq.num_computed_tokens - seq.get_len())
        return super().schedule()


class YoungestFirst(Scheduler):
    """Serves the last to come first."""

    def _rank(self, seq: Sequence) -> tuple[int, float, int, int]:
        priority, arrival_time, arrival, index = super()._rank(seq)
        return priority, -arrival_time, -arrival, index


class OldestIsVictim(Scheduler):
    """Takes the blocks of the sequence that has been served longest, when there are too few."""

    def _choose_victim(self, candidates: list[Sequence]) -> Sequence:
        return self.running[0]


class KeepsItsCount(Scheduler):
    """Takes a sequence's blocks, and goes on as if their tokens were still computed."""

    def _put_back(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.WAITING
        self._enqueue(self.waiting, seq)

    def _admit_waiting(self, seq: Sequence, output: SchedulerOutput, budget: int) -> int:
        kept = seq.num_computed_tokens
        num_new = super()._admit_waiting(seq, output, budget)
        if kept:
            seq.num_computed_tokens = kept
        return min(num_new, seq.get_len() - seq.num_computed_tokens)


class LeaksABlock(KVCacheManager):
    """Gives back all blocks of a sequence but the last."""

    def release(self, seq: Sequence) -> None:
        """Frees the blocks of a sequence that will run again."""
        del seq.block_ids[-1:]
        super().release(seq)


class WritesIntoShared(KVCacheManager):
    """Never copies: whoever writes, writes into the block that others read."""

    def allocate_slots(self, seq: Sequence, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        """Makes sure the first ``num_tokens`` tokens of ``seq`` have slots."""
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_ids)
        if num_new > self.pool.num_free:
            return False
        seq.block_ids += [self.pool.allocate() for _ in range(num_new)]
        self.cache_blocks(seq, num_tokens)
        return True


class CopyIsForgotten(KVCacheManager):
    """Gives a fork a block of its own to write into, without what stood in the shared one."""

    def allocate_slots(self, seq: Sequence, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        """Makes sure the first ``num_tokens`` tokens of ``seq`` have slots."""
        allocated = super().allocate_slots(seq, num_tokens, full_sequence_must_fit)
        self.copies.clear()
        return allocated


class HashWithoutParent(KVCacheManager):
    """Tells blocks apart by their own tokens, whatever stands before them."""

    @staticmethod
    def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
        """The hash of a block's tokens."""
        return hash_block(b"", token_ids)


class HashWithoutSalt(KVCacheManager):
    """Lets everybody find everybody's blocks."""

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        salt, seq.cache_salt = seq.cache_salt, None
        hashes = super()._hash_blocks(seq, num_blocks)
        seq.cache_salt = salt
        return hashes


class ForgetsNothing(BlockPool):
    """Hands out a block that can still be found by its old contents."""

    def allocate(self) -> int:
        """Takes a free block for one table."""
        block_id, _ = self._free.popitem(last=False)
        self.ref_counts[block_id] = 1
        return block_id


class StaleHashes(KVCacheManager):
    """Finds blocks by what stood in them once."""

    block_pool_cls = ForgetsNothing


class WholePromptCached(KVCacheManager):
    """Takes even a prompt's last token from the cache, which has no logits for it."""

    def get_computed_blocks(self, seq: Sequence) -> int:
        """Fills an empty table with the cached blocks of the sequence's longest known prefix."""
        num_cached = super().get_computed_blocks(seq)
        if self.enable_prefix_caching and num_cached + self.block_size == seq.get_len():
            block_id = self.pool.get_cached_block(self._hash_blocks(seq, seq.get_len() // self.block_size)[-1])
            if block_id is not None:
                self.pool.touch(block_id)
                seq.block_ids.append(block_id)
        return len(seq.block_ids) * self.block_size


class SlotOffByOneBlock(ModelRunner):
    """Writes the last token of each block one block further on than where it is read."""

    def prepare(self, scheduler_output: SchedulerOutput) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The flat tensors of a step."""
        input_ids, positions, metadata = super().prepare(scheduler_output)
        is_last = positions % self.block_size == self.block_size - 1
        num_slots = self.kv_cache.shape[self.backend_cls.block_dim] * self.block_size
        metadata.slot_mapping = (metadata.slot_mapping + is_last * self.block_size) % num_slots
        return input_ids, positions, metadata


class SharedGenerator(ModelRunner):
    """Draws for all sequences from the generator of whichever came first."""

    _generator: random.Random | None = None

    def _sample(self, logits: Tensor, sampled: list[tuple[Sequence, int]], *likeliest: Tensor) -> RunnerOutput:
        for seq, _ in sampled:
            seq.generator = self._generator
        output = super()._sample(logits, sampled, *likeliest)
        if sampled:
            self._generator = sampled[0][0].generator
        return output


class UsesUpNumbers(ModelRunner):
    """Uses up a random number for every guess, also for those behind a wrong one."""

    def _verify(
        self, logits: Tensor, seqs: list[Sequence], guesses: list[list[int]], draft_probs: Tensor | None
    ) -> RunnerOutput:
        output = super()._verify(logits, seqs, guesses, draft_probs)
        for seq, guessed, token_ids in zip(seqs, guesses, output.sampled_token_ids):
            for _ in range(len(guessed) + 1 - len(token_ids)):
                cast(random.Random, seq.generator).random()
        return output


class KeepsOldWeights(OnlineSoftmax):
    """Goes on with a new maximum, and leaves what was added up by the old one as it is."""

    def rescale(self, maximum: Tensor) -> None:
        """Makes what has been added up so far relative to a new maximum."""
        self.maximum = maximum


class NeverRescales(InPlaceAttention):
    """Reads block after block, and weighs the keys of the first ones too much."""

    softmax_cls = KeepsOldWeights


class ZerosAsStored(WeightReader):
    """Takes zero points as they stand in the file, whoever wrote it."""

    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        """The zero points, uint8 ``[num_out, num_groups]``."""
        return super().read_zeros(qzeros, num_out, version=2)


class CountsThePrompt(BeamSearch):
    """Divides the log probability of an answer by the length of prompt and answer."""

    def score(self, text: BeamSearchSequence) -> float:
        """What texts that have ended are ranked by."""
        return text.cum_logprob / len(text.tokens) ** self.params.length_penalty


class OnePlace(StructuredOutputGrammar):
    """A grammar whose copies are other names for the same place."""

    def __init__(self, place: StructuredOutputGrammar) -> None:
        self.place, self.vocab_size = place, place.vocab_size

    def accept_tokens(self, token_ids: SequenceOf[int]) -> bool:
        """Goes on by these tokens."""
        return self.place.accept_tokens(token_ids)

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        """Sets the bits of the tokens that may come next."""
        self.place.fill_bitmask(bitmask, row)

    def copy(self) -> StructuredOutputGrammar:
        """Another one in the same place."""
        return OnePlace(self.place)


class OnePlaceForAll(GuidanceBackend):
    """Lets all answers to a prompt share one place in its grammar."""

    def compile_grammar(self, structured_outputs: StructuredOutputsParams) -> Any:
        """What an answer must be, at its beginning."""
        return OnePlace(super().compile_grammar(structured_outputs))


class HalfCharacters(Detokenizer):
    """Decodes each token for itself."""

    def _read_tokens(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self._text += self._decode([token_id])


class StopNotHeldBack(Detokenizer):
    """Shows all of the text at once, even what may turn out to be the beginning of a stop string."""

    def visible_text(self) -> str:
        """The text to stream."""
        return self.text


class StopWithinOneToken(Detokenizer):
    """Looks for stop strings in the newest token's text alone."""

    def _find_stop(self, before: int) -> str | None:
        newest = self._text[before:]
        return super()._find_stop(before) if any(stop in newest for stop in self.stops) else None


FAULTS: dict[str, type[Any]] = {
    "the second batch never starts": ClosedForever,
    "a step is larger than its budget": OverrunsBudget,
    "a stream freezes while a prompt is read": LongestFirst,
    "some never get an answer": YoungestFirst,
    "the oldest makes room": OldestIsVictim,
    "after a preemption a text rambles": KeepsItsCount,
    "memory runs out by evening": LeaksABlock,
    "two answers write into each other": WritesIntoShared,
    "an answer forgets how its prompt ended": CopyIsForgotten,
    "somebody else's beginning": HashWithoutParent,
    "a stranger's prompt is fast": HashWithoutSalt,
    "yesterday's words": StaleHashes,
    "asking again hangs": WholePromptCached,
    "a token is lost at each border of two blocks": SlotOffByOneBlock,
    "a seed that does not hold": SharedGenerator,
    "guesses change what is drawn": UsesUpNumbers,
    "only long texts ramble": NeverRescales,
    "some quantized models talk nonsense": ZerosAsStored,
    "the longer the prompt, the shorter the answer": CountsThePrompt,
    "several answers break off": OnePlaceForAll,
    "broken letters": HalfCharacters,
    "the text takes words back": StopNotHeldBack,
    "a stop string that does not stop": StopWithinOneToken,
}
"""What users would report -> the part of the engine that is to blame."""


def plant(engine: LLMEngine, fault: str) -> LLMEngine:
    """Puts a faulty part in the place of the engine's own.

    Args:
        engine: an idle one; what its prefix cache holds is lost.
        fault: a name of `FAULTS`.

    Raises:
        ValueError: if there is no such fault, or the engine has unfinished requests.
    """
    require(fault in FAULTS, f"fault must be one of {', '.join(map(repr, FAULTS))}, got {fault!r}")
    return replace_part(engine, FAULTS[fault])


def replace_part(engine: LLMEngine, part: type[Any]) -> LLMEngine:
    """Gives an idle engine another part, by its class; of a backend of grammars ``compile_grammar`` is all it needs.

    A weight reader reads the engine's weights again, from its folder in GPTQ's format.

    Raises:
        ValueError: if there is no such part, or the engine has unfinished requests.
    """
    require(not engine.has_unfinished_requests(), "a part can only be replaced while no request is unfinished")
    scheduler_cls: type[Scheduler] = type(engine.scheduler)
    if issubclass(part, Detokenizer):
        engine.output_processor.detokenizer_cls = part
        return engine
    if hasattr(part, "compile_grammar"):
        inputs = engine.input_processor
        inputs.structured_output_backend = part(engine.tokenizer, inputs.vocab_size, engine.eos_token_ids)
        return engine
    if issubclass(part, AttentionBackend):
        runner = cast(ModelRunner, engine.runner)
        runner.set_attention_backend(part)
        runner.initialize_kv_cache(engine.cache.pool.num_blocks, engine.cache.swap_pool.num_blocks)
        return engine
    if issubclass(part, WeightReader):
        folder, num_positions = Path(engine.config.model_config.model), engine.max_model_len
        engine.decoder = read_decoder(folder, part(), num_positions)
        part = type(engine.runner)
    if issubclass(part, ModelRunner):
        old = cast(ModelRunner, engine.runner)
        runner = part(engine.decoder, old.sampler, engine.config, old.draft)
        runner.initialize_kv_cache(engine.cache.pool.num_blocks, engine.cache.swap_pool.num_blocks)
        engine.runner = runner
        return engine
    if issubclass(part, KVCacheManager):
        cache = engine.cache
        num_blocks, num_swap_blocks = cache.pool.num_blocks, cache.swap_pool.num_blocks
        engine.cache = part(num_blocks, cache.block_size, cache.enable_prefix_caching, num_swap_blocks)
    else:
        require(
            issubclass(part, Scheduler),
            "a part must be a Scheduler, KVCacheManager, ModelRunner, AttentionBackend, Detokenizer or WeightReader, "
            f"got {part.__name__}",
        )
        scheduler_cls = part
    engine.scheduler = scheduler_cls(engine.config.scheduler_config, engine.cache)
    return engine
