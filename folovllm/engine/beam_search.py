"""Beam search: the likeliest of many texts, looked for a token at a time. Chapter 17.

`BeamSearch` decides which texts go on, and knows of log probabilities alone; `run_searches` asks an engine for these, a
request of one token per text. The algorithm, and so the texts, are those of transformers' ``num_beams`` with
``early_stopping=True``. Names and shapes are vLLM's (``entrypoints/generate/beam_search/``, 0.33.0), where the score of
a text depends on the length of its prompt too, and a search never stops early.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from folovllm.engine.llm_engine import LLMEngine, Prompt
from folovllm.engine.output_processor import OutputSink
from folovllm.logprobs import Logprob
from folovllm.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput
from folovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from folovllm.utils import generate_request_id
from folovllm.validation import require, show


@dataclass
class BeamSearch:
    """The search for one prompt: the texts that go on, and those that have ended."""

    prompt_token_ids: list[int]
    params: BeamSearchParams
    end_token_ids: Collection[int] = ()
    """The tokens that end a text."""
    cache_salt: str | None = None
    """Of the requests that the search is made of."""
    beams: list[BeamSearchSequence] = field(init=False)
    """The texts that go on, the likeliest first; none when the search is over."""
    finished: list[BeamSearchSequence] = field(init=False, default_factory=list)
    """The texts that have ended, the best first."""

    def __post_init__(self) -> None:
        self.beams = [BeamSearchSequence(list(self.prompt_token_ids), [])]

    @property
    def num_candidates(self) -> int:
        """How many likeliest next tokens of each text a step must be given.

        Beside the tokens that may end it, ``beam_width`` are enough, even if all survivors come from one text.
        """
        width = self.params.beam_width
        return max(2 * width, width + len(self.end_token_ids))

    def score(self, text: BeamSearchSequence) -> float:
        """What texts that have ended are ranked by: the log probability, divided by a power of the output's length."""
        num_generated = len(text.tokens) - len(self.prompt_token_ids)
        return text.cum_logprob / num_generated**self.params.length_penalty

    def step(self, logprobs: Sequence[dict[int, Logprob]]) -> None:
        """Extends the texts by one token, and keeps the likeliest ``beam_width`` of those that go on.

        A text ends if its newest token ends it, and its place is among the first ``beam_width`` of all; the search is
        over once so many have ended, or when the texts are as long as they may be.

        Args:
            logprobs: for each of ``beams`` its `num_candidates` likeliest next tokens.
        """
        width = self.params.beam_width
        extended = [
            (text.cum_logprob + entry.logprob, text, token_id, found)
            for text, found in zip(self.beams, logprobs)
            for token_id, entry in found.items()
        ]
        extended.sort(key=lambda candidate: candidate[0], reverse=True)
        self.beams = []
        for place, (cum_logprob, text, token_id, found) in enumerate(extended):
            reason = self.finish_reason(text, token_id)
            is_kept = len(self.beams) < width if reason is None else place < width
            if is_kept:
                longer = BeamSearchSequence([*text.tokens, token_id], [*text.logprobs, found], cum_logprob)
                longer.finish_reason = reason
                (self.beams if reason is None else self.finished).append(longer)
        self.finished = sorted(self.finished, key=self.score, reverse=True)[:width]
        if len(self.finished) == width:
            self.beams = []

    def finish_reason(self, text: BeamSearchSequence, token_id: int) -> str | None:
        """Why a text ends with this token as its next, None if it goes on."""
        if token_id in self.end_token_ids:
            return "stop"
        num_generated = len(text.tokens) + 1 - len(self.prompt_token_ids)
        return "length" if num_generated == self.params.max_tokens else None

    def abort(self, reason: int | str | None) -> None:
        """Ends the search: the texts that would have gone on come after those that have ended."""
        for text in self.beams:
            text.finish_reason, text.stop_reason = "abort", reason
        self.finished, self.beams = [*self.finished, *self.beams][: self.params.beam_width], []


def start_search(
    engine: LLMEngine, prompt: Prompt, params: BeamSearchParams, search_cls: type[BeamSearch] = BeamSearch
) -> BeamSearch:
    """A search that the engine can serve to its end; nothing has been computed for it.

    Args:
        engine: whose tokenizer, end tokens and lengths it is made for.
        prompt: in any form that a request takes.
        params: copied.
        search_cls: which texts go on.

    Raises:
        ValueError: if the prompt or the params could never be served.
    """
    require(isinstance(params, BeamSearchParams), f"params must be BeamSearchParams, got {show(params)}")
    params = replace(params)
    vocab_size = engine.input_processor.vocab_size
    require(
        2 * params.beam_width <= vocab_size,
        f"beam_width must be at most half of the vocabulary of {vocab_size} tokens, got {params.beam_width}",
    )
    longest = SamplingParams(max_tokens=params.max_tokens, detokenize=False, seed=0)
    request = engine.input_processor.process(generate_request_id(), prompt, longest, arrival_time=0.0)
    params.max_tokens = min(params.max_tokens, engine.max_model_len - len(request.prompt_token_ids))
    ends = () if params.ignore_eos else tuple(engine.eos_token_ids)
    search = search_cls(request.prompt_token_ids, params, ends, request.cache_salt)
    limit = engine.config.model_config.max_logprobs
    require(
        limit == -1 or search.num_candidates <= limit,
        f"a beam_width of {params.beam_width} needs {search.num_candidates} log probabilities at each position, and "
        f"max_logprobs is {limit}: lower beam_width or raise max_logprobs (-1: no limit)",
    )
    return search


def run_searches(engine: LLMEngine, sink: OutputSink, searches: Iterable[BeamSearch]) -> Iterator[BeamSearch]:
    """Runs searches side by side, each a token further as soon as its own texts are computed.

    Args:
        engine: others may use it meanwhile.
        sink: for the outputs of the requests; whoever closes it ends the searches.
        searches: new ones.

    Yields:
        each search when it is over.

    Raises:
        Exception: what a step of the engine raised.
    """
    asked: dict[str, tuple[BeamSearch, dict[str, CompletionOutput | None]]] = {}

    def ask(search: BeamSearch) -> None:
        params = SamplingParams(
            temperature=search.params.temperature,
            logprobs=search.num_candidates,
            max_tokens=1,
            detokenize=False,
            seed=0,  # so that it takes no other's seed
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        answers: dict[str, CompletionOutput | None] = {generate_request_id(): None for _ in search.beams}
        for request_id, text in zip(answers, search.beams):
            asked[request_id] = search, answers
            prompt = {"prompt_token_ids": text.tokens, "cache_salt": search.cache_salt}
            engine.add_request(request_id, prompt, params, sink=sink)

    for search in searches:
        ask(search)
    while asked:
        for output in engine.wait(sink):
            search, answers = asked.pop(output.request_id)
            answers[output.request_id] = output.outputs[0]
            if not all(answers.values()):
                continue
            _go_on(search, cast("list[CompletionOutput]", [*answers.values()]))
            if search.beams:
                ask(search)
            else:
                yield search


def _go_on(search: BeamSearch, answers: list[CompletionOutput]) -> None:
    """Gives a search what was computed for its texts."""
    for answer in answers:
        if answer.finish_reason == "abort":
            search.abort(answer.stop_reason)
            return
    search.step([cast("list[dict[int, Logprob]]", answer.logprobs)[0] for answer in answers])


def make_output(engine: LLMEngine, search: BeamSearch) -> BeamSearchOutput:
    """What a search that is over has found, with the texts of its tokens."""
    tokenizer, params = engine.tokenizer, search.params
    for text in search.finished:
        is_stopped = text.finish_reason == "stop"
        if is_stopped and text.tokens[-1] != tokenizer.eos_token_id:
            text.stop_reason = text.tokens[-1]
        hidden = 1 if is_stopped and not params.include_stop_str_in_output else 0
        shown = text.tokens[: len(text.tokens) - hidden]
        text.text = str(tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens))
    return BeamSearchOutput(search.finished)
