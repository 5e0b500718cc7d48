"""Only what fits: which tokens may come next, so that an answer is what was asked for. Chapter 18.

A grammar says what an answer must be, and llguidance, a parser in Rust, says which tokens keep to it after those that
are there already. Each sequence has a parser of its own. Its masks go to the sampler, and the tokens that come out of
there move it on. As in vLLM (``v1/structured_output/backend_guidance.py``, 0.33.0).

The package is imported when the first request asks for a structure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence, Sized
from functools import cache, lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer
from llguidance.numpy import (
    allocate_token_bitmask,
    fill_next_token_bitmask,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)

from folovllm.request import StructuredOutputGrammar
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.utils import cdiv
from folovllm.utils.large_stack import run_on_large_stack
from folovllm.validation import require, shorten, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_GRAMMARS = 128
"""Compiled grammars that a backend keeps, the least recently used dropped first."""

COMPILER_STACK_BYTES = 2**29
"""llguidance follows rules that name each other by recursion, some KiB for each, and where a stack ends, so does the
process. This is more than the longest chain that fits into `MAX_STRUCTURE_CHARS` takes; memory is used as it goes."""


class GuidanceBackend:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's.
        vocab_size: token ids that the model has a logit for; those that the tokenizer does not know are never allowed.
        eos_token_ids: every token that ends a text; they are allowed where the grammar may end, and nowhere else.

    Raises:
        ValueError: if the tokenizer is not a fast one, or if no token ends a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self.vocab_size = max(vocab_size, len(cast(Sized, tokenizer or ())))
        self.eos_token_ids = frozenset(token_id for token_id in eos_token_ids if token_id < self.vocab_size)
        require(bool(self.eos_token_ids), "structured_outputs needs a token that ends a text, and this model has none")
        try:
            self._tokenizer = from_tokenizer(
                cast("PreTrainedTokenizerFast", tokenizer), self.vocab_size, sorted(self.eos_token_ids)
            )
        except ValueError as error:
            raise ValueError(
                "structured_outputs needs a fast tokenizer whose tokens it can read, got a "
                f"{type(tokenizer).__name__} ({_reason(error)})"
            ) from None
        is_end = np.zeros(32 * cdiv(self.vocab_size, 32), dtype=bool)
        is_end[[*self.eos_token_ids]] = True
        self.end_bitmask = np.packbits(is_end, bitorder="little").view(np.int32)
        self._compile_once = lru_cache(MAX_GRAMMARS)(self._compile)

    def compile_grammar(self, structured_outputs: StructuredOutputsParams) -> GuidanceGrammar:
        """What an answer must be, at its beginning; compiled once for all requests that ask for the same.

        Raises:
            ValueError: if it cannot be followed; of one sentence.
        """
        return self._compile_once(structured_outputs).copy()

    def _compile(self, structured_outputs: StructuredOutputsParams) -> GuidanceGrammar:
        name, grammar = _to_guidance(structured_outputs)
        matcher, reason = run_on_large_stack(lambda: self._match(grammar), COMPILER_STACK_BYTES)
        require(not reason, f"structured_outputs.{name} cannot be followed: {_reason(reason)}")
        return GuidanceGrammar(matcher, self)

    def _match(self, grammar: str) -> tuple[LLMatcher, str]:
        """A parser at the beginning of a grammar, and what is wrong with it."""
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        return matcher, matcher.get_error() or _try(matcher)


class GuidanceGrammar(StructuredOutputGrammar):
    """Where one answer is in its grammar.

    Args:
        matcher: the parser.
        backend: whose tokens it reads.
    """

    def __init__(self, matcher: LLMatcher, backend: GuidanceBackend) -> None:
        self.matcher, self.backend, self.vocab_size = matcher, backend, backend.vocab_size

    def copy(self) -> GuidanceGrammar:
        """Another one in the same place, which goes on by itself."""
        return GuidanceGrammar(self.matcher.deep_copy(), self.backend)

    @property
    def error(self) -> str:
        """Why it is of no more use; empty as long as it is of use."""
        return _reason(self.matcher.get_error()) if self.matcher.is_error() else ""

    def accept_tokens(self, token_ids: Sequence[int]) -> bool:
        """Goes on by these tokens; False if they do not fit, after which it is of no more use."""
        for token_id in token_ids:
            if not self.matcher.is_stopped():
                if not self.matcher.consume_token(token_id):
                    return False
            elif self.matcher.is_error() or token_id not in self.backend.eos_token_ids:
                return False
        return True

    def validate_tokens(self, token_ids: Sequence[int]) -> list[int]:
        """As many of these tokens, from the first, as would be accepted; none where it has ended."""
        num_valid = 0 if self.matcher.is_stopped() else self.matcher.validate_tokens(list(token_ids))
        return list(token_ids[:num_valid])

    def compute_ff_tokens(self) -> list[int]:
        """The tokens that must follow, if there is but one way to go on and to write it."""
        return self.matcher.deep_copy().compute_ff_tokens()

    def fill_bitmask(self, bitmask: np.ndarray, row: int) -> None:
        """Sets the bits of the tokens that may come next, and of no others.

        Raises:
            ValueError: if its limits do not suffice to tell, or if no token leads on to an end.
        """
        fill_next_token_bitmask(self.matcher, bitmask, row)
        self.check()

    def check(self) -> None:
        """Raises `ValueError` once the parser has given up; its masks would allow an end, wherever it is."""
        if self.error:
            raise ValueError(f"structured_outputs could not be followed any further: {self.error}")


def fill_bitmasks(
    grammars: Sequence[StructuredOutputGrammar], guesses: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """The masks of all rows of a step, int32 ``[num_rows, num_words]``, computed side by side.

    Args:
        grammars: one for each sequence, of one model; they are left where they are.
        guesses: for each sequence, tokens that its grammar would accept. After a sequence's own row comes one more for
            each of them, with what may follow it. None: no sequence has any.

    Raises:
        ValueError: if a grammar cannot tell; of one sentence.
    """
    guessed = [[] for _ in grammars] if guesses is None else [list(tokens) for tokens in guesses]
    starts = np.cumsum([0, *(1 + len(tokens) for tokens in guessed)]).tolist()
    bitmask = allocate_token_bitmask(starts[-1], grammars[0].vocab_size)
    ahead: list[tuple[LLMatcher, int, list[int]]] = []
    for grammar, row, tokens in zip(grammars, starts, guessed):
        if not tokens:
            continue
        if isinstance(grammar, GuidanceGrammar):
            ahead.append((grammar.matcher.deep_copy(), row, tokens))
            # The rows behind the end of a text are left as they are: nothing may follow but another end.
            bitmask[row + 1 : row + 1 + len(tokens)] = grammar.backend.end_bitmask
        else:
            _fill_ahead(grammar, bitmask, row, tokens)
    if ahead:
        fill_next_token_bitmask_par_with_draft_tokens(_get_executor(), ahead, bitmask)
    for matcher, row, tokens in ahead:
        if matcher.is_error():  # it gave up behind some guess, which may be wrong
            bitmask[row + 1 : row + 1 + len(tokens)] = 0
    _fill_first(grammars, bitmask, starts)
    return bitmask


def _fill_first(grammars: Sequence[StructuredOutputGrammar], bitmask: np.ndarray, rows: Sequence[int]) -> None:
    """The masks of the next tokens, one row for each grammar."""
    matchers: list[tuple[LLMatcher, int]] = []
    for grammar, row in zip(grammars, rows):
        if isinstance(grammar, GuidanceGrammar):
            matchers.append((grammar.matcher, row))
        else:
            grammar.fill_bitmask(bitmask, row)
    if matchers:
        fill_next_token_bitmask_par(_get_executor(), matchers, bitmask)
    for grammar in grammars:
        if isinstance(grammar, GuidanceGrammar):
            grammar.check()


def _fill_ahead(grammar: StructuredOutputGrammar, bitmask: np.ndarray, row: int, guesses: list[int]) -> None:
    """The masks behind the guesses of a sequence whose grammar is not llguidance's: none behind one that is wrong."""
    bitmask[row + 1 : row + 1 + len(guesses)] = 0
    ahead = grammar.copy()
    for i, token_id in enumerate(guesses, 1):
        if not ahead.accept_tokens([token_id]):
            return
        try:
            ahead.fill_bitmask(bitmask, row + i)
        except ValueError:  # which is raised again if the guess becomes a token
            bitmask[row + i] = 0
            return


@cache
def _get_executor() -> LLExecutor:
    """The threads that compute masks, of one process."""
    return LLExecutor()


if hasattr(os, "register_at_fork"):  # which Windows has not
    os.register_at_fork(after_in_child=_get_executor.cache_clear)  # a child has none of its parent's threads


def _try(matcher: LLMatcher) -> str:
    """Computes the first mask, in the caller's own time and not in a step, and tries a token; returns what is wrong."""
    allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    ahead = matcher.deep_copy()
    if not matcher.is_error():
        ahead.consume_token(int(allowed.argmax()))
    return matcher.get_error() or ahead.get_error()


def _to_guidance(structured_outputs: StructuredOutputsParams) -> tuple[str, str]:
    """The field that is set, and a grammar in llguidance's own format."""
    asked = structured_outputs
    if asked.regex is not None:
        num_last = len(asked.regex) - len(asked.regex.rstrip("\\"))
        require(num_last % 2 == 0, f"structured_outputs.regex must not end within an escape, got {show(asked.regex)}")
        return "regex", LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        # One word of the lexer: as rules of the parser, thousands of texts that begin alike are too many at once.
        texts = " | ".join(json.dumps(text) for text in asked.choice if text)
        start = "TEXT?" if "" in asked.choice else "TEXT"
        return "choice", LLMatcher.grammar_from_lark(f"start: {start}\nTEXT: {texts}" if texts else 'start: ""')
    if asked.grammar is not None:
        return "grammar", LLMatcher.grammar_from_lark(asked.grammar)
    schema = cast(str, asked.json or '{"type": "object"}')
    return "json" if asked.json else "json_object", LLMatcher.grammar_from_json_schema(schema)


def _reason(error: object) -> str:
    """What is wrong, without the drawing of where it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = next(iter(errors or lines), "no reason is given")
    reason = "no text fits it" if reason == "NoExtensionBias" else reason  # llguidance's own word for it
    return shorten(reason)
