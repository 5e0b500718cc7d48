"""What an engine did, step by step, for the figures of chapters 0 and 8 to 13.

An engine itself keeps counts only. Who had which place and which blocks is written down by a step hook, which is one of
the engine's doors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypeVar

from folovllm.core.guesses import count_accepted
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.stats import StepStats
from folovllm.outputs import RequestOutput, RunnerOutput
from folovllm.request import Sequence
from folovllm.sampling_params import SamplingParams

Name = TypeVar("Name", str, int)


@dataclass
class StepRecord:
    """One step. A sequence is called by its request, and by its ``seq_id`` where the request has several answers."""

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
    arrived: list[str] = field(default_factory=list)
    """Who is seen in this step, waiting or at work, for the first time."""
    tokens: list[str] = field(default_factory=list)
    """Who got a token in this step."""


def name_of(seq: Sequence) -> str:
    """What a figure calls a sequence."""
    return seq.request_id if seq.sampling_params.best_of == 1 else seq.seq_id


def names_of(seqs: Iterable[Sequence]) -> list[str]:
    """What a figure calls each sequence."""
    return [name_of(seq) for seq in seqs]


def split_work(scheduled: SchedulerOutput) -> tuple[dict[str, int], list[str]]:
    """The tokens of each sequence that read its prompt, or what it had lost; and the sequences that decoded."""
    prefill, decode = {}, []
    for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens):
        num_known = num_new - len(scheduled.get_guesses(seq))
        # The step is over, so its own token is counted, and the one that it drew is not.
        if num_known == 1 and seq.num_computed_tokens > seq.get_prompt_len():
            decode.append(name_of(seq))
        else:
            prefill[name_of(seq)] = num_known
    return prefill, decode


def take_places(places: dict[Name, int], in_step: list[Name], running: list[Name]) -> None:
    """Removes who is gone from the places of a batch, and gives those who are new the first free ones."""
    for name in set(places) - {*in_step, *running}:
        del places[name]
    for name in in_step:
        if name not in places:
            places[name] = next(i for i in range(len(places) + 1) if i not in places.values())


def steps_to_first_token(records: SequenceOf[StepRecord]) -> dict[str, int]:
    """For each sequence how many steps it took, from its arrival, until its first token was there: at least 1."""
    arrived = {name: step for step, record in enumerate(records) for name in record.arrived}
    first: dict[str, int] = {}
    for step, record in enumerate(records):
        for name in record.tokens:
            first.setdefault(name, step + 1 - arrived[name])
    return first


def record_steps(engine: LLMEngine) -> list[StepRecord]:
    """A list to which every later step of the engine adds its record."""
    records: list[StepRecord] = []
    places: dict[str, int] = {}
    seen: set[str] = set()

    def hook(scheduled: SchedulerOutput, _: RunnerOutput, stats: StepStats) -> None:
        scheduler = engine.scheduler
        in_step = [*scheduled.seqs, *(child for _, child in scheduled.forks)]
        prefill, decode = split_work(scheduled)
        take_places(places, names_of(in_step), names_of(scheduler.running))
        present = names_of([*in_step, *scheduler.waiting, *scheduler.swapped])
        records.append(
            StepRecord(
                prefill=prefill,
                decode=decode,
                places=dict(places),
                waiting=names_of(scheduler.waiting),
                swapped=names_of(scheduler.swapped),
                preempted=names_of(scheduled.preempted),
                tables={name_of(seq): list(seq.block_ids) for seq in scheduler.running},
                ref_counts=list(engine.cache.pool.ref_counts),
                finished=[name_of(seq) for seq in in_step if seq.is_finished()],
                stats=stats,
                time_us=engine.clock.now_us(),
                arrived=[name for name in present if name not in seen],
                tokens=[name_of(seq) for seq, _ in scheduled.sampled],
            )
        )
        seen.update(present)
        for seq in in_step:
            if seq.is_finished():
                del places[name_of(seq)]

    engine.step_hooks.append(hook)
    return records


@dataclass
class CheckedGuesses:
    """What a pass gave one sequence that had guesses, or none."""

    name: str
    guesses: list[int]
    tokens: list[int]
    """The accepted guesses and the model's own token after them, up to the end of the answer."""
    num_accepted: int


def record_guesses(engine: LLMEngine) -> list[CheckedGuesses]:
    """A list to which every later step of the engine adds what it gave each sequence."""
    records: list[CheckedGuesses] = []

    def hook(scheduled: SchedulerOutput, output: RunnerOutput, _: StepStats) -> None:
        for (seq, _row), tokens in zip(scheduled.sampled, output.sampled_token_ids):
            guesses = scheduled.get_guesses(seq)
            records.append(CheckedGuesses(name_of(seq), guesses, tokens, count_accepted(guesses, tokens)))

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
