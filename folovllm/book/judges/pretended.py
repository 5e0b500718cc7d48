"""An engine with a pretended model, and random requests for it: what all judges of an engine need.

`PretendedRunner` keeps tokens where a model keeps keys and values, and what it says next depends on every token that it
reads back through the block table. So one wrong block, or one token that was not computed, changes the answer, and a
run of a hundred steps takes milliseconds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from folovllm.book.exercises.verdict import NotYet, expect
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.served_model import ServedModel
from folovllm.llm import make_engine_config
from folovllm.outputs import RequestOutput, RunnerOutput
from folovllm.request import Sequence
from folovllm.sampling_params import SamplingParams
from folovllm.tales import EMBEDDED_MODEL

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
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's."""
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
    return engine_cls(config, model=ServedModel(runner, VOCAB_SIZE, 512, tokenizer()))


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
