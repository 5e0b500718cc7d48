"""What has to be remembered about a text that is not finished. Chapter 3 is about this module.

A `Request` is what a user asked for. It owns one `Sequence` per answer, and a sequence owns its tokens
(`SequenceData`) and the list of its KV blocks. The layering is that of vLLM's first engine
(``vllm/sequence.py``, 0.6); its present one (``vllm/v1/request.py``, 0.33.0) keeps a single ``Request``.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from folovllm.logprobs import Logprob
from folovllm.sampling_params import SamplingParams
from folovllm.validation import check_token_ids, require

MAX_GUESSED_ROWS = 64
"""Most rows of a step that checks guesses. Few cost nearly nothing, since a pass reads all weights for a single one."""

NUM_RECENT_GUESSES = 32
"""Checked guesses of a sequence that are remembered."""


class SequenceStatus(Enum):
    """The states of a sequence."""

    WAITING = "waiting"
    """Not started, or preempted without its blocks; its tokens must be computed (again)."""
    RUNNING = "running"
    """In the batch: each step computes tokens of it while its budget lasts."""
    SWAPPED = "swapped"
    """Preempted, with its blocks in CPU memory until there is room on the GPU."""
    FINISHED_STOPPED = "finished_stopped"
    """Ended by an end-of-sequence token, a stop token or a stop text."""
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    """Ended by ``max_tokens`` or ``max_model_len``."""
    FINISHED_ABORTED = "finished_aborted"
    """Ended by the caller, or by an error."""
    FINISHED_IGNORED = "finished_ignored"
    """Finished, but not among the ``n`` likeliest of ``best_of``."""

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.value.startswith("finished")


class RequestStatus(Enum):
    """The states of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH_CAPPED = "finished_length_capped"
    FINISHED_ABORTED = "finished_aborted"

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.value.startswith("finished")


class StructuredOutputGrammar(ABC):
    """Where one answer is in what it must be (vLLM: ``v1/structured_output/backend_types.py``)."""

    vocab_size: int
    """The token ids that its masks tell of: all below this."""

    @abstractmethod
    def accept_tokens(self, token_ids: SequenceOf[int]) -> bool:
        """Goes on by these tokens; False if they do not fit, after which it is of no more use."""

    @abstractmethod
    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        """Sets the bits of the tokens that may come next, and of no others.

        Args:
            bitmask: int32 ``[num_rows, ceil(vocab_size / 32)]``, a NumPy array; token ``i`` is bit ``i % 32`` of word
                ``i // 32``.
            row: the row to set.

        Raises:
            ValueError: if it cannot tell; of one sentence.
        """

    @abstractmethod
    def copy(self) -> StructuredOutputGrammar:
        """Another one in the same place, which goes on by itself."""

    @property
    def error(self) -> str:
        """Why it accepts nothing more, if it knows."""
        return ""

    def validate_tokens(self, token_ids: SequenceOf[int]) -> list[int]:
        """As many of these tokens, from the first, as would be accepted."""
        ahead = self.copy()
        return list(itertools.takewhile(lambda token_id: ahead.accept_tokens([token_id]), token_ids))

    def compute_ff_tokens(self) -> list[int]:
        """Tokens that must follow, where there is but one way to go on; as many as it is easy to tell."""
        return []


@dataclass
class SequenceData:
    """The tokens of one sequence, and how likely its output was."""

    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum of the log probabilities of the output's tokens; None while none has been reported."""
    _sums: list[float | None] = field(default_factory=list, repr=False, compare=False)
    """That sum after each token that was added."""

    def __post_init__(self) -> None:
        # Copies, since the caller may go on changing its lists.
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
        # Only the slice is copied: an engine asks for a few tokens of a long text in every step.
        return (
            self.prompt_token_ids[start:end]
            + self.output_token_ids[max(start - prompt_len, 0) : max(end - prompt_len, 0)]
        )

    def get_last_token_id(self) -> int:
        """The newest token, which the model has not read; the prompt's last while nothing has been generated."""
        return self.output_token_ids[-1] if self.output_token_ids else self.prompt_token_ids[-1]

    def add_token_id(self, token_id: int, logprob: float | None = None) -> None:
        """Appends a generated token, and its log probability to the sum if it is known."""
        self.output_token_ids.append(token_id)
        if logprob is not None:
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + logprob
        self._sums.append(self.cumulative_logprob)

    def drop_newest(self, num_tokens: int) -> None:
        """Drops the last of the tokens that were added, and their log probabilities."""
        if num_tokens:
            del self.output_token_ids[-num_tokens:], self._sums[-num_tokens:]
            # Not by subtracting: with floats, a + b - b is not always a.
            self.cumulative_logprob = self._sums[-1] if self._sums else None


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
    """Per output token what ``SamplingParams.logprobs`` asked for, the token itself where best_of must rank the answer;
    empty when nothing was asked for."""
    stop_reason: int | str | None = None
    """The stop token or stop text that ended it."""
    num_computed_tokens: int = 0
    """How many of its tokens, from the first, have their keys and values in ``block_ids``."""
    output_text: str | None = None
    """The output's text so far; None outside an engine, where no text is kept."""
    index: int = 0
    """Its number among the answers to the request, from 0."""
    cache_salt: str | None = None
    """The request's: only sequences with the same one share cached blocks."""
    num_preemptions: int = 0
    """How often it was preempted."""
    generator: random.Random | None = None
    """Its own random numbers; made when the first of them is needed."""
    draft_generator: random.Random | None = None
    """Those that a draft model guesses its tokens with."""
    spec_token_ids: list[int] = field(default_factory=list)
    """Guesses of its next tokens, to be checked in its next step; -1 where a draft model will make them then."""
    recent_guesses: list[bool] = field(default_factory=list)
    """Whether each of its last checked guesses was right, the newest last."""
    next_guess: int = 0
    """The length of its output from which on tokens are guessed again, after too few guesses were right."""
    grammar: StructuredOutputGrammar | None = None
    """Where its output is in what ``structured_outputs`` ask for; None: it may be anything."""

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

    def truncate_output(self, num_tokens: int) -> None:
        """Drops all but the first ``num_tokens`` tokens of the output, and what is known of their probabilities."""
        self.data.drop_newest(self.get_output_len() - num_tokens)
        del self.logprobs[num_tokens:]

    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.status.is_finished()

    def fork(self, new_seq_id: str) -> Sequence:
        """A second sequence with the same past and its own future.

        Tokens, logprobs and the list of blocks are copied; the sampling params are shared, and so are the blocks
        themselves, until one of the two writes (copy-on-write, Kwon et al. 2023, section 4.4). Its random numbers are
        its own.
        """
        data = copy.copy(self.data)  # which was checked when it was made
        data.prompt_token_ids, data.output_token_ids = list(data.prompt_token_ids), list(data.output_token_ids)
        data._sums = list(data._sums)
        return replace(
            self,
            seq_id=new_seq_id,
            data=data,
            block_ids=list(self.block_ids),
            logprobs=list(self.logprobs),
            num_preemptions=0,
            generator=None,
            draft_generator=None,
            spec_token_ids=[],
            recent_guesses=[],
            next_guess=0,
            grammar=self.grammar and self.grammar.copy(),
        )


@dataclass
class Request:
    """A prompt with its sampling params, and the sequences that answer it.

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
    """By ``seq_id``; when none are given and none are pending, ``best_of`` new ones."""
    status: RequestStatus = RequestStatus.WAITING
    priority: int = 0
    """Lower is served first, where the scheduler's policy is "priority"."""
    cache_salt: str | None = None
    """A secret of one user or group: only requests with the same salt find each other's cached blocks."""
    eos_token_id: int | None = None
    """The end-of-sequence token; it ends an answer without a ``stop_reason``."""
    num_pending: int = 0
    """Answers without a sequence yet; the scheduler starts them when the batch has room."""
    grammar: StructuredOutputGrammar | None = None
    """What its answers must be, at its beginning; each answer goes on by a copy of it."""

    def __post_init__(self) -> None:
        self.prompt_token_ids = SequenceData(self.prompt_token_ids).prompt_token_ids
        for index, seq in enumerate(self.sequences.values()):
            seq.index = index
        if not self.sequences and not self.num_pending:
            self.num_pending = self.sampling_params.best_of or self.sampling_params.n
            while self.num_pending:
                self.start_answer()

    def start_answer(self, parent: Sequence | None = None) -> Sequence:
        """Makes a sequence of the next pending answer.

        Args:
            parent: another answer, which has the prompt and nothing else; the new one is a fork of it.
        """
        index = len(self.sequences)
        seq_id = f"{self.request_id}-{index}"
        if parent is None:
            data = SequenceData(self.prompt_token_ids)
            seq = Sequence(seq_id, self.request_id, data, self.sampling_params, cache_salt=self.cache_salt)
            seq.grammar = self.grammar and self.grammar.copy()
        else:
            seq = parent.fork(seq_id)
        seq.index = index
        self.sequences[seq_id] = seq
        self.num_pending -= 1
        return seq

    def get_seqs(self, status: SequenceStatus | None = None) -> list[Sequence]:
        """The sequences, all or only those with one status."""
        return [seq for seq in self.sequences.values() if status is None or seq.status == status]

    def get_num_seqs(self, status: SequenceStatus | None = None) -> int:
        """The number of sequences, all or only those with one status."""
        return len(self.get_seqs(status))

    def is_finished(self) -> bool:
        """Whether all sequences are finished and no answer is pending."""
        return not self.num_pending and all(seq.is_finished() for seq in self.sequences.values())
