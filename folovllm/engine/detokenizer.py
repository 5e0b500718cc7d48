"""From tokens to text, as they come. Chapter 8 is about this module.

A token is a piece of bytes, not of text: a character may take several tokens, and a token's text may depend on the one
before it. So every new token is decoded together with a few earlier ones, and what is new at the end is its text. Text
that ends within a character is held back. Where the text is not asked for and there are no stop strings, everything is
decoded once, at the end. Stop strings are found here, since they may begin in one token and end in another. As in vLLM
(``tokenizers/detokenizer_utils.py``, ``v1/engine/detokenizer.py``, 0.33.0).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from folovllm.logprobs import NOT_WHOLE, known_tokens
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

CONTEXT = 2
"""At least so many earlier tokens are decoded with a new one; at first they are the prompt's last."""

_MAY_LOSE_SPACES = re.compile(r" [ ']*(?:n[ ']*|[vr])?$")
"""The end of a text that ``clean_up_tokenization`` may still change, depending on what follows."""

_special_ids: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()


class Detokenizer:
    """The text of one sequence's output: ``decode`` of prompt and output, without the prompt's text.

    Args:
        tokenizer: the model's, of any kind, fast or slow; nothing in it is changed.
        params: stop strings, and what to do with special tokens.
        prompt_token_ids: the tokens before the output.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self.params = params
        self.stops = list(params.stop or [])
        self._held_back = 0 if params.include_stop_str_in_output else max(map(len, self.stops), default=1) - 1
        self._decode = _make_decode(tokenizer, params.skip_special_tokens)
        self._skipped = _find_special_ids(tokenizer) if params.skip_special_tokens else frozenset()
        self._unspaced = {} if params.skip_special_tokens or params.spaces_between_special_tokens else _added(tokenizer)
        """The text of added tokens that follow one another, where no space may be put between them."""
        self._follows_added = False
        self._text = ""
        self.num_tokens = 0
        """Tokens that were added."""
        self._is_finished = False
        self._unread: list[int] = []
        """Tokens that have not been decoded yet."""
        self._window, self._window_text = self._find_context(list(prompt_token_ids))
        """The last tokens decoded, and the part of their text that was appended to ``_text`` or is the prompt's."""
        self._num_given = len(self._window)
        """How many of the window's tokens that part covers; the others wait for the rest of their character."""
        self._clean_up = _CleanUp(tokenizer, self._decode(list(prompt_token_ids))) if _cleans_up(tokenizer) else None

    @property
    def text(self) -> str:
        """All text so far, in whole characters; after a stop string it is cut as the params say."""
        self._read()
        return self._text

    def add(self, token_id: int, stop_terminated: bool = False) -> str | None:
        """Adds one token.

        Args:
            token_id: the token.
            stop_terminated: whether it is the end token or stop token that ends the output. It then adds no text,
                unless ``include_stop_str_in_output``.

        Returns:
            the stop string that its text completes, or None. One that the first ``min_tokens`` tokens complete does not
            count.
        """
        self.num_tokens += 1
        if token_id not in self._skipped and not (stop_terminated and not self.params.include_stop_str_in_output):
            self._unread.append(token_id)
        if not self.stops:
            return None  # decoded when the text is asked for
        before = len(self._text)
        self._read()
        return self._find_stop(before) if self.num_tokens > self.params.min_tokens else None

    def finish(self) -> None:
        """No token will follow, so nothing is held back any more. The bytes of an incomplete character are dropped."""
        self._read()
        if self._clean_up is not None and not self._is_finished:
            self._text += self._clean_up("", is_last=True)
        self._is_finished = True

    def visible_text(self) -> str:
        """The text to stream: while the output grows, an end that may become a stop string is held back."""
        text = self.text
        return text if self._is_finished else text[: max(len(text) - self._held_back, 0)]

    def _read(self) -> None:
        """Decodes the unread tokens and appends their text."""
        if self._unread:
            token_ids, self._unread = self._unread, []
            self._read_tokens(token_ids)

    def _read_tokens(self, token_ids: list[int]) -> None:
        """Decodes the window followed by these tokens, and appends what is new and complete.

        All at once gives the same text as one by one, and is faster, except around bytes that form no character.
        """
        window = self._window + token_ids
        text = self._decode(window)
        if len(token_ids) > 1 and (self._unspaced or NOT_WHOLE in text[len(self._window_text) :]):
            for token_id in token_ids:
                self._read_tokens([token_id])
            return
        self._window = window
        if not text.endswith(NOT_WHOLE):
            self._give_out(text)
        self._follows_added = token_ids[-1] in self._unspaced

    def _give_out(self, text: str) -> None:
        """Appends what is new in the window's text, and drops old tokens from the window."""
        if not text.startswith(self._window_text):
            text = self._find_border(text)
        new = text[len(self._window_text) :]
        if not new:
            return  # the newest tokens may only have a text together with those that follow
        if self._follows_added:
            new = self._unspaced.get(self._window[-1], new)
        self._text += new if self._clean_up is None else self._clean_up(new)
        if len(self._window) > 2 * CONTEXT:
            self._window, text = self._find_context(self._window)
        self._window_text, self._num_given = text, len(self._window)

    def _find_border(self, text: str) -> str:
        """Sets the known part of the window's text anew where later bytes changed how it decodes; returns the text.

        Either the prompt ended within a character: then the longest beginning that its tokens can account for is the
        prompt's. Or invalid byte tokens follow valid ones, and the tokenizer now decodes all of them as invalid: then
        the text already appended stays, and only the new tokens count as invalid.
        """
        if self._window_text.endswith(NOT_WHOLE):
            # At most three tokens, a byte each, can stand for a character of four bytes that is not complete.
            meant = (self._decode(self._window[: max(self._num_given - num, 0)]) for num in range(4))
            self._window_text = text[: max(_count_shared(text, each) for each in meant)]
            return text
        self._window, self._window_text, self._num_given = self._window[self._num_given :], "", 0
        return self._decode(self._window)

    def _find_context(self, token_ids: list[int]) -> tuple[list[int], str]:
        """The last few tokens, enough context for what follows, and their text.

        The cut may fall within a character, or within a run of byte tokens, which then decodes to nothing valid. That
        does no harm if other text follows. If not, one of four neighbouring cuts is between two characters.
        """
        for num in range(CONTEXT, min(CONTEXT + 4, len(token_ids))):
            text = self._decode(token_ids[-num:])
            if text.strip(NOT_WHOLE):
                return token_ids[-num:], text
        return token_ids, self._decode(token_ids)

    def _find_stop(self, before: int) -> str | None:
        """Cuts the text at the first stop string that ends after character ``before``, and returns that string."""
        ends: dict[int, str] = {}
        for stop in self.stops:
            found = self._text.find(stop, max(before - len(stop) + 1, 0))
            if found >= 0:
                ends.setdefault(found + len(stop), stop)
        if not ends:
            return None
        end = min(ends)
        self._text = self._text[: end if self.params.include_stop_str_in_output else end - len(ends[end])]
        self._is_finished = True
        return ends[end]


class _CleanUp:
    """Removes the spaces that a tokenizer's ``clean_up_tokenization_spaces`` removes, once later text cannot matter.

    Args:
        tokenizer: whose rules.
        before: the prompt's text; what follows may take spaces from its end, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: str) -> None:
        self._tokenizer = tokenizer
        self._rest = before[_find_certain(before) :]
        self._prompt_end = tokenizer.clean_up_tokenization(self._rest)

    def __call__(self, text: str, is_last: bool = False) -> str:
        """The cleaned text that is final now that ``text`` has come; all of it if ``is_last``."""
        rest = self._rest + text
        num = len(rest) if is_last else _find_certain(rest)
        clean, self._rest = self._tokenizer.clean_up_tokenization(rest[:num]), rest[num:]
        if clean:
            clean, self._prompt_end = clean[_count_shared(clean, self._prompt_end) :], ""
        return clean


def _count_shared(a: str, b: str) -> int:
    """Length of the longest common prefix of two texts."""
    return next((num for num, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _find_certain(text: str) -> int:
    """How many characters, from the first, clean up the same whatever follows."""
    found = _MAY_LOSE_SPACES.search(text)
    return found.start() if found else len(text)


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``decode`` removes spaces; for BPE, transformers ignores the setting unless a second one is set."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    is_bpe = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return not is_bpe or bool(tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)


def _make_decode(tokenizer: PreTrainedTokenizerBase, skip: bool) -> Callable[[list[int]], str]:
    """A function from token ids to their text, without special tokens if ``skip``; it removes no spaces."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer  # same text in a third of the time, which matters for a call per token
        return lambda token_ids: str(backend.decode(token_ids, skip_special_tokens=skip))
    return lambda token_ids: str(
        tokenizer.decode(
            known_tokens(token_ids, tokenizer), skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
    )


def _find_special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that ``skip_special_tokens`` leaves out; dropping them at once keeps the window short."""
    if tokenizer not in _special_ids:
        added = tokenizer.added_tokens_decoder.items()
        fast = (token_id for token_id, token in added if token.special)
        _special_ids[tokenizer] = frozenset(fast if tokenizer.is_fast else tokenizer.all_special_ids)
    return _special_ids[tokenizer]


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that were added to the tokenizer's vocabulary, by id."""
    return {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
