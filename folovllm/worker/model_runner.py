"""From scheduled sequences to logits: flat tensors in, one row a sequence that has come to its end out. Chapter 6.

The tokens of all sequences of a step stand in one row, without padding; ``query_start_loc`` says where each begins,
``positions`` which place each token has in its sequence, ``slot_mapping`` where its key and value go, and
``block_table`` where those of its past are. As in vLLM (``v1/worker/gpu_model_runner.py``, 0.33.0).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import PagedAttention
from folovllm.core.scheduler import SchedulerOutput
from folovllm.model.decoder import Decoder


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory before they are written to, on a CPU: a large cache is mostly empty at first."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which come when they are touched; torch writes the zeros.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class ModelRunner:
    """Owns the tensors of the cache and runs the decoder over scheduled work.

    Args:
        decoder: the model.
        num_blocks: blocks of the cache.
        block_size: tokens in one.
        num_swap_blocks: blocks in CPU memory.
    """

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int, num_swap_blocks: int = 0) -> None:
        self.decoder, self.block_size = decoder, block_size
        config = decoder.config
        shape = (config.num_layers, 2, config.num_kv_heads, num_blocks, block_size, config.head_dim)
        # Zeros, not whatever lies there: what is masked is multiplied by 0, and 0 times NaN is NaN.
        self.kv_cache = _zeros(shape, decoder.dtype, decoder.device)
        swap_shape = (*shape[:3], num_swap_blocks, *shape[4:])
        self.swap_cache = torch.empty(swap_shape, dtype=decoder.dtype)
        self.attention = PagedAttention(self.kv_cache)

    @torch.inference_mode()
    def run(self, work: SchedulerOutput) -> Tensor:
        """Computes a step.

        Returns:
            hidden states ``[num_tokens, hidden_size]`` of all its tokens, sequence after sequence.
        """
        self._move_blocks(work)
        input_ids, positions, metadata = self.prepare(work)
        self.attention.begin(metadata)
        return self.decoder(input_ids, positions, self.attention)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Logits ``[len(rows), vocab_size]`` after the tokens at these places of the batch."""
        if rows != list(range(len(hidden))):  # all of them, where all sequences decode
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        return self.decoder.compute_logits(hidden)

    def prepare(self, work: SchedulerOutput) -> tuple[Tensor, Tensor, AttentionMetadata]:
        """The flat tensors of a step: input ids, positions (both ``[num_tokens]``), and attention's metadata."""
        input_ids: list[int] = []
        for seq, num_new in zip(work.seqs, work.num_new_tokens):
            input_ids += seq.data.get_token_ids(seq.num_computed_tokens, seq.num_computed_tokens + num_new)
        computed = np.array([seq.num_computed_tokens for seq in work.seqs])
        num_new_tokens = np.array(work.num_new_tokens)
        starts = np.concatenate([[0], num_new_tokens.cumsum()])
        rows = np.repeat(np.arange(len(work.seqs)), num_new_tokens)
        positions = np.arange(len(input_ids)) - starts[rows] + computed[rows]
        width = max(len(seq.block_ids) for seq in work.seqs)
        tables = np.array([seq.block_ids + [0] * (width - len(seq.block_ids)) for seq in work.seqs])
        slots = tables[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        ids_, positions_, slots_, tables_ = (
            torch.from_numpy(array).to(self.decoder.device) for array in (np.array(input_ids), positions, slots, tables)
        )
        return ids_, positions_, AttentionMetadata(starts, computed + num_new_tokens, slots_, tables_)

    def _move_blocks(self, work: SchedulerOutput) -> None:
        """Copies blocks out of the way, back, and apart, in this order: each frees what the next one fills."""
        for source, target, pairs in (
            (self.kv_cache, self.swap_cache, work.swap_out),
            (self.swap_cache, self.kv_cache, work.swap_in),
            (self.kv_cache, self.kv_cache, work.copies),
        ):
            if pairs:
                sources = torch.tensor([a for a, _ in pairs], device=source.device)
                targets = torch.tensor([b for _, b in pairs], device=target.device)
                target[:, :, :, targets] = source[:, :, :, sources].to(target.device)
