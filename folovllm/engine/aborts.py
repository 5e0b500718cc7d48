"""How requests end before their answers are complete: by whoever asked, or by a step that failed. Chapter 8."""

from __future__ import annotations

from collections.abc import Callable

from folovllm.core.scheduler import Scheduler
from folovllm.engine.output_processor import OutputProcessor
from folovllm.request import SequenceStatus


class Aborter:
    """Aborts requests and sends their last outputs. The engine's lock must be held.

    Its methods are given the scheduler, which has the requests that are not finished, since it may be exchanged.

    Args:
        output_processor: has those whose last output was not sent.
        now: gives the time, in seconds since the epoch.
    """

    def __init__(self, output_processor: OutputProcessor, now: Callable[[], float]) -> None:
        self.output_processor, self.now = output_processor, now
        self._failure: str | None = None

    def abort(self, scheduler: Scheduler, request_id: str, reason: str | None = None) -> None:
        """Ends a request, with ``reason`` as the stop reason of its unfinished answers; an unknown one is ignored."""
        if (state := self.output_processor.states.get(request_id)) is None:
            return
        if request_id in scheduler.requests:
            scheduler.finish_request(request_id, SequenceStatus.FINISHED_ABORTED, reason)
        self.output_processor.send_outputs(state.request.get_seqs(), self.now())

    def abort_running(self, scheduler: Scheduler, reason: str) -> None:
        """Ends every request that was running in a failed step. If this is interrupted, `catch_up` does the rest."""
        self._failure = reason = self._failure or reason
        running = scheduler.reset()
        for request_id in [*self.output_processor.settle_unsent(reason), *running]:
            try:
                self.abort(scheduler, request_id, reason)
            except Exception:  # of the detokenizer, which has made the step fail perhaps: without text it can be sent
                self.output_processor.states[request_id].detokenizers.clear()
                self.abort(scheduler, request_id, reason)
        self._failure = None

    def catch_up(self, scheduler: Scheduler) -> None:
        """Ends the requests that should have ended: after a failed step, and those whose sink is closed or gone."""
        if self._failure is not None:
            self.abort_running(scheduler, self._failure)
        for request_id in self.output_processor.take_abandoned():
            self.abort(scheduler, request_id)
