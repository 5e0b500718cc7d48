"""From scheduled sequences to tokens: flat tensors in, one row of logits per sequence whose last token was computed.

Chapter 10 is about this module. The tokens of all sequences of a step are one flat batch, without padding.
``query_start_loc`` says where each sequence begins, ``positions`` where each token is in its sequence, ``slot_mapping``
where its key and value are written, and ``block_table`` where those of earlier tokens are. The sampler is called here,
as in vLLM (``v1/worker/gpu_model_runner.py``, 0.33.0).
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import PagedAttention
from folovllm.config import EngineConfig
from folovllm.core.scheduler import SchedulerOutput
from folovllm.logprobs import NUM_CONTEXT_TOKENS, Logprob
from folovllm.model.decoder import Decoder
from folovllm.outputs import RunnerOutput
from folovllm.request import Sequence
from folovllm.sample.sampler import Sampler, SamplingMetadata, compute_prompt_logprobs, make_generator
from folovllm.utils import cdiv
from folovllm.validation import require

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
        """Computes a step: one token for each entry of ``sampled``."""
        ...


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take no memory until they are written to, since a large cache is mostly empty at first."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which are mapped when touched; torch writes the zeros itself.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class ModelRunner:
    """Owns the tensors of the cache, runs the decoder on what was scheduled, and samples.

    Args:
        decoder: the model.
        sampler: chooses the tokens.
        config: with ``max_model_len`` and ``max_num_batched_tokens`` filled in.
    """

    def __init__(self, decoder: Decoder, sampler: Sampler, config: EngineConfig) -> None:
        self.decoder, self.sampler, self.config = decoder, sampler, config
        self.block_size = config.cache_config.block_size

    def count_blocks(self) -> tuple[int, int]:
        """KV blocks that there is memory for (or that the config asks for), and swap blocks in CPU memory.

        Raises:
            ValueError: if there is no room for a single block.
        """
        cache, scheduler, shape = self.config.cache_config, self.config.scheduler_config, self.decoder.config
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * self.decoder.dtype.itemsize
        block_bytes = cache.block_size * token_bytes
        swap_bytes = cache.swap_space * 2**30 if scheduler.preemption_mode == "swap" else 0
        num_blocks = cache.num_blocks
        if num_blocks is None:
            longest = cast(int, self.config.model_config.max_model_len)
            useful = scheduler.max_num_seqs * cdiv(longest, cache.block_size)
            room = CPU_CACHE_BYTES if self.decoder.device.type == "cpu" else self._free_gpu_bytes()
            num_blocks = min(useful, int(room // block_bytes))
        require(
            num_blocks > 0,
            f"the cache has room for no block of {block_bytes / 2**20:.1f} MiB: lower block_size"
            + ("" if self.decoder.device.type == "cpu" else " or raise gpu_memory_utilization"),
        )
        return num_blocks, int(swap_bytes // block_bytes)

    def _free_gpu_bytes(self) -> float:
        """Bytes of GPU memory left for the cache, measured by running the largest batch once."""
        device, shape = self.decoder.device, self.decoder.config
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        num_tokens = cast(int, self.config.scheduler_config.max_num_batched_tokens)
        token_ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
        with torch.inference_mode():
            width = shape.num_heads * shape.head_dim
            hidden = self.decoder(token_ids, token_ids, lambda layer, q, kv: q.reshape(num_tokens, width))
            rows = min(num_tokens, self.config.scheduler_config.max_num_seqs)
            self.decoder.compute_logits(hidden[:rows]).float().softmax(dim=-1)
        activations = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        used = total - free
        return total * self.config.cache_config.gpu_memory_utilization - used - activations

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Allocates the cache, ``[num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim]``."""
        config = self.decoder.config
        shape = (config.num_layers, 2, config.num_kv_heads, num_blocks, self.block_size, config.head_dim)
        # Zeros, not uninitialized memory: masked values are multiplied by 0, and 0 times NaN is NaN.
        self.kv_cache = _zeros(shape, self.decoder.dtype, self.decoder.device)
        swap_shape = (*shape[:3], num_swap_blocks, *shape[4:])
        self.swap_cache = torch.empty(swap_shape, dtype=self.decoder.dtype, device="cpu")
        self.attention = PagedAttention(self.kv_cache)

    @torch.inference_mode()
    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Computes a step: one forward pass over all its tokens, then one token for each entry of ``sampled``."""
        self._move_blocks(scheduler_output)
        self._clear_begun_blocks(scheduler_output)
        input_ids, positions, metadata = self.prepare(scheduler_output)
        self.attention.begin(metadata)
        hidden = self.decoder(input_ids, positions, self.attention)
        output = self._sample(hidden, scheduler_output.sampled)
        output.prompt_logprobs = self._prompt_logprobs(hidden, scheduler_output)
        return output

    def _sample(self, hidden: Tensor, sampled: list[tuple[Sequence, int]]) -> RunnerOutput:
        """A token, with log probabilities if asked for, for each sequence whose last token was computed."""
        if not sampled:
            return RunnerOutput([], [])
        seqs, rows = [seq for seq, _ in sampled], [row for _, row in sampled]
        if rows != list(range(len(hidden))):  # in a pure decode step every row is sampled
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        for seq in seqs:
            if seq.generator is None:
                seq.generator = make_generator(seq.sampling_params, seq.index)
        metadata = SamplingMetadata(
            [seq.sampling_params for seq in seqs],
            [seq.data.prompt_token_ids for seq in seqs],
            [seq.data.output_token_ids for seq in seqs],
            [seq.generator for seq in seqs if seq.generator is not None],
        )
        output = self.sampler.sample(self.decoder.compute_logits(hidden), metadata)
        return RunnerOutput(output.token_ids, output.logprobs, output.errors)

    def _prompt_logprobs(
        self, hidden: Tensor, scheduler_output: SchedulerOutput
    ) -> dict[str, tuple[int, list[dict[int, Logprob] | None]]]:
        """Log probabilities of the prompt tokens that this step's hidden states predict, where asked for."""
        found = {}
        start = 0
        for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
            first, count = seq.num_computed_tokens, seq.sampling_params.prompt_logprobs
            token_ids = seq.data.prompt_token_ids[first : first + num_new + 1]
            # Once there is an output, the whole prompt has been reported.
            if count is not None and len(token_ids) > 1 and seq.index == 0 and seq.get_output_len() == 0:
                found[seq.seq_id] = first + 1, self._report_on(seq, first, hidden[start : start + len(token_ids) - 1])
            start += num_new
        return found

    def _report_on(self, seq: Sequence, first: int, hidden: Tensor) -> list[dict[int, Logprob] | None]:
        """Log probabilities of the prompt tokens predicted by these hidden states, the first of position ``first``."""
        prompt, count, found = seq.data.prompt_token_ids, cast(int, seq.sampling_params.prompt_logprobs), []
        # A prompt's logits are many times as large as its hidden states, so they are computed in chunks.
        for start in range(0, len(hidden), PROMPT_LOGPROBS_ROWS):
            logits = self.decoder.compute_logits(hidden[start : start + PROMPT_LOGPROBS_ROWS])
            place = first + start
            token_ids = prompt[place : place + len(logits) + 1]
            context = prompt[max(place - NUM_CONTEXT_TOKENS, 0) : place]
            found += compute_prompt_logprobs(logits, token_ids, count, self.sampler.tokenizer, context)[1:]
        return found

    def prepare(self, scheduler_output: SchedulerOutput) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The flat tensors of a step: input ids, positions (both ``[num_tokens]``), and attention's metadata."""
        input_ids: list[int] = []
        seqs = scheduler_output.seqs
        for seq, num_new in zip(seqs, scheduler_output.num_new_tokens):
            input_ids += seq.data.get_token_ids(seq.num_computed_tokens, seq.num_computed_tokens + num_new)
        computed = np.array([seq.num_computed_tokens for seq in seqs])
        num_new_tokens = np.array(scheduler_output.num_new_tokens)
        starts = np.concatenate([[0], num_new_tokens.cumsum()])
        rows = np.repeat(np.arange(len(seqs)), num_new_tokens)
        positions = np.arange(len(input_ids)) - starts[rows] + computed[rows]
        width = max(len(seq.block_ids) for seq in seqs)
        # A table is filled up with a block of its own, since what others have may not be numbers.
        tables = np.array([seq.block_ids + seq.block_ids[-1:] * (width - len(seq.block_ids)) for seq in seqs])
        slots = tables[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        ids_, positions_, slots_, tables_ = (
            torch.from_numpy(array).to(self.decoder.device) for array in (np.array(input_ids), positions, slots, tables)
        )
        return ids_, positions_, AttentionMetadata(starts, computed + num_new_tokens, slots_, tables_)

    def _clear_begun_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Empties the blocks that this step begins and does not fill.

        Attention reads whole blocks, and multiplies by 0 what is behind the last token: what somebody's failed forward
        pass has left there may not be a number, and 0 times that is none either.
        """
        begun = []
        for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
            index, num_in_block = divmod(seq.num_computed_tokens + num_new, self.block_size)
            if 0 < num_in_block <= num_new:
                begun.append(seq.block_ids[index])
        if begun:
            self.kv_cache.index_fill_(3, torch.tensor(begun, device=self.kv_cache.device), 0)

    def _move_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Copies blocks: swap-outs, swap-ins, then copy-on-write; each frees what the next one fills."""
        for source, target, pairs in (
            (self.kv_cache, self.swap_cache, scheduler_output.swap_out),
            (self.swap_cache, self.kv_cache, scheduler_output.swap_in),
            (self.kv_cache, self.kv_cache, scheduler_output.copies),
        ):
            if pairs:
                sources = torch.tensor([a for a, _ in pairs], device=source.device)
                targets = torch.tensor([b for _, b in pairs], device=target.device)
                target[:, :, :, targets] = source[:, :, :, sources].to(target.device)
