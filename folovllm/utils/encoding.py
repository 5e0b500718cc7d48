"""Encoding with a tokenizer that other threads use as well.

transformers sets padding and truncation in the tokenizer's backend, for whoever encodes next or at the same time.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each with the number of tokens that it was copied with, since a caller may add some.
_unlimited: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, PreTrainedTokenizerBase]] = WeakKeyDictionary()


def encode_whole(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """All tokens of a text, without padding. Several threads may call it at once.

    Args:
        tokenizer: nothing in it is changed.
        text: any text.
        add_special_tokens: whether the tokenizer may add its own, such as one at the beginning.
    """
    used = _without_limits(tokenizer)
    token_ids = used.encode(text, add_special_tokens=add_special_tokens, verbose=False)
    if used is tokenizer and _has_limits(tokenizer):  # somebody has set them in the meantime
        token_ids = _without_limits(tokenizer).encode(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(token_ids)


def _has_limits(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # which a slow one has not
    return backend is not None and (backend.padding or backend.truncation) is not None


def _without_limits(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or a copy if its backend pads or truncates.

    ``encode`` would switch both off, while another thread may have just switched them on.
    """
    found = _unlimited.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        if not _has_limits(tokenizer):
            return tokenizer
        found = _unlimited[tokenizer] = len(tokenizer), copy.deepcopy(tokenizer)
    return found[1]
