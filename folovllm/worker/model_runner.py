"""From scheduled sequences to tokens: flat tensors in, one row of logits per sequence whose last token was computed.

Chapter 10 is about this module. The tokens of all sequences of a step are one flat batch, without padding.
``query_start_loc`` says where each sequence begins, ``positions`` where each token is in its sequence, ``slot_mapping``
where its key and value are written, and ``block_table`` where those of earlier tokens are. The sampler is called here,
as in vLLM (``v1/worker/gpu_model_runner.py``, 0.33.0).
"""

from __future__ import annotations

import logging
import math
import operator
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata, choose_backend
from folovllm.config import EngineConfig, SchedulerConfig
from folovllm.core.scheduler import SchedulerOutput
from folovllm.logprobs import NUM_CONTEXT_TOKENS, Logprob
from folovllm.model.decoder import Decoder
from folovllm.outputs import RunnerOutput
from folovllm.request import Sequence
from folovllm.sample.sampler import Sampler, SamplingMetadata, compute_prompt_logprobs, make_generator
from folovllm.sample.speculative import Proposer, verify
from folovllm.sampling_params import SamplingParams
from folovllm.utils import cdiv, get_cpu_memory_info, without_autocast
from folovllm.utils.heap import keep_freed_memory
from folovllm.utils.transfer import copy_to_device
from folovllm.validation import require
from folovllm.worker.cache_blocks import clear_begun_blocks, move_blocks
from folovllm.worker.prepared_steps import PreparedSteps, choose_prepared_steps

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 2**30
"""Bytes of KV cache on a CPU where ``num_blocks`` is None (1 GiB); fewer if all sequences together need fewer."""

PROMPT_LOGPROBS_ROWS = 256
"""Prompt tokens whose logits are in memory at once when prompt log probabilities are asked for."""


class Runner(Protocol):
    """Turns a scheduler output into tokens."""

    def count_blocks(self) -> tuple[int, int]:
        """KV blocks that there is memory for, and swap blocks in CPU memory for preempted sequences."""
        ...

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Allocates the tensors of the cache."""
        ...

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Computes a step: the new tokens of each entry of ``sampled``."""
        ...


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take no memory until they are written to, since a large cache is mostly empty at first."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which are mapped when touched; torch writes the zeros itself.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _check_memory(config: EngineConfig, device: torch.device, cache_gb: float) -> None:
    """Refuses a cache or a swap space that the CPU could not hold.

    Its memory is taken when it is first written to (`_zeros`): the system would end the process in the middle of some
    step.
    """
    memory, cache = get_cpu_memory_info(), config.cache_config
    require(
        device.type != "cpu" or cache_gb <= memory["free_gb"],
        f"num_blocks must fit into the CPU's memory, got {cache.num_blocks}, which take {cache_gb:.1f} GiB where "
        f"{memory['free_gb']:.1f} GiB are free",
    )
    require(
        config.scheduler_config.preemption_mode != "swap" or cache.swap_space <= memory["total_gb"],
        f"swap_space must be at most the CPU's memory of {memory['total_gb']:.1f} GiB, got {cache.swap_space:g}",
    )


def _report_on(
    decoder: Decoder, sampler: Sampler, seq: Sequence, first: int, hidden: Tensor
) -> list[dict[int, Logprob] | None]:
    """Log probabilities of the prompt tokens predicted by these hidden states, the first of position ``first``."""
    prompt, count, found = seq.data.prompt_token_ids, cast(int, seq.sampling_params.prompt_logprobs), []
    # A prompt's logits are many times as large as its hidden states, so they are computed in chunks.
    for start in range(0, len(hidden), PROMPT_LOGPROBS_ROWS):
        logits = decoder.compute_logits(hidden[start : start + PROMPT_LOGPROBS_ROWS])
        place = first + start
        token_ids = prompt[place : place + len(logits) + 1]
        context = prompt[max(place - NUM_CONTEXT_TOKENS, 0) : place]
        found += compute_prompt_logprobs(logits, token_ids, count, sampler.tokenizer, context)[1:]
    return found


def _reported(scheduler_output: SchedulerOutput) -> list[tuple[Sequence, slice]]:
    """Sequences of whose prompts log probabilities are asked for, and the rows of a step that predict their tokens."""
    found, start = [], 0
    for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
        num_predicting = min(num_new, len(seq.data.prompt_token_ids) - seq.num_computed_tokens - 1)
        # Once there is an output, the whole prompt has been reported.
        is_new = seq.sampling_params.prompt_logprobs is not None and seq.index == 0 and seq.get_output_len() == 0
        if is_new and num_predicting > 0:
            found.append((seq, slice(start, start + num_predicting)))
        start += num_new
    return found


class Drafter(Protocol):
    """A smaller model that guesses tokens: `folovllm.worker.draft_model.DraftModel`."""

    decoder: Decoder

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Allocates a cache with as many blocks as the model's."""
        ...

    def guess(self, scheduler_output: SchedulerOutput) -> Tensor | None:
        """Makes the guesses of a step; returns what they were drawn from."""
        ...


def token_bytes(decoder: Decoder) -> int:
    """Bytes of the keys and values of one token."""
    shape = decoder.config
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * decoder.dtype.itemsize


def _largest_batch(
    scheduler: SchedulerConfig, longest: int, block_size: int, device: torch.device
) -> AttentionMetadata:
    """As many tokens as a step may have; all sequences share one block, since what is computed is of no interest."""
    num_tokens = cast(int, scheduler.max_num_batched_tokens)
    num_seqs = min(scheduler.max_num_seqs, num_tokens)
    # Prompts as long as can be while the budget lasts, and a token each for the others, at the end of a long past.
    query_lens = 1 + np.clip(num_tokens - num_seqs - np.arange(num_seqs) * (longest - 1), 0, longest - 1)
    starts, num_rows = np.concatenate([[0], query_lens.cumsum()]), int(query_lens.sum())
    tables = np.zeros((num_seqs, cdiv(longest, block_size)), dtype=np.int64)
    return AttentionMetadata.from_arrays(
        starts, np.full(num_seqs, longest), np.zeros(num_rows, dtype=np.int64), tables, device
    )


def place_rows(rows: list[int], num_tokens: int, device: torch.device) -> Tensor | None:
    """Rows of a flat batch as a tensor; None if it is all of them in order, as in a decode step.

    For none, as in the middle of a prompt, it is the first, which nobody reads: not every kernel can compute nothing.
    """
    if rows == list(range(num_tokens)):
        return None
    (places,) = copy_to_device([np.array(rows or [0], dtype=np.int64)], device)
    return places


class ModelRunner:
    """Owns the tensors of the cache, runs the decoder on what was scheduled, and samples.

    Args:
        decoder: the model.
        sampler: chooses the tokens.
        config: with ``max_model_len`` and ``max_num_batched_tokens`` filled in.
        draft: makes the guesses that a step checks; None: they are looked up, if the config asks for any.
    """

    def __init__(self, decoder: Decoder, sampler: Sampler, config: EngineConfig, draft: Drafter | None = None) -> None:
        self.decoder, self.sampler, self.config, self.draft = decoder, sampler, config, draft
        draft_cost = 0.0 if draft is None else draft.decoder.config.num_multiplied / decoder.config.num_multiplied
        speculative = config.speculative_config
        self.proposer = None if speculative is None else Proposer(speculative, draft_cost)
        self.block_size = config.cache_config.block_size
        backend_cls, self.backend_choice = choose_backend(
            config.model_config.attention_backend, decoder.device, decoder.dtype, decoder.config.head_dim,
            self.block_size,
        )  # fmt: skip
        logger.info("attention backend %s", self.backend_choice)
        if decoder.device.type == "cpu":
            keep_freed_memory()
        self.set_attention_backend(backend_cls)
        self._sampled: tuple[list[Sequence], SamplingMetadata] = [], SamplingMetadata([])

    def __repr__(self) -> str:
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        how = "" if self._steps_cls is None else f", {self._steps_cls.how} steps"
        return f"ModelRunner({self.decoder.device}, {dtype}, attention backend {self.backend_choice}{how})"

    def set_attention_backend(self, backend_cls: type[AttentionBackend]) -> None:
        """Computes attention by this backend, from the next `initialize_kv_cache` on."""
        enforce_eager = self.config.model_config.enforce_eager
        self._steps_cls = choose_prepared_steps(enforce_eager, self.decoder.device, backend_cls)  # or it refuses
        self.backend_cls = backend_cls
        # Blocks that the scheduler does not know of.
        self._num_reserved = 0 if self._steps_cls is None else self._steps_cls.num_reserved_blocks

    @without_autocast()  # on a GPU a batch is run to measure its memory
    def count_blocks(self) -> tuple[int, int]:
        """KV blocks that there is memory for (or that the config asks for), and swap blocks in CPU memory.

        Raises:
            ValueError: if there is no room for a single block, or none for what the config asks for.
        """
        cache, scheduler = self.config.cache_config, self.config.scheduler_config
        decoders = [self.decoder] if self.draft is None else [self.decoder, self.draft.decoder]
        block_bytes = cache.block_size * sum(map(token_bytes, decoders))
        swap_bytes = cache.swap_space * 2**30 if scheduler.preemption_mode == "swap" else 0
        num_blocks = cache.num_blocks
        _check_memory(self.config, self.decoder.device, (num_blocks or 0) * block_bytes / 2**30)
        if num_blocks is None:
            longest = cast(int, self.config.model_config.max_model_len)
            useful = scheduler.max_num_seqs * cdiv(longest, cache.block_size)
            room = CPU_CACHE_BYTES if self.decoder.device.type == "cpu" else self._free_gpu_bytes()
            num_blocks = min(useful, int(room // block_bytes) - self._num_reserved)
        require(
            num_blocks > 0,
            f"the cache has room for no block of {block_bytes / 2**20:.1f} MiB: lower block_size"
            + ("" if self.decoder.device.type == "cpu" else " or raise gpu_memory_utilization"),
        )
        return num_blocks, int(swap_bytes // block_bytes)

    def _free_gpu_bytes(self) -> float:
        """Bytes of GPU memory left for the cache once the largest batch has run and decode steps have been recorded."""
        device = self.decoder.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._run_largest_batch()
        activations = torch.cuda.max_memory_allocated(device) - before
        steps = self._prepare_steps(self._attention_over(1))  # for what they take, then thrown away
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        del steps
        torch.cuda.empty_cache()
        return free - total * (1 - self.config.cache_config.gpu_memory_utilization) - activations

    def _prepare_steps(self, attention: AttentionBackend) -> PreparedSteps | None:
        """Prepared steps over a cache, if the config has them."""
        return None if self._steps_cls is None else self._steps_cls(self.decoder, attention, self.config)

    def _attention_over(self, num_blocks: int) -> AttentionBackend:
        """The attention backend over a new cache."""
        config = self.decoder.config
        sizes = config.num_layers, config.num_kv_heads, num_blocks, self.block_size, config.head_dim
        shape = self.backend_cls.kv_cache_shape(*sizes)
        # Zeros, not uninitialized memory: masked values are multiplied by 0, and 0 times NaN is NaN.
        return self.backend_cls(_zeros(shape, self.decoder.dtype, self.decoder.device))

    @torch.inference_mode()
    def _run_largest_batch(self) -> None:
        """A step as large as the config allows, through the attention backend and the sampler that will serve."""
        longest = cast(int, self.config.model_config.max_model_len)
        metadata = _largest_batch(self.config.scheduler_config, longest, self.block_size, self.decoder.device)
        num_seqs, num_rows = len(metadata.seq_lens_cpu), int(metadata.query_start_loc_cpu[-1])
        attention = self._attention_over(1)
        attention.begin(metadata)
        input_ids = torch.zeros(num_rows, dtype=torch.long, device=self.decoder.device)
        logits = self.decoder.compute_logits(self.decoder(input_ids, input_ids, attention)[:num_seqs])
        params = SamplingParams(top_p=0.9, seed=0)  # a seed, or Python's own random numbers would be used up
        self.sampler.sample(logits, SamplingMetadata([params] * num_seqs))

    @without_autocast()  # steps may be recorded
    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Allocates the cache, in the shape that the attention backend reads, and swap space for as many blocks."""
        self.attention = self._attention_over(num_blocks + self._num_reserved)
        self.kv_cache = self.attention.kv_cache
        swap_shape = list(self.kv_cache.shape)
        swap_shape[self.backend_cls.block_dim] = num_swap_blocks
        pinned = self.decoder.device.type == "cuda" and torch.cuda.is_available()
        self.swap_cache = torch.empty(swap_shape, dtype=self.decoder.dtype, device="cpu", pin_memory=pinned)
        self.prepared_steps = self._prepare_steps(self.attention)
        if self.draft is not None:
            self.draft.initialize_kv_cache(num_blocks, num_swap_blocks)

    @torch.inference_mode()
    @without_autocast()
    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Computes a step: one forward pass over all its tokens, then tokens for each entry of ``sampled``."""
        self.prepare_blocks(scheduler_output)
        draft_probs = None if self.draft is None else self.draft.guess(scheduler_output)
        reported = _reported(scheduler_output)
        hidden, logits, *likeliest = self._forward(scheduler_output, needs_all=len(reported) > 0)
        seqs = [seq for seq, _ in scheduler_output.sampled]
        if scheduler_output.scheduled_spec_token_ids:
            output = self._verify(logits, seqs, [scheduler_output.get_guesses(seq) for seq in seqs], draft_probs)
        else:
            output = self._sample(logits, scheduler_output.sampled, *likeliest)
        for seq, rows in reported:
            first = seq.num_computed_tokens
            found = _report_on(self.decoder, self.sampler, seq, first, hidden[rows])
            output.prompt_logprobs[seq.seq_id] = first + 1, found
        if self.proposer is not None:
            output.spec_token_ids = self.proposer.propose(seqs, output.sampled_token_ids)
        return output

    def prepare_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """What a step does to whole blocks before it computes."""
        move_blocks(self.kv_cache, self.swap_cache, self.backend_cls.block_dim, scheduler_output)
        if self.backend_cls.reads_whole_blocks:
            clear_begun_blocks(self.kv_cache, self.backend_cls.block_dim, self.block_size, scheduler_output)

    def _forward(self, scheduler_output: SchedulerOutput, needs_all: bool) -> list[Tensor]:
        """Hidden states, logits of the sampled rows, and what a prepared step has found likeliest.

        The hidden states are those of all tokens if that is needed, else perhaps of the sampled rows alone.
        """
        input_ids, positions, metadata = self.prepare(scheduler_output)
        rows = place_rows(scheduler_output.get_sampled_rows(), len(input_ids), self.decoder.device)
        steps = self.prepared_steps
        if steps is not None and steps.takes(metadata):
            hidden, *found = steps.run(input_ids, positions, metadata)
            return [hidden, *(x if rows is None else x[rows] for x in found)]
        self.attention.begin(metadata)
        decoder = self.decoder if steps is None else steps.decoder
        hidden = decoder(input_ids, positions, self.attention, None if needs_all else rows)
        if not scheduler_output.sampled:  # in the middle of a prompt
            return [hidden, hidden[:0]]
        sampled = hidden[rows] if needs_all and rows is not None else hidden
        return [hidden, self.decoder.compute_logits(sampled)]

    def _sample(self, logits: Tensor, sampled: list[tuple[Sequence, int]], *likeliest: Tensor) -> RunnerOutput:
        """A token, with log probabilities if asked for, for each sequence whose last token was computed."""
        if not sampled:
            return RunnerOutput([], [])
        metadata = self._sampling_metadata([seq for seq, _ in sampled])
        output = self.sampler.sample(logits, metadata, likeliest)
        token_ids = [[] if row in output.errors else [token_id] for row, token_id in enumerate(output.token_ids)]
        logprobs = [None if found is None else [found] for found in output.logprobs]
        return RunnerOutput(token_ids, logprobs, output.errors, output.not_finite)

    def _verify(
        self, logits: Tensor, seqs: list[Sequence], guesses: list[list[int]], draft_probs: Tensor | None
    ) -> RunnerOutput:
        """The tokens of each sequence: its guesses that are right, and one of the model's own."""
        return verify(self.sampler, logits, self._sampling_metadata(seqs), guesses, draft_probs)

    def _sampling_metadata(self, seqs: list[Sequence]) -> SamplingMetadata:
        """What the sampler knows about these sequences: the same object for as long as they are the same."""
        for seq in seqs:
            if seq.generator is None:
                seq.generator = make_generator(seq.sampling_params, seq.index)
        generators = [seq.generator for seq in seqs if seq.generator is not None]
        kept, metadata = self._sampled
        if len(kept) != len(seqs) or not all(map(operator.is_, kept, seqs)):
            metadata = SamplingMetadata(
                [seq.sampling_params for seq in seqs],
                [seq.data.prompt_token_ids for seq in seqs],
                [seq.data.output_token_ids for seq in seqs],
                generators,
                [seq.grammar for seq in seqs],
            )
            self._sampled = seqs, metadata
        metadata.generators = generators
        return metadata

    def prepare(self, scheduler_output: SchedulerOutput) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The flat tensors of a step: input ids, positions (both ``[num_tokens]``), and attention's metadata."""
        input_ids: list[int] = []
        seqs = scheduler_output.seqs
        for seq, num_new in zip(seqs, scheduler_output.num_new_tokens):
            first, num_tokens = seq.num_computed_tokens, seq.get_len()
            end = first + num_new
            input_ids += seq.data.get_token_ids(first, end)
            if end > num_tokens:
                input_ids += scheduler_output.get_guesses(seq)[max(first - num_tokens, 0) : end - num_tokens]
        computed = np.array([seq.num_computed_tokens for seq in seqs])
        num_new_tokens = np.array(scheduler_output.num_new_tokens)
        starts = np.concatenate([[0], num_new_tokens.cumsum()])
        rows = np.repeat(np.arange(len(seqs)), num_new_tokens)
        positions = np.arange(len(input_ids)) - starts[rows] + computed[rows]
        width = max(len(seq.block_ids) for seq in seqs)
        # A table is filled up with a block of its own, since what others have may not be numbers.
        tables = np.array([seq.block_ids + seq.block_ids[-1:] * (width - len(seq.block_ids)) for seq in seqs], np.int32)
        slots = tables[rows, positions // self.block_size] * np.int64(self.block_size) + positions % self.block_size
        lens = computed + num_new_tokens
        arrays = [np.array(input_ids), positions, starts.astype(np.int32), lens.astype(np.int32), slots, tables]
        ids, *found = copy_to_device(arrays, self.decoder.device)
        return ids, found[0], AttentionMetadata(found[1], found[2], found[3], found[4], starts, lens)
