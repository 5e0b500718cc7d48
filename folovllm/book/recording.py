"""What an engine did, step by step, for the figures of chapters 8 to 13.

An engine itself keeps counts only. Who had which place and which blocks is written down by a step hook, which is one of
the engine's doors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.stats import StepStats
from folovllm.outputs import RequestOutput, RunnerOutput
from folovllm.sampling_params import SamplingParams


@dataclass
class StepRecord:
    """One step. Sequences are called by their ``seq_id``."""

    prefill: dict[str, int]
    """Tokens computed for each sequence that was reading its prompt, or what a preemption made it lose."""
    decode: list[str]
    """The sequences that computed their newest token."""
    places: dict[str, int]
    """The place in the batch that each sequence of the step had, from 0; it keeps its place until it leaves."""
    waiting: list[str]
    """Who waits after the step, the next to be admitted first."""
    swapped: list[str]
    preempted: list[str]
    tables: dict[str, list[int]]
    """The block table of each sequence that runs on after the step."""
    ref_counts: list[int]
    """In how many tables each block is after the step."""
    finished: list[str]
    """Who ended in this step."""
    stats: StepStats
    time_us: int
    """The engine's clock after the step."""


def record_steps(engine: LLMEngine) -> list[StepRecord]:
    """A list to which every later step of the engine adds its record."""
    records: list[StepRecord] = []
    places: dict[str, int] = {}

    def hook(scheduled: SchedulerOutput, _: RunnerOutput, stats: StepStats) -> None:
        scheduler, running = engine.scheduler, {seq.seq_id for seq in engine.scheduler.running}
        in_step = [*scheduled.seqs, *(child for _, child in scheduled.forks)]
        for name in [name for name in places if name not in {seq.seq_id for seq in in_step} | running]:
            del places[name]
        for seq in in_step:
            if seq.seq_id not in places:
                places[seq.seq_id] = next(i for i in range(len(places) + 1) if i not in places.values())
        prefill, decode = {}, []
        for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens):
            if num_new == 1 and seq.num_computed_tokens > seq.get_prompt_len():
                decode.append(seq.seq_id)
            else:
                prefill[seq.seq_id] = num_new
        records.append(
            StepRecord(
                prefill=prefill,
                decode=decode,
                places=dict(places),
                waiting=[seq.seq_id for seq in scheduler.waiting],
                swapped=[seq.seq_id for seq in scheduler.swapped],
                preempted=[seq.seq_id for seq in scheduled.preempted],
                tables={seq.seq_id: list(seq.block_ids) for seq in scheduler.running},
                ref_counts=list(engine.cache.pool.ref_counts),
                finished=[seq.seq_id for seq in in_step if seq.is_finished()],
                stats=stats,
                time_us=engine.clock.now_us(),
            )
        )
        for seq in in_step:
            if seq.seq_id not in running:
                del places[seq.seq_id]

    engine.step_hooks.append(hook)
    return records


def run_requests(
    engine: LLMEngine,
    requests: Iterable[tuple[str, str | list[int], SamplingParams]],
    arrivals: Iterable[int] | None = None,
    after_step: Callable[[LLMEngine], None] = lambda engine: None,
) -> tuple[dict[str, RequestOutput], list[StepRecord]]:
    """Runs requests to their end.

    Args:
        engine: nobody else may step it meanwhile.
        requests: name, prompt and params of each.
        arrivals: before which step each arrives, from 0, in ascending order; None: all before the first.
        after_step: called after each step.

    Returns:
        the last output of each request, and a record of each step. A step in which there was nothing to do, because
        the next request has not arrived, is not counted: the next one arrives at once.
    """
    todo = list(requests)
    due = [0] * len(todo) if arrivals is None else list(arrivals)
    outputs: dict[str, RequestOutput] = {}
    records = record_steps(engine)
    while todo or engine.has_unfinished_requests():
        while todo and (due[0] <= len(records) or not engine.has_unfinished_requests()):
            engine.add_request(*todo.pop(0))
            del due[0]
        for output in engine.step():
            outputs[output.request_id] = output
        after_step(engine)
    engine.step_hooks.pop()
    return outputs, records
