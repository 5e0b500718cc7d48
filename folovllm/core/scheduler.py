"""Which sequences run in the next step, and how many tokens of each. Chapters 9, 11 and 12.

There is no prefill phase and no decode phase. A sequence has tokens, and ``num_computed_tokens`` of them have been
computed; each step raises that number, within one token budget for all sequences. A new prompt has many tokens left to
compute, a generating sequence one. As in vLLM (``v1/core/sched/scheduler.py``, 0.33.0), where the unit is a request;
here it is a sequence.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field
from typing import cast

from folovllm.config import SchedulerConfig
from folovllm.core.guesses import drop_refused, fit_guesses, take_guesses
from folovllm.core.kv_cache import KVCacheManager
from folovllm.logprobs import Logprob
from folovllm.outputs import RunnerOutput
from folovllm.request import MAX_GUESSED_ROWS, Request, Sequence, SequenceStatus


@dataclass
class SchedulerOutput:
    """The work of one step."""

    seqs: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    """For each sequence, how many tokens after ``num_computed_tokens`` are computed in this step, guesses included."""
    num_computed_tokens: list[int] = field(default_factory=list)
    """For each sequence, how many of its tokens had been computed before this step."""
    scheduled_spec_token_ids: dict[str, list[int]] = field(default_factory=dict)
    """``seq_id`` -> guesses, computed as if they followed the newest token; those that a draft model will make are -1
    until it has."""
    sampled: list[tuple[Sequence, int]] = field(default_factory=list)
    """The sequences that get tokens, each with the row of the flat batch whose logits the first is drawn from. The rows
    of its guesses follow."""
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    """``(parent, child)``: answers that start in this step, forked from the one that has just computed the prompt."""
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    """The sequences that left the waiting queue, each with the number of its tokens found in the prefix cache."""
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """``(block, CPU block)``, copied first."""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """``(CPU block, block)``, copied second."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """``(from, to)``, the copies of copy-on-write, copied last."""

    def add(self, seq: Sequence, num_new_tokens: int) -> None:
        """Adds a sequence to the step."""
        self.seqs.append(seq)
        self.num_new_tokens.append(num_new_tokens)
        self.num_computed_tokens.append(seq.num_computed_tokens)

    def get_guesses(self, seq: Sequence) -> list[int]:
        """The guesses that this step checks for a sequence."""
        return self.scheduled_spec_token_ids.get(seq.seq_id, [])

    def get_sampled_rows(self) -> list[int]:
        """All rows of the flat batch that a token is drawn from, in the order of ``sampled``."""
        return [row + place for seq, row in self.sampled for place in range(len(self.get_guesses(seq)) + 1)]


class Scheduler:
    """Keeps the queues: WAITING, RUNNING and SWAPPED.

    Args:
        config: with ``max_num_batched_tokens`` and ``max_model_len`` filled in.
        cache: where running sequences get their blocks.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self.config, self.cache = config, cache
        self.max_model_len = cast(int, config.max_model_len)
        self.max_num_batched_tokens = cast(int, config.max_num_batched_tokens)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swapped: list[Sequence] = []
        self._ranks: dict[str, tuple[int, float, int]] = {}
        self._arrivals = itertools.count()
        self._batch_is_open = True  # for static batching: whether the current batch may still grow

    def add_request(self, request: Request) -> None:
        """Queues a new request: its answers, or the first if they are pending, whose others start from its prompt."""
        self.requests[request.request_id] = request
        order = (request.priority, request.arrival_time) if self.config.policy == "priority" else (0, 0.0)
        self._ranks[request.request_id] = (*order, next(self._arrivals))
        for seq in [request.start_answer()] if request.num_pending else request.get_seqs():
            self._enqueue(self.waiting, seq)

    def forget(self, request_id: str) -> None:
        """Drops a request that was not scheduled yet, wherever `add_request` was interrupted."""
        self.waiting = [seq for seq in self.waiting if seq.request_id != request_id]
        self.requests.pop(request_id, None)
        self._ranks.pop(request_id, None)

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self.waiting or self.swapped)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step: running sequences first, then waiting ones, then guesses, all within one budget."""
        output = SchedulerOutput()
        if self.config.policy == "priority":
            self.running.sort(key=self._rank)  # the victim of a preemption is taken from the end
        budget = self._continue_running(output)
        if not output.preempted:
            self._admit(output, budget)
        add_guesses(output, self.cache, self.max_num_batched_tokens, self.max_model_len)
        self._choose_sampled(output)
        output.copies, self.cache.copies = self.cache.copies, []
        return output

    def _rank(self, seq: Sequence) -> tuple[int, float, int, int]:
        """Sort key of the queues: priority if that is the policy, then arrival, then the answer's index."""
        return *self._ranks[seq.request_id], seq.index

    def _enqueue(self, queue: list[Sequence], seq: Sequence) -> None:
        bisect.insort(queue, seq, key=self._rank)

    def _continue_running(self, output: SchedulerOutput) -> int:
        """Schedules the next tokens of running sequences and allocates their slots; returns the rest of the budget."""
        budget, i = self.max_num_batched_tokens, 0
        while i < len(self.running):
            seq = self.running[i]
            num_new = min(seq.get_len() - seq.num_computed_tokens, budget)
            if num_new == 0:
                break
            if self.cache.allocate_slots(seq, seq.num_computed_tokens + num_new):
                output.add(seq, num_new)
                budget -= num_new
                i += 1
            else:  # one leaves, and the next round looks at place i again
                victim = self._choose_victim(self.running[i:])
                self.running[:] = [other for other in self.running if other is not victim]
                self._preempt(victim, output)
        return budget

    def _choose_victim(self, candidates: list[Sequence]) -> Sequence:
        """Which of the sequences that this step has not scheduled yet makes room: the last to be served."""
        return candidates[-1]

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        """Admits waiting and swapped sequences, in order of rank, until one does not fit."""
        if self.config.batching == "static" and self.running and not self._batch_is_open:
            return
        num_before = len(self.running)
        while budget > 0 and len(self.running) < self.config.max_num_seqs and (self.swapped or self.waiting):
            heads = [queue[0] for queue in (self.swapped, self.waiting) if queue]
            seq = min(heads, key=self._rank)
            admit = self._admit_swapped if seq.status is SequenceStatus.SWAPPED else self._admit_waiting
            num_new = admit(seq, output, budget)
            if num_new == 0:
                break
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            output.add(seq, num_new)
            budget -= num_new
        # A static batch that the budget was too small for may grow on in the next step.
        self._batch_is_open = num_before < len(self.running) < self.config.max_num_seqs and bool(self.waiting)

    def _admit_swapped(self, seq: Sequence, output: SchedulerOutput, budget: int) -> int:
        """Swaps in the first swapped sequence; returns its tokens in this step, 0 if it does not fit."""
        num_new = min(seq.get_len() - seq.num_computed_tokens, budget)
        if (pairs := self.cache.swap_in(seq, seq.num_computed_tokens + num_new)) is None:
            return 0
        output.swap_in += pairs
        self.swapped.pop(0)
        return num_new

    def _admit_waiting(self, seq: Sequence, output: SchedulerOutput, budget: int) -> int:
        """Starts the first waiting sequence; returns its tokens in this step, 0 if it does not fit."""
        chunked = self.config.enable_chunked_prefill
        seq.num_computed_tokens = num_cached = self.cache.get_computed_blocks(seq)
        num_left = seq.get_len() - num_cached
        num_new = min(num_left, budget) if chunked else num_left
        whole = chunked and self.config.scheduler_reserve_full_isl
        if num_new > budget or not self.cache.allocate_slots(seq, num_cached + num_new, whole):
            self.cache.release(seq)
            seq.num_computed_tokens = 0
            return 0
        output.admitted.append((seq, num_cached))
        self.waiting.pop(0)
        return num_new

    def _choose_sampled(self, output: SchedulerOutput) -> None:
        """Lists the sequences that get a token, and forks further answers from prompts that this step completes."""
        end = 0
        for seq, num_new in zip(output.seqs, output.num_new_tokens):
            end += num_new
            if seq.num_computed_tokens + num_new < seq.get_len():
                continue
            output.sampled.append((seq, end - 1 - len(output.get_guesses(seq))))
            request = self.requests[seq.request_id]
            if not request.num_pending or seq.get_output_len():
                continue
            while request.num_pending and len(self.running) < self.config.max_num_seqs:
                child = request.start_answer(seq)
                self.cache.fork(seq, child)
                self.running.append(child)
                output.forks.append((seq, child))
                output.sampled.append((child, end - 1))
            if request.num_pending:
                self._enqueue(self.waiting, request.start_answer())

    def update_from_output(self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput) -> None:
        """Records a step's results: tokens, their log probabilities, and which sequences have ended."""
        for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
            seq.num_computed_tokens += num_new
        for parent, child in scheduler_output.forks:
            child.num_computed_tokens = parent.num_computed_tokens
        follow_grammars(scheduler_output, runner_output)
        for i, (seq, _) in enumerate(scheduler_output.sampled):
            if i in runner_output.not_finite and begins_anew(seq, self.cache):
                self._put_back(seq)
            elif i in runner_output.errors:
                seq.stop_reason = runner_output.errors[i]
                self.finish(seq, SequenceStatus.FINISHED_ABORTED)
            else:
                token_ids, logprobs = runner_output.sampled_token_ids[i], runner_output.logprobs[i]
                drop_refused(seq, self.cache, scheduler_output.get_guesses(seq), token_ids)
                status = add_tokens(seq, self.requests[seq.request_id], token_ids, logprobs, self.max_model_len)
                self.cache.cache_blocks(seq, min(seq.num_computed_tokens, seq.get_len()))  # which guesses have filled
                if status is not None:
                    self.finish(seq, status)
                elif runner_output.spec_token_ids:
                    seq.spec_token_ids = fit_guesses(seq.grammar, runner_output.spec_token_ids[i])

    def _preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Takes a running sequence's blocks: swaps them out if the mode says so and there is room, else frees them."""
        output.preempted.append(seq)
        seq.num_preemptions, seq.spec_token_ids = seq.num_preemptions + 1, []
        pairs = self.cache.swap_out(seq) if self.config.preemption_mode == "swap" else None
        if pairs is not None:
            output.swap_out += pairs
            seq.status = SequenceStatus.SWAPPED
            self._enqueue(self.swapped, seq)
        else:
            self.cache.release(seq)
            self._put_back(seq)

    def _put_back(self, seq: Sequence) -> None:
        """Puts a sequence without blocks back in the waiting queue, at its rank: before all later arrivals."""
        self.running[:] = [other for other in self.running if other is not seq]
        seq.num_computed_tokens, seq.status = 0, SequenceStatus.WAITING
        self._enqueue(self.waiting, seq)

    def reset(self) -> list[str]:
        """Begins anew after a failed step, trusting no block; returns the requests that were running."""
        self.cache.reset()
        self.running, self.waiting, self.swapped = [], [], []
        seqs = [seq for request in self.requests.values() for seq in request.get_seqs() if not seq.is_finished()]
        for seq in seqs:
            seq.block_ids.clear()
            if seq.status is not SequenceStatus.RUNNING:
                self._put_back(seq)
        return list(dict.fromkeys(seq.request_id for seq in seqs if seq.status is SequenceStatus.RUNNING))

    def finish(self, seq: Sequence, status: SequenceStatus) -> None:
        """Ends a sequence: removes it from its queue, the only one that is searched, and frees its blocks."""
        queues = {SequenceStatus.RUNNING: self.running, SequenceStatus.SWAPPED: self.swapped}
        queue = queues.get(seq.status, self.waiting)
        queue[:] = [other for other in queue if other is not seq]
        seq.status = status
        self.cache.free(seq)
        self._forget_if_finished(seq.request_id)

    def finish_request(self, request_id: str, status: SequenceStatus, reason: str | None = None) -> None:
        """Ends every unfinished answer to a request, including those that have not started."""
        request = self.requests[request_id]
        while request.num_pending:
            seq = request.start_answer()
            seq.status, seq.stop_reason = status, reason
        for seq in request.get_seqs():
            if not seq.is_finished():
                seq.stop_reason = reason
                self.finish(seq, status)
        self._forget_if_finished(request_id)

    def _forget_if_finished(self, request_id: str) -> None:
        if request_id in self.requests and self.requests[request_id].is_finished():
            del self.requests[request_id], self._ranks[request_id]


def add_guesses(output: SchedulerOutput, cache: KVCacheManager, max_num_tokens: int, max_model_len: int) -> None:
    """Adds guesses to the sequences of a step whose newest token is computed, while it has room for more tokens.

    They come last, so that they keep nobody waiting and take nobody's blocks.
    """
    room = min(max_num_tokens - sum(output.num_new_tokens), MAX_GUESSED_ROWS - len(output.seqs))
    for i, seq in enumerate(output.seqs):
        if seq.spec_token_ids and seq.num_computed_tokens + output.num_new_tokens[i] == seq.get_len():
            guesses = take_guesses(seq, cache, room, max_model_len)
            if guesses:
                output.scheduled_spec_token_ids[seq.seq_id] = guesses
                output.num_new_tokens[i] += len(guesses)
                room -= len(guesses)


def begins_anew(seq: Sequence, cache: KVCacheManager) -> bool:
    """Whether a sequence whose logits were no numbers shall try again without its blocks, which it then has no more.

    A token whose keys and values are no numbers spoils those before it in its prompt, too, and others may have found
    their blocks in the cache. So nobody finds them any longer, and whoever has just begun with some begins anew.
    """
    if not cache.distrust(seq) or seq.get_output_len():
        return False
    cache.release(seq)
    seq.generator = seq.draft_generator = None  # numbers may have been drawn for the token that it did not get
    return True


def add_tokens(
    seq: Sequence,
    request: Request,
    token_ids: list[int],
    logprobs: list[dict[int, Logprob]] | None,
    max_model_len: int,
) -> SequenceStatus | None:
    """Appends a step's tokens up to the one that ends the answer; those behind it are removed from ``token_ids``.

    Returns:
        the status that the sequence ends with, None if it goes on.
    """
    for place, token_id in enumerate(token_ids):
        if logprobs is None:
            seq.add_token_id(token_id)
        else:
            seq.add_token_id(token_id, logprobs[place][token_id].logprob)
            seq.logprobs.append(logprobs[place])
        if (status := check_stop(seq, request.eos_token_id, max_model_len)) is not None:
            del token_ids[place + 1 :]
            return status
    return None


def follow_grammars(scheduler_output: SchedulerOutput, runner_output: RunnerOutput) -> None:
    """Moves grammars on by a step's tokens; those that do not fit, since a mask was wrong, become an error."""
    for i, (seq, _) in enumerate(scheduler_output.sampled):
        token_ids = runner_output.sampled_token_ids[i]
        if seq.grammar is not None and not seq.grammar.accept_tokens(token_ids):
            why = f" ({seq.grammar.error})" if seq.grammar.error else ""
            runner_output.errors[i] = f"tokens {token_ids} do not fit the structured_outputs of the request{why}"
            runner_output.sampled_token_ids[i] = []


def check_stop(seq: Sequence, eos_token_id: int | None, max_model_len: int) -> SequenceStatus | None:
    """The status a sequence ends with after its newest token, None if it goes on (vLLM: ``v1/core/sched/utils.py``)."""
    params, num_tokens, token_id = seq.sampling_params, seq.get_output_len(), seq.get_last_token_id()
    # From the min_tokens-th token on; a stop string counts from the one after it on, as in vLLM.
    if num_tokens >= params.min_tokens:
        if token_id == eos_token_id and not params.ignore_eos:
            return SequenceStatus.FINISHED_STOPPED
        if token_id in (params.stop_token_ids or []):
            seq.stop_reason = token_id
            return SequenceStatus.FINISHED_STOPPED
    if num_tokens == params.max_tokens or seq.get_len() >= max_model_len:
        return SequenceStatus.FINISHED_LENGTH_CAPPED
    return None
