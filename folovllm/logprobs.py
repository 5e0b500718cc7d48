"""How likely the model found a token. Chapter 3.

As in vLLM (``vllm/logprobs.py`` and ``vllm/v1/engine/logprobs.py``, 0.33.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_CONTEXT_TOKENS = 4
"""Tokens before a token that can hold the start of its character: no character of UTF-8 has more bytes."""

NOT_WHOLE = "\ufffd"
"""Replacement character: stands for bytes that form no character, or none yet."""

_texts: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = WeakKeyDictionary()
# The same tokens are likely again and again, and decoding one takes longer than finding it.


@dataclass
class Logprob:
    """How likely the model found one token at one position."""

    logprob: float
    """Log probability in nats, before penalties and temperature."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
    """The token's text; empty while it ends inside a character, all of the character where it completes one."""


def decode_token(token_id: int, context: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that one token adds.

    A token that ends inside a character adds none, and the one that completes the character all of it.

    Args:
        context: the tokens before it; only the last `NUM_CONTEXT_TOKENS` are used, after an incomplete character.
    """
    texts = _texts.setdefault(tokenizer, {})
    text = texts.get(token_id)
    if text is None:
        text = texts[token_id] = _decode([token_id], tokenizer)
    if not text.endswith(NOT_WHOLE):
        return text
    for start in range(len(context) - 1, max(len(context) - NUM_CONTEXT_TOKENS, 0) - 1, -1):
        if not decode_token(context[start], (), tokenizer):
            text = _decode([*context[start:], token_id], tokenizer)
            if not text.endswith(NOT_WHOLE):
                return text
        else:
            break
    return ""


def _decode(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(known_tokens(token_ids, tokenizer)))


def known_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that a tokenizer can decode: a model may have more, which fast ones leave out and slow ones refuse."""
    if tokenizer.is_fast:
        return token_ids
    num_known = len(tokenizer)
    return [token_id for token_id in token_ids if token_id < num_known]
