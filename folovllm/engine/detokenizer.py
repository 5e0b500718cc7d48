"""From tokens to text, as they come. Chapter 6 is about this module.

A token is a piece of bytes, not of text: a character may take several, and what a token reads as may depend on the one
before it. So a few tokens are decoded again with every new one, and what is new at the end is the text; while it ends
within a character, nothing is given out. Where nobody asks and no stop string is looked for, all is decoded at once at
the end. Stop strings are looked for here, since they may begin in one token and end in another. As in vLLM
(``tokenizers/detokenizer_utils.py``, ``v1/engine/detokenizer.py``, 0.33.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

CONTEXT = 5
"""Tokens that are decoded again in front of a new one, at least; the first of them are the prompt's."""


def _make_decode(tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> Callable[[list[int]], str]:
    """A function from token ids to their text, as the params want it."""
    skip = params.skip_special_tokens
    if tokenizer.is_fast and not tokenizer.clean_up_tokenization_spaces:
        backend = tokenizer.backend_tokenizer  # the same text in a third of the time: two calls a token add up
        return lambda token_ids: str(backend.decode(token_ids, skip_special_tokens=skip))
    spaces = params.spaces_between_special_tokens
    return lambda token_ids: str(
        tokenizer.decode(token_ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    )


class Detokenizer:
    """The text of one sequence's output.

    Args:
        tokenizer: the model's.
        params: stop strings, and what to do with special tokens.
        prompt_token_ids: what the output follows on.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self.params = params
        self.stops = list(params.stop or [])
        self._decode = _make_decode(tokenizer, params)
        self._text = ""
        self._window = list(prompt_token_ids[-CONTEXT:])
        """The newest tokens; of their text, the first ``_num_given`` characters have been given out."""
        self._num_given = len(self._decode(self._window))
        self._is_read = True  # whether all of the window's tokens have been looked at
        self._held_back = 0 if params.include_stop_str_in_output else max(map(len, self.stops), default=1) - 1
        self._num_tokens = 0

    @property
    def text(self) -> str:
        """All text so far, in whole characters; after a stop string it is cut as the params say."""
        self._read()
        return self._text

    def add(self, token_id: int) -> str | None:
        """Takes in one token.

        Returns:
            the stop string that its text completes, None if there is none.
        """
        self._num_tokens += 1
        self._window.append(token_id)
        self._is_read = False
        if not self.stops:
            return None  # and nothing is decoded before somebody asks for it
        before = len(self._text)
        self._read()
        return self._find_stop(before) if self._num_tokens >= self.params.min_tokens else None

    def finish(self) -> None:
        """Gives out what was waiting for the rest of its character, which will not come."""
        self._text += self._decode(self._window)[self._num_given :]
        self._window.clear()
        self._is_read = True

    def visible_text(self) -> str:
        """What a stream may show while the output grows: not what may turn out to be the beginning of a stop string."""
        return self.text[: max(len(self.text) - self._held_back, 0)]

    def _read(self) -> None:
        """Decodes the window again, if it has grown, and adds what is new and whole to the text."""
        if self._is_read:
            return
        self._is_read = True
        text = self._decode(self._window)
        whole = text.rstrip("\ufffd")  # which stands for bytes that make no character, or none yet
        self._text += whole[self._num_given :]
        self._num_given = max(self._num_given, len(whole))
        if len(whole) == len(text) and len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._num_given = len(self._decode(self._window))

    def _find_stop(self, before: int) -> str | None:
        """Cuts the text at the stop string that is complete first, of those that were not complete ``before``."""
        ends: dict[int, str] = {}
        for stop in self.stops:
            found = self._text.find(stop, max(before - len(stop) + 1, 0))
            if found >= 0:
                ends.setdefault(found + len(stop), stop)
        if not ends:
            return None
        end = min(ends)
        self._text = self._text[: end if self.params.include_stop_str_in_output else end - len(ends[end])]
        return ends[end]
