"""What attention needs to know of a step, and which backend computes it. Chapters 10 and 14.

A backend owns the layout of the cache: it says its shape and which dimension counts blocks, and the runner allocates
it. `AttentionBackend` is what all of them offer; `choose_backend` takes the one that the config names, or for "auto"
the best that can serve. As in vLLM (``v1/attention/backend.py``, ``v1/attention/backends/``, 0.33.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from folovllm.utils.transfer import copy_to_device
from folovllm.validation import require

BACKENDS = {
    "gather": "folovllm.attention.gather.GatherAttention",
    "sdpa": "folovllm.attention.sdpa.SdpaAttention",
    "triton": "folovllm.attention.triton.TritonAttention",
    "flash": "folovllm.attention.flash.FlashAttention",
}
"""Where each backend lives; its module is imported when it is asked for."""

PREFERRED = {"cuda": ("triton", "flash", "gather")}
"""What "auto" tries in turn on a kind of device; "gather" on every other."""


@dataclass
class AttentionMetadata:
    """Which sequence each token of a flat batch belongs to, and where the cache has its keys and values."""

    query_start_loc: Tensor
    """Where each sequence's tokens begin in the batch, and where the last one's end: int32 ``[num_seqs + 1]``."""
    seq_lens: Tensor
    """Tokens of each sequence so far, those of this step included: int32 ``[num_seqs]``."""
    slot_mapping: Tensor
    """The cache slot of each token of the batch: int64 ``[num_tokens]``."""
    block_table: Tensor
    """The blocks of each sequence: int32 ``[num_seqs, max_num_blocks]``; a row is filled up with its last block."""
    query_start_loc_cpu: np.ndarray
    """``query_start_loc`` in the CPU's memory, for whoever plans there: asking the device would wait for it."""
    seq_lens_cpu: np.ndarray
    """``seq_lens`` in the CPU's memory."""

    @classmethod
    def from_arrays(
        cls,
        query_start_loc: np.ndarray,
        seq_lens: np.ndarray,
        slot_mapping: np.ndarray,
        block_table: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Metadata from integers of any width, copied to ``device``."""
        starts, lens, table = (array.astype(np.int32) for array in (query_start_loc, seq_lens, block_table))
        found = copy_to_device([starts, lens, slot_mapping.astype(np.int64), table], torch.device(device))
        return cls(found[0], found[1], found[2], found[3], query_start_loc, seq_lens)

    @property
    def max_query_len(self) -> int:
        """The most tokens that one sequence has in this step."""
        return int(np.diff(self.query_start_loc_cpu).max())

    @property
    def max_seq_len(self) -> int:
        """The most tokens that one sequence has so far."""
        return int(self.seq_lens_cpu.max())


class AttentionBackend(ABC):
    """Attention over one cache: `begin` for each step, then a call for each layer.

    Args:
        kv_cache: of the shape that `kv_cache_shape` gives.
    """

    block_dim: ClassVar[int] = 3
    """The dimension of the cache that counts blocks."""
    reads_whole_blocks: ClassVar[bool] = False
    """Whether what lies behind a sequence's last token is read too, so that it must be numbers."""
    capturable: ClassVar[bool] = False
    """Whether a recorded decode step serves later ones, since it reads their lengths from the device."""

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
        """A sentence that says why this backend cannot serve such a cache; None if it can."""
        return None

    @staticmethod
    def kv_cache_shape(
        num_layers: int, num_kv_heads: int, num_blocks: int, block_size: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim]``: keys, then values.

        Heads come before blocks, so that a head's block is one piece.
        """
        return (num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim)

    def __init__(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        self.num_kv_heads, self.num_blocks, self.block_size = kv_cache.shape[2:5]
        self._slots = kv_cache.flatten(3, 4).flatten(1, 2)  # [num_layers, 2 * num_kv_heads, num_slots, head_dim]

    @abstractmethod
    def begin(self, metadata: AttentionMetadata) -> None:
        """Prepares a step: computes what is the same for all of its layers."""

    @abstractmethod
    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention: `folovllm.model.decoder.Attend`. Writes the new keys and values first."""

    def write(self, layer: int, kv: Tensor, slot_mapping: Tensor) -> None:
        """Puts the new keys and values ``[num_tokens, 2 * num_kv_heads, head_dim]`` into their slots."""
        self._slots[layer].index_copy_(1, slot_mapping, kv.transpose(0, 1))


class KernelBackend(AttentionBackend):
    """Attention by a GPU's kernel, which finds all that it needs on the device: lengths, and every key in the cache.

    So the new keys may be written by whoever calls `read`: on a GPU by the kernel of `folovllm.model.fused` that has
    rotated them.
    """

    capturable = True
    metadata: AttentionMetadata
    """Of the step that has begun."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention: `folovllm.model.decoder.Attend`."""
        self.write(layer, kv, self.metadata.slot_mapping)
        return self.read(layer, q)

    @abstractmethod
    def read(self, layer: int, q: Tensor) -> Tensor:
        """One layer's attention, once the step's keys and values are in their slots, as `__call__` has it."""

    def slots(self, layer: int) -> Tensor:
        """A layer's cache as ``[num_slots, 2, num_kv_heads, head_dim]``, in its own memory."""
        return self._slots[layer].unflatten(0, (2, -1)).permute(2, 0, 1, 3)


def load_backend(name: str) -> type[AttentionBackend]:
    """The class of a backend in `BACKENDS`."""
    module, _, cls = BACKENDS[name].rpartition(".")
    return getattr(import_module(module), cls)


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> tuple[type[AttentionBackend], str]:
    """The backend that a config's ``attention_backend`` means, and a sentence on why it is this one.

    Args:
        name: a name in `BACKENDS`, or "auto".
        device: where the cache is.
        dtype: of the cache.
        head_dim: numbers of one head's key.
        block_size: tokens of one block.

    Raises:
        ValueError: if the backend that is named cannot serve.
    """
    asked = device, dtype, head_dim, block_size
    if name != "auto":
        why_not = load_backend(name).unsupported(*asked)
        require(why_not is None, f"attention_backend={name!r} cannot serve: {why_not}")
        return load_backend(name), f"{name}: named by attention_backend"
    refusals = []
    for chosen in PREFERRED.get(device.type, ("gather",)):  # the last one serves everywhere
        why_not = load_backend(chosen).unsupported(*asked)
        if why_not is None:
            break
        refusals.append(f"not {chosen}, since {why_not}")
    return load_backend(chosen), "; ".join([f"{chosen}: the best that can serve on {device.type}", *refusals])
