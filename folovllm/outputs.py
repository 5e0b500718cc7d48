"""What comes back: the answers to a request, each with its text, tokens and reason for ending. Chapter 3.

The same names as in vLLM (``vllm/outputs.py``, 0.33.0).
"""

from __future__ import annotations

import copy
import html
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from folovllm.logprobs import Logprob
from folovllm.request import Request, Sequence, SequenceStatus
from folovllm.utils.html import tinted_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: "stop",
    SequenceStatus.FINISHED_LENGTH_CAPPED: "length",
    SequenceStatus.FINISHED_ABORTED: "abort",
}
"""The ``finish_reason`` of each status that ends a sequence."""


@dataclass
class CompletionOutput:
    """One answer."""

    index: int
    """Place among the answers, from 0."""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum of the log probabilities of ``token_ids``."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token what ``SamplingParams.logprobs`` asked for, the chosen token first."""
    finish_reason: str | None = None
    """"stop", "length", "abort", or None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id or stop text that ended it; None for the end-of-sequence token."""

    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None

    @classmethod
    def from_sequence(
        cls, seq: Sequence, tokenizer: PreTrainedTokenizerBase, first_token: int = 0, first_char: int = 0
    ) -> CompletionOutput:
        """The present state of a sequence, as its user sees it, or what is new of it.

        Args:
            seq: the sequence; its ``output_text`` is used if an engine has set it.
            tokenizer: makes the text otherwise.
            first_token: tokens and log probabilities before this one are left out.
            first_char: text before this character is left out.
        """
        params, text = seq.sampling_params, seq.output_text
        if text is None:
            # A token that ended the answer is one of its tokens and no part of its text.
            ended_by_token = seq.status is SequenceStatus.FINISHED_STOPPED and not isinstance(seq.stop_reason, str)
            hidden = 1 if ended_by_token and not params.include_stop_str_in_output else 0
            text = tokenizer.decode(
                seq.data.output_token_ids[: seq.get_output_len() - hidden],
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        return cls(
            index=seq.index,
            text=text[first_char:],
            token_ids=seq.data.output_token_ids[first_token:],
            cumulative_logprob=seq.data.cumulative_logprob,
            logprobs=None if params.logprobs is None else seq.logprobs[first_token:],
            finish_reason=FINISH_REASONS.get(seq.status),
            stop_reason=seq.stop_reason,
        )


def best_sequences(request: Request) -> list[Sequence]:
    """The sequences that answer a request: all, or of ``best_of`` > ``n`` the ``n`` with the highest log probability.

    A sequence whose log probability was never reported comes after those whose was, and one that was aborted after
    all others: the less there is of a text, the likelier it is.
    """

    def likelihood(seq: Sequence) -> tuple[bool, float]:
        logprob = seq.data.cumulative_logprob
        return seq.status is not SequenceStatus.FINISHED_ABORTED, -math.inf if logprob is None else logprob

    seqs = [seq for seq in request.get_seqs() if seq.status is not SequenceStatus.FINISHED_IGNORED]
    if request.sampling_params.best_of == request.sampling_params.n:
        return seqs
    return sorted(seqs, key=likelihood, reverse=True)[: request.sampling_params.n]


@dataclass
class SpecDecodingStats:
    """What guessing has given (vLLM: ``v1/spec_decode/metrics.py``, 0.33.0)."""

    num_drafts: int = 0
    """How often a sequence had guesses that a pass checked."""
    num_draft_tokens: int = 0
    """Guesses that were checked."""
    num_accepted_tokens: int = 0
    """How many of them became tokens."""
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)
    """By their place: the first guess after a newest token, the second, …"""
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens per checked draft in the mean, the one that comes anyway included: 1 + accepted / drafts."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def acceptance_rates(self) -> list[float]:
        """By their place, the share of the guesses that became tokens."""
        return [a / b for a, b in zip(self.num_accepted_tokens_per_pos, self.num_draft_tokens_per_pos)]

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Counts the guesses that a pass has checked for one sequence."""
        longer = num_draft_tokens - len(self.num_draft_tokens_per_pos)
        self.num_draft_tokens_per_pos += [0] * longer
        self.num_accepted_tokens_per_pos += [0] * longer
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for place in range(num_draft_tokens):
            self.num_draft_tokens_per_pos[place] += 1
            self.num_accepted_tokens_per_pos[place] += place < num_accepted_tokens


@dataclass
class RequestMetrics:
    """Times and costs of a request. Times are seconds since the epoch."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_computed_tokens: int = 0
    """Tokens that went through the model, those that a preemption made it compute again included."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the prefix cache when the first answer was first admitted."""
    num_shared_tokens: int = 0
    """Prompt tokens that later answers shared with the first one instead of computing them."""
    num_preemptions: int = 0
    num_passes: int = 0
    """How often a pass gave one of its answers tokens."""
    num_generated_tokens: int = 0
    """Tokens of all its answers."""
    spec_decoding: SpecDecodingStats | None = None
    """What guessing has given; None while no guess has been checked."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave an answer, in the mean: 1 without guessing."""
        return self.num_generated_tokens / max(self.num_passes, 1)

    def snapshot(self) -> RequestMetrics:
        """A copy that stays as it is while the engine goes on counting."""
        return replace(self, spec_decoding=copy.deepcopy(self.spec_decoding))


@dataclass(repr=False)
class RequestOutput:
    """All answers to one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    """Whether every answer is complete."""
    metrics: RequestMetrics | None = None
    """Times and counts of the request; None outside an engine."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt what ``SamplingParams.prompt_logprobs`` asked for, None for the first token. Of
    deltas, the first has them."""

    @classmethod
    def from_request(cls, request: Request, tokenizer: PreTrainedTokenizerBase) -> RequestOutput:
        """All answers in the order of their number, or of ``best_of`` > ``n`` the likeliest ``n``, likeliest first."""
        return cls(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[CompletionOutput.from_sequence(seq, tokenizer) for seq in best_sequences(request)],
            finished=request.is_finished(),
        )

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens found in the prefix cache when the request was admitted; None outside an engine."""
        return None if self.metrics is None else self.metrics.num_cached_tokens

    def add(self, newer: RequestOutput) -> None:
        """Appends a later delta to this one; both are of the same request, with ``RequestOutputKind.DELTA``."""
        by_index = {answer.index: answer for answer in self.outputs}
        for answer in newer.outputs:
            if answer.index not in by_index:
                self.outputs.append(answer)
                continue
            old = by_index[answer.index]
            old.text += answer.text
            old.token_ids = [*old.token_ids, *answer.token_ids]
            if answer.logprobs is not None:
                old.logprobs = [*(old.logprobs or []), *answer.logprobs]
            old.cumulative_logprob = answer.cumulative_logprob
            old.finish_reason, old.stop_reason = answer.finish_reason, answer.stop_reason
        self.finished, self.metrics = newer.finished, newer.metrics

    def _repr_html_(self) -> str:
        """The prompt and the answers, as a notebook shows them: no id and no times, so it is the same in every run."""
        prompt = f"{len(self.prompt_token_ids)} tokens" if self.prompt is None else self.prompt
        shown = [f"<p><b>prompt</b> {html.escape(prompt)}</p>"]
        for answer in self.outputs:
            why = "running" if answer.finish_reason is None else answer.finish_reason
            why += "" if answer.stop_reason is None else f", {answer.stop_reason!r}"
            shown.append(f"<p><b>answer {answer.index}</b> ({len(answer.token_ids)} tokens, {html.escape(why)})</p>")
            if answer.logprobs is None:
                shown.append(f"<p>{html.escape(answer.text)}</p>")
            else:
                found = [entry[token_id] for entry, token_id in zip(answer.logprobs, answer.token_ids)]
                tokens = [logprob.decoded_token or "" for logprob in found]
                shown.append(tinted_text(tokens, [math.exp(logprob.logprob) for logprob in found]))
        return "".join(shown)

    def __repr__(self) -> str:
        prompt = self.prompt
        if prompt is not None and len(prompt) > 50:
            prompt = prompt[:50] + "…"
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={prompt!r}, "
            f"outputs={self.outputs!r}, finished={self.finished})"
        )


@dataclass
class BeamSearchSequence:
    """One text of a beam search, in the making or ended (vLLM: ``entrypoints/generate/beam_search/utils.py``)."""

    tokens: list[int]
    """Prompt and output, with the token that ended it."""
    logprobs: list[dict[int, Logprob]] = field(repr=False)
    """For each token of the output the likeliest ones at its place, which it was chosen from."""
    cum_logprob: float = 0.0
    """Sum of the log probabilities of the output's tokens."""
    text: str | None = None
    """The text of prompt and output; None while the search runs."""
    finish_reason: str | None = None
    """"stop", "length", "abort", or None while the search runs."""
    stop_reason: int | str | None = None
    """The token that ended it, or why it was aborted; None for the end-of-sequence token."""


@dataclass
class BeamSearchOutput:
    """What a beam search found for one prompt: as many texts as the beam was wide, the best one first."""

    sequences: list[BeamSearchSequence]


@dataclass
class RunnerOutput:
    """What a runner returns for one step (vLLM: ``v1/outputs.py``, ``ModelRunnerOutput``)."""

    sampled_token_ids: list[list[int]]
    """For each entry of the step's ``sampled`` its new tokens: one, or more where guesses were right. The scheduler
    drops those behind the end of an answer."""
    logprobs: list[list[dict[int, Logprob]] | None]
    """For each entry the log probabilities of its tokens, or None if they were not asked for."""
    errors: dict[int, str] = field(default_factory=dict)
    """Entries that got no token: index in ``sampled`` -> the reason, one sentence."""
    not_finite: set[int] = field(default_factory=set)
    """Those of them with a logit that is NaN or infinite, whose keys and values may be so, too."""
    prompt_logprobs: dict[str, tuple[int, list[dict[int, Logprob] | None]]] = field(default_factory=dict)
    """``seq_id`` -> position in the prompt of the first token reported, and the log probabilities from there on."""
    spec_token_ids: list[list[int]] = field(default_factory=list)
    """For each entry guesses of the tokens that will follow its new ones; empty where nothing is guessed."""
