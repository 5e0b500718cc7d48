"""A smaller model that guesses what the model will say. Chapter 16.

Its keys and values lie in a cache of its own, in the same blocks: what is done to a block of the model's cache is done
to that of the draft model's. So prefix caching, forks and preemption need nothing more. It runs only for sequences
whose tokens it is to guess, and first reads what it has missed. As in vLLM (``v1/spec_decode/draft_model.py``, 0.33.0),
where it reads all that the model reads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from folovllm.config import EngineConfig
from folovllm.core.scheduler import SchedulerOutput
from folovllm.model.decoder import Decoder
from folovllm.request import Sequence, StructuredOutputGrammar
from folovllm.sample.sampler import Sampler, SamplingMetadata
from folovllm.sample.speculative import draw_guesses, make_draft_generator
from folovllm.utils import cdiv
from folovllm.utils.transfer import copy_to_device
from folovllm.worker.model_runner import ModelRunner, place_rows

USUAL_LAG = 2
"""Newest tokens of a sequence that the draft model has not read after a step: the model's own one, and its last guess
if that was right."""


class DraftModel(ModelRunner):
    """Guesses tokens, one pass for each place, for all sequences of a step at once.

    Args:
        decoder: the smaller model, with the model's tokens.
        sampler: the model's, so that guesses follow the params as its tokens do.
        config: the model's, with ``max_model_len`` and ``max_num_batched_tokens`` filled in.
    """

    def __init__(self, decoder: Decoder, sampler: Sampler, config: EngineConfig) -> None:
        model_config = replace(config.model_config, enforce_eager=True)
        super().__init__(decoder, sampler, replace(config, model_config=model_config, speculative_config=None))

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Allocates a cache with as many blocks as the model's."""
        super().initialize_kv_cache(num_blocks, num_swap_blocks)
        # How many tokens of each block, from its first, are in this cache: never more than are in the model's.
        self._num_filled, self._num_filled_swap = [0] * num_blocks, [0] * num_swap_blocks

    @torch.inference_mode()
    def guess(self, scheduler_output: SchedulerOutput) -> Tensor | None:
        """Makes the guesses of a step and writes them into ``scheduled_spec_token_ids``, before the model computes it.

        Returns:
            what each was drawn from, ``[num_sampled_rows, vocab_size]``, 0 in rows that check none of them; None if
            there are none.
        """
        self._follow(scheduler_output)
        active, num_rows = [], 0
        for seq, _ in scheduler_output.sampled:
            guesses = scheduler_output.get_guesses(seq)
            if -1 in guesses:  # others are known: a grammar allows nothing else
                active.append(_Draft(seq, guesses, num_rows, seq.grammar and seq.grammar.copy()))
            num_rows += len(guesses) + 1
        if not active:
            return None
        self._catch_up([draft.seq for draft in active])
        shape = num_rows, self.decoder.config.vocab_size
        probs = torch.zeros(shape, dtype=torch.float32, device=self.decoder.device)
        place = 0
        while active:
            work = [(d.seq, self._count_filled(d.seq, place), d.seq.get_len() + place) for d in active]
            logits = self._compute(work, scheduler_output)
            token_ids, drawn_from = draw_guesses(self.sampler, logits, _metadata(active, place))
            (rows,) = copy_to_device([np.array([draft.row + place for draft in active])], probs.device)
            probs.index_copy_(0, rows, drawn_from)
            for draft, token_id in zip(active, token_ids):
                draft.set(place, token_id)
            place += 1
            active = [draft for draft in active if len(draft.guesses) > place]
        return probs

    def _follow(self, scheduler_output: SchedulerOutput) -> None:
        """Does to the blocks what the step does to the model's; what it will compute anew counts as missing here."""
        self.prepare_blocks(scheduler_output)
        here, swapped = self._num_filled, self._num_filled_swap
        for source, target, pairs in (
            (here, swapped, scheduler_output.swap_out),
            (swapped, here, scheduler_output.swap_in),
            (here, here, scheduler_output.copies),
        ):
            for (_, block_id), count in zip(pairs, [source[block_id] for block_id, _ in pairs]):
                target[block_id] = count
        for seq, num_computed in zip(scheduler_output.seqs, scheduler_output.num_computed_tokens):
            index, num_in_block = divmod(num_computed, self.block_size)
            for block_id in seq.block_ids[index:]:
                here[block_id], num_in_block = min(here[block_id], num_in_block), 0

    def _count_filled(self, seq: Sequence, num_guesses: int = 0) -> int:
        """How many tokens of a sequence, and of so many guesses, the draft model need not read again."""
        num_tokens = 0
        for block_id in seq.block_ids:
            num_tokens += self._num_filled[block_id]
            if self._num_filled[block_id] < self.block_size:
                break
        return min(num_tokens, seq.get_len() + num_guesses - 1)  # the last is read for its logits

    def _catch_up(self, seqs: list[Sequence]) -> None:
        """Reads what the draft model has missed of these sequences, but for their last tokens, in usual steps."""
        most = cast(int, self.config.scheduler_config.max_num_batched_tokens)
        work: list[tuple[Sequence, int, int]] = []
        room = most
        for seq in seqs:
            first, end = self._count_filled(seq), seq.get_len() - USUAL_LAG
            while first < end:
                stop = min(first + room, end)
                work.append((seq, first, stop))
                first, room = stop, room - (stop - first)
                if room == 0:
                    self._compute(work)
                    work, room = [], most
        if work:
            self._compute(work)

    def _compute(
        self, work: list[tuple[Sequence, int, int]], scheduler_output: SchedulerOutput | None = None
    ) -> Tensor:
        """Computes tokens of sequences; returns the logits of each one's last, ``[num_sequences, vocab_size]``.

        Args:
            work: each sequence, the position of the first token, and that behind the last.
            scheduler_output: has the guesses, if some of the tokens are guesses.
        """
        step = SchedulerOutput()
        if scheduler_output is not None:
            step.scheduled_spec_token_ids = scheduler_output.scheduled_spec_token_ids
        for seq, first, end in work:
            part = copy.copy(seq)
            part.num_computed_tokens = first
            step.add(part, end - first)
        input_ids, positions, metadata = self.prepare(step)
        self.attention.begin(metadata)
        last = place_rows((metadata.query_start_loc_cpu[1:] - 1).tolist(), len(input_ids), self.decoder.device)
        hidden = self.decoder(input_ids, positions, self.attention, last)
        for seq, first, end in work:
            for index in range(first // self.block_size, cdiv(end, self.block_size)):
                self._num_filled[seq.block_ids[index]] = min(end - index * self.block_size, self.block_size)
        return self.decoder.compute_logits(hidden)


@dataclass
class _Draft:
    """A sequence's guesses in the making."""

    seq: Sequence
    guesses: list[int]
    row: int
    """Of the flat batch of sampled rows: that in which the first guess is checked."""
    grammar: StructuredOutputGrammar | None
    """Where the guesses are in what the sequence must be."""

    def set(self, place: int, token_id: int) -> None:
        """Makes a guess."""
        self.guesses[place] = token_id
        if self.grammar is not None and not self.grammar.accept_tokens([token_id]):
            self.grammar = None  # what follows a guess that will be refused does not matter


def _metadata(drafts: list[_Draft], place: int) -> SamplingMetadata:
    """What the sampler is told of sequences whose outputs end in guesses, up to this place."""
    seqs = [draft.seq for draft in drafts]
    for seq in seqs:
        if seq.draft_generator is None:
            seq.draft_generator = make_draft_generator(seq.sampling_params, seq.index)
    return SamplingMetadata(
        [seq.sampling_params for seq in seqs],
        [seq.data.prompt_token_ids for seq in seqs],
        [draft.seq.data.output_token_ids + draft.guesses[:place] for draft in drafts],
        [seq.draft_generator for seq in seqs if seq.draft_generator is not None],
        [draft.grammar for draft in drafts],
    )
