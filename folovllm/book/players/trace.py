"""What a run did, written down while it happens: who waited, who ran, what was computed, where it lies.

`folovllm.book.recording` notes how things stand after each step, for figures along all steps. A trace notes each step
as it runs, down to the slots and the words in them, so that it can be played again. An engine itself keeps none of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from folovllm.book.recording import name_of, take_places
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.stats import StepStats
from folovllm.llm import LLM
from folovllm.logprobs import Logprob
from folovllm.outputs import RunnerOutput
from folovllm.request import Sequence

LONGEST_NAME = 12
"""Characters of a request's name; those with longer ones, as `folovllm.llm.LLM` makes them up, are numbered."""
MOST_BARS = 5
"""Probabilities that are kept behind each token, the likeliest ones; its own is always kept."""


@dataclass
class TracedSequence:
    """One answer in the making; it is called by its place in `Trace.seqs`."""

    name: str
    num_prompt_tokens: int
    token_ids: list[int]
    """Prompt and output."""
    num_first_tokens: int
    """How many of these it had when it was seen for the first time."""


@dataclass
class TracedStep:
    """One step, as it was while it ran."""

    work: list[tuple[int, int, int]]
    """The flat batch: of which sequence, from which position on, how many tokens."""
    places: dict[int, int]
    """The place in the batch that each sequence has."""
    waiting: list[int]
    swapped: list[int]
    preempted: list[int]
    admitted: dict[int, int]
    """Who came in, and how many of its tokens were found in the prefix cache."""
    tables: dict[int, list[int]]
    """The block table of each sequence that has blocks."""
    guesses: dict[int, list[int]] = field(default_factory=dict)
    """The tokens at the end of a sequence's work that were guesses, and that this step has checked."""
    num_new_tokens: dict[int, int] = field(default_factory=dict)
    """How many tokens each sequence got."""
    bars: dict[int, list[list[tuple[int, float]]]] = field(default_factory=dict)
    """For each of them, where log probabilities were asked for, the likeliest tokens and itself, with probabilities."""
    finished: list[int] = field(default_factory=list)
    """Who ended after this step."""


@dataclass
class Trace:
    """All steps of a run, and the sequences that took part in it."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    tokenizer: Any
    """What turns token ids into texts; None: ids are shown."""
    seqs: list[TracedSequence] = field(default_factory=list)
    steps: list[TracedStep] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Trace({len(self.seqs)} sequences, {len(self.steps)} steps)"


@contextlib.contextmanager
def record(llm: LLM | LLMEngine) -> Iterator[Trace]:
    """Writes down all steps that run inside of the ``with`` block, whoever runs them; not in two blocks side by side.

    Requests that ask for ``logprobs`` have the probabilities behind each of their tokens in it.
    """
    engine = llm if isinstance(llm, LLMEngine) else llm.engine
    pool = engine.cache.pool
    trace = Trace(engine.cache.block_size, pool.num_blocks, engine.scheduler.config.max_num_seqs, engine.tokenizer)
    recorder = _Recorder(engine, trace)
    runner = engine.runner
    # A step's hook comes when blocks have been given back already, so what the runner is given is looked at before.
    engine.runner = _WatchedRunner(runner, recorder)
    engine.step_hooks.append(recorder.finish_step)
    try:
        yield trace
    finally:
        engine.step_hooks.remove(recorder.finish_step)
        engine.runner = runner


class _WatchedRunner:
    """Stands in the place of an engine's runner, and is it, but for one look at the work."""

    def __init__(self, runner: Any, recorder: _Recorder) -> None:
        self._runner, self._recorder = runner, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        self._recorder.begin_step(scheduler_output)
        return self._runner.run(scheduler_output)


class _Recorder:
    """Makes a `TracedStep` of each step: its work before it runs, its tokens after."""

    def __init__(self, engine: LLMEngine, trace: Trace) -> None:
        self.engine, self.trace = engine, trace
        self._numbers: dict[int, int] = {}
        self._kept: list[Sequence] = []  # so that no other object gets the id of one that is gone
        self._places: dict[int, int] = {}
        self._begun: dict[int, TracedStep] = {}  # by the scheduler output, since threads may take turns

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Notes the work of a step, and how queues and tables stand while it runs."""
        scheduler = self.engine.scheduler
        running = self._numbers_of(scheduler.running)
        take_places(self._places, running, [])
        self._begun[id(scheduled)] = TracedStep(
            work=[
                (self._number_of(seq), seq.num_computed_tokens, num_new)
                for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens)
            ],
            places=dict(self._places),
            waiting=self._numbers_of(scheduler.waiting),
            swapped=self._numbers_of(scheduler.swapped),
            preempted=self._numbers_of(scheduled.preempted),
            admitted={self._number_of(seq): num_cached for seq, num_cached in scheduled.admitted},
            tables={self._number_of(seq): list(seq.block_ids) for seq in scheduler.running},
        )

    def finish_step(self, scheduled: SchedulerOutput, _: RunnerOutput, __: StepStats) -> None:
        """Adds the tokens that came of it, and who has ended. An engine's step hook."""
        step = self._begun.pop(id(scheduled), None)
        if step is None:  # it began before the recording did
            return
        for seq in scheduled.seqs:  # a draft model makes its guesses within the step
            if guesses := scheduled.get_guesses(seq):
                step.guesses[self._number_of(seq)] = list(guesses)
        for seq, _row in scheduled.sampled:
            number = self._number_of(seq)
            known = self.trace.seqs[number].token_ids
            new = seq.data.get_token_ids(len(known))
            known += new
            step.num_new_tokens[number] = len(new)
            if seq.sampling_params.logprobs is not None and new:
                step.bars[number] = [likeliest(found) for found in seq.logprobs[-len(new) :]]
            if seq.is_finished():
                step.finished.append(number)
        self.trace.steps.append(step)

    def _numbers_of(self, seqs: Iterable[Sequence]) -> list[int]:
        return [self._number_of(seq) for seq in seqs]

    def _number_of(self, seq: Sequence) -> int:
        """A sequence's place in `Trace.seqs`, where it is put when it is seen for the first time."""
        if id(seq) not in self._numbers:
            self._numbers[id(seq)] = len(self._kept)
            self._kept.append(seq)
            name, token_ids = self._name_of(seq), seq.get_token_ids()
            self.trace.seqs.append(TracedSequence(name, seq.get_prompt_len(), token_ids, len(token_ids)))
        return self._numbers[id(seq)]

    def _name_of(self, seq: Sequence) -> str:
        """What `folovllm.book.recording` calls it, or a number in place of a long name."""
        if len(seq.request_id) <= LONGEST_NAME:
            return name_of(seq)
        ids = list(dict.fromkeys(kept.request_id for kept in self._kept))
        answer = "" if seq.sampling_params.best_of == 1 else f"-{seq.index}"
        return f"request {ids.index(seq.request_id) + 1}{answer}"


def likeliest(found: dict[int, Logprob]) -> list[tuple[int, float]]:
    """Of what was reported for a token the likeliest ones and itself, which comes first in it, likeliest first."""
    chosen = next(iter(found))
    ranked = sorted(found, key=lambda token_id: (-found[token_id].logprob, token_id))
    kept = ranked[:MOST_BARS] if chosen in ranked[:MOST_BARS] else [*ranked[: MOST_BARS - 1], chosen]
    probs = {token_id: round(math.exp(found[token_id].logprob), 3) for token_id in kept}
    return [(token_id, p) for token_id, p in probs.items() if p or token_id == chosen]  # no bar is too short to see


def text_of(tokenizer: Any, token_id: int) -> str:
    """The text of one token; its number where that cannot be read: no whole character, or one that steers a printer."""
    text = "" if tokenizer is None else str(tokenizer.decode([token_id]))
    readable = text and "\ufffd" not in text and text.replace("\n", "").isprintable()
    return text if readable else f"#{token_id}"


def label_of(text: str) -> str:
    """A token's text with its spaces and new lines in sight, as in the book's figures."""
    return text.replace(" ", "␣").replace("\n", "⏎")
