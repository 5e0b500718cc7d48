"""What attention needs to know of a step: whose each token is, and where the cache has its past. Chapter 10.

As in vLLM, how the cache is read is up to each backend (``v1/attention/backends/``, 0.33.0); ours is
`folovllm.attention.gather`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class AttentionMetadata:
    """Which sequence each token of a flat batch belongs to, and where the cache has its keys and values."""

    query_start_loc: np.ndarray
    """Where each sequence's tokens begin in the batch, and where the last one's end, ``[num_seqs + 1]``."""
    seq_lens: np.ndarray
    """Tokens of each sequence so far, those of this step included, ``[num_seqs]``."""
    slot_mapping: Tensor
    """The cache slot of each token of the batch, ``[num_tokens]``."""
    block_table: Tensor
    """The blocks of each sequence, ``[num_seqs, max_num_blocks]``; a row is filled up with its last block."""
