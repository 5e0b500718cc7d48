"""What attention is told about a step: which tokens belong to which sequence, and where the cache has them. Chapter 6.

As in vLLM, how the cache is read is a backend's own affair (``v1/attention/backends/``, 0.33.0); ours is
`folovllm.attention.gather`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class AttentionMetadata:
    """Whose token is whose in a flat batch, and where the cache has each."""

    query_start_loc: np.ndarray
    """Where each sequence's tokens begin in the batch, and where the last one's end, ``[num_seqs + 1]``."""
    seq_lens: np.ndarray
    """Tokens of each sequence so far, those of this step included, ``[num_seqs]``."""
    slot_mapping: Tensor
    """The cache slot of each token of the batch, ``[num_tokens]``."""
    block_table: Tensor
    """The blocks of each sequence, ``[num_seqs, most blocks of any]``; what is behind its last one is arbitrary."""
