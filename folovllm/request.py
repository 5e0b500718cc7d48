"""What has to be remembered about a text that is not finished. Chapter 3 is about this module.

A `Request` is what somebody asked for; it owns one `Sequence` for each answer it may give; a sequence owns its
tokens (`SequenceData`) and the list of KV blocks they live in. The layering is that of vLLM's first engine
(``vllm/sequence.py``, 0.6); its present one (``vllm/v1/request.py``, 0.33.0) keeps a single ``Request``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from folovllm.logprobs import Logprob
from folovllm.sampling_params import SamplingParams
from folovllm.validation import check_token_ids, require


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """Not started, or started and made to give up its blocks; its tokens must be computed (again)."""
    RUNNING = "running"
    """Gets a token in every step."""
    SWAPPED = "swapped"
    """Its blocks wait in CPU memory for room on the GPU."""
    FINISHED_STOPPED = "finished_stopped"
    """Ended by an end-of-sequence token, a stop token or a stop text."""
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    """Ended by ``max_tokens`` or ``max_model_len``."""
    FINISHED_ABORTED = "finished_aborted"
    """Ended by whoever asked for it, or by an error."""
    FINISHED_IGNORED = "finished_ignored"
    """One of ``best_of`` that was not among the ``n`` likeliest."""

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.value.startswith("finished")


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    FINISHED_ABORTED = "finished_aborted"

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.value.startswith("finished")


@dataclass
class SequenceData:
    """The tokens of one sequence, and how likely its output was."""

    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum of the log probabilities of the output's tokens; None while none has been reported."""

    def __post_init__(self) -> None:
        # Lists of its own: whoever made this object may go on changing theirs.
        self.prompt_token_ids = check_token_ids("prompt_token_ids", self.prompt_token_ids)
        self.output_token_ids = check_token_ids("output_token_ids", self.output_token_ids)
        require(
            len(self.prompt_token_ids) > 0,
            "prompt_token_ids must hold at least one token, got []: there is no last token to go on from",
        )

    def get_len(self) -> int:
        """Tokens in prompt and output together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def get_prompt_len(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    def get_output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.output_token_ids)

    def get_token_ids(self, start: int = 0, end: int | None = None) -> list[int]:
        """Prompt and output in one new list, or the part of it from ``start`` to before ``end``."""
        prompt_len = len(self.prompt_token_ids)
        end = self.get_len() if end is None else end
        # Only what is asked for is copied: an engine asks for a few tokens of a long text in every step.
        return (
            self.prompt_token_ids[start:end]
            + self.output_token_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]
        )

    def get_last_token_id(self) -> int:
        """The newest token: the one the model reads next. The prompt's last while nothing has been generated."""
        return self.output_token_ids[-1] if self.output_token_ids else self.prompt_token_ids[-1]

    def add_token_id(self, token_id: int, logprob: float | None = None) -> None:
        """Appends a generated token, and its log probability to the sum if it is known."""
        self.output_token_ids.append(token_id)
        if logprob is not None:
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprob


@dataclass
class Sequence:
    """One answer in the making: tokens, status, and the KV blocks that hold its past."""

    seq_id: str
    request_id: str
    data: SequenceData
    sampling_params: SamplingParams
    status: SequenceStatus = SequenceStatus.WAITING
    block_ids: list[int] = field(default_factory=list)
    """The KV blocks of its tokens, in order (its block table)."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    """Per output token what ``SamplingParams.logprobs`` asked for; empty when it asked for nothing."""
    stop_reason: int | str | None = None
    """The stop token or stop text that ended it."""
    num_computed_tokens: int = 0
    """How many of its tokens, from the first, have their keys and values in ``block_ids``."""
    output_text: str | None = None
    """The output's text as far as an engine has it; None where nobody keeps one."""

    def get_len(self) -> int:
        """Tokens in prompt and output together."""
        return self.data.get_len()

    def get_prompt_len(self) -> int:
        """Tokens in the prompt."""
        return self.data.get_prompt_len()

    def get_output_len(self) -> int:
        """Tokens generated so far."""
        return self.data.get_output_len()

    def get_token_ids(self) -> list[int]:
        """Prompt and output in one new list."""
        return self.data.get_token_ids()

    def get_last_token_id(self) -> int:
        """The newest token; the prompt's last while nothing has been generated."""
        return self.data.get_last_token_id()

    def add_token_id(self, token_id: int, logprob: float | None = None) -> None:
        """Appends a generated token, and its log probability to the sum if it is known."""
        self.data.add_token_id(token_id, logprob)

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.status.is_finished()

    def fork(self, new_seq_id: str) -> Sequence:
        """A second sequence with the same past and its own future.

        Tokens, logprobs and the list of blocks are copied; the sampling params are shared, and so are the blocks
        themselves, until one of the two writes (copy-on-write, Kwon et al. 2023, section 4.4).
        """
        data = SequenceData(self.data.prompt_token_ids, self.data.output_token_ids, self.data.cumulative_logprob)
        return Sequence(
            new_seq_id,
            self.request_id,
            data,
            self.sampling_params,
            self.status,
            list(self.block_ids),
            list(self.logprobs),
            self.stop_reason,
            self.num_computed_tokens,
            self.output_text,
        )


@dataclass
class Request:
    """What somebody asked for, and the sequences that will answer it.

    Raises:
        ValueError: if the prompt has no token.
    """

    request_id: str
    prompt: str | None
    """The prompt's text; None when the prompt came as token ids."""
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    sequences: dict[str, Sequence] = field(default_factory=dict)
    """By ``seq_id``; when none are given, ``best_of`` new ones."""
    status: RequestStatus = RequestStatus.WAITING

    def __post_init__(self) -> None:
        self.prompt_token_ids = SequenceData(self.prompt_token_ids).prompt_token_ids
        if self.sequences:
            return
        for i in range(self.sampling_params.best_of or self.sampling_params.n):
            seq_id = f"{self.request_id}-{i}"
            data = SequenceData(self.prompt_token_ids)
            self.sequences[seq_id] = Sequence(seq_id, self.request_id, data, self.sampling_params)

    def get_seqs(self, status: SequenceStatus | None = None) -> list[Sequence]:
        """The sequences, or only those in one status."""
        return [seq for seq in self.sequences.values() if status is None or seq.status == status]

    def get_num_seqs(self, status: SequenceStatus | None = None) -> int:
        """How many sequences there are, or are in one status."""
        return len(self.get_seqs(status))

    def is_finished(self) -> bool:
        """Whether all sequences are."""
        return all(seq.is_finished() for seq in self.sequences.values())
