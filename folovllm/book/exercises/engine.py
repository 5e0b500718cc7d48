"""Checks of the exercises of chapter 6."""

from __future__ import annotations

from collections.abc import Callable

from folovllm.book.exercises.verdict import exercise, expect


@exercise(
    "the first to come is served first, and a prompt that does not fit waits or is cut.",
    gives="a list of numbers of tokens",
)
def check_schedule(attempt: Callable[[list[int], int, bool], list[int]]) -> None:
    """``attempt(num_left, budget, chunked)``: how many tokens each sequence computes now, first come first served."""
    cases = (
        (([1, 1, 1], 10, False), [1, 1, 1], "all of them fit"),
        (([1, 1, 1], 2, True), [1, 1, 0], "the budget holds two tokens"),
        (([1, 30, 1], 16, True), [1, 15, 0], "a prompt may be cut to what is left"),
        (([1, 30, 1], 16, False), [1, 0, 0], "a prompt that may not be cut waits, and nothing overtakes it"),
    )
    for (num_left, budget, chunked), right, why in cases:
        got = list(attempt(list(num_left), budget, chunked))
        expect(
            got == right,
            f"{num_left} tokens left, a budget of {budget}, {'chunks' if chunked else 'no chunks'}: {right} ({why}), "
            f"yours says {got}.",
        )


@exercise("a block is named by its tokens and by everything before them.", gives="a number of tokens")
def check_cached_tokens(attempt: Callable[[list[int], list[int], int], int]) -> None:
    """``attempt(cached, prompt, block_size)``: tokens of ``prompt`` that need not be computed after ``cached`` was."""
    cases = (
        (([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], 2), 4, "two full blocks are alike"),
        (([1, 2, 3, 4, 5], [1, 2, 3, 9, 9], 2), 2, "only full blocks are shared"),
        (([1, 2, 3, 4, 5], [9, 9, 3, 4, 5], 2), 0, "a block after another beginning is another block"),
        (([1, 2, 3, 4], [1, 2, 3, 4], 2), 2, "the last token is always computed, and with it its block"),
    )
    for (cached, prompt, block_size), right, why in cases:
        got = attempt(list(cached), list(prompt), block_size)
        expect(
            got == right,
            f"{prompt} after {cached} in blocks of {block_size}: {right} tokens cached ({why}), yours says {got}.",
        )
