"""How likely the model found a token. Chapter 3.

As in vLLM (``vllm/logprobs.py``, 0.33.0).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Logprob:
    """How likely the model found one token at one place."""

    logprob: float
    """Log probability in nats, before penalties and temperature."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
    """The token's text."""
