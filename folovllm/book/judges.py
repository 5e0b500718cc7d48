"""Judges of an engine and of the parts that readers put into it, by properties: what must hold whatever is asked of it.

The engine is the real one; only its model is pretended. `PretendedRunner` keeps tokens where a model keeps keys and
values, and what it says next depends on every token that it reads back through the block table. So one wrong block, or
one token that was not computed, changes the answer, and a run of a hundred steps takes milliseconds. The engine's own
tests use the same judges (``tests/integration/test_engine.py``, ``tests/book/test_faults.py``).
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from folovllm.attention import AttentionBackend
from folovllm.book.exercises.verdict import NotYet, blame_part, expect
from folovllm.book.faults import replace_part
from folovllm.book.few_bits import WeightReader, read_decoder, write_default_model
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.engine.beam_search import BeamSearch, run_searches
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.output_processor import OutputSink
from folovllm.engine.served_model import ServedModel
from folovllm.llm import make_engine_config
from folovllm.logprobs import Logprob
from folovllm.model.packing import QuantizedWeight, column_groups, pack_gptq
from folovllm.outputs import BeamSearchSequence, RequestOutput, RunnerOutput
from folovllm.request import Sequence, SequenceStatus
from folovllm.sampling_params import BeamSearchParams, SamplingParams
from folovllm.tales import EMBEDDED_MODEL
from folovllm.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 1294
MAX_MODEL_LEN = 64
"""Tokens of the longest text in a judge's runs."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 3, "block_size": 16, "num_blocks": 64},
    {"max_num_seqs": 4, "block_size": 4, "num_blocks": 24, "enable_prefix_caching": True},
    {"max_num_seqs": 3, "batching": "static", "block_size": 4, "num_blocks": 40},
    {
        "max_num_seqs": 8,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 12,
        "block_size": 4,
        "num_blocks": 60,
    },
    {"max_num_seqs": 6, "block_size": 1, "num_blocks": 70, "policy": "priority"},
    {
        "max_num_seqs": 6,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 20,
        "block_size": 4,
        "num_blocks": 22,
        "enable_prefix_caching": True,
        "preemption_mode": "swap",
        "swap_space": 12.0,
    },
    {"max_num_seqs": 5, "block_size": 4, "num_blocks": 18, "max_num_batched_tokens": 70},
)
"""Fields of the configs, for one run each. Half of them have too few blocks for all who come. A judge's gibibyte of
swap space holds one block."""


@dataclass(frozen=True)
class Arrival:
    """One request of a run."""

    name: str
    prompt: list[int]
    params: SamplingParams
    step: int = 0
    """Before which step it comes, from 0."""
    priority: int = 0
    cache_salt: str | None = None
    abort_after: int | None = None
    """Steps after which its caller changes his mind; None: never."""


def next_token(token_ids: SequenceOf[int], seed: int) -> int:
    """What the pretended model says after some tokens: a text depends on all of its past, and on its seed."""
    return 3 + hash((tuple(token_ids), seed)) % 1200


def expected_tokens(prompt: list[int], params: SamplingParams, index: int = 0) -> list[int]:
    """Answer ``index`` to a prompt, told without an engine."""
    token_ids = list(prompt)
    for _ in range(cast(int, params.max_tokens)):
        token_ids.append(next_token(token_ids, cast(int, params.seed) + index))
    return token_ids[len(prompt) :]


def keep_right_guesses(guesses: list[int], draw: Callable[[], int]) -> list[int]:
    """The tokens that a pass gives: those that are drawn, up to the first that was not guessed."""
    tokens = [draw()]
    for guess in guesses:
        if tokens[-1] != guess:
            break
        tokens.append(draw())
    return tokens


class PretendedRunner:
    """A `folovllm.worker.model_runner.Runner` whose cache holds tokens, and whose model is a hash of what it reads.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens per block.
        num_swap_blocks: blocks in CPU memory.
        script: what each request is to say, by its name; None: `next_token`.
        num_guesses: tokens that it guesses after each step, many of them right.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_swap_blocks: int = 0,
        script: Mapping[str, list[int]] | None = None,
        num_guesses: int = 0,
    ) -> None:
        self.num_blocks, self.block_size, self.num_swap_blocks = num_blocks, block_size, num_swap_blocks
        self.script, self.num_guesses = script, num_guesses
        self.verify: Callable[[list[int], Callable[[], int]], list[int]] = keep_right_guesses

    def count_blocks(self) -> tuple[int, int]:
        """The numbers of blocks that it was made with."""
        return self.num_blocks, self.num_swap_blocks

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Empties the cache."""
        self.kv_cache = [[0] * self.block_size for _ in range(num_blocks)]
        self.swap_cache = [[0] * self.block_size for _ in range(num_swap_blocks)]

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Moves blocks, writes the step's tokens into their slots, and reads all that each answer needs."""
        expect(
            bool(scheduler_output.seqs or scheduler_output.preempted),
            "this step computes nothing, although requests are waiting or running",
        )
        for source, target, pairs in (
            (self.kv_cache, self.swap_cache, scheduler_output.swap_out),
            (self.swap_cache, self.kv_cache, scheduler_output.swap_in),
            (self.kv_cache, self.kv_cache, scheduler_output.copies),
        ):
            contents = [list(source[block_id]) for block_id, _ in pairs]
            for (_, block_id), content in zip(pairs, contents):
                target[block_id] = content
        for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
            first = seq.num_computed_tokens
            token_ids = seq.data.get_token_ids(first, first + num_new) + scheduler_output.get_guesses(seq)
            for position, token_id in enumerate(token_ids, start=first):
                block, slot = self._find(seq, position)
                block[slot] = token_id
        given = [self._check(seq, scheduler_output.get_guesses(seq)) for seq, _ in scheduler_output.sampled]
        guesses = [self._guess(seq, token_ids) for (seq, _), token_ids in zip(scheduler_output.sampled, given)]
        return RunnerOutput(given, [None] * len(given), spec_token_ids=guesses)

    def _find(self, seq: Sequence, position: int) -> tuple[list[int], int]:
        index, slot = divmod(position, self.block_size)
        expect(
            index < len(seq.block_ids),
            f"{name_of(seq)} has {len(seq.block_ids)} blocks of {self.block_size} in its table, and no slot for its "
            f"token {position}",
        )
        return self.kv_cache[seq.block_ids[index]], slot

    def _check(self, seq: Sequence, guesses: list[int]) -> list[int]:
        """The tokens of a sequence, of which each is drawn once."""
        drawn: list[int] = []

        def draw() -> int:
            expect(
                len(drawn) <= len(guesses), f"{name_of(seq)} draws {len(drawn) + 1} tokens, of {len(guesses)} guesses"
            )
            drawn.append(self._say(seq, len(drawn)))
            return drawn[-1]

        found = list(self.verify(list(guesses), draw))
        expect(
            len(found) == len(drawn),
            f"{name_of(seq)} gets {len(found)} tokens, and {len(drawn)} were drawn: its next draw is another's",
        )
        return found

    def _say(self, seq: Sequence, num_guesses: int) -> int:
        """The token after so many guesses."""
        if self.script is not None:
            return self.script[seq.request_id][seq.get_output_len() + num_guesses]
        return next_token(self._read(seq, num_guesses), cast(int, seq.sampling_params.seed) + seq.index)

    def _read(self, seq: Sequence, num_guesses: int = 0) -> tuple[int, ...]:
        """A sequence's tokens and so many guesses, as they stand in its blocks."""
        places = (self._find(seq, position) for position in range(seq.get_len() + num_guesses))
        return tuple(block[slot] for block, slot in places)

    def _guess(self, seq: Sequence, token_ids: list[int]) -> list[int]:
        """What the sequence will say next; every few tokens a wrong one."""
        if not self.num_guesses:
            return []
        text, seed = seq.get_token_ids() + token_ids, cast(int, seq.sampling_params.seed) + seq.index
        for _ in range(self.num_guesses):
            token_id = next_token(text, seed)
            text.append(3 if token_id % 4 == 0 else token_id)
        return text[len(text) - self.num_guesses :]


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    from folovllm.config import ModelConfig
    from folovllm.model_loader import ModelLoader

    return ModelLoader(ModelConfig(str(EMBEDDED_MODEL))).load_tokenizer(add_pad_token=False)


def make_engine(
    settings: Mapping[str, Any],
    script: Mapping[str, list[int]] | None = None,
    engine_cls: type[LLMEngine] = LLMEngine,
) -> LLMEngine:
    """An engine with a pretended model.

    Args:
        settings: fields of the configs; ``num_blocks`` and ``block_size`` are needed, ``swap_space`` is in blocks.
        script: as for `PretendedRunner`.
        engine_cls: which engine.
    """
    config = make_engine_config(str(EMBEDDED_MODEL), **{"max_model_len": MAX_MODEL_LEN, **settings})
    cache_config = config.cache_config
    runner = PretendedRunner(
        cast(int, cache_config.num_blocks),
        cache_config.block_size,
        int(cache_config.swap_space),
        script,
        0 if config.speculative_config is None else config.speculative_config.num_speculative_tokens,
    )
    return engine_cls(config, model=ServedModel(runner, VOCAB_SIZE, 512, _tokenizer()))


def random_arrivals(seed: int, num_requests: int = 18, priorities: bool = False) -> list[Arrival]:
    """Requests of all lengths, in the order of their steps; some begin alike, want several answers, or are aborted."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(2)]
    arrivals = []
    steps = sorted(rng.choice((0, 0, rng.randint(1, 40))) for _ in range(num_requests))
    for i, step in enumerate(steps):
        shared = rng.choice(beginnings)[: rng.choice((0, 3, 8, 8, 16, 17, 32, 40))]
        own = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        params = SamplingParams(
            seed=rng.randrange(3),
            n=rng.choice((1, 1, 1, 2, 3)),
            max_tokens=rng.choice((1, 2, 5, rng.randint(6, 20))),
            ignore_eos=True,
            detokenize=False,
        )
        arrivals.append(
            Arrival(
                f"r{i}",
                shared + own or [5],
                params,
                step,
                rng.randint(-1, 1) if priorities else 0,
                rng.choice((None, None, None, "a tenant")),
                rng.choice((None,) * 5 + (rng.randint(0, 12),)),
            )
        )
    return arrivals


def name_of(seq: Sequence) -> str:
    """How a sentence calls a sequence: as its request, with its number if it is not the first answer."""
    return seq.request_id if seq.index == 0 else f"{seq.request_id}'s answer {seq.index}"


def drive(engine: LLMEngine, arrivals: SequenceOf[Arrival], max_steps: int = 2000) -> dict[str, RequestOutput]:
    """Runs requests to their end and recounts the blocks after each step.

    Returns:
        the last output of each request.

    Raises:
        NotYet: if requests are never finished, a block is lost, or blocks are in use at the end.
    """
    outputs: dict[str, RequestOutput] = {}
    last = max((a.step + (a.abort_after or 0) for a in arrivals), default=0)
    for step in itertools.count():
        expect(step < max_steps, f"after {max_steps} steps {', '.join(engine.scheduler.requests)} are not finished")
        for a in arrivals:
            if a.step == step:
                prompt = {"prompt_token_ids": a.prompt, "cache_salt": a.cache_salt}
                engine.add_request(a.name, prompt, a.params, priority=a.priority)
            if a.abort_after is not None and a.step + a.abort_after == step:
                engine.abort_request(a.name)
        try:
            outputs |= {output.request_id: output for output in engine.step()}
            engine.check_integrity()
        except RuntimeError as error:
            raise NotYet(f"step {step}: {str(error).removesuffix('; this is a bug in the engine')}") from error
        if step >= last and not engine.has_unfinished_requests():
            break
    for pool, where in ((engine.cache.pool, "the cache"), (engine.cache.swap_pool, "CPU memory")):
        used = pool.num_blocks - pool.num_free
        expect(used == 0, f"all requests are finished, and {used} blocks of {where} are not free")
    return outputs


def check_outputs(
    arrivals: SequenceOf[Arrival],
    outputs: Mapping[str, RequestOutput],
    expected: Callable[[Arrival, int], list[int]] = lambda a, index: expected_tokens(a.prompt, a.params, index),
    source: str = "it gets alone",
) -> None:
    """Each answer is what it is alone, ends as it should, and is computed once.

    Args:
        arrivals: what was asked.
        outputs: the last output of each request.
        expected: the tokens of answer ``index`` to a request, at least as many as it may have.
        source: where these are from, for the sentence "it gets other tokens than …".

    Raises:
        NotYet: if not.
    """
    for a in arrivals:
        expect(a.name in outputs and outputs[a.name].finished, f"{a.name} never got an end")
        m = outputs[a.name].metrics
        assert m is not None  # an engine's outputs have metrics
        guessing = m.spec_decoding
        total, cut = 0 if guessing is None else guessing.num_draft_tokens - guessing.num_accepted_tokens, False
        for answer in outputs[a.name].outputs:
            num, right = len(answer.token_ids), expected(a, answer.index)
            wrong = next((i for i, pair in enumerate(zip(answer.token_ids, right)) if pair[0] != pair[1]), None)
            expect(
                wrong is None,
                f"{a.name} gets other tokens than {source}, from its answer's token {wrong} on: what it reads, or "
                "draws, is not its own",
            )
            aborted = answer.finish_reason == "abort"
            expect(
                (aborted and a.abort_after is not None)
                or (answer.finish_reason, num) == ("length", a.params.max_tokens),
                f"{a.name} asked for {a.params.max_tokens} tokens, got {num}, and ended by {answer.finish_reason!r}",
            )
            total, cut = total + len(a.prompt) + num - 1, cut or aborted
        done = m.num_computed_tokens + m.num_cached_tokens + m.num_shared_tokens
        expect(
            cut or done == total or (done > total and m.num_preemptions > 0),
            f"{a.name} needs {total} tokens, and {m.num_computed_tokens} were computed, {m.num_cached_tokens} taken "
            f"from the cache, {m.num_shared_tokens} shared",
        )


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


PARTS = ("scheduler_cls", "kv_cache_manager_cls")
"""The doors of the configs through which readers put parts of their own."""


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


def expect_subclass(attempt: Any, base: type) -> None:
    """Raises `NotYet` unless the attempt is a class that inherits from ``base``."""
    expect(
        isinstance(attempt, type) and issubclass(attempt, base),
        f"a class was asked for that begins with `class Name({base.__name__}):`, and yours does not.",
    )


def expect_own(attempt: type, base: type, name: str) -> None:
    """Raises `NotYet` unless the attempt has a method ``name`` of its own, which does without that of ``base``."""
    own = vars(attempt).get(name)
    expect(
        own is not None and own is not vars(base)[name],
        f"your class has no {name} of its own, so it is still the engine's that runs.",
    )
    code = getattr(inspect.unwrap(own) if callable(own) else own, "__code__", None)  # checks wrap a class's methods
    expect(
        code is None or name not in code.co_names,
        f"your {name} calls the engine's, and the exercise is to write it: do the work yourself.",
    )


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


@cache
def _embedded_engine(guessing: bool = False) -> LLMEngine:
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    config = make_engine_config(
        str(EMBEDDED_MODEL),
        max_model_len=64,
        block_size=16,
        num_blocks=16,
        speculative_config=lookup if guessing else None,
    )
    return LLMEngine(config, "cpu")


SEEDED = [
    Arrival(
        f"r{i}",
        list(range(10 + 7 * i, 10 + 7 * i + length)),
        SamplingParams(temperature=1.0, seed=i, n=n, max_tokens=num, ignore_eos=True, detokenize=False),
        step,
    )
    for i, (length, n, num, step) in enumerate([(12, 1, 7, 0), (14, 2, 4, 0), (16, 1, 3, 1)])
]
"""Requests whose answers are drawn, with seeds."""


@cache
def _repeating() -> list[Arrival]:
    """Requests like `SEEDED`, in whose answers much comes again, so that there is something to guess."""
    prompt = _tokenizer().encode("Once upon a time, in the forest, there lived a little fox named Mira. Mira")
    return [replace(a, prompt=prompt, params=replace(a.params, max_tokens=24)) for a in SEEDED]


@cache
def _tokens_alone(guessing: bool = False) -> dict[tuple[str, int], list[int]]:
    """What the embedded model answers to each request alone, by our own runner, which guesses nothing."""
    engine = replace_part(_embedded_engine(), ModelRunner)
    arrivals = _repeating() if guessing else SEEDED
    outputs = [drive(engine, [Arrival(a.name, a.prompt, a.params)])[a.name] for a in arrivals]
    return {(o.request_id, answer.index): answer.token_ids for o in outputs for answer in o.outputs}


def judge_runner(attempt: type, guessing: bool = False) -> None:
    """Lets a reader's runner compute seeded requests with the embedded model.

    Args:
        attempt: a subclass of `folovllm.worker.model_runner.ModelRunner`.
        guessing: whether tokens are guessed, in requests that repeat themselves.

    Raises:
        NotYet: if somebody gets other tokens than alone.
    """
    expect_subclass(attempt, ModelRunner)
    alone, arrivals = _tokens_alone(guessing), _repeating() if guessing else SEEDED
    try:
        engine = replace_part(_embedded_engine(guessing), attempt)
        Watch(engine)
        right = "our own runner gives it alone"
        check_outputs(arrivals, drive(engine, arrivals), lambda a, index: alone[a.name, index], right)
    except NotYet as error:
        raise NotYet(f"{str(error).rstrip('.')}.") from error
    except Exception as error:
        raise NotYet(f"{blame_part(error)}.") from error
    finally:
        _forget_requests(_embedded_engine(guessing))


ATTENTION_SETTINGS: tuple[dict[str, Any], ...] = (
    {"block_size": 16, "num_blocks": 16},
    {
        "block_size": 3,
        "num_blocks": 40,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 7,
        "enable_prefix_caching": True,
    },
    {"block_size": 5, "num_blocks": 13, "max_num_batched_tokens": 64},
)
"""Fields of the configs for a judge of attention: whole prompts, chunks of them, and too few blocks for all."""


def judge_attention(attempt: type, settings: SequenceOf[Mapping[str, Any]] = ATTENTION_SETTINGS) -> None:
    """Lets a reader's attention backend serve seeded requests with the embedded model.

    Args:
        attempt: a subclass of `folovllm.attention.AttentionBackend`.
        settings: fields of the configs, for one run each.

    Raises:
        NotYet: if somebody gets other tokens than alone and by our own backend.
    """
    expect_subclass(attempt, AttentionBackend)
    alone = _tokens_alone()
    for each in settings:
        shown = ", ".join(f"{name}={value!r}" for name, value in each.items())
        try:
            engine = replace_part(_engine_with_embedded_model(each), attempt)
            check_outputs(SEEDED, drive(engine, SEEDED), lambda a, index: alone[a.name, index])
        except NotYet as error:
            raise NotYet(f"{str(error).rstrip('.')} ({shown}).") from error
        except Exception as error:
            raise NotYet(f"your code raised {type(error).__name__}: {error} ({shown}).") from error


def judge_reader(attempt: type) -> None:
    """Reads weights of both versions of GPTQ's format, then lets an engine answer with the embedded model's.

    Args:
        attempt: a subclass of `folovllm.book.few_bits.WeightReader`.

    Raises:
        NotYet: if a zero point or a token is another one.
    """
    expect_subclass(attempt, WeightReader)
    for seed, (num_out, num_groups) in enumerate(((8, 1), (24, 3), (16, 2), (40, 1))):
        weight = _random_weight(num_out, num_groups, seed)
        for version in (2, 1):
            tensors, case = pack_gptq(weight, version), f"{num_out} rows, {num_groups} groups, version {version}"
            try:
                zeros = attempt().read(tensors, version).zeros
            except Exception as error:
                raise NotYet(f"{case}: {blame_part(error)}.") from error
            same = zeros.shape == weight.zeros.shape and bool((zeros == weight.zeros).all())
            expect(
                same,
                f"{case}: the zero points of the first row are {weight.zeros[0].tolist()}, yours reads "
                f"{zeros[0].tolist()}.",
            )
    for version in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = _tokens_read(Path(folder) / "model", attempt, version)
        right = _tokens_read_by_us()
        expect(found == right, f"in the engine, a model in version {version} says other tokens than by our own reader.")


def _random_weight(num_out: int, num_groups: int, seed: int) -> QuantizedWeight:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        torch.randint(0, 16, (num_out, 16 * num_groups), generator=generator, dtype=torch.uint8),
        torch.rand(num_out, num_groups, generator=generator),
        torch.randint(1, 16, (num_out, num_groups), generator=generator, dtype=torch.uint8),
        column_groups(16 * num_groups, num_groups),
    )


@cache
def _tokens_read_by_us() -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        return _tokens_read(Path(folder) / "model", WeightReader, 1)


def _tokens_read(folder: Path, reader: type[WeightReader], version: int) -> list[int]:
    """What the embedded model says, rounded to 4 bits, written in one version, and read by a reader."""
    import torch

    write_default_model(folder, version)
    decoder = read_decoder(folder, reader(), 64)
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=8)
    runner = ModelRunner(decoder, cast(ModelRunner, _embedded_engine().runner).sampler, config)
    engine = LLMEngine(config, model=ServedModel(runner, VOCAB_SIZE, 512, _tokenizer(), decoder=decoder))
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    with torch.inference_mode():
        output = drive(engine, [Arrival("r", list(range(10, 22)), greedy)])["r"]
    return output.outputs[0].token_ids


def _engine_with_embedded_model(settings: Mapping[str, Any]) -> LLMEngine:
    """An engine of its own, without loading the model again."""
    ours = _embedded_engine()
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=MAX_MODEL_LEN, **settings)
    runner = ModelRunner(ours.decoder, cast(ModelRunner, ours.runner).sampler, config)
    return LLMEngine(config, model=ServedModel(runner, VOCAB_SIZE, 512, _tokenizer(), decoder=ours.decoder))


def _forget_requests(engine: LLMEngine) -> None:
    """Ends what a broken part has left behind, takes its outputs, and puts our own parts back."""
    for name in list(engine.output_processor.states):
        engine.abort_request(name)
    engine.step()  # with nothing to compute
    for part in (KVCacheManager, Scheduler, ModelRunner):
        replace_part(engine, part)


TEXTS: tuple[tuple[str, list[str], bool], ...] = (
    ("Grüße, said the fox 🦊 to Jürgen, the bear 🐻 of Zürich.", [], False),
    ("नमस्ते, 你好, καλημέρα: three ways to begin.", [], False),
    ("Plain words, and then the END of it", ["END"], False),
    ("The first line.\n\nThe second paragraph.", ["\n\nThe s", "paragraph"], False),
    ("She said: the en, the end, the ending.", ["the ending"], False),
    ("To be kept: 你好吗 and no more", ["好吗"], True),
)
"""What is said to a detokenizer: a text, stop strings, and whether the stop string stays in the text."""


def judge_detokenizer(attempt: type, stops: bool = True) -> None:
    """Lets an engine say texts with long characters and stop strings, and compares what a user would see at each step.

    Args:
        attempt: the engine's ``detokenizer_cls``.
        stops: whether there are stop strings, too.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect(isinstance(attempt, type), "a class was asked for, and yours is something else.")
    missing = [name for name in ("add", "finish", "visible_text") if not hasattr(attempt, name)]
    expect(not missing, f"the engine calls {', '.join(missing)} of a detokenizer, and yours has no such thing.")
    is_method = callable(getattr(attempt, "text", None))
    expect(not is_method, "the engine reads text like an attribute: put @property above it, or set self.text.")
    texts = _texts(stops)
    ours = _our_texts(stops)
    try:
        found = _tell(attempt, texts)
    except Exception as error:
        raise NotYet(f"{blame_part(error)}.") from error
    for (text, stop, _), right, got in zip(texts, ours, found):
        _compare_texts(f"{text!r}{f' with stop={stop}' if stop else ''}", right, got)


def _texts(stops: bool) -> list[tuple[str, list[str], bool]]:
    return [text for text in TEXTS if stops or not text[1]]


@cache
def _our_texts(stops: bool) -> list[list[str]]:
    return _tell(Detokenizer, _texts(stops))


def _tell(part: type, texts: SequenceOf[tuple[str, list[str], bool]]) -> list[list[str]]:
    """What the user of each text has seen after each token; last, why it ended."""
    # Those without stop strings end by the end token, which is no text.
    ends = [[] if stop else [cast(int, _tokenizer().eos_token_id)] for _, stop, _ in texts]
    encoded = [_tokenizer().encode(text) + end for (text, _, _), end in zip(texts, ends)]
    script = {str(i): token_ids for i, token_ids in enumerate(encoded)}
    engine_cls = cast(type[LLMEngine], type("Engine", (LLMEngine,), {"detokenizer_cls": part}))
    engine = make_engine({"block_size": 16, "num_blocks": 64, "max_model_len": 256}, script, engine_cls)
    seen: list[list[str]] = [[] for _ in texts]
    for i, (_, stop, include) in enumerate(texts):
        params = SamplingParams(
            max_tokens=len(encoded[i]), stop=stop or None, include_stop_str_in_output=include, ignore_eos=bool(stop)
        )
        engine.add_request(str(i), [5], params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = output.outputs[0]
            seen[int(output.request_id)].append(answer.text)
            if output.finished:
                seen[int(output.request_id)].append(f"{answer.finish_reason}, {answer.stop_reason!r}")
    return seen


def _compare_texts(text: str, right: list[str], got: list[str]) -> None:
    shown = ""
    for num, now in enumerate(got[:-1], start=1):
        where = f"after {num} tokens of {text}"
        expect(isinstance(now, str), f"{where} a text is asked for, and yours gives a {type(now).__name__}.")
        expect("\ufffd" not in now, f"{where} yours shows {now[-12:]!r}: a piece of a character that is not complete.")
        expect(
            now.startswith(shown),
            f"{where} yours shows {now[-24:]!r}, and had shown {shown[-24:]!r}: it takes text back.",
        )
        best = right[num - 1] if num < len(right) else None
        expect(best is not None, f"{where} yours goes on, and a stop string has ended the text before.")
        expect(now == best, f"{where} the user should see {best!r}, and sees {now!r}.")
        shown = now
    expect(
        right[-1] == got[-1],
        f"{text} ends by {right[-1]}, yours by {got[-1]}: what add gives back is taken for a stop string.",
    )


NUM_WORDS = 14
"""Tokens that the pretended model of a search knows."""

SEARCHES: tuple[tuple[list[int], BeamSearchParams, tuple[int, ...]], ...] = (
    ([5], BeamSearchParams(2, 3), ()),
    ([6, 7, 8, 9, 10, 11], BeamSearchParams(3, 6, length_penalty=0.0), (0,)),
    ([9, 8, 7], BeamSearchParams(4, 5, length_penalty=2.0), (0, 1, 2)),
    ([7] * 21, BeamSearchParams(1, 4, length_penalty=0.5), (3, 4)),
    ([6, 5], BeamSearchParams(5, 8), (0, 1)),
    ([8, 9, 10, 11, 12], BeamSearchParams(2, 9, length_penalty=-1.0), (1, 2, 3)),
)
"""Prompt, params and end tokens of each search of a judge."""


@cache
def next_logprobs(token_ids: tuple[int, ...]) -> dict[int, Logprob]:
    """What the pretended model finds how likely after some tokens, the likeliest first."""
    rng = random.Random(hash(token_ids))
    weights = [rng.uniform(0.01, 1) ** 4 for _ in range(NUM_WORDS)]
    found = {i: Logprob(math.log(weight / sum(weights))) for i, weight in enumerate(weights)}
    return dict(sorted(found.items(), key=lambda item: -item[1].logprob))


class SearchedRunner(PretendedRunner):
    """Tells log probabilities of what it reads through the block table."""

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """As `PretendedRunner.run`, with as many likeliest tokens as are asked for."""
        super().run(scheduler_output)
        found = [
            dict(itertools.islice(next_logprobs(self._read(seq)).items(), cast(int, seq.sampling_params.logprobs)))
            for seq, _ in scheduler_output.sampled
        ]
        return RunnerOutput([[next(iter(each))] for each in found], [[each] for each in found])


def judge_search(attempt: type, ours: type[BeamSearch] = BeamSearch) -> None:
    """Runs a reader's search beside ours, step by step, and then all of `SEARCHES` at once in an engine.

    Args:
        attempt: given to an `LLM` as ``beam_search_cls``.
        ours: what it must do alike.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect_subclass(attempt, BeamSearch)
    for prompt, params, ends in SEARCHES:
        right, got = (cls(list(prompt), params, ends) for cls in (ours, attempt))
        for step in range(params.max_tokens):
            found = [next_logprobs(tuple(text.tokens)) for text in right.beams]
            likeliest = [dict(itertools.islice(each.items(), right.num_candidates)) for each in found]
            right.step(likeliest)
            try:
                got.step(likeliest)
                _compare_search(right, got, f"step {step} of a beam of {params.beam_width}")
            except NotYet:
                raise
            except Exception as error:
                raise NotYet(f"step {step}: {blame_part(error)}.") from error
            if not right.beams:
                break
    _search_in_engine(attempt, ours)


def _compare_search(right: BeamSearch, got: BeamSearch, where: str) -> None:
    num_prompt, params = len(right.prompt_token_ids), right.params
    kinds = (("go on", right.beams, got.beams), ("have ended", right.finished, got.finished))
    for kind, ours, yours in kinds:
        shown, told = ([text.tokens[num_prompt:] for text in texts] for texts in (ours, yours))
        settings = f"length_penalty={params.length_penalty:g}, ends {[*right.end_token_ids]}"
        expect(shown == told, f"after {where} ({settings}) {shown} {kind}, and by yours {told}.")
        for one, other in zip(ours, yours):
            output = other.tokens[num_prompt:]
            expect(other.tokens == one.tokens, f"{where}: a text's tokens begin with the prompt's, which are lost.")
            expect(
                math.isclose(one.cum_logprob, other.cum_logprob, abs_tol=1e-9),
                f"after {where} the sum of {output} should be {one.cum_logprob:.3f}, yours is {other.cum_logprob:.3f}.",
            )
            expect(
                one.finish_reason == other.finish_reason,
                f"after {where} the finish_reason of {output} should be {one.finish_reason!r}, yours is "
                f"{other.finish_reason!r}.",
            )
            expect(one.logprobs == other.logprobs, f"after {where} the logprobs of {output} are not what it had.")


def _search_in_engine(attempt: type, ours: type[BeamSearch]) -> None:
    found: list[list[list[BeamSearchSequence]]] = []
    for cls in (ours, attempt):
        settings = {"block_size": 2, "num_blocks": 200, "max_num_seqs": 8, "enable_prefix_caching": True}
        config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=MAX_MODEL_LEN, **settings)
        engine = LLMEngine(config, model=ServedModel(SearchedRunner(200, 2), NUM_WORDS, 512, _tokenizer()))
        searches = [cls(list(prompt), params, ends) for prompt, params, ends in SEARCHES]
        sink = OutputSink()
        try:
            for _ in run_searches(engine, sink, searches):
                engine.check_integrity()
        except Exception as error:
            raise NotYet(f"in the engine: {blame_part(error)}.") from error
        finally:
            engine.close(sink)
        found.append([search.finished for search in searches])
    expect(found[0] == found[1], "side by side in the engine, your searches find other texts than alone.")
