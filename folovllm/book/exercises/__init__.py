"""Checks of the exercises: each takes an attempt and says in one sentence what is wrong with it, or that it is right.

A module for each subject, and one (`folovllm.book.exercises.verdict`) with what a check is made of.
"""

from folovllm.book.exercises.attention import check_join, check_online_softmax, check_rescaled, check_split
from folovllm.book.exercises.batching import (
    check_admit,
    check_latencies,
    check_mended_order,
    check_mended_seed,
    check_passes,
    check_shown_text,
    check_whole_characters,
)
from folovllm.book.exercises.bits import check_packing, check_scale, check_step, check_zeros
from folovllm.book.exercises.chunking import (
    check_choose_budget,
    check_considerate,
    check_count_passes,
    check_steady_stream,
)
from folovllm.book.exercises.configs import check_budget, check_num_blocks, check_tokens_that_fit
from folovllm.book.exercises.cost import check_crossing, check_ridge, check_tpot
from folovllm.book.exercises.fits import check_allowed_tokens, check_bitmask, check_grammar, check_own_places
from folovllm.book.exercises.generation import check_generate, check_tokens_computed
from folovllm.book.exercises.guesses import check_proposer, check_seed_with_guesses, check_verifier
from folovllm.book.exercises.loading import check_count_weights, check_kv_bytes, check_pad_batch, check_read_tensor
from folovllm.book.exercises.paging import check_allocate_slots, check_block_pool, check_leak, check_slot_mapping
from folovllm.book.exercises.passes import check_attention, check_mask, check_rope
from folovllm.book.exercises.preemption import check_cheaper, check_rambling, check_victim, check_victims
from folovllm.book.exercises.prefixes import check_block_hash, check_cache_salt, check_fresh_words, check_prompt_order
from folovllm.book.exercises.requests import check_blocks_of_forks, check_finish_status, check_next_status
from folovllm.book.exercises.sampling import check_draw, check_softmax, check_top_p
from folovllm.book.exercises.search import check_beam_step, check_best_of, check_gnmt, check_own_length
from folovllm.book.exercises.verdict import Verdict

__all__ = [
    "Verdict",
    "check_admit",
    "check_allocate_slots",
    "check_allowed_tokens",
    "check_attention",
    "check_beam_step",
    "check_best_of",
    "check_bitmask",
    "check_block_hash",
    "check_block_pool",
    "check_blocks_of_forks",
    "check_budget",
    "check_cache_salt",
    "check_cheaper",
    "check_choose_budget",
    "check_considerate",
    "check_count_passes",
    "check_count_weights",
    "check_crossing",
    "check_draw",
    "check_finish_status",
    "check_fresh_words",
    "check_generate",
    "check_gnmt",
    "check_grammar",
    "check_join",
    "check_kv_bytes",
    "check_latencies",
    "check_leak",
    "check_mask",
    "check_mended_order",
    "check_mended_seed",
    "check_next_status",
    "check_num_blocks",
    "check_online_softmax",
    "check_own_length",
    "check_own_places",
    "check_packing",
    "check_pad_batch",
    "check_passes",
    "check_prompt_order",
    "check_proposer",
    "check_rambling",
    "check_read_tensor",
    "check_rescaled",
    "check_ridge",
    "check_rope",
    "check_scale",
    "check_seed_with_guesses",
    "check_shown_text",
    "check_slot_mapping",
    "check_softmax",
    "check_split",
    "check_steady_stream",
    "check_step",
    "check_tokens_computed",
    "check_tokens_that_fit",
    "check_top_p",
    "check_tpot",
    "check_verifier",
    "check_victim",
    "check_victims",
    "check_whole_characters",
    "check_zeros",
]
