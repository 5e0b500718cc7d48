"""Attention one sequence at a time, as it is written in a paper: the reference for the other backends. Chapter 14.

Each sequence's keys and values are gathered from its blocks into one piece, and torch's
``scaled_dot_product_attention`` does the rest. Nothing is shared between sequences, so it is slow, and easy to believe.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.utils import cdiv


class SdpaAttention(AttentionBackend):
    """Plain attention over blocks, for any device, dtype and shape."""

    def begin(self, metadata: AttentionMetadata) -> None:
        """Notes where each sequence begins."""
        self.metadata = metadata

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention: `folovllm.model.decoder.Attend`."""
        self.write(layer, kv, self.metadata.slot_mapping)
        starts, lens = self.metadata.query_start_loc_cpu.tolist(), self.metadata.seq_lens_cpu.tolist()
        outputs = []
        for i, num_tokens in enumerate(lens):
            blocks = self.metadata.block_table[i, : cdiv(num_tokens, self.block_size)]
            keys, values = self.kv_cache[layer][:, :, blocks].flatten(2, 3)[:, :, :num_tokens]
            queries = q[starts[i] : starts[i + 1]].transpose(0, 1)
            num_new = queries.shape[1]
            mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=q.device).tril(num_tokens - num_new)
            found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            outputs.append(found.transpose(0, 1).flatten(1))
        return torch.cat(outputs)
