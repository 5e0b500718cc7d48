"""Attention that reads blocks where they lie, written in torch to be read: what a GPU's kernel does. Chapter 14.

`OnlineSoftmax` averages values whose scores come in pieces. `InPlaceAttention` is a backend of the engine that gives it
one block after another, without bringing the blocks together first.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.utils import cdiv

LEAST = torch.finfo(torch.float32).min
"""Where a maximum begins: not at -inf, since the difference of two infinities is not a number."""


class OnlineSoftmax:
    """Averages of values, weighted by a softmax whose scores come in pieces (Milakov and Gimelshein 2018).

    Args:
        shape: of the rows that are computed side by side; ``()`` for a single one.
        head_dim: numbers of one value.
        device: where the scores and values are.
    """

    def __init__(self, shape: tuple[int, ...], head_dim: int, device: torch.device | str = "cpu") -> None:
        self.maximum = torch.full(shape, LEAST, device=device)
        self.total = torch.zeros(shape, device=device)
        self.output = torch.zeros(*shape, head_dim, device=device)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Takes in one more piece: scores ``[*shape, num_keys]``, and values ``[..., num_keys, head_dim]``."""
        self.rescale(torch.maximum(self.maximum, scores.amax(dim=-1)))
        weights = torch.exp(scores - self.maximum.unsqueeze(-1))
        self.total = self.total + weights.sum(dim=-1)
        self.output = self.output + weights @ values

    def rescale(self, maximum: Tensor) -> None:
        """Makes what has been added up so far relative to a new maximum."""
        factor = torch.exp(self.maximum - maximum)
        self.total, self.output = self.total * factor, self.output * factor.unsqueeze(-1)
        self.maximum = maximum

    def result(self) -> Tensor:
        """The averages of all that has been added, ``[*shape, head_dim]``."""
        return self.output / self.total.unsqueeze(-1)


def softmax_steps(
    scores: Tensor, values: Tensor, block_size: int, softmax_cls: type[OnlineSoftmax] = OnlineSoftmax
) -> list[OnlineSoftmax]:
    """The state after each block of keys, for one query.

    Args:
        scores: ``[num_keys]``.
        values: ``[num_keys, head_dim]``.
        block_size: keys per block.
        softmax_cls: what adds them up.
    """
    softmax, states = softmax_cls((), values.shape[-1], values.device), []
    for piece, their_values in zip(scores.split(block_size), values.split(block_size)):
        softmax.add(piece, their_values)
        states.append(copy.copy(softmax))
    return states


class InPlaceAttention(AttentionBackend):
    """Attention block by block through the block table, for float32; no key is copied."""

    reads_whole_blocks = True
    softmax_cls: ClassVar[type[OnlineSoftmax]] = OnlineSoftmax

    def begin(self, metadata: AttentionMetadata) -> None:
        """Notes where each sequence begins."""
        self.metadata = metadata

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention: `folovllm.model.decoder.Attend`."""
        self.write(layer, kv, self.metadata.slot_mapping)
        starts, lens = self.metadata.query_start_loc_cpu.tolist(), self.metadata.seq_lens_cpu.tolist()
        outputs = []
        for i, table in enumerate(self.metadata.block_table.tolist()):
            queries = q[starts[i] : starts[i + 1]].transpose(0, 1)
            num_heads, num_new, head_dim = queries.shape
            # The query heads that share a key head are rows of one matrix.
            rows = queries.reshape(self.num_kv_heads, -1, head_dim) * head_dim**-0.5
            positions = torch.arange(lens[i] - num_new, lens[i], device=q.device).repeat(num_heads // self.num_kv_heads)
            found = self.average(layer, rows, positions, table[: cdiv(lens[i], self.block_size)])
            outputs.append(found.view(num_heads, num_new, head_dim).transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def average(self, layer: int, rows: Tensor, positions: Tensor, block_table: Sequence[int]) -> Tensor:
        """What each row takes from its sequence's values, ``[num_kv_heads, num_rows, head_dim]``.

        Args:
            layer: number of the layer.
            rows: queries, divided by the root of ``head_dim``: ``[num_kv_heads, num_rows, head_dim]``.
            positions: of each row in its sequence; it sees no later key.
            block_table: the sequence's blocks, in its own order.
        """
        return self.read(layer, rows, positions, block_table, range(len(block_table))).result()

    def read(
        self, layer: int, rows: Tensor, positions: Tensor, block_table: Sequence[int], indices: Iterable[int]
    ) -> OnlineSoftmax:
        """Adds up some of a sequence's blocks, those with these indices in its table."""
        softmax = self.softmax_cls(rows.shape[:2], rows.shape[2], rows.device)
        places = torch.arange(self.block_size, device=rows.device)
        for index in indices:
            keys, values = self.kv_cache[layer, :, :, block_table[index]]
            is_later = index * self.block_size + places > positions.unsqueeze(-1)
            scores = (rows @ keys.transpose(1, 2)).masked_fill(is_later, -torch.inf)
            softmax.add(scores, values)
        return softmax


def make_step(
    seq_lens: Sequence[int],
    num_new_tokens: Sequence[int],
    block_size: int = 16,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    seed: int = 0,
) -> tuple[Tensor, AttentionMetadata, Tensor, Tensor]:
    """One layer's attention to try a backend on: random numbers in blocks that lie in random order.

    Args:
        seq_lens: tokens of each sequence, the new ones included.
        num_new_tokens: new tokens of each sequence.
        block_size: tokens per block.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and of values.
        head_dim: numbers of one head.
        seed: of the random numbers.

    Returns:
        the cache ``[1, 2, num_kv_heads, num_blocks, block_size, head_dim]``, metadata, queries ``[num_new, num_heads,
        head_dim]``, and the new keys and values ``[num_new, 2 * num_kv_heads, head_dim]``.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    num_blocks = [cdiv(length, block_size) for length in seq_lens]
    blocks = rng.permutation(sum(num_blocks) + 1)  # one of them is nobody's
    table = np.stack(
        [
            np.pad(own, (0, max(num_blocks) - len(own)), mode="edge")
            for own in np.split(blocks[:-1], np.cumsum(num_blocks)[:-1])
        ]
    )
    positions = [np.arange(length - new, length) for length, new in zip(seq_lens, num_new_tokens)]
    slots = [row[at // block_size] * block_size + at % block_size for row, at in zip(table, positions)]
    starts = np.concatenate([[0], np.cumsum(num_new_tokens)])
    metadata = AttentionMetadata.from_arrays(starts, np.array(seq_lens), np.concatenate(slots), table)
    shape = (1, 2, num_kv_heads, len(blocks), block_size, head_dim)
    kv_cache = torch.randn(shape, generator=generator)
    q = 2 * torch.randn(starts[-1], num_heads, head_dim, generator=generator)
    kv = torch.randn(starts[-1], 2 * num_kv_heads, head_dim, generator=generator)
    return kv_cache, metadata, q, kv


def compare_with_kernel() -> float:
    """The largest difference between what our Triton kernel and ``sdpa`` make of a step, on a CPU.

    Raises:
        ImportError: if Triton is not installed.
    """
    from folovllm.attention.sdpa import SdpaAttention
    from folovllm.attention.triton import TritonAttention

    kv_cache, metadata, q, kv = make_step([37, 5, 60], [1, 1, 12])
    outputs = []
    for cls in (SdpaAttention, TritonAttention):
        backend = cls(kv_cache.clone())
        backend.begin(metadata)
        outputs.append(backend(0, q, kv))
    return float((outputs[0] - outputs[1]).abs().max())


def why_not_interpreted() -> str | None:
    """A sentence that says why `interpret_kernel` cannot do it here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so the kernel is not run here"
    found = {name: version(name) for name in ("triton", "numpy")}
    triton, numpy = ([int(part) for part in text.split(".")[:2]] for text in found.values())
    if triton < [3, 7] and numpy >= [2, 4]:
        return f"Triton {found['triton']} compiles the kernel, but cannot interpret it with NumPy {found['numpy']}"
    return None


def interpret_kernel() -> float:
    """`compare_with_kernel` in a process of its own, since Triton decides when it is imported whether to interpret.

    Raises:
        RuntimeError: if that process fails.
    """
    code = f"from {__name__} import compare_with_kernel; print(compare_with_kernel())"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernel could not be interpreted: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
