"""Guessing the tokens to come, and checking several guesses in one pass. Chapter 16 is about this module.

The model computes a sequence's newest token and some guesses of what follows, all in one pass. Each place gets a token
as it would have without guesses, and the places count up to the first whose token is not the guessed one: so a pass
gives one token at least. Where the guesses were looked up, the tokens are the very ones that come without guessing.
Where a draft model drew them, its distribution is taken into account (rejection sampling: Leviathan et al. 2023, Chen
et al. 2023), and the tokens come from the model's own. As in vLLM (``v1/spec_decode/ngram_proposer.py``,
``v1/sample/rejection_sampler.py``, 0.33.0).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence as SequenceOf
from typing import cast

import numpy as np
import torch
from torch import Tensor

from folovllm.config import SpeculativeConfig
from folovllm.outputs import RunnerOutput
from folovllm.request import MAX_GUESSED_ROWS, NUM_RECENT_GUESSES, Sequence
from folovllm.sample.sampler import Sampler, SamplerOutput, SamplingMetadata, draw
from folovllm.sampling_params import SamplingParams, SamplingType
from folovllm.utils.transfer import copy_to_device

MIN_ACCEPTED = 1 / 8
"""The share of a sequence's last guesses that must have been right for a guess to be worth its row."""
PAUSE = 64
"""Tokens of a sequence without guesses after too few were right; then it tries again."""


class NgramProposer:
    """Guesses that what followed the last tokens before follows them again (prompt lookup: Saxena 2023).

    Args:
        min_n: fewest tokens that must be found again.
        max_n: most tokens that are looked up; they are tried first.
    """

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n

    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """At most ``num_tokens`` tokens that followed the longest of the last n-grams where it first occurs."""
        size = array("q").itemsize
        text = array("q", token_ids).tobytes()  # in which Python searches fast
        for n in range(min(self.max_n, len(token_ids) - 1), self.min_n - 1, -1):
            ngram, place = text[-n * size :], -1
            while (place := text.find(ngram, place + 1, len(text) - 1)) >= 0:
                if place % size == 0:
                    first = place // size + n
                    return token_ids[first : first + num_tokens]
        return []


class Proposer:
    """Says after each step what is guessed for the next, and gives up where it does not pay, by counts alone.

    Args:
        config: the method and its numbers.
        draft_cost: what a pass of the draft model costs, in passes of the model.
    """

    def __init__(self, config: SpeculativeConfig, draft_cost: float = 0.0) -> None:
        self.num_speculative_tokens = config.num_speculative_tokens
        self.min_accepted = MIN_ACCEPTED + draft_cost
        lookup = cast(int, config.prompt_lookup_min), cast(int, config.prompt_lookup_max)
        self.ngrams = NgramProposer(*lookup) if config.method == "ngram" else None

    def propose(self, seqs: SequenceOf[Sequence], sampled_token_ids: list[list[int]]) -> list[list[int]]:
        """Guesses of what follows the tokens that a step has given each sequence; -1 where a model will make them."""
        return [
            self._guess(seq, token_ids, self._count(seq, len(seqs))) if token_ids else []
            for seq, token_ids in zip(seqs, sampled_token_ids)
        ]

    def _guess(self, seq: Sequence, new_token_ids: list[int], num_tokens: int) -> list[int]:
        if num_tokens <= 0 or self.ngrams is None:
            return [-1] * num_tokens
        return self.ngrams.propose(seq.get_token_ids() + new_token_ids, num_tokens)

    def _count(self, seq: Sequence, num_seqs: int) -> int:
        """How many tokens to guess: fewer in a large batch, and none for a while after too few were right."""
        recent, output_len = seq.recent_guesses, seq.get_output_len()
        if len(recent) == NUM_RECENT_GUESSES and sum(recent) < self.min_accepted * len(recent):
            recent.clear()
            seq.next_guess = output_len + PAUSE
        if output_len < seq.next_guess:
            return 0
        return min(self.num_speculative_tokens, MAX_GUESSED_ROWS // num_seqs - 1)


def make_draft_generator(params: SamplingParams, index: int = 0) -> random.Random:
    """The random numbers that a draft model guesses with: others than those of `make_generator`, which check them."""
    return random.Random(random.getrandbits(64) if params.seed is None else f"draft {params.seed + index}")


def draw_guesses(sampler: Sampler, logits: Tensor, metadata: SamplingMetadata) -> tuple[list[int], Tensor]:
    """A draft model's guesses, and what each was drawn from: ``[num_rows, vocab_size]``.

    Args:
        sampler: of the model that will check them.
        logits: the draft model's, ``[num_rows, vocab_size]``.
        metadata: one entry a row, with the generators of the draft model.
    """
    try:
        probs = sampler.compute_probs(logits, metadata)
    except ValueError:  # a row that has no token, which the model will find, too, or numbers that are none
        probs = torch.zeros_like(logits, dtype=torch.float32)
        probs[:, 0] = 1  # any guess will do whose distribution is known
    return draw(probs, [generator.random() for generator in metadata.generators]).tolist(), probs


def with_guesses(metadata: SamplingMetadata, guesses: list[list[int]]) -> SamplingMetadata:
    """The rows of ``metadata``, each followed by one for each of its guesses, with the guesses so far in its output."""
    rows = [(row, place) for row, found in enumerate(guesses) for place in range(len(found) + 1)]
    return SamplingMetadata(
        [metadata.params[row] for row, _ in rows],
        [metadata.prompt_token_ids[row] for row, _ in rows],
        [metadata.output_token_ids[row] + guesses[row][:place] for row, place in rows],
        [metadata.generators[row] for row, _ in rows],
        [metadata.grammars[row] for row, _ in rows],
        guesses,
    )


def verify(
    sampler: Sampler,
    logits: Tensor,
    metadata: SamplingMetadata,
    guesses: list[list[int]],
    draft_probs: Tensor | None = None,
) -> RunnerOutput:
    """Each sequence's tokens: the guesses that are right, and the one that the model gives after them.

    Each generator has given one number for each of these tokens afterwards, and none for what was dropped.

    Args:
        sampler: of the model.
        logits: ``[num_rows, vocab_size]``: for each sequence a row for its newest token, then one for each guess.
        metadata: one row for each sequence.
        guesses: of each sequence.
        draft_probs: ``[num_rows, vocab_size]``, the distribution that the guess checked in a row was drawn from, 0 in
            rows that check none; None: no guess was drawn.
    """
    states = [
        generator.getstate() if found and params.sampling_type is SamplingType.RANDOM else None
        for generator, found, params in zip(metadata.generators, guesses, metadata.params)
    ]
    rows = with_guesses(metadata, guesses)
    if draft_probs is not None:
        checked = np.array([token_id for found in guesses for token_id in (*found, -1)])
        rows.draw = _Rejection(draft_probs, *copy_to_device([checked], logits.device))
    output = sampler.sample(logits, rows)
    verified, row = RunnerOutput([], []), 0
    for entry, found in enumerate(guesses):
        num_tokens = _count_given(output, row, found)
        if num_tokens == 0:
            verified.errors[entry] = output.errors[row]
            if row in output.not_finite:
                verified.not_finite.add(entry)
        verified.sampled_token_ids.append(output.token_ids[row : row + num_tokens])
        logprobs = output.logprobs[row : row + num_tokens]
        verified.logprobs.append(None if None in logprobs else cast(list, logprobs))
        if (state := states[entry]) is not None and num_tokens <= len(found):
            metadata.generators[entry].setstate(state)
            for _ in range(num_tokens):
                metadata.generators[entry].random()
        row += len(found) + 1
    return verified


def _count_given(output: SamplerOutput, row: int, guesses: list[int]) -> int:
    """How many tokens the rows of a sequence, from ``row`` on, give it: up to the first that was not guessed."""
    for place in range(len(guesses) + 1):
        if row + place in output.errors:  # which is that of its next step, if another token comes before
            return place
        if place == len(guesses) or output.token_ids[row + place] != guesses[place]:
            return place + 1
    raise AssertionError("unreachable")


class _Rejection:
    """Draws as `draw` does, where a guess was drawn before: see `rejection_sample`."""

    def __init__(self, draft_probs: Tensor, draft_token_ids: Tensor) -> None:
        self.draft_probs, self.draft_token_ids = draft_probs, draft_token_ids

    def __call__(self, probs: Tensor, uniforms: Tensor, rows: Tensor | None) -> Tensor:
        draft_probs, draft_token_ids = self.draft_probs, self.draft_token_ids
        if rows is not None:
            draft_probs, draft_token_ids = draft_probs.index_select(0, rows), draft_token_ids.index_select(0, rows)
        return rejection_sample(probs, draft_probs, draft_token_ids, uniforms)


def rejection_sample(probs: Tensor, draft_probs: Tensor, draft_token_ids: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens of the model's distribution, which are the guesses as often as possible (Leviathan et al. 2023).

    A guess x is accepted with probability min(1, p(x) / q(x)); else a token is drawn from what p has more than q.

    Args:
        probs: ``[num_rows, vocab_size]``, p: the model's distribution.
        draft_probs: ``[num_rows, vocab_size]``, q: what each guess was drawn from; 0 where there is no guess.
        draft_token_ids: ``[num_rows]``, x; -1 where there is no guess.
        uniforms: float64 ``[num_rows]``, in [0, 1).

    Returns:
        token ids ``[num_rows]``; one that was drawn is never the guess.
    """
    guess = draft_token_ids.clamp(min=0).unsqueeze(1)
    p, q = probs.gather(1, guess).squeeze(1).double(), draft_probs.gather(1, guess).squeeze(1).double()
    accept = (p / q).clamp(max=1).where((draft_token_ids >= 0) & (q > 0), 0)
    more = (probs - draft_probs).clamp(min=0)
    more = torch.where(more.sum(dim=-1, keepdim=True) > 0, more, probs)  # they differ by rounding alone
    # Where a guess was refused, its number is uniform between `accept` and 1, and good for another draw.
    rest = ((uniforms - accept) / (1 - accept)).clamp(0, 1).nan_to_num(0.0)
    return torch.where(uniforms < accept, draft_token_ids, draw(more, rest))
