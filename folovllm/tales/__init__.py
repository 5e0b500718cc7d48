"""The embedded model: a grammar of short tales, a tokenizer and a small Qwen3 model trained on it.

It makes every page of the book run anywhere, and it is the only model whose true probabilities are known.
"""

from __future__ import annotations

import os
from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"
"""The folder of the embedded checkpoint, in the layout of a checkpoint on the hub."""


def default_model() -> str:
    """The model the notebooks load: ``$FOLOVLLM_MODEL`` (a hub name or a path) or else the embedded one."""
    return os.environ.get("FOLOVLLM_MODEL") or str(EMBEDDED_MODEL)
