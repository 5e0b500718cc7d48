"""Timing one layer on this machine, and what the machine can do, for the figures of chapter 7.

What is measured here is different on every machine, so the cells that show it are not compared. One core is timed, by
the processor time that it spends: what else the machine does meanwhile would drown the differences in wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import GatherAttention
from folovllm.model.decoder import DecoderConfig, DecoderLayer
from folovllm.model.layers import Linear, LinearMethod
from folovllm.simulator.cost import ModelShape
from folovllm.utils import cdiv

BLOCK_SIZE = 16
FLOAT_BYTES = 4
"""Bytes of a number here: a CPU computes in float32."""


def best_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds that one core needs for the fastest of several calls, after one to warm up."""
    num_threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        run()
        for _ in range(repeats):
            start = time.thread_time()
            run()
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(num_threads)
    return min(times)


def measure_bandwidth(num_bytes: int = 2**27) -> float:
    """Bytes per second at which one core reads memory: it adds up a vector that no cache holds."""
    numbers = torch.ones(num_bytes // FLOAT_BYTES)
    return num_bytes / best_of(numbers.sum)


def measure_flops(size: int = 1024) -> float:
    """FLOPs per second that one core reaches in one product of two square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best_of(lambda: a @ b)


class TimedLayer:
    """One layer of a model with random weights, run by the engine's own code in float32.

    Args:
        shape: the model's.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        config = _decoder_config(shape)
        self.layer = DecoderLayer(config, 0, LinearMethod(torch.float32, torch.device("cpu")))
        for linear in self.layer.linears:
            cast(Linear, linear).weight.normal_(std=0.02)
        for norm in self.layer.norms:
            norm.weight.fill_(1)
        self.layer.process_weights_after_loading()

    @property
    def num_weights(self) -> int:
        """Weights in the layer's matrices."""
        return self.shape.num_layer_params // self.shape.num_layers

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that one token keeps in this layer's cache."""
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * FLOAT_BYTES

    @torch.inference_mode()
    def time_rows(self, num_rows: int) -> float:
        """Seconds for so many tokens, without attention."""
        width = self.shape.num_heads * self.shape.head_dim
        return self._time(num_rows, lambda layer, q, kv: q.reshape(num_rows, width))

    @torch.inference_mode()
    def time_decode(self, num_seqs: int, context: int) -> float:
        """Seconds for one new token of each of so many sequences, which have ``context`` tokens each."""
        shape, num_blocks = self.shape, cdiv(context, BLOCK_SIZE)
        table = np.arange(num_seqs * num_blocks).reshape(num_seqs, num_blocks)
        cache = torch.zeros(1, 2, shape.num_kv_heads, num_seqs * num_blocks, BLOCK_SIZE, shape.head_dim)
        attention = GatherAttention(cache)
        slots = table[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        lens = np.full(num_seqs, context)
        attention.begin(AttentionMetadata.from_arrays(np.arange(num_seqs + 1), lens, slots, table))
        return self._time(num_seqs, attention)

    def _time(self, num_rows: int, attend: Callable[[int, Tensor, Tensor], Tensor]) -> float:
        x = torch.randn(num_rows, self.shape.hidden_size)
        cos = torch.ones(num_rows, 1, self.shape.head_dim)
        return best_of(lambda: self.layer(x, cos, torch.zeros_like(cos), attend), repeats=3)


def _decoder_config(shape: ModelShape) -> DecoderConfig:
    """Qwen3's switches and this shape."""
    return DecoderConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling={"rope_type": "default"},
        qkv_bias=False,
        output_bias=False,
        qk_norm=True,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
