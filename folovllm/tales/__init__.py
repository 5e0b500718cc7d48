"""The embedded model: a grammar of short tales, a tokenizer and a small Qwen3 model trained on it.

It makes every page of the book run anywhere, and it is the only model whose true probabilities are known.
"""

from __future__ import annotations

import os
from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"
"""The folder of the embedded checkpoint, in the layout of a checkpoint on the hub."""

EMBEDDED_DRAFT = Path(__file__).parent / "draft"
"""The folder of the smaller checkpoint that guesses what the embedded one will say."""


def default_model() -> str:
    """The model the notebooks load: ``$FOLOVLLM_MODEL`` (a hub name or a path) or else the embedded one."""
    return os.environ.get("FOLOVLLM_MODEL") or str(EMBEDDED_MODEL)


def draft_model() -> str:
    """The model that guesses for `default_model`: ``$FOLOVLLM_DRAFT_MODEL``, which must have its tokenizer, or else the
    embedded one of a fifth of the size; for another default model that model itself, which gains nothing by it.
    """
    own = default_model()
    return os.environ.get("FOLOVLLM_DRAFT_MODEL") or (str(EMBEDDED_DRAFT) if own == str(EMBEDDED_MODEL) else own)
