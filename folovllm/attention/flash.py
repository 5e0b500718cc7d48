"""FlashAttention through block tables, as torch has it: a CUDA kernel for 16 bits and blocks of 256. Chapter 14.

``torch.nn.attention.varlen.varlen_attn_out`` takes block tables since torch 2.13. The kernel in it, FlashAttention 2
(Dao 2023), reads a block as a page: ``[num_blocks, block_size, num_kv_heads, head_dim]``, of a multiple of 256 tokens.
Its own choice of splits along the keys leaves rows unwritten where a batch has several lengths (pytorch issue 194167),
so there is one split. It has not run on a GPU here yet, so "auto" takes our own kernel before it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention import varlen

from folovllm.attention import AttentionMetadata, KernelBackend

PAGE_TOKENS = 256
"""A block must be a multiple of so many tokens."""
MAX_HEAD_DIM = 256


class FlashAttention(KernelBackend):
    """torch's FlashAttention over pages, for CUDA and 16 bits."""

    block_dim = 2
    reads_whole_blocks = True

    @classmethod
    def unsupported(cls, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
        """A sentence that says why it cannot serve such a cache; None if it can."""
        if device.type != "cuda" or torch.version.hip:
            return f"FlashAttention runs on CUDA only, not on {'ROCm' if torch.version.hip else device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"FlashAttention computes in float16 and bfloat16 only, not in {str(dtype).removeprefix('torch.')}"
        if block_size % PAGE_TOKENS:
            return f"FlashAttention needs a block_size that is a multiple of {PAGE_TOKENS}, got {block_size}"
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            return f"FlashAttention needs heads of a multiple of 8 and at most {MAX_HEAD_DIM} numbers, got {head_dim}"
        attend = getattr(varlen, "varlen_attn_out", None)
        if attend is None or "block_table" not in inspect.signature(attend).parameters:
            return f"torch {torch.__version__} has no FlashAttention with block tables; 2.13 has"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "FlashAttention needs a GPU of compute capability 8.0 or newer"
        if (other := torch.nn.attention.current_flash_attention_impl()) is not None:
            return (
                f"blocks are read by FlashAttention 2, and this process has activated {other}: call "
                "torch.nn.attention.restore_flash_attention_impl()"
            )
        return None

    @staticmethod
    def kv_cache_shape(
        num_layers: int, num_kv_heads: int, num_blocks: int, block_size: int, head_dim: int
    ) -> tuple[int, ...]:
        """``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``: tokens come before heads.

        The kernel wants its pages so.
        """
        return (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)

    def __init__(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        self._slots = kv_cache.flatten(2, 3)  # [num_layers, 2, num_slots, num_kv_heads, head_dim]

    def begin(self, metadata: AttentionMetadata) -> None:
        """Adds up the lengths, which the kernel asks for besides the lengths themselves."""
        self.metadata = metadata
        self._longest = metadata.max_query_len, metadata.max_seq_len  # found once, not for each layer
        self._key_start_loc = torch.nn.functional.pad(metadata.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))

    def write(self, layer: int, kv: Tensor, slot_mapping: Tensor) -> None:
        """Puts the new keys and values ``[num_tokens, 2 * num_kv_heads, head_dim]`` into their slots."""
        for slots, new in zip(self._slots[layer], kv.chunk(2, dim=1)):
            slots.index_copy_(0, slot_mapping, new)

    def slots(self, layer: int) -> Tensor:
        """A layer's cache as ``[num_slots, 2, num_kv_heads, head_dim]``, in its own memory."""
        return self._slots[layer].transpose(0, 1)

    def read(self, layer: int, q: Tensor) -> Tensor:
        """One layer's attention, once the step's keys and values are in their slots."""
        step = self.metadata
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        varlen.varlen_attn_out(
            out,
            q.contiguous(),
            self.kv_cache[layer, 0],
            self.kv_cache[layer, 1],
            step.query_start_loc,
            self._key_start_loc,
            *self._longest,
            # Causal. Where each sequence has one new token it says nothing, but without it torch fills a copy of `out`.
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=step.seq_lens,
            block_table=step.block_table,
            num_splits=1,
        )
        return out.flatten(1)
