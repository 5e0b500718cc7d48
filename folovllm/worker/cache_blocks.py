"""What a step does to whole blocks of the cache before it computes: it moves some and empties others. Chapter 11."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from folovllm.core.scheduler import SchedulerOutput
from folovllm.utils.transfer import copy_to_device


def move_blocks(kv_cache: Tensor, swap_cache: Tensor, block_dim: int, scheduler_output: SchedulerOutput) -> None:
    """Copies blocks: swap-outs, swap-ins, then copy-on-write; each frees what the next one fills."""
    for source, target, pairs in (
        (kv_cache, swap_cache, scheduler_output.swap_out),
        (swap_cache, kv_cache, scheduler_output.swap_in),
        (kv_cache, kv_cache, scheduler_output.copies),
    ):
        if pairs:
            ids = np.array(pairs)
            (sources,) = copy_to_device([ids[:, 0]], source.device)
            (targets,) = copy_to_device([ids[:, 1]], target.device)
            target.index_copy_(block_dim, targets, source.index_select(block_dim, sources).to(target.device))


def clear_begun_blocks(kv_cache: Tensor, block_dim: int, block_size: int, scheduler_output: SchedulerOutput) -> None:
    """Empties the blocks that this step begins and does not fill.

    A backend that reads whole blocks multiplies by 0 what is behind the last token: what somebody's failed forward pass
    has left there may not be a number, and 0 times that is none either.
    """
    begun = []
    for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
        index, num_in_block = divmod(seq.num_computed_tokens + num_new, block_size)
        if 0 < num_in_block <= num_new:
            begun.append(seq.block_ids[index])
    if begun:
        (blocks,) = copy_to_device([np.array(begun)], kv_cache.device)
        kv_cache.index_fill_(block_dim, blocks, 0)
