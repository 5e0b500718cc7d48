"""Checks of the exercises of chapter 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import exercise, expect


@exercise("with a cache each token is computed once; without, each pass computes all there are.")
def check_tokens_computed(attempt: Callable[[int, int, bool], int]) -> None:
    """``attempt(prompt_len, output_len, cached)``: tokens that all forward passes of a generation compute."""
    for (prompt_len, output_len), cached, right in (((5, 1), False, 5), ((5, 3), False, 18), ((5, 3), True, 7)):
        got = attempt(prompt_len, output_len, cached)
        how = "with" if cached else "without"
        expect(
            got == right,
            f"a prompt of {prompt_len} and {output_len} new tokens {how} a cache: {right} computed, yours says {got} "
            "(the last new token is never read).",
        )
    expect(attempt(1000, 1000, True) == 1999, "a prompt of 1,000 and 1,000 new tokens with a cache compute 1,999.")
    expect(attempt(1000, 1000, False) == 1_499_500, "and without a cache 1,499,500.")


class _CountingModel:
    """Stands in for a model: counts the tokens it is given, and always predicts the last token plus one."""

    def __init__(self, vocab_size: int = 50) -> None:
        self.vocab_size, self.num_computed, self.num_passes = vocab_size, 0, 0

    def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True, **_: Any) -> Any:
        import types

        import torch

        past = [] if past_key_values is None else past_key_values
        self.num_computed += input_ids.shape[1]
        self.num_passes += 1
        seen = [*past, *input_ids[0].tolist()]
        logits = torch.zeros(1, input_ids.shape[1], self.vocab_size)
        # The prediction depends on how much the model has seen, so a lost cache changes the text.
        logits[0, -1, (seen[-1] + len(seen)) % self.vocab_size] = 1.0
        return types.SimpleNamespace(logits=logits, past_key_values=seen)


@exercise("the prompt is read once, and then each new token once.")
def check_generate(attempt: Callable[[Any, list[int], int], list[int]]) -> None:
    """``attempt(model, prompt_token_ids, max_tokens)``: the tokens generated greedily, with a cache."""
    model = _CountingModel()
    got = [int(t) for t in attempt(model, [3, 1, 4], 5)]
    right, seen = [], [3, 1, 4]
    for _ in range(5):
        right.append((seen[-1] + len(seen)) % 50)
        seen.append(right[-1])
    expect(len(got) == 5, f"5 tokens were asked for, yours gives {len(got)}.")
    expect(got == right, f"the tokens should be {right}, yours are {got}: is the cache handed on to every pass?")
    expect(
        model.num_computed <= 8,
        f"the right tokens, but {model.num_computed} computed instead of 7: after the first pass feed only the new.",
    )
