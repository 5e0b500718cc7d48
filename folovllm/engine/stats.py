"""Statistics of steps and metrics of requests, counted in one place. Chapter 8.

As in vLLM (``v1/metrics/stats.py``, 0.33.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import pairwise

from folovllm.core.kv_cache import BlockPool
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.outputs import RequestMetrics, RunnerOutput
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
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each of the three parts: "schedule", "run" and "update"."""

    def _repr_html_(self) -> str:
        """The counts, as a notebook shows them; no times, so they are the same in every run."""
        return table("StepStats", ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "seconds"))


StepHook = Callable[[SchedulerOutput, RunnerOutput, StepStats], None]
"""Called after each step with what was scheduled, what was computed, and what was counted."""


def begin_step_stats(scheduler_output: SchedulerOutput) -> StepStats:
    """Counts what a step is about to compute."""
    num_tokens = scheduler_output.num_new_tokens
    decodes = sum(
        1
        for seq, num_new in zip(scheduler_output.seqs, num_tokens)
        if num_new == 1 and seq.get_output_len() > 0 and seq.num_computed_tokens == seq.get_len() - 1
    )
    return StepStats(
        num_prefill_tokens=sum(num_tokens) - decodes,
        num_decode_tokens=decodes,
        num_seqs=len(scheduler_output.seqs),
        num_preempted=len(scheduler_output.preempted),
        num_queried_tokens=sum(seq.get_len() for seq, _ in scheduler_output.admitted),
        num_cached_tokens=sum(num_cached for _, num_cached in scheduler_output.admitted),
    )


def finish_step_stats(stats: StepStats, scheduler: Scheduler, pool: BlockPool, times_us: list[int]) -> None:
    """Adds the state after the step; ``times_us`` are its start and the ends of its three parts."""
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
        if not seq.num_preemptions:
            metrics_of(seq.request_id).num_cached_tokens += num_cached
    for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
        metrics_of(seq.request_id).num_computed_tokens += num_new
    for parent, child in scheduler_output.forks:
        metrics_of(child.request_id).num_shared_tokens += parent.get_prompt_len()
