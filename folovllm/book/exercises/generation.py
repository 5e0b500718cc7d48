"""Checks of the exercises of chapter 5."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import exercise, expect


@exercise(
    "with a cache each token is computed once; without, each pass computes all there are.", gives="a number of tokens"
)
def check_tokens_computed(attempt: Callable[[int, int, bool], int]) -> None:
    """``attempt(prompt_len, output_len, cached)``: tokens that all forward passes of a generation compute."""
    first = "the one pass reads the prompt, and the new token is never read"
    rest = {
        False: "each pass reads the prompt and all new tokens so far, but never the last new one",
        True: "the prompt once, and each new token once but the last, which is never read",
    }
    cases = [(5, 1, False), (5, 1, True), (5, 3, False), (5, 3, True), (7, 3, False), (7, 4, True)]
    cases += itertools.product((1, 2, 30), (1, 2, 9), (False, True))
    for prompt_len, output_len, cached in [*cases, (1000, 1000, True), (1000, 1000, False)]:
        right = prompt_len + output_len - 1
        if not cached:
            right = output_len * prompt_len + output_len * (output_len - 1) // 2
        got = attempt(prompt_len, output_len, cached)
        expect(
            got == right and not isinstance(got, bool),
            f"a prompt of {prompt_len:,} and {output_len:,} new token{'s' if output_len > 1 else ''} "
            f"{'with' if cached else 'without'} a cache: {right:,} computed "
            f"({first if output_len == 1 else rest[cached]}), yours says {got!r}.",
        )


MAX_PASSES = 100
"""Many more than any of the generations below takes."""


class _CountingModel:
    """Stands in for a model: predicts from all that it has read, and writes down what each pass was given."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.device = "cpu"
        self.passes: list[tuple[int, int]] = []
        """Tokens read and tokens in the cache, of each pass."""

    def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True, **_: Any) -> Any:
        import types

        import torch

        shape = list(input_ids.shape) if hasattr(input_ids, "shape") else None
        given = f"a {type(input_ids).__name__}" if shape is None else f"one of shape {shape}"
        is_row = shape is not None and len(shape) == 2 and shape[0] == 1 and shape[1] > 0
        expect(is_row, f"the model takes a tensor [1, num_tokens], and your code gives it {given}.")
        expect(len(self.passes) < MAX_PASSES, f"your code makes {MAX_PASSES} passes and goes on: what ends its loop?")
        past = [] if past_key_values is None else list(past_key_values)
        new = input_ids[0].tolist()
        self.passes.append((len(new), len(past)))
        # Nearly equal logits, so drawing at random is not the same as taking the likeliest.
        logits = torch.stack([self._logits([*past, *new[: i + 1]]) for i in range(len(new))])[None]
        return types.SimpleNamespace(logits=logits, past_key_values=[*past, *new] if use_cache else None)

    def _logits(self, seen: list[int]) -> Any:
        import torch

        logits = torch.full((self.vocab_size,), -1.0)
        # The prediction depends on the whole text, so a lost cache changes it.
        logits[self.likeliest(seen)] = -0.9
        return logits

    def likeliest(self, seen: list[int]) -> int:
        """The token after a text."""
        return (sum((i + 1) * token for i, token in enumerate(seen)) + 3 * len(seen)) % self.vocab_size


@exercise("the prompt is read once, and then each new token once.", gives="a list of token ids")
def check_generate(attempt: Callable[[Any, list[int], int], list[int]]) -> None:
    """``attempt(model, prompt_token_ids, max_tokens)``: the tokens generated greedily, with a cache."""
    for prompt, max_tokens in (([3, 1, 4], 5), ([2, 7], 1), ([6], 4), ([5, 5, 8, 1, 0, 2], 9)):
        model, given = _CountingModel(997), list(prompt)
        got = [int(token) for token in attempt(model, given, max_tokens)]
        right: list[int] = []
        while len(right) < max_tokens:
            right.append(model.likeliest([*prompt, *right]))
        expect(given == prompt, "your code changes the prompt's list, which belongs to the caller: make a new one.")
        told = f"prompt {prompt}, {max_tokens} token{'s' if max_tokens > 1 else ''}"
        expect(got[: len(prompt)] != prompt or got == right, "only the new tokens were asked for, without the prompt.")
        expect(len(got) == max_tokens, f"{told}: yours gives {len(got)}.")
        expect(
            got == right,
            f"{told}: these should be {right}, yours are {got}; {_what_went_wrong(model.passes, got, right)}.",
        )
        _expect_economy(model.passes, told, len(prompt), max_tokens)


def _what_went_wrong(passes: list[tuple[int, int]], got: list[int], right: list[int]) -> str:
    """Why the tokens may be others, from what each pass was given."""
    if got[:1] != right[:1]:
        return "take the likeliest token of the last place of the logits"
    later = passes[1:]
    if any(past > 0 and new > 1 for new, past in later):
        return "a pass was given tokens that are in the cache already, so it has read them twice"
    if any(past == 0 for _, past in later):
        return "a pass was given only a part of the text, and no cache with the rest"
    if any(past != sum(new for new, _ in passes[:i]) for i, (_, past) in enumerate(passes)):
        return "a pass was given an older cache: hand on the one that the pass before it gave"
    return "take the likeliest token after each pass, and feed that one"


def _expect_economy(passes: list[tuple[int, int]], told: str, prompt_len: int, max_tokens: int) -> None:
    """Ends a check unless every token was computed once."""
    num_computed, least = sum(new for new, _ in passes), prompt_len + max_tokens - 1
    expect(
        num_computed <= least or len(passes) > max_tokens,
        f"the right tokens, but {num_computed} computed instead of {least}: after the first pass feed only the newest "
        "token, and hand on the cache.",
    )
    expect(
        len(passes) == max_tokens,
        f"{told}: the right tokens in {len(passes)} passes instead of {max_tokens}; the prompt is read in one pass, "
        "and the last new token is never read.",
    )
