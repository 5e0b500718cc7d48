"""The figures of the book: each is one call in a notebook, and returns its Axes so that tests can read it.

A module for each subject, and one (`folovllm.book.plotting.style`) with the style that all share.
"""

from folovllm.book.plotting.attention import (
    plot_buckets,
    plot_bytes_moved,
    plot_idle_processors,
    plot_online_softmax,
    plot_operations,
)
from folovllm.book.plotting.bits import (
    plot_error_by_layer,
    plot_gain_by_rows,
    plot_grid,
    plot_group_sizes,
    plot_kl_by_bits,
    plot_moved_error,
    plot_packed,
    plot_rotated,
    plot_time_by_rows,
)
from folovllm.book.plotting.chunking import plot_frontier, plot_prompt_cost, plot_step_makeup, plot_token_gaps
from folovllm.book.plotting.configs import plot_block_waste, plot_dtype_errors, plot_memory_split
from folovllm.book.plotting.cost import plot_cost_ratio, plot_machine, plot_roofline, plot_step_parts, plot_throughput
from folovllm.book.plotting.engine import plot_steps
from folovllm.book.plotting.fits import plot_allowed, plot_distortion, plot_token_path, plot_valid
from folovllm.book.plotting.generation import plot_along_text, plot_pass_times, plot_tokens_computed
from folovllm.book.plotting.guesses import (
    expected_tokens,
    plot_gain,
    plot_guesses,
    plot_overlap,
    plot_tokens_per_pass,
)
from folovllm.book.plotting.loading import (
    plot_kv_capacity,
    plot_measured_against_predicted,
    plot_weights_by_dtype,
    plot_weights_by_layer,
)
from folovllm.book.plotting.paging import (
    flat_pass_of,
    pages_of,
    plot_block_size_costs,
    plot_flat_pass,
    plot_pages,
    plot_texts_at_once,
)
from folovllm.book.plotting.passes import (
    plot_attention_map,
    plot_dials,
    plot_layer,
    plot_logit_lens,
    plot_masks,
    plot_score_by_distance,
    plot_shared_heads,
)
from folovllm.book.plotting.path import PATH, plot_path
from folovllm.book.plotting.preemption import plot_admission, plot_resume_costs, plot_states, plot_used_blocks
from folovllm.book.plotting.prefixes import plot_hash_tree, plot_hit_rates, plot_ttft_by_turn, plot_turns
from folovllm.book.plotting.requests import (
    STATUS_COLORS,
    plot_cumulative_logprobs,
    plot_fork_blocks,
    plot_state_machine,
    plot_timeline,
)
from folovllm.book.plotting.sampling import (
    plot_draws,
    plot_entropy,
    plot_inverse_cdf,
    plot_kept,
    plot_temperatures,
    plot_token_bars,
)
from folovllm.book.plotting.search import plot_beam_tree, plot_likelihoods, plot_search_blocks, plot_width
from folovllm.book.plotting.timeline import (
    plot_anatomy,
    plot_block_map,
    plot_first_tokens,
    plot_gantt,
    plot_load,
    plot_places,
    plot_queue,
)

__all__ = [
    "PATH",
    "STATUS_COLORS",
    "expected_tokens",
    "flat_pass_of",
    "pages_of",
    "plot_admission",
    "plot_allowed",
    "plot_along_text",
    "plot_anatomy",
    "plot_attention_map",
    "plot_beam_tree",
    "plot_block_map",
    "plot_block_size_costs",
    "plot_block_waste",
    "plot_buckets",
    "plot_bytes_moved",
    "plot_cost_ratio",
    "plot_cumulative_logprobs",
    "plot_dials",
    "plot_distortion",
    "plot_draws",
    "plot_dtype_errors",
    "plot_entropy",
    "plot_error_by_layer",
    "plot_first_tokens",
    "plot_flat_pass",
    "plot_fork_blocks",
    "plot_frontier",
    "plot_gain",
    "plot_gain_by_rows",
    "plot_gantt",
    "plot_grid",
    "plot_group_sizes",
    "plot_guesses",
    "plot_hash_tree",
    "plot_hit_rates",
    "plot_idle_processors",
    "plot_inverse_cdf",
    "plot_kept",
    "plot_kl_by_bits",
    "plot_kv_capacity",
    "plot_layer",
    "plot_likelihoods",
    "plot_load",
    "plot_logit_lens",
    "plot_machine",
    "plot_masks",
    "plot_measured_against_predicted",
    "plot_memory_split",
    "plot_moved_error",
    "plot_online_softmax",
    "plot_operations",
    "plot_overlap",
    "plot_packed",
    "plot_pages",
    "plot_pass_times",
    "plot_path",
    "plot_places",
    "plot_prompt_cost",
    "plot_queue",
    "plot_resume_costs",
    "plot_roofline",
    "plot_rotated",
    "plot_score_by_distance",
    "plot_search_blocks",
    "plot_shared_heads",
    "plot_state_machine",
    "plot_states",
    "plot_step_makeup",
    "plot_step_parts",
    "plot_steps",
    "plot_temperatures",
    "plot_texts_at_once",
    "plot_throughput",
    "plot_time_by_rows",
    "plot_timeline",
    "plot_token_bars",
    "plot_token_gaps",
    "plot_token_path",
    "plot_tokens_computed",
    "plot_tokens_per_pass",
    "plot_ttft_by_turn",
    "plot_turns",
    "plot_used_blocks",
    "plot_valid",
    "plot_weights_by_dtype",
    "plot_weights_by_layer",
    "plot_width",
]
