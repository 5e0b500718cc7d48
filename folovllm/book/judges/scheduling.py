"""Judges of a scheduler and of a cache: each step is looked at before it is computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import Any, cast

from folovllm.book.exercises.verdict import NotYet, blame_part, expect, expect_subclass
from folovllm.book.judges.pretended import (
    SETTINGS,
    check_outputs,
    drive,
    make_engine,
    name_of,
    random_arrivals,
)
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.outputs import RunnerOutput
from folovllm.request import Sequence, SequenceStatus

PARTS = ("scheduler_cls", "kv_cache_manager_cls")
"""The doors of the configs through which readers put parts of their own."""


class Watch:
    """Looks at each step of an engine before it is computed, and raises `NotYet` for what must not be.

    Args:
        engine: idle; it is watched from now on.
        in_order: whether waiting requests must be admitted in the order of their ranks.
    """

    def __init__(self, engine: LLMEngine, in_order: bool = True) -> None:
        self.engine, self.in_order, self.num_steps = engine, in_order, 0
        self.steps: list[dict[str, int]] = []
        """Tokens computed for each sequence, by step."""
        self.num_cached = 0
        self._known: set[tuple[str | None, tuple[int, ...]]] = set()
        self._arrived: dict[str, int] = {}
        self._waited: set[str] = set()
        self._grew = False
        self._line: list[Sequence] = []  # the running, by how long they have run
        self._run = engine.runner.run
        self._calls = 0
        engine.runner.run = self.run  # type: ignore[method-assign]
        for name in ("allocate_slots", "get_computed_blocks"):
            setattr(engine.cache, name, self._counted(getattr(engine.cache, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which notices that it is called in a loop without an end."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            expect(self._calls < 10_000, f"{self._where()} asks for blocks again and again: a loop does not end")
            return method(*args, **kwargs)

        return call

    def _where(self) -> str:
        return f"step {self.num_steps}"

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Checks a step, then computes it."""
        self._check_size(scheduler_output)
        self._check_order(scheduler_output)
        self._check_line(scheduler_output)
        self._check_cached(scheduler_output)
        self._check_writes(scheduler_output)
        self.steps.append(
            {name_of(seq): num for seq, num in zip(scheduler_output.seqs, scheduler_output.num_new_tokens)}
        )
        self.num_steps, self._calls = self.num_steps + 1, 0
        self._grew = bool(scheduler_output.admitted)
        self._waited = {seq.seq_id for seq in self.engine.scheduler.waiting}
        output = self._run(scheduler_output)
        for (seq, _), new_token_ids in zip(scheduler_output.sampled, output.sampled_token_ids):
            if scheduler_output.get_guesses(seq):  # of which the right ones are computed
                self._know(seq, seq.get_token_ids() + new_token_ids[:-1])
        return output

    def _check_size(self, scheduled: SchedulerOutput) -> None:
        config, running = self.engine.config.scheduler_config, self.engine.scheduler.running
        where, total, budget = self._where(), sum(scheduled.num_new_tokens), cast(int, config.max_num_batched_tokens)
        expect(total <= budget, f"{where} computes {total} tokens, and max_num_batched_tokens is {budget}")
        expect(
            len(running) <= config.max_num_seqs,
            f"{len(running)} sequences run in {where}, and max_num_seqs is {config.max_num_seqs}",
        )
        expect(len(set(map(id, scheduled.seqs))) == len(scheduled.seqs), f"{where} schedules a sequence twice")
        ids = set(map(id, running))
        scheduler = self.engine.scheduler
        for queue, status in (
            (running, SequenceStatus.RUNNING),
            (scheduler.waiting, SequenceStatus.WAITING),
            (scheduler.swapped, SequenceStatus.SWAPPED),
        ):
            for seq in queue:
                expect(
                    seq.status is status,
                    f"in {where} {name_of(seq)} is among the {status.name.lower()}, and its status is {seq.status}",
                )
        for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens):
            left, name = seq.get_len() - seq.num_computed_tokens + len(scheduled.get_guesses(seq)), name_of(seq)
            expect(id(seq) in ids, f"{where} computes {name}, which is not among the running")
            expect(0 < num_new <= left, f"{where} computes {num_new} tokens of {name}, which has {left} left")
            expect(
                num_new == left or config.enable_chunked_prefill,
                f"{where} cuts the prompt of {name} ({num_new} of {left} tokens) without enable_chunked_prefill",
            )

    def _check_order(self, scheduled: SchedulerOutput) -> None:
        engine, where = self.engine, self._where()
        admitted = [seq for seq, _ in scheduled.admitted]
        if engine.config.scheduler_config.batching == "static" and admitted:
            before = [seq for seq in scheduled.seqs if all(seq is not other for other in admitted)]
            expect(
                not before or self._grew,
                f"{where} admits {name_of(admitted[0])} although {name_of((before or admitted)[0])} still runs: a "
                "static batch is closed once it has stopped growing",
            )
        if self.in_order and admitted and not scheduled.preempted:
            last = max(admitted, key=self._rank)
            for seq in (*engine.scheduler.waiting, *engine.scheduler.swapped):
                # A further answer may have been queued in this very step, behind the admissions.
                expect(
                    self._rank(last) < self._rank(seq) or (seq.index > 0 and seq.seq_id not in self._waited),
                    f"{where} admits {name_of(last)}, and {name_of(seq)}, whose turn it is, still waits",
                )

    def _check_line(self, scheduled: SchedulerOutput) -> None:
        """Whoever has run longer gets all of its tokens before the next one gets any."""
        running = self.engine.scheduler.running
        self._line = [seq for seq in self._line if any(seq is other for other in running)]
        computed = {id(seq): num for seq, num in zip(scheduled.seqs, scheduled.num_new_tokens)}
        is_fcfs = self.engine.config.scheduler_config.policy == "fcfs"
        passed: Sequence | None = None
        for seq in self._line if self.in_order and is_fcfs and not scheduled.preempted else ():
            num, left = computed.get(id(seq), 0), seq.get_len() - seq.num_computed_tokens
            expect(
                passed is None or num == 0,
                f"{self._where()} computes {num} tokens of {name_of(seq)}, and {name_of(passed or seq)}, which has run "
                "longer, does not get all that it needs",
            )
            passed = seq if num < left and passed is None else passed
        self._line += [seq for seq in running if all(seq is not other for other in self._line)]

    def _rank(self, seq: Sequence) -> tuple[int, int, int]:
        for request_id in self.engine.output_processor.states:
            self._arrived.setdefault(request_id, len(self._arrived))
        by_priority = self.engine.config.scheduler_config.policy == "priority"
        priority = self.engine.output_processor.states[seq.request_id].request.priority
        return priority if by_priority else 0, self._arrived[seq.request_id], seq.index

    def _check_cached(self, scheduled: SchedulerOutput) -> None:
        """Tokens that are not computed must have been computed before, for somebody with the same salt."""
        cached = {id(seq): num for seq, num in scheduled.admitted}
        for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens):
            token_ids, num_cached = seq.get_token_ids(), cached.get(id(seq), 0)
            self.num_cached += num_cached
            expect(
                num_cached == 0 or (seq.cache_salt, tuple(token_ids[:num_cached])) in self._known,
                f"{self._where()} takes {num_cached} tokens of {name_of(seq)} from the cache, and nobody with the salt "
                f"{seq.cache_salt!r} has had this beginning",
            )
            self._know(seq, token_ids[: seq.num_computed_tokens + num_new])

    def _know(self, seq: Sequence, token_ids: list[int]) -> None:
        """Notes that somebody with the sequence's salt has computed these tokens, from the first."""
        size = self.engine.cache.block_size
        for end in range(size, len(token_ids) + 1, size):
            self._known.add((seq.cache_salt, tuple(token_ids[:end])))

    def _check_writes(self, scheduled: SchedulerOutput) -> None:
        """No step writes a block twice, and whoever else has it in a table only reads it."""
        size, where, written = self.engine.cache.block_size, self._where(), cast(dict[int, Sequence], {})
        for seq, num_new in zip(scheduled.seqs, scheduled.num_new_tokens):
            first, last = seq.num_computed_tokens, seq.num_computed_tokens + num_new - 1
            for block_id in seq.block_ids[first // size : last // size + 1]:
                other = written.setdefault(block_id, seq)
                expect(other is seq, f"{where}: {name_of(other)} and {name_of(seq)} write into block {block_id}")
        children = {id(child) for _, child in scheduled.forks}
        for seq in self.engine.scheduler.running:
            for i, block_id in enumerate(seq.block_ids if id(seq) not in children else ()):
                writer, is_past = written.get(block_id), (i + 1) * size <= seq.num_computed_tokens
                expect(
                    writer is None or (writer is not seq if is_past else writer is seq),
                    f"{where}: {name_of(writer or seq)} writes into block {block_id}, which {name_of(seq)} "
                    f"{'has filled' if is_past else 'still fills'}",
                )


def run_watched(
    make: Callable[[Mapping[str, Any]], LLMEngine], settings: Mapping[str, Any], seed: int, in_order: bool = True
) -> Watch:
    """One run of random requests on an engine that is watched; what was wrong is told together with the settings.

    Raises:
        NotYet: if anything was.
    """
    arrivals = random_arrivals(seed, priorities=settings.get("policy") == "priority")
    shown = ", ".join(f"{name}={value!r}" for name, value in settings.items() if name not in PARTS)
    watched: Watch | None = None
    try:
        engine = make(settings)
        watched = Watch(engine, in_order)
        check_outputs(arrivals, drive(engine, arrivals))
    except NotYet as error:
        raise NotYet(f"{str(error).rstrip('.')} ({shown}).") from error
    except Exception as error:
        at = "before the first step" if watched is None else f"step {watched.num_steps}"
        raise NotYet(f"{at}: {blame_part(error)} ({shown}).") from error
    return watched


def judge_engine(
    make: Callable[[Mapping[str, Any]], LLMEngine] = make_engine,
    settings: SequenceOf[Mapping[str, Any]] = SETTINGS,
    in_order: bool = True,
) -> list[Watch]:
    """Runs random requests with each of the settings.

    Args:
        make: makes an engine from settings.
        settings: fields of the configs, for one run each.
        in_order: as for `Watch`.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    return [run_watched(make, each, seed, in_order) for seed, each in enumerate(settings)]


def judge_scheduler(
    attempt: type,
    same_steps: bool = False,
    settings: SequenceOf[Mapping[str, Any]] = SETTINGS,
    in_order: bool = True,
) -> None:
    """Runs random requests through a reader's scheduler.

    Args:
        attempt: given to the engine as ``scheduler_cls``.
        same_steps: whether it must schedule what ours schedules, step by step.
        settings: fields of the configs, for one run each.
        in_order: as for `Watch`.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect_subclass(attempt, Scheduler)
    for seed, each in enumerate(settings):
        found = run_watched(make_engine, {**each, "scheduler_cls": attempt}, seed, in_order)
        if same_steps:
            _compare_steps(_our_steps(tuple(each.items()), seed), found.steps, each)


@cache
def _our_steps(settings: tuple[tuple[str, Any], ...], seed: int) -> list[dict[str, int]]:
    return run_watched(make_engine, dict(settings), seed).steps


def _compare_steps(ours: list[dict[str, int]], found: list[dict[str, int]], settings: Mapping[str, Any]) -> None:
    shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    nothing: dict[str, int] = {}
    for step, (right, got) in enumerate(itertools.zip_longest(ours, found, fillvalue=nothing)):
        expect(right == got, f"step {step} should compute {right}, yours computes {got} ({shown}).")


def judge_cache(attempt: type, settings: SequenceOf[Mapping[str, Any]] = SETTINGS, hit_rate: bool = True) -> None:
    """Runs random requests through a reader's cache manager, its pool and its hash.

    Args:
        attempt: given to the engine as ``kv_cache_manager_cls``.
        settings: fields of the configs, for one run each.
        hit_rate: whether it must find at least as many tokens in its prefix cache as ours does.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect_subclass(attempt, KVCacheManager)
    for seed, each in enumerate(settings):
        found = run_watched(make_engine, {**each, "kv_cache_manager_cls": attempt}, seed)
        ours = run_watched(make_engine, each, seed)
        expect(
            not hit_rate or found.num_cached >= ours.num_cached,
            f"yours found {found.num_cached} tokens in the cache where ours finds {ours.num_cached}.",
        )
