"""Who runs in the next step, and how many of its tokens. Chapter 6 is about this module.

There is no prefill phase and no decode phase. A sequence has tokens, and a number that says how many of them the model
has computed; a step moves that number towards the end, within one budget of tokens. A prompt is a long way to go, a
generated token a short one. As in vLLM (``v1/core/sched/scheduler.py``, 0.33.0); the unit is a sequence here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from folovllm.config import SchedulerConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.request import Sequence, SequenceStatus


@dataclass
class SchedulerOutput:
    """The work of one step."""

    seqs: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    """For each sequence, how many of its tokens are computed now, counted from ``num_computed_tokens``."""
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    """The sequences that left the queue, each with the number of its tokens that the prefix cache had."""
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """``(block, CPU block)``, to copy before anything else."""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """``(CPU block, block)``, to copy next."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """``(block, block)``: what copy-on-write asks for, to copy last."""

    def add(self, seq: Sequence, num_new_tokens: int) -> None:
        """Takes a sequence into the step."""
        self.seqs.append(seq)
        self.num_new_tokens.append(num_new_tokens)


class Scheduler:
    """Keeps the queues: WAITING, RUNNING and SWAPPED.

    Args:
        config: with ``max_num_batched_tokens`` and ``max_model_len`` settled.
        cache: where running sequences get their blocks.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self.config, self.cache = config, cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.swapped: deque[Sequence] = deque()
        self._batch_is_open = True  # static batching's: whether the present batch may still grow

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.running or self.waiting or self.swapped)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step: those who run go on, then others are admitted, all within one budget."""
        output = SchedulerOutput()
        budget = self._continue_running(output)
        if not output.preempted:
            self._admit(output, budget)
        output.copies, self.cache.copies = self.cache.copies, []
        return output

    def _continue_running(self, output: SchedulerOutput) -> int:
        """Gives running sequences their next tokens, and room for them; returns what is left of the budget."""
        budget = self._budget()
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            num_new = min(seq.get_len() - seq.num_computed_tokens, budget)
            if num_new == 0:
                break
            while not self.cache.reserve(seq, seq.num_computed_tokens + num_new):
                victim = self.running.pop()
                self._preempt(victim, output)
                if victim is seq:
                    return budget
            output.add(seq, num_new)
            budget -= num_new
            i += 1
        return budget

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        """Lets sequences in: those in CPU memory first, then the queue, each in its order, until one does not fit."""
        if not self.running:
            self._batch_is_open = True
        if self.config.batching == "static" and not self._batch_is_open:
            return
        num_before = len(self.running)
        while budget > 0 and len(self.running) < self.config.max_num_seqs and (self.swapped or self.waiting):
            num_new = self._admit_swapped(output, budget) if self.swapped else self._admit_waiting(output, budget)
            if num_new == 0:
                break
            budget -= num_new
        self._batch_is_open = len(self.running) > num_before

    def _admit_swapped(self, output: SchedulerOutput, budget: int) -> int:
        """Brings the first swapped sequence back; returns its tokens in this step, 0 if it does not fit."""
        seq = self.swapped[0]
        num_new = min(seq.get_len() - seq.num_computed_tokens, budget)
        pairs = self.cache.swap_in(seq, seq.num_computed_tokens + num_new)
        if pairs is None:
            return 0
        output.swap_in += pairs
        self._start(self.swapped.popleft(), num_new, output)
        return num_new

    def _admit_waiting(self, output: SchedulerOutput, budget: int) -> int:
        """Starts the first waiting sequence; returns its tokens in this step, 0 if it does not fit."""
        seq = self.waiting[0]
        seq.num_computed_tokens = self.cache.take_prefix(seq)
        num_left = seq.get_len() - seq.num_computed_tokens
        num_new = min(num_left, budget) if self.config.enable_chunked_prefill else num_left
        if num_new > budget or not self.cache.reserve(seq, seq.num_computed_tokens + num_new):
            self.cache.release(seq)
            seq.num_computed_tokens = 0
            return 0
        output.admitted.append((seq, seq.num_computed_tokens))
        self._start(self.waiting.popleft(), num_new, output)
        return num_new

    def _start(self, seq: Sequence, num_new: int, output: SchedulerOutput) -> None:
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        output.add(seq, num_new)

    def _budget(self) -> int:
        assert self.config.max_num_batched_tokens is not None  # the engine has settled it
        return self.config.max_num_batched_tokens

    def _preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Takes a running sequence's blocks: to CPU memory if that is the way and there is room, else for good."""
        output.preempted.append(seq)
        pairs = self.cache.swap_out(seq) if self.config.preemption_mode == "swap" else None
        if pairs is not None:
            output.swap_out += pairs
            seq.status = SequenceStatus.SWAPPED
            self.swapped.appendleft(seq)  # as in the queue: who came first returns first
        else:
            self.cache.release(seq)
            self._put_back(seq)

    def restart(self, seq: Sequence) -> None:
        """Forgets what CPU memory has of a swapped sequence; it is computed again."""
        if seq.status is SequenceStatus.SWAPPED:
            self.finish(seq, SequenceStatus.WAITING)
            self._put_back(seq)

    def _put_back(self, seq: Sequence) -> None:
        """Makes a sequence without blocks the next to be started."""
        seq.num_computed_tokens = 0
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Starts another answer to a prompt that has just been computed: beside it if there is a place, else later."""
        if len(self.running) < self.config.max_num_seqs:
            self.cache.fork(parent, child)
            self.running.append(child)
        else:
            child.block_ids.clear()
            self._put_back(child)

    def finish(self, seq: Sequence, status: SequenceStatus) -> None:
        """Ends a sequence: out of its queue, its blocks back."""
        # Only the queue it stands in is searched: thousands may wait.
        if seq.status is SequenceStatus.RUNNING:
            self.running = [other for other in self.running if other is not seq]
        elif seq.status is SequenceStatus.SWAPPED:
            self.swapped = deque(other for other in self.swapped if other is not seq)
        else:
            self.waiting = deque(other for other in self.waiting if other is not seq)
        seq.status = status
        self.cache.free(seq)
