"""Statistics of steps and metrics of requests, counted in one place. Chapter 8.

As in vLLM (``v1/metrics/stats.py``, 0.33.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise

from folovllm.core.guesses import count_accepted
from folovllm.core.kv_cache import BlockPool
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.outputs import RequestMetrics, RunnerOutput, SpecDecodingStats
from folovllm.utils.html import table

MAX_STEPS = 1024
"""Steps whose statistics an engine keeps; a step hook sees all of them."""


@dataclass
class StepStats:
    """What one step did."""

    num_prefill_tokens: int = 0
    """Tokens of prompts, and tokens that are computed again after a preemption."""
    num_decode_tokens: int = 0
    """Newest tokens of sequences that had computed all tokens before it."""
    num_seqs: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_preempted: int = 0
    num_used_blocks: int = 0
    num_free_blocks: int = 0
    num_queried_tokens: int = 0
    """Tokens of sequences admitted in this step, with prefix caching or without."""
    num_cached_tokens: int = 0
    """How many of these were found in the prefix cache."""
    num_draft_tokens: int = 0
    """Guesses of further tokens, which are in neither of the first two counts."""
    num_passes: int = 0
    """Sequences that got tokens."""
    num_generated_tokens: int = 0
    """Tokens that they got: one each without guesses."""
    spec_decoding: SpecDecodingStats | None = None
    """What guessing gave; None in a step that checked no guess."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each of the three parts: "schedule", "run" and "update"."""

    def _repr_html_(self) -> str:
        """The counts, as a notebook shows them; no times, so they are the same in every run."""
        return table("StepStats", ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "seconds"))


StepHook = Callable[[SchedulerOutput, RunnerOutput, StepStats], None]
"""Called after each step with what was scheduled, what was computed, and what was counted."""


def begin_step_stats(scheduler_output: SchedulerOutput) -> StepStats:
    """Counts what a step is about to compute."""
    decodes = sum(
        1 for seq in scheduler_output.seqs if seq.get_output_len() > 0 and seq.num_computed_tokens == seq.get_len() - 1
    )
    num_guesses = sum(map(len, scheduler_output.scheduled_spec_token_ids.values()))
    return StepStats(
        num_prefill_tokens=sum(scheduler_output.num_new_tokens) - decodes - num_guesses,
        num_decode_tokens=decodes,
        num_draft_tokens=num_guesses,
        num_seqs=len(scheduler_output.seqs),
        num_preempted=len(scheduler_output.preempted),
        num_queried_tokens=sum(seq.get_len() for seq, _ in scheduler_output.admitted),
        num_cached_tokens=sum(num_cached for _, num_cached in scheduler_output.admitted),
    )


def finish_step_stats(
    stats: StepStats,
    scheduler_output: SchedulerOutput,
    runner_output: RunnerOutput,
    scheduler: Scheduler,
    pool: BlockPool,
    times_us: list[int],
) -> None:
    """Adds the tokens and the state after the step; ``times_us`` are its start and the ends of its three parts."""
    count_tokens(scheduler_output, runner_output, lambda _: stats)
    stats.num_running, stats.num_waiting = len(scheduler.running), len(scheduler.waiting)
    stats.num_swapped = len(scheduler.swapped)
    stats.num_used_blocks, stats.num_free_blocks = pool.num_blocks - pool.num_free, pool.num_free
    durations = [(after - before) / 1e6 for before, after in pairwise(times_us)]
    stats.seconds = dict(zip(("schedule", "run", "update"), durations))


def count_requests(scheduler_output: SchedulerOutput, metrics_of: Callable[[str], RequestMetrics]) -> None:
    """Adds a step's counts to the metrics of the requests that took part."""
    for seq in scheduler_output.preempted:
        metrics_of(seq.request_id).num_preemptions += 1
    for seq, num_cached in scheduler_output.admitted:
        # A preempted sequence finds its own blocks again. They had been computed for it, so they save nothing.
        if seq.num_preemptions:
            continue
        if seq.index:  # what it finds was computed for the answers before it
            metrics_of(seq.request_id).num_shared_tokens += num_cached
        else:
            metrics_of(seq.request_id).num_cached_tokens = num_cached
    for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
        metrics_of(seq.request_id).num_computed_tokens += num_new
    for parent, child in scheduler_output.forks:
        metrics_of(child.request_id).num_shared_tokens += parent.get_prompt_len()


def count_tokens(
    scheduler_output: SchedulerOutput,
    runner_output: RunnerOutput,
    counted_in: Callable[[str], StepStats | RequestMetrics],
) -> None:
    """Counts the tokens that a step gave, once those behind the ends of answers are dropped.

    Args:
        scheduler_output: the step.
        runner_output: what it gave.
        counted_in: a request's name -> where its tokens are counted.
    """
    for (seq, _), token_ids in zip(scheduler_output.sampled, runner_output.sampled_token_ids):
        counts = counted_in(seq.request_id)
        counts.num_passes += bool(token_ids)
        counts.num_generated_tokens += len(token_ids)
        if guesses := scheduler_output.get_guesses(seq):
            counts.spec_decoding = counts.spec_decoding or SpecDecodingStats()
            counts.spec_decoding.observe(len(guesses), count_accepted(guesses, token_ids))
