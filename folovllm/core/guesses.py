"""Guesses of a sequence's next tokens: how many a step has room for, and what becomes of them. Chapter 16.

A guess is computed as if it followed the newest token, and the same pass shows whether it does. Until then it is no
token of the sequence: no block is found by it, and where it was wrong, nothing is left of it. As in vLLM
(``v1/core/sched/scheduler.py``, 0.33.0), but that guesses get only what nobody else wants.
"""

from __future__ import annotations

from folovllm.core.kv_cache import KVCacheManager
from folovllm.request import NUM_RECENT_GUESSES, Sequence, StructuredOutputGrammar


def fit_guesses(grammar: StructuredOutputGrammar | None, guesses: list[int]) -> list[int]:
    """The guesses that a grammar would accept, or the tokens that must follow, if these are more.

    Args:
        grammar: where the sequence is in what it must be; None: it may be anything.
        guesses: -1 for those that a draft model will make, which follows the grammar itself.
    """
    if grammar is None:
        return guesses
    return max(guesses if -1 in guesses else grammar.validate_tokens(guesses), grammar.compute_ff_tokens(), key=len)


def take_guesses(seq: Sequence, cache: KVCacheManager, budget: int, max_model_len: int) -> list[int]:
    """Allocates slots for a sequence's guesses, as far as there is room, and returns those that have one.

    Args:
        seq: all its own tokens have slots; it has no guesses afterwards.
        cache: gives free blocks only.
        budget: tokens that may still be added to the step.
        max_model_len: the most tokens of a sequence.
    """
    guesses, seq.spec_token_ids = seq.spec_token_ids, []
    num_tokens, max_tokens = seq.get_len(), seq.sampling_params.max_tokens
    # One token more than was guessed comes out, so the last that may come needs no guess.
    room = [budget, max_model_len - num_tokens - 1, cache.count_slots_left(seq, num_tokens)]
    if max_tokens is not None:
        room.append(max_tokens - seq.get_output_len() - 1)
    guesses = guesses[: max(min(room), 0)]
    if guesses:
        cache.allocate_slots(seq, num_tokens + len(guesses))
    return guesses


def count_accepted(guesses: list[int], token_ids: list[int]) -> int:
    """How many of a sequence's guesses, from the first, are the tokens that it got."""
    wrong = (i for i, (guess, token_id) in enumerate(zip(guesses, token_ids)) if guess != token_id)
    return next(wrong, min(len(guesses), len(token_ids)))


def drop_refused(seq: Sequence, cache: KVCacheManager, guesses: list[int], token_ids: list[int]) -> None:
    """Makes it as if the guesses from the first wrong one on had never been computed.

    Args:
        seq: with all guesses counted as computed.
        cache: takes back the blocks that only wrong guesses needed.
        guesses: what was computed.
        token_ids: what came out: the accepted guesses, and a token of the model's own, which is not computed.
    """
    if not guesses:
        return
    num_accepted = min(count_accepted(guesses, token_ids), len(token_ids) - 1)
    seq.num_computed_tokens -= len(guesses) - num_accepted
    cache.release_unused(seq)
    seq.recent_guesses += [i < num_accepted for i in range(len(guesses))]
    del seq.recent_guesses[:-NUM_RECENT_GUESSES]
