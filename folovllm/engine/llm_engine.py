"""The engine: schedule, run, update, until no request is left. Chapter 8 is about this module.

Requests are added with `LLMEngine.add_request`, and each `LLMEngine.step` moves all scheduled ones a little further.
For texts instead of steps there is `folovllm.llm.LLM`. As in vLLM (``v1/engine/core.py``,
``v1/engine/llm_engine.py``, 0.33.0), in one process; any number of threads may use it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from folovllm.config import EngineConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.engine.aborts import Aborter
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.input_processor import InputProcessor, Prompt
from folovllm.engine.output_processor import OutputProcessor, OutputSink
from folovllm.engine.served_model import ServedModel, load_model, settle_lengths
from folovllm.engine.stats import MAX_STEPS, StepHook, StepStats, begin_step_stats, finish_step_stats
from folovllm.outputs import RequestOutput, RunnerOutput
from folovllm.request import SequenceStatus
from folovllm.sampling_params import SamplingParams
from folovllm.utils.clock import Clock, WallClock
from folovllm.utils.fair_lock import FairLock
from folovllm.validation import check_str, require

if TYPE_CHECKING:
    import torch


class LLMEngine:
    """Runs many requests at once on one model. A subclass may set ``detokenizer_cls``, which turns tokens into text.

    Args:
        config: the settings; ``max_model_len``, ``num_blocks`` and ``max_num_batched_tokens`` are filled in if None.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.
        clock: where the times in metrics and statistics come from.
        model: what computes the steps; None loads the checkpoint that the config names, on ``device``.

    Raises:
        ModelLoadError: if the checkpoint cannot be loaded.
        ValueError: if the budget of a step is too small, or the cache cannot hold a single block.
    """

    detokenizer_cls: type[Detokenizer] = Detokenizer

    def __init__(
        self,
        config: EngineConfig,
        device: str | torch.device | None = None,
        clock: Clock | None = None,
        model: ServedModel | None = None,
    ) -> None:
        self.config, self.clock, model = config, clock or WallClock(), model or load_model(config, device)
        self.load_report = model.load_report
        self.max_model_len = settle_lengths(config, model.max_model_len)
        self.runner, self.decoder, self.tokenizer = model.runner, cast(Any, model.decoder), cast(Any, model.tokenizer)
        self.eos_token_ids, self.default_params = model.eos_token_ids, model.default_params
        cache_config, scheduler_config = config.cache_config, config.scheduler_config
        cache_config.num_blocks, num_swap_blocks = self.runner.count_blocks()
        self.runner.initialize_kv_cache(cache_config.num_blocks, num_swap_blocks)
        self.cache = (cache_config.kv_cache_manager_cls or KVCacheManager)(
            cache_config.num_blocks, cache_config.block_size, cache_config.enable_prefix_caching, num_swap_blocks
        )
        self.scheduler = (scheduler_config.scheduler_cls or Scheduler)(scheduler_config, self.cache)
        self.input_processor = InputProcessor(config, model)
        self.output_processor = OutputProcessor(self.tokenizer, self.detokenizer_cls)
        self.aborter = Aborter(self.output_processor, self._now)
        self.steps: deque[StepStats] = deque(maxlen=MAX_STEPS)
        """Statistics of the last steps, oldest first; `stats` returns them as a list."""
        self.step_hooks: list[StepHook] = []  # called after each step; what one raises goes to whoever stepped
        self._sink, self._lock = OutputSink(), FairLock()  # the sink of requests that were added without one

    def __repr__(self) -> str:
        return f"LLMEngine({self.config.model_config.model!r}, {self.cache.pool.num_blocks} blocks, {self.runner!r})"

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        sink: OutputSink | None = None,
    ) -> None:
        """Puts a request in the queue.

        Args:
            request_id: a name that no unfinished request has.
            prompt: a text, token ids, or a dict with one of them and, if wanted, a ``cache_salt``.
            params: copied; None takes the checkpoint's own generation config.
            arrival_time: seconds since the epoch; None: now.
            priority: lower is served first, where the scheduler's policy is "priority".
            sink: where its outputs go; None: `step` returns them. A sink that is garbage-collected ends its requests.

        Raises:
            ValueError: if the request could never be served, if the name is taken, or if the sink is closed.
        """
        arrival_time = self._now() if arrival_time is None else arrival_time
        request = self.input_processor.process(request_id, prompt, params, arrival_time, priority)
        sink = self._sink if sink is None else sink
        with self._lock:
            require(not sink.is_closed, f"the sink of request {request_id!r} is closed: make another one")
            self.aborter.catch_up(self.scheduler)  # or a request that nobody waits for would keep its name
            taken = request_id in self.output_processor.states
            require(not taken, f"request_id {request_id!r} is taken by a request that is not finished")
            try:
                self.output_processor.add_request(request, sink)
                self.scheduler.add_request(request)
            except BaseException:  # Ctrl-C between the two: neither may know of it alone
                self.scheduler.forget(request_id)
                self.output_processor.forget(request_id)
                raise

    def abort_request(self, request_id: str | Iterable[str], reason: str | None = None) -> None:
        """Ends a request at once; its last output comes with the next step. An unknown or finished one is ignored.

        Args:
            request_id: its name, or the names of several.
            reason: becomes the ``stop_reason`` of their unfinished answers.

        Raises:
            ValueError: if a name is no text.
        """
        is_one = isinstance(request_id, str) or not isinstance(request_id, Iterable)
        request_ids = [check_str("request_id", each) for each in ([request_id] if is_one else request_id)]
        with self._lock:
            for each in request_ids:
                self.aborter.abort(self.scheduler, each, reason)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to compute or to return for requests without a sink of their own."""
        with self._lock:
            return bool(self._sink or self._sink.unfinished)

    def step(self) -> list[RequestOutput]:
        """Runs one forward pass for every scheduled request.

        Returns:
            the output of each request without a sink of its own that got a token or ended since the last call.

        Raises:
            Exception: what the forward pass raised. The requests that were running are aborted, with the error as their
                ``stop_reason``; the next step returns them, and the engine goes on with the others.
        """
        with self._lock:
            self._step()
            return self._sink.take()

    def wait(self, sink: OutputSink) -> list[RequestOutput]:
        """The outputs waiting in a sink; runs a step first if there are none. Raises what `step` raises."""
        with self._lock:
            if not sink:
                self._step()
            return sink.take()

    def close(self, sink: OutputSink) -> None:
        """Ends the unfinished requests of a sink that is no longer read. Never blocks, so a finalizer may call it."""
        sink.is_closed = True
        self.output_processor.abandoned.extend(list(sink.unfinished))
        if self._lock.take_if_free():  # else the step that holds the lock, or the next one, does it
            try:
                self.aborter.catch_up(self.scheduler)
            finally:
                self._lock.release()

    def stats(self) -> list[StepStats]:
        """Statistics of the last steps (at most `MAX_STEPS`), oldest first."""
        return list(self.steps)

    def reset_prefix_cache(self) -> bool:
        """Empties the prefix cache, if no block is in use; returns whether it did."""
        with self._lock:
            self.aborter.catch_up(self.scheduler)
            return self.cache.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Recounts all blocks.

        Raises:
            RuntimeError: if one is lost or counted wrong.
        """
        with self._lock:
            requests = (state.request for state in self.output_processor.states.values())
            self.cache.check_integrity(seq for request in requests for seq in request.get_seqs())

    def _now(self) -> float:
        return self.clock.now_us() / 1e6

    def _step(self) -> None:
        """Schedule, run, update; each output goes to its request's sink."""
        try:
            self.aborter.catch_up(self.scheduler)
            if not self.scheduler.has_unfinished():
                return
            times_us = [self.clock.now_us()]
            scheduler_output = self.scheduler.schedule()
            stats = begin_step_stats(scheduler_output)
            times_us.append(self.clock.now_us())
            runner_output = self.runner.run(scheduler_output)
            times_us.append(self.clock.now_us())
            self._update(scheduler_output, runner_output)
            times_us.append(self.clock.now_us())
        except BaseException as error:
            self.aborter.abort_running(self.scheduler, f"{type(error).__name__}: {error}")
            raise
        finish_step_stats(stats, scheduler_output, runner_output, self.scheduler, self.cache.pool, times_us)
        self.steps.append(stats)
        with self._lock.lend():  # a hook may add, abort and count, as between two steps
            for hook in self.step_hooks:
                hook(scheduler_output, runner_output, stats)

    def _update(self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput) -> None:
        """Records the results: tokens and ends in the scheduler, text and stop strings in the output processor."""
        self.scheduler.update_from_output(scheduler_output, runner_output)
        for seq in self.output_processor.process_outputs(scheduler_output, runner_output):
            if seq.is_finished():  # by its length or a stop token; the stop string is the better reason
                seq.status = SequenceStatus.FINISHED_STOPPED
            else:
                self.scheduler.finish(seq, SequenceStatus.FINISHED_STOPPED)
        # One that begins anew waits again, and has nothing to send.
        told = (seq for seq, _ in scheduler_output.sampled if seq.status is not SequenceStatus.WAITING)
        self.output_processor.send_outputs(told, self._now())
