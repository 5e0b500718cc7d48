"""What comes back: the answers to a request, each with its text, tokens and reason for ending. Chapter 3.

The same names as in vLLM (``vllm/outputs.py``, 0.33.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from folovllm.logprobs import Logprob
from folovllm.request import Request, Sequence, SequenceStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: "stop",
    SequenceStatus.FINISHED_LENGTH_CAPPED: "length",
    SequenceStatus.FINISHED_ABORTED: "abort",
}
"""What a user is told about each way a sequence ends."""


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
    def from_sequence(cls, index: int, seq: Sequence, tokenizer: PreTrainedTokenizerBase) -> CompletionOutput:
        """The present state of a sequence, as its user sees it."""
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
            index=index,
            text=text,
            token_ids=list(seq.data.output_token_ids),
            cumulative_logprob=seq.data.cumulative_logprob,
            logprobs=None if params.logprobs is None else list(seq.logprobs),
            finish_reason=FINISH_REASONS.get(seq.status),
            stop_reason=seq.stop_reason,
        )


@dataclass
class RequestMetrics:
    """When things happened to a request, and what it cost. Times are seconds since the epoch."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_computed_tokens: int = 0
    """Tokens that went through the model, those that a preemption made it compute again included."""
    num_cached_tokens: int = 0
    """Tokens whose keys and values were found in the prefix cache."""
    num_shared_tokens: int = 0
    """Tokens of the prompt that later answers took over from the first one."""
    num_preemptions: int = 0


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
    """Times and counts of the request, where an engine keeps them."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt what ``SamplingParams.prompt_logprobs`` asked for; None for the first token."""

    @classmethod
    def from_request(
        cls,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        metrics: RequestMetrics | None = None,
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None,
    ) -> RequestOutput:
        """The ``n`` likeliest of the ``best_of`` sequences, by cumulative log probability.

        A sequence whose log probability was never reported comes after those whose was.
        """

        def likelihood(seq: Sequence) -> float:
            logprob = seq.data.cumulative_logprob
            return -math.inf if logprob is None else logprob

        seqs = [seq for seq in request.get_seqs() if seq.status is not SequenceStatus.FINISHED_IGNORED]
        best = sorted(seqs, key=likelihood, reverse=True)[: request.sampling_params.n]
        return cls(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput.from_sequence(i, seq, tokenizer) for i, seq in enumerate(best)],
            finished=request.is_finished(),
            metrics=metrics,
            prompt_logprobs=prompt_logprobs,
        )

    def __repr__(self) -> str:
        prompt = self.prompt
        if prompt is not None and len(prompt) > 50:
            prompt = prompt[:50] + "…"
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={prompt!r}, "
            f"outputs={self.outputs!r}, finished={self.finished})"
        )
