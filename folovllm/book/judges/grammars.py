"""A judge of grammars and of their masks in a running engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from folovllm.book.exercises.verdict import NotYet, blame_part, expect
from folovllm.book.faults import replace_part
from folovllm.book.judges.pretended import VOCAB_SIZE, Arrival, PretendedRunner, drive, name_of, tokenizer
from folovllm.book.state_machine import machine_of, token_bytes
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.served_model import ServedModel
from folovllm.llm import make_engine_config
from folovllm.request import Sequence, StructuredOutputGrammar
from folovllm.sample.structured_output import GuidanceBackend, fill_bitmasks
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams
from folovllm.tales import EMBEDDED_MODEL

if TYPE_CHECKING:
    pass

REGEXES = ("(fox|frog)s?", "[a-f]{2,4}", "(red|blue) (hat|map)", "ab*", "(狐|狸)+")
"""What a judge's answers must match; in words that Python, llguidance and `StateMachine` read alike."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 8, "block_size": 4, "num_blocks": 60},
    {"max_num_seqs": 5, "block_size": 2, "num_blocks": 17, "enable_prefix_caching": True},
    {"max_num_seqs": 5, "block_size": 2, "num_blocks": 17, "preemption_mode": "swap", "swap_space": 12.0},
)
"""Fields of the configs, for one run each: room for all, too few blocks for those who come, and swapping."""

EOS_TOKEN_IDS = (0, 2)


def read_bitmask(words: np.ndarray) -> set[int]:
    """The tokens whose bits are set, of one row."""
    return set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())


class FittingRunner(PretendedRunner):
    """Says of what is allowed what `PretendedRunner` would have drawn, and compares each mask with ours."""

    def _say(self, seq: Sequence, num_guesses: int) -> int:
        drawn, grammar = super()._say(seq, num_guesses), cast(StructuredOutputGrammar, seq.grammar)
        found = [self._find(seq, position) for position in range(seq.get_len(), seq.get_len() + num_guesses)]
        guesses = [block[slot] for block, slot in found]
        allowed = read_bitmask(fill_bitmasks([grammar], [guesses])[-1])
        _compare(seq, guesses, allowed)
        return sorted(allowed)[drawn % len(allowed)]


@cache
def _backend() -> GuidanceBackend:
    return GuidanceBackend(tokenizer(), VOCAB_SIZE, EOS_TOKEN_IDS)


@cache
def _allowed(regex: str, token_ids: tuple[int, ...]) -> tuple[set[int], set[int]]:
    """What must be allowed after some tokens, and what may be; what is certain may be written in one way only."""
    grammar = _backend().compile_grammar(StructuredOutputsParams(regex=regex))
    grammar.accept_tokens(token_ids)
    least = read_bitmask(fill_bitmasks([grammar])[0])
    if token_ids and token_ids[-1] in EOS_TOKEN_IDS:
        return least, least
    machine, tokens = machine_of(regex), _token_bytes()
    state = machine.step(machine.start, b"".join(tokens[i] for i in token_ids))
    most = {i for i, token in enumerate(tokens) if token and machine.step(state, token)}
    return least, most | (set(EOS_TOKEN_IDS) if machine.accepts(state) else set())


@cache
def _token_bytes() -> list[bytes]:
    return token_bytes(tokenizer())


def _compare(seq: Sequence, guesses: list[int], allowed: set[int]) -> None:
    regex = cast(StructuredOutputsParams, seq.sampling_params.structured_outputs).regex
    output = seq.data.output_token_ids + guesses
    least, most = _allowed(cast(str, regex), tuple(output))
    where = f"{name_of(seq)} of {regex!r}, after {tokenizer().decode(output)!r}"
    for wrong, does, fits in ((allowed - most, "is", "does not fit"), (least - allowed, "is not", "fits")):
        for token_id in sorted(wrong)[:1]:
            what = "the end" if token_id in EOS_TOKEN_IDS else f"the token {tokenizer().decode([token_id])!r}"
            raise NotYet(f"{where}: {what} {does} allowed, and it {fits}.")


def make_arrivals() -> list[Arrival]:
    """Requests for one to four answers each, in steps that lie close together."""
    arrivals = []
    for i, regex in enumerate(REGEXES):
        params = SamplingParams(
            seed=i, n=1 + i % 4, max_tokens=14, structured_outputs=StructuredOutputsParams(regex=regex)
        )
        arrivals.append(Arrival(f"r{i}", list(range(10 + 5 * i, 13 + 7 * i)), params, i // 2))
    return arrivals


def judge_grammars(attempt: type) -> None:
    """Lets a backend make the grammars of an engine's requests, and looks at every mask and every answer.

    Args:
        attempt: a class like `folovllm.sample.structured_output.GuidanceBackend`.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    for settings in SETTINGS:
        try:
            _run(attempt, settings)
        except NotYet:
            raise
        except Exception as error:
            raise NotYet(f"{blame_part(error)}.") from error


def _run(attempt: type, settings: Mapping[str, Any]) -> None:
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, **settings)
    runner = FittingRunner(settings["num_blocks"], settings["block_size"], int(settings.get("swap_space", 0)))
    model = ServedModel(runner, VOCAB_SIZE, 512, tokenizer(), list(EOS_TOKEN_IDS))
    arrivals = make_arrivals()
    outputs = drive(replace_part(LLMEngine(config, model=model), attempt), arrivals)
    for arrival in arrivals:
        regex = cast(StructuredOutputsParams, arrival.params.structured_outputs).regex
        for answer in outputs[arrival.name].outputs:
            who = f"{arrival.name}, answer {answer.index}"
            expect(answer.finish_reason != "abort", f"{who} was aborted: {answer.stop_reason}.")
            fits = answer.finish_reason == "length" or re.fullmatch(cast(str, regex), answer.text)
            expect(bool(fits), f"{who} ended as {answer.text!r}, which does not match {regex!r}.")
