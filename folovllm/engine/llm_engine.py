"""The engine: schedule, run, sample, update, until nobody is left. Chapter 6 is about this module.

`LLMEngine` is told of requests with `LLMEngine.add_request`, and each `LLMEngine.step` moves all of them a little
further. Whoever wants texts and not steps takes `folovllm.llm.LLM`. As in vLLM (``v1/engine/core.py``,
``v1/engine/llm_engine.py``, 0.33.0), in one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import GenerationConfig

from folovllm.config import EngineConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler, SchedulerOutput
from folovllm.engine.detokenizer import Detokenizer
from folovllm.logprobs import Logprob
from folovllm.model.decoder import load_decoder
from folovllm.model_loader import ModelLoader, kv_cache_bytes_per_token
from folovllm.outputs import RequestMetrics, RequestOutput
from folovllm.request import Request, RequestStatus, Sequence, SequenceStatus
from folovllm.sample.sampler import Sampler, SamplingMetadata, compute_prompt_logprobs, make_generator
from folovllm.sampling_params import SamplingParams
from folovllm.validation import require
from folovllm.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

CPU_CACHE_BYTES = 2**30
"""Bytes of KV cache where there is no GPU and nobody said how many blocks (1 GiB), or what all sequences can fill."""
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
"""Tokens in one step where nobody said; at least ``max_model_len`` where prompts are not chunked."""


@dataclass
class StepStats:
    """What one step did."""

    num_prefill_tokens: int = 0
    """Tokens of sequences that computed more than one, or whose last token is still to be computed."""
    num_decode_tokens: int = 0
    """Tokens of sequences that computed their newest one and had computed all others."""
    num_seqs: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_preempted: int = 0
    num_used_blocks: int = 0
    num_free_blocks: int = 0
    num_queried_tokens: int = 0
    """Tokens of sequences admitted in this step, with prefix caching or without."""
    num_cached_tokens: int = 0
    """Those of them that were found in the prefix cache."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of its four parts: "schedule", "run", "sample" and "update"."""


@dataclass
class _State:
    """What the engine keeps beside a request while it lasts."""

    request: Request
    metrics: RequestMetrics
    final_only: bool
    detokenizers: dict[str, Detokenizer] = field(default_factory=dict)
    generators: dict[str, random.Random] = field(default_factory=dict)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class LLMEngine:
    """Runs many requests at once on one model.

    Args:
        config: what the engine is told; ``max_model_len``, ``num_blocks`` and ``max_num_batched_tokens`` are settled.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.

    Raises:
        ModelLoadError: if the checkpoint cannot be loaded.
        ValueError: if the budget of a step is too small, or the cache cannot hold a single block.
    """

    def __init__(self, config: EngineConfig, device: str | torch.device | None = None) -> None:
        self.config = config
        loader = ModelLoader(config.model_config)
        checkpoint = loader.open(device)
        config.resolve_max_model_len(checkpoint.model_max_len)
        self.max_model_len = checkpoint.max_model_len
        self._settle_budget()
        self.tokenizer = loader.load_tokenizer()
        self.decoder = load_decoder(checkpoint)
        self.vocab_size = self.decoder.config.vocab_size
        cache_config = config.cache_config
        block_bytes = cache_config.block_size * kv_cache_bytes_per_token(checkpoint.hf_config, checkpoint.dtype)
        num_blocks, num_swap_blocks = self._count_blocks(block_bytes)
        cache_config.num_blocks = num_blocks
        self.cache = KVCacheManager(
            num_blocks, cache_config.block_size, cache_config.enable_prefix_caching, num_swap_blocks
        )
        self.runner = ModelRunner(self.decoder, num_blocks, cache_config.block_size, num_swap_blocks)
        self.scheduler = Scheduler(config.scheduler_config, self.cache)
        self.eos_token_ids, self.default_params = read_generation_config(checkpoint.folder, self.tokenizer)
        self.sampler = Sampler(self.tokenizer, self.eos_token_ids)
        self.steps: list[StepStats] = []
        """What each step did, oldest first; `stats` gives it out."""
        self._states: dict[str, _State] = {}
        self._late_outputs: list[RequestOutput] = []
        """Of requests that ended outside a step; the next step gives them out."""

    def add_request(
        self,
        request_id: str,
        prompt: str | SequenceOf[int],
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        final_only: bool = False,
    ) -> None:
        """Puts a request in the queue.

        Args:
            request_id: a name that no unfinished request has.
            prompt: a text, or token ids.
            params: None takes the checkpoint's own generation config.
            arrival_time: seconds since the epoch; None: now.
            final_only: whether steps keep silent about it until it is finished (vLLM: ``RequestOutputKind``).

        Raises:
            ValueError: if the prompt is empty, too long, or has tokens outside the vocabulary, if the name is taken, or
                if the cache could never hold the request.
        """
        params = self.default_params if params is None else params
        require(request_id not in self._states, f"request_id {request_id!r} is taken by a request that is not finished")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        arrival_time = time.time() if arrival_time is None else arrival_time
        require(len(token_ids) > 0, f"prompt must have at least one token, got {prompt!r}")
        request = Request(request_id, text, token_ids, params, arrival_time)
        self._check(request)
        state = _State(request, RequestMetrics(arrival_time), final_only)
        for index, seq_id in enumerate(request.sequences):
            state.detokenizers[seq_id] = Detokenizer(self.tokenizer, params, token_ids)
            state.generators[seq_id] = make_generator(params, index)
        self._states[request_id] = state
        self.scheduler.add(next(iter(request.sequences.values())))

    def abort_request(self, request_id: str, reason: str | None = None) -> None:
        """Ends a request at once; what it has so far comes out of the next step. An unknown or finished one is ignored.

        Args:
            request_id: its name.
            reason: becomes the ``stop_reason`` of its unfinished answers.
        """
        state = self._states.get(request_id)
        if state is None:
            return
        for seq in state.request.get_seqs():
            if not seq.is_finished():
                seq.stop_reason = reason
                self._finish_seq(state, seq, SequenceStatus.FINISHED_ABORTED)
        self._late_outputs.append(self._output(state))

    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do or to give out."""
        return self.scheduler.has_unfinished() or bool(self._late_outputs)

    def step(self) -> list[RequestOutput]:
        """Moves every scheduled request on by one forward pass.

        Returns:
            the present state of each request that got a token or ended; of a ``final_only`` one, its last.

        Raises:
            Exception: what the forward pass raised. The requests that were running are aborted then, with the error as
                their ``stop_reason``; the next step gives them out, and the engine goes on with the others.
        """
        outputs = self.take_late_outputs()
        if not self.scheduler.has_unfinished():
            return outputs
        work = None
        try:
            times = [time.perf_counter()]
            work = self.scheduler.schedule()
            times.append(time.perf_counter())
            hidden = self.runner.run(work)
            times.append(time.perf_counter())
            tokens = self._sample(self._advance(work, hidden), hidden)
            times.append(time.perf_counter())
            outputs += self._update(tokens)
            times.append(time.perf_counter())
        except BaseException as error:
            self._late_outputs = outputs + self._late_outputs
            self._abort_running(work, error)
            raise
        self._record(work, times)
        return outputs

    def take_late_outputs(self) -> list[RequestOutput]:
        """What the next step would give out of requests that ended outside a step."""
        outputs, self._late_outputs = self._late_outputs, []
        return outputs

    def stats(self) -> list[StepStats]:
        """What each step did, oldest first."""
        return list(self.steps)

    def check_integrity(self) -> None:
        """Counts all blocks again.

        Raises:
            RuntimeError: if one is lost or counted wrong.
        """
        seqs = (seq for state in self._states.values() for seq in state.request.get_seqs())
        self.cache.check_integrity(seqs)

    def _advance(self, work: SchedulerOutput, hidden: torch.Tensor) -> list[tuple[Sequence, int]]:
        """Writes down what was computed, and starts the other answers to prompts that are complete now.

        Returns:
            the sequences that get a token, each with the place in the batch after which it comes.
        """
        for seq in work.preempted:
            self._states[seq.request_id].metrics.num_preemptions += 1
        for seq, num_cached in work.admitted:
            self._states[seq.request_id].metrics.num_cached_tokens += num_cached
        ready: list[tuple[Sequence, int]] = []
        start = 0
        for seq, num_new in zip(work.seqs, work.num_new_tokens):
            state = self._states[seq.request_id]
            state.metrics.num_computed_tokens += num_new
            if seq.sampling_params.prompt_logprobs is not None and seq.num_computed_tokens < seq.get_prompt_len():
                self._collect_prompt_logprobs(state, seq, hidden[start : start + num_new])
            start += num_new
            seq.num_computed_tokens += num_new
            self.cache.remember(seq)
            if seq.num_computed_tokens == seq.get_len():
                ready += [(each, start - 1) for each in (seq, *self._fork_siblings(state, seq))]
        return ready

    def _fork_siblings(self, state: _State, seq: Sequence) -> list[Sequence]:
        """The other answers to the prompt that ``seq`` has just completed for the first time."""
        request = state.request
        if seq.get_output_len() > 0 or seq.seq_id != next(iter(request.sequences)):
            return []
        started = []
        for seq_id in list(request.sequences)[1:]:
            child = request.sequences[seq_id] = seq.fork(seq_id)
            self.scheduler.fork(seq, child)
            if child.status is SequenceStatus.RUNNING:
                state.metrics.num_shared_tokens += child.num_computed_tokens
                started.append(child)
        return started

    def _collect_prompt_logprobs(self, state: _State, seq: Sequence, hidden: torch.Tensor) -> None:
        """Adds the log probabilities of the prompt's tokens that this step's hidden states predict."""
        count = cast(int, seq.sampling_params.prompt_logprobs)
        first = seq.num_computed_tokens
        if state.prompt_logprobs is None:
            state.prompt_logprobs = [None]
        if len(state.prompt_logprobs) != first + 1:
            return  # computed again after a preemption
        token_ids = seq.data.prompt_token_ids[first : first + len(hidden) + 1]
        logits = self.runner.decoder.compute_logits(hidden[: len(token_ids) - 1])
        state.prompt_logprobs += compute_prompt_logprobs(logits, token_ids, count, self.tokenizer)[1:]

    def _sample(
        self, ready: list[tuple[Sequence, int]], hidden: torch.Tensor
    ) -> list[tuple[Sequence, int, dict[int, Logprob] | None]]:
        """A token, and what was asked about it, for each sequence that is ready."""
        if not ready:
            return []
        seqs = [seq for seq, _ in ready]
        logits = self.runner.compute_logits(hidden, [place for _, place in ready])
        metadata = SamplingMetadata(
            [seq.sampling_params for seq in seqs],
            [seq.data.prompt_token_ids for seq in seqs],
            [seq.data.output_token_ids for seq in seqs],
            [self._states[seq.request_id].generators[seq.seq_id] for seq in seqs],
        )
        output = self.sampler(logits, metadata)
        return list(zip(seqs, output.token_ids, output.logprobs))

    def _update(self, tokens: list[tuple[Sequence, int, dict[int, Logprob] | None]]) -> list[RequestOutput]:
        """Appends the tokens, ends what has ended, and says how each request stands now."""
        changed: dict[str, _State] = {}
        for seq, token_id, logprobs in tokens:
            state = changed[seq.request_id] = self._states[seq.request_id]
            seq.add_token_id(token_id, None if logprobs is None else logprobs[token_id].logprob)
            if logprobs is not None and seq.sampling_params.logprobs is not None:
                seq.logprobs.append(logprobs)
            if state.metrics.first_token_time is None:
                state.metrics.first_token_time = time.time()
                state.request.status = RequestStatus.RUNNING
            status = self._find_end(seq, token_id, state.detokenizers[seq.seq_id])
            if status is not None:
                self._finish_seq(state, seq, status)
        return [
            self._output(state) for state in changed.values() if not state.final_only or state.request.is_finished()
        ]

    def _find_end(self, seq: Sequence, token_id: int, detokenizer: Detokenizer) -> SequenceStatus | None:
        """Whether a sequence has ended with its newest token, and how; its text grows by that token."""
        params, num_tokens = seq.sampling_params, seq.get_output_len()
        status = None
        if num_tokens >= params.min_tokens:
            if token_id in self.eos_token_ids and not params.ignore_eos:
                status = SequenceStatus.FINISHED_STOPPED
            elif token_id in cast("list[int]", params.stop_token_ids):
                status, seq.stop_reason = SequenceStatus.FINISHED_STOPPED, token_id
        if status is not None and not params.include_stop_str_in_output:
            detokenizer.finish()
            return status
        stop = detokenizer.add(token_id)
        if status is None and stop is not None:
            status, seq.stop_reason = SequenceStatus.FINISHED_STOPPED, stop
        elif status is None and (num_tokens == params.max_tokens or seq.get_len() >= self.max_model_len):
            status = SequenceStatus.FINISHED_LENGTH_CAPPED
        if status is not None and stop is None:
            detokenizer.finish()
        return status

    def _finish_seq(self, state: _State, seq: Sequence, status: SequenceStatus) -> None:
        """Ends one sequence, and its request if it was the last one."""
        self.scheduler.finish(seq, status)
        request = state.request
        if not request.is_finished():
            return
        state.metrics.finished_time = time.time()
        request.status = RequestStatus(status.value)
        del self._states[request.request_id]

    def _output(self, state: _State) -> RequestOutput:
        """How a request stands now."""
        for seq_id, seq in state.request.sequences.items():
            detokenizer = state.detokenizers[seq_id]
            seq.output_text = detokenizer.text if seq.is_finished() else detokenizer.visible_text()
        return RequestOutput.from_request(state.request, self.tokenizer, state.metrics, state.prompt_logprobs)

    def _abort_running(self, work: SchedulerOutput | None, error: BaseException) -> None:
        """Ends every request that takes part in steps now, and says why."""
        # What was to be copied to CPU memory may not have arrived there.
        for seq in [] if work is None else work.preempted:
            self.scheduler.restart(seq)
        for request_id in {seq.request_id: None for seq in self.scheduler.running}:
            self.abort_request(request_id, f"{type(error).__name__}: {error}")

    def _record(self, work: SchedulerOutput, times: list[float]) -> None:
        """Keeps what the step did; ``times`` are the seconds at its start and after each of its four parts."""
        decodes = sum(
            num_new for seq, num_new in zip(work.seqs, work.num_new_tokens) if num_new == 1 and seq.get_output_len() > 1
        )
        pool = self.cache.pool
        self.steps.append(
            StepStats(
                num_prefill_tokens=sum(work.num_new_tokens) - decodes,
                num_decode_tokens=decodes,
                num_seqs=len(work.seqs),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_swapped=len(self.scheduler.swapped),
                num_preempted=len(work.preempted),
                num_used_blocks=pool.num_blocks - pool.num_free,
                num_free_blocks=pool.num_free,
                num_queried_tokens=sum(seq.get_len() for seq, _ in work.admitted),
                num_cached_tokens=sum(num_cached for _, num_cached in work.admitted),
                seconds=dict(zip(("schedule", "run", "sample", "update"), (b - a for a, b in pairwise(times)))),
            )
        )

    def _check(self, request: Request) -> None:
        """Refuses what could never be served, in one sentence."""
        num_prompt, params = len(request.prompt_token_ids), request.sampling_params
        largest = max(request.prompt_token_ids)
        require(
            largest < self.vocab_size,
            f"prompt has the token id {largest}, but the vocabulary has {self.vocab_size} tokens",
        )
        require(
            num_prompt < self.max_model_len,
            f"prompt has {num_prompt} tokens, and max_model_len is {self.max_model_len}: shorten it by at least "
            f"{num_prompt - self.max_model_len + 1}",
        )
        longest = min(num_prompt + (params.max_tokens or self.max_model_len), self.max_model_len)
        # The last token is given out and never read, so it needs no slot.
        num_blocks = self.cache.num_blocks_for(longest - 1)
        require(
            num_blocks <= self.cache.pool.num_blocks,
            f"request {request.request_id!r} may grow to {longest} tokens, {num_blocks} blocks, and the cache has "
            f"{self.cache.pool.num_blocks}: lower max_tokens or raise num_blocks",
        )

    def _settle_budget(self) -> None:
        """Decides how many tokens a step may hold, if nobody did."""
        scheduler = self.config.scheduler_config
        longest = self.max_model_len
        if scheduler.max_num_batched_tokens is None:
            chunked = scheduler.enable_chunked_prefill
            scheduler.max_num_batched_tokens = max(DEFAULT_MAX_NUM_BATCHED_TOKENS, 0 if chunked else longest)
        budget = scheduler.max_num_batched_tokens
        require(
            scheduler.enable_chunked_prefill or budget >= longest,
            f"max_num_batched_tokens must be at least max_model_len ({longest}) where prompts are not chunked, got "
            f"{budget}; raise it or set enable_chunked_prefill=True",
        )

    def _count_blocks(self, block_bytes: int) -> tuple[int, int]:
        """Blocks of the cache and blocks in CPU memory, of so many bytes each."""
        cache, scheduler, decoder = self.config.cache_config, self.config.scheduler_config, self.decoder
        swap_bytes = cache.swap_space * 2**30 if scheduler.preemption_mode == "swap" else 0
        num_blocks = cache.num_blocks
        if num_blocks is None:
            useful = scheduler.max_num_seqs * -(-self.max_model_len // cache.block_size)
            room = CPU_CACHE_BYTES if decoder.device.type == "cpu" else self._free_gpu_bytes()
            num_blocks = min(useful, int(room // block_bytes))
        require(
            num_blocks > 0,
            f"the cache has room for no block of {block_bytes / 2**20:.1f} MiB: raise gpu_memory_utilization or lower "
            "block_size",
        )
        return num_blocks, int(swap_bytes // block_bytes)

    def _free_gpu_bytes(self) -> float:
        """Bytes that the cache may take of the GPU, after the largest batch has been tried."""
        device = self.decoder.device
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        num_tokens = cast(int, self.config.scheduler_config.max_num_batched_tokens)
        token_ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
        with torch.inference_mode():
            heads = self.decoder.config.num_heads * self.decoder.config.head_dim
            hidden = self.decoder(token_ids, token_ids, lambda layer, q, kv: q.reshape(num_tokens, heads))
            rows = min(num_tokens, self.config.scheduler_config.max_num_seqs)
            self.decoder.compute_logits(hidden[:rows]).float().softmax(dim=-1)
        activations = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        used = total - free
        return total * self.config.cache_config.gpu_memory_utilization - used - activations


def read_generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], SamplingParams]:
    """What a checkpoint says about generating: the tokens that end a text, and its own way to sample.

    Without a ``generation_config.json``: the tokenizer's end token, and the defaults of `SamplingParams`.
    """
    if not (folder / "generation_config.json").is_file():
        own = tokenizer.eos_token_id
        return [] if own is None else [own], SamplingParams()
    config = GenerationConfig.from_pretrained(folder)
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: getattr(config, name, None) for name in names}
    given = {name: value for name, value in found.items() if value is not None and (name, value) != ("top_k", 0)}
    if config.do_sample is False:
        given["temperature"] = 0.0
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends), SamplingParams(**given)
