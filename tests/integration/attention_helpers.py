"""Random steps for attention, and what must come out: each sequence alone, from contiguous keys, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.utils import cdiv

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""What an output may be off by: two units in the last place of numbers near 1, and in float32 some for the sums."""


@dataclass
class Step:
    """One step of one layer: ``past`` is in the cache before it, ``q`` and ``kv`` are new."""

    metadata: AttentionMetadata
    q: Tensor
    kv: Tensor
    past: list[Tensor]
    block_size: int
    num_blocks: int

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[1] // 2

    def run(self, backend_cls: type[AttentionBackend]) -> Tensor:
        """What a backend makes of it."""
        backend = self.make_backend(backend_cls)
        backend.begin(self.metadata)
        return backend(0, self.q, self.kv)

    def make_backend(self, backend_cls: type[AttentionBackend]) -> AttentionBackend:
        """A backend before the step: the past is in its cache, and everything else there is as bad as can be."""
        shape = backend_cls.kv_cache_shape(1, self.num_kv_heads, self.num_blocks, self.block_size, self.q.shape[2])
        # A backend that reads whole blocks is promised numbers in them, the others nothing.
        rubbish = 1e4 if backend_cls.reads_whole_blocks else torch.nan
        backend = backend_cls(torch.full(shape, rubbish, dtype=self.q.dtype, device=self.q.device))
        for past, slots in zip(self.past, self._past_slots()):
            backend.write(0, past, slots)
        return backend

    def _past_slots(self) -> list[Tensor]:
        places = [torch.arange(len(past), device=past.device) for past in self.past]
        return [
            table[place // self.block_size].long() * self.block_size + place % self.block_size
            for table, place in zip(self.metadata.block_table, places)
        ]

    def expected(self) -> Tensor:
        """Softmax of scaled products, in float64."""
        outputs = []
        starts = self.metadata.query_start_loc.tolist()
        for past, start, end in zip(self.past, starts, starts[1:]):
            keys, values = torch.cat([past, self.kv[start:end]]).double().chunk(2, dim=1)
            q = self.q[start:end].double()
            group = q.shape[1] // self.num_kv_heads
            keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q, keys) / q.shape[2] ** 0.5
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(len(past))
            probs = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", probs, values).flatten(1))
        return torch.cat(outputs)


def make_step(
    seed: int,
    lens: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    num_shared: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Step:
    """A step with random numbers.

    Args:
        seed: of the numbers, and of where the blocks lie.
        lens: tokens in the past and new tokens of each sequence.
        num_kv_heads: key heads.
        group: query heads of each key head.
        head_dim: numbers of a head.
        block_size: tokens of a block.
        num_shared: blocks that all sequences begin with, as after a prefix that was found in the cache.
        dtype: of everything.
        device: where it is; the numbers are the same on each.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    past_lens, new_lens = np.array(lens).T
    past_lens += num_shared * block_size
    widths = [cdiv(total, block_size) for total in (past_lens + new_lens).tolist()]
    num_blocks = sum(widths) + 2
    order = torch.randperm(num_blocks, generator=generator).numpy()
    tables, used = [], num_shared
    for width in (width - num_shared for width in widths):
        blocks = np.concatenate([order[:num_shared], order[used : used + width]])
        tables.append(np.concatenate([blocks, blocks[-1:].repeat(max(widths) - len(blocks))]))
        used += width
    starts = np.concatenate([[0], new_lens.cumsum()])
    places = [np.arange(past, past + new) for past, new in zip(past_lens, new_lens)]
    slots = [table[place // block_size] * block_size + place % block_size for table, place in zip(tables, places)]
    metadata = AttentionMetadata.from_arrays(
        starts, past_lens + new_lens, np.concatenate(slots), np.array(tables), device
    )
    num_new = int(starts[-1])
    pasts = [normal(past, 2 * num_kv_heads, head_dim) for past in past_lens.tolist()]
    for past in pasts:
        past[: num_shared * block_size] = pasts[0][: num_shared * block_size]
    return Step(
        metadata,
        normal(num_new, num_kv_heads * group, head_dim),
        normal(num_new, 2 * num_kv_heads, head_dim),
        pasts,
        block_size,
        num_blocks,
    )
