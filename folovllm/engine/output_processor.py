"""From tokens to outputs, and from there to the caller who asked for them. Chapter 8.

An output belongs to its request, not to the caller of the step that made it: each request has a sink, and its outputs
go there and nowhere else. As in vLLM (``v1/engine/output_processor.py``, 0.33.0).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.stats import count_requests, count_tokens
from folovllm.logprobs import Logprob
from folovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput, RunnerOutput, best_sequences
from folovllm.request import Request, RequestStatus, Sequence, SequenceStatus
from folovllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OutputSink:
    """Holds the outputs of one caller's requests until the caller takes them.

    Outputs of one request that were not taken yet are merged: the newest cumulative one replaces the others, deltas are
    joined (vLLM: ``RequestOutputCollector``).
    """

    def __init__(self) -> None:
        self.unfinished: set[str] = set()
        """The unfinished requests whose outputs come here."""
        self.is_closed = False
        """Whether its outputs will not be taken any more."""
        self._waiting: list[RequestOutput] = []
        self._places: dict[str, int] = {}  # of the outputs that newer ones of the same request are merged with

    def open(self, request_id: str) -> None:
        """Registers a request. Waiting outputs of an earlier one of the same name stay as they are."""
        self._places.pop(request_id, None)
        self.unfinished.add(request_id)

    def put(self, output: RequestOutput, is_delta: bool) -> None:
        """Adds an output to those that wait."""
        place = self._places.setdefault(output.request_id, len(self._waiting))
        if place == len(self._waiting):
            self._waiting.append(output)
        elif is_delta:
            self._waiting[place].add(output)
        else:
            self._waiting[place] = output

    def take(self) -> list[RequestOutput]:
        """Removes and returns the waiting outputs, by when each request's first one came."""
        waiting, self._waiting, self._places = self._waiting, [], {}
        return waiting

    def __bool__(self) -> bool:
        return bool(self._waiting)


@dataclass
class RequestState:
    """What the engine keeps for an unfinished request, beside the request itself."""

    request: Request
    metrics: RequestMetrics
    sink: weakref.ref[OutputSink]
    detokenizers: dict[str, Detokenizer] = field(default_factory=dict)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_given: dict[str, tuple[int, int]] = field(default_factory=dict)
    """``seq_id`` -> the tokens and characters sent so far, for requests that get deltas."""
    given_whole: set[str] = field(default_factory=set)
    """The sequences whose last delta has been sent."""
    prompt_token_ids: list[int] = field(init=False)
    """What its outputs show: a copy, since the caller may change it."""

    def __post_init__(self) -> None:
        self.prompt_token_ids = list(self.request.prompt_token_ids)


class OutputProcessor:
    """Turns tokens into text, finds stop strings, and sends every request its outputs.

    Args:
        tokenizer: the model's.
        detokenizer_cls: turns an answer's tokens into text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, detokenizer_cls: type[Detokenizer] = Detokenizer) -> None:
        self.tokenizer, self.detokenizer_cls = tokenizer, detokenizer_cls
        self.states: dict[str, RequestState] = {}
        self.abandoned: deque[str] = deque()
        """Requests whose sink is gone; a deque, since a sink may be collected in any thread at any moment."""

    def add_request(self, request: Request, sink: OutputSink) -> None:
        """Keeps a request's state until it is finished; its outputs will go to ``sink``."""
        request_id = request.request_id
        reference = weakref.ref(sink, lambda _: self.abandoned.append(request_id))
        state = RequestState(request, RequestMetrics(request.arrival_time), reference)
        if request.sampling_params.prompt_logprobs is not None:
            state.prompt_logprobs = [None]  # nothing predicts the first token
        self.states[request_id] = state
        sink.open(request_id)

    def forget(self, request_id: str) -> None:
        """Drops a request that was never scheduled; it has no outputs."""
        state = self.states.pop(request_id, None)
        sink = None if state is None else state.sink()
        if sink is not None:
            sink.unfinished.discard(request_id)

    def take_abandoned(self) -> Iterator[str]:
        """The unfinished requests whose sink is closed or garbage-collected."""
        while self.abandoned:
            state = self.states.get(self.abandoned.popleft())
            sink = None if state is None else state.sink()
            if state is not None and (sink is None or sink.is_closed):
                yield state.request.request_id

    def process_outputs(self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput) -> list[Sequence]:
        """Turns a step's tokens into text; called after the scheduler has recorded them.

        Returns:
            the sequences whose text now contains a stop string; their ``stop_reason`` is that string.
        """
        count_requests(scheduler_output, lambda request_id: self.states[request_id].metrics)
        for seq, num_cached in scheduler_output.admitted:  # nothing is known of tokens that were not computed
            self._add_prompt_logprobs(seq, 1, [None] * min(num_cached, seq.get_prompt_len() - 1))
        for seq in scheduler_output.seqs:
            if seq.seq_id in runner_output.prompt_logprobs:
                self._add_prompt_logprobs(seq, *runner_output.prompt_logprobs[seq.seq_id])
        stopped = []
        for i, (seq, _) in enumerate(scheduler_output.sampled):
            if i in runner_output.errors or not seq.sampling_params.detokenize:
                continue
            if self._add_tokens(seq, runner_output.sampled_token_ids[i]):
                stopped.append(seq)
        count_tokens(scheduler_output, runner_output, lambda request_id: self.states[request_id].metrics)
        return stopped

    def _add_tokens(self, seq: Sequence, token_ids: list[int]) -> bool:
        """Turns a sequence's newest tokens into text; returns whether it contains a stop string.

        The tokens behind the one that completes it are removed, from the sequence and from ``token_ids``.
        """
        detokenizer, ended = self._detokenizer(seq), seq.status is SequenceStatus.FINISHED_STOPPED
        for num_added, token_id in enumerate(token_ids, 1):
            num_left = len(token_ids) - num_added
            stop = detokenizer.add(token_id, ended and not num_left)
            if stop is not None:
                seq.stop_reason = stop
                seq.truncate_output(seq.get_output_len() - num_left)
                del token_ids[num_added:]
                return True
        return False

    def settle_unsent(self, reason: str) -> list[str]:
        """Settles how the requests end that ended in a step which failed before their outputs were sent.

        Answers whose last tokens had not been turned into text by then are aborted, with ``reason`` as stop reason; the
        others have ended as they have.

        Returns:
            the ids of these requests.
        """
        unsent = [state for state in self.states.values() if state.request.is_finished()]
        for state in unsent:
            for seq in state.request.get_seqs():
                detokenizer = state.detokenizers.get(seq.seq_id)
                num_read = getattr(detokenizer, "num_tokens", 0)  # which one of the caller's own need not have
                if seq.sampling_params.detokenize and num_read < seq.get_output_len():
                    seq.status, seq.stop_reason = SequenceStatus.FINISHED_ABORTED, reason
        return [state.request.request_id for state in unsent]

    def _detokenizer(self, seq: Sequence) -> Detokenizer:
        detokenizers = self.states[seq.request_id].detokenizers
        if seq.seq_id not in detokenizers:
            detokenizers[seq.seq_id] = self.detokenizer_cls(
                self.tokenizer, seq.sampling_params, seq.data.prompt_token_ids
            )
        return detokenizers[seq.seq_id]

    def _add_prompt_logprobs(self, seq: Sequence, first: int, logprobs: list[dict[int, Logprob] | None]) -> None:
        """Appends log probabilities of the prompt from position ``first`` on; those known already are dropped."""
        found = self.states[seq.request_id].prompt_logprobs
        if found is not None:
            found += logprobs[len(found) - first :]

    def send_outputs(self, seqs: Iterable[Sequence], now: float) -> None:
        """Sends the outputs of the requests that these sequences belong to.

        Args:
            seqs: those that got a token or ended.
            now: seconds since the epoch.
        """
        for request_id in dict.fromkeys(seq.request_id for seq in seqs):
            if request_id in self.states:
                self._send(self.states[request_id], now)

    def _send(self, state: RequestState, now: float) -> None:
        request, metrics, params = state.request, state.metrics, state.request.sampling_params
        if metrics.first_token_time is None and any(seq.get_output_len() for seq in request.get_seqs()):
            metrics.first_token_time, request.status = now, RequestStatus.RUNNING
        sink, finished = state.sink(), request.is_finished()
        if finished:
            self._finish(state, now)
        # Where best_of is above n, the n answers are chosen once, at the end.
        at_the_end = params.output_kind is RequestOutputKind.FINAL_ONLY or params.best_of != params.n
        if sink is not None and (finished or not at_the_end):
            is_delta = params.output_kind is RequestOutputKind.DELTA
            outputs = list(self._deltas(state) if is_delta else self._answers(state))
            sink.put(self._make_output(state, outputs, finished, is_delta), is_delta)
        if finished:  # and its output was sent: an interrupt at any line loses none
            if sink is not None:
                sink.unfinished.discard(request.request_id)
            del self.states[request.request_id]

    def _finish(self, state: RequestState, now: float) -> None:
        """Sets the final times and statuses of a request."""
        request, kept = state.request, best_sequences(state.request)
        state.metrics.finished_time = now
        request.status = RequestStatus(kept[0].status.value)
        kept_ids = {seq.seq_id for seq in kept}
        for seq in request.get_seqs():
            if seq.seq_id not in kept_ids:
                seq.status = SequenceStatus.FINISHED_IGNORED

    def _make_output(
        self, state: RequestState, outputs: list[CompletionOutput], finished: bool, is_delta: bool
    ) -> RequestOutput:
        request, prompt_logprobs = state.request, state.prompt_logprobs and list(state.prompt_logprobs)
        if is_delta:  # with the first one only
            state.prompt_logprobs = None
        return RequestOutput(
            request.request_id,
            request.prompt,
            state.prompt_token_ids,
            outputs,
            finished,
            state.metrics.snapshot(),
            prompt_logprobs,
        )

    def _read_text(self, state: RequestState, seq: Sequence) -> None:
        """Sets ``seq.output_text`` to what the user may see so far."""
        detokenizer = state.detokenizers.get(seq.seq_id)
        if detokenizer is None:
            seq.output_text = ""
        elif seq.is_finished():
            detokenizer.finish()
            seq.output_text = detokenizer.text
        else:
            seq.output_text = detokenizer.visible_text()

    def _answers(self, state: RequestState) -> Iterator[CompletionOutput]:
        """The whole of every answer so far, by index; where best_of is above n, the likeliest first."""
        for seq in best_sequences(state.request):
            self._read_text(state, seq)
            yield CompletionOutput.from_sequence(seq, self.tokenizer)

    def _deltas(self, state: RequestState) -> Iterator[CompletionOutput]:
        """What is new in each answer since its last delta."""
        for seq in state.request.get_seqs():
            if seq.seq_id in state.given_whole:
                continue
            tokens, chars = state.num_given.get(seq.seq_id, (0, 0))
            self._read_text(state, seq)
            new = CompletionOutput.from_sequence(seq, self.tokenizer, tokens, chars)
            if not new.token_ids and not new.finished():
                continue
            state.num_given[seq.seq_id] = seq.get_output_len(), chars + len(new.text)
            if new.finished():
                state.given_whole.add(seq.seq_id)
            yield new
