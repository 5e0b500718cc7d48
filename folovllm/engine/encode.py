"""From a prompt's text to token ids; a text that can never be served is refused before it is encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from folovllm.utils.encoding import encode_whole
from folovllm.validation import check_unicode, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each with the number of tokens that it was found for, since a caller may add some.
_longest_tokens: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]] = WeakKeyDictionary()


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, max_model_len: int, add_special_tokens: bool = True
) -> list[int]:
    """The tokens of a text: all of them, without padding. Several threads may call it at once.

    Args:
        tokenizer: the model's; nothing in it is changed.
        text: any text.
        max_model_len: tokens that the model can take. The caller checks the number of tokens; here a text is refused
            only if it must have more, even when every token is the longest in the vocabulary (as in vLLM).
        add_special_tokens: whether the tokenizer may add its own, such as one at the beginning.

    Raises:
        ValueError: if the text is much too long, or contains half a surrogate pair, which cannot be encoded.
    """
    if len(text) > max_model_len:  # a token has at least one character, so a shorter text always passes
        longest = _longest_token(tokenizer)
        require(
            len(text) <= max_model_len * longest,
            f"prompt must have at most {max_model_len * longest} characters (max_model_len {max_model_len} times "
            f"{longest}, the longest token's), got {len(text)}",
        )
    check_unicode("prompt", text)
    return encode_whole(tokenizer, text, add_special_tokens)


def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token, read from the vocabulary once per tokenizer."""
    found = _longest_tokens.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        found = _longest_tokens[tokenizer] = len(tokenizer), max(map(len, tokenizer.get_vocab()))
    return found[1]
