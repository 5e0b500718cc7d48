"""Checks of the exercises of chapter 1."""

from __future__ import annotations

from collections.abc import Callable

from folovllm.book.exercises.verdict import NotYet, exercise, expect


@exercise("blocks are handed out whole, so the last one is counted even when a single token is in it.")
def check_num_blocks(attempt: Callable[[int, int], int]) -> None:
    """``attempt(num_tokens, block_size)``: blocks that a sequence takes."""
    expect(attempt(16, 16) == 1, f"16 tokens fill one block of 16 exactly, yours says {attempt(16, 16)}.")
    expect(attempt(17, 16) == 2, f"the 17th token needs a second block of 16, yours says {attempt(17, 16)}.")
    expect(attempt(1, 16) == 1, f"one token takes a whole block, yours says {attempt(1, 16)}.")
    expect(attempt(100, 1) == 100, f"with blocks of one token 100 tokens take 100, yours says {attempt(100, 1)}.")
    expect(
        attempt(2**60 + 1, 2) == 2**59 + 1,
        "very long sequences come out wrong: stay with integers, don't divide with /.",
    )


@exercise("two budgets never share a list, and a mistake is refused where it is typed.")
def check_budget(attempt: type) -> None:
    """``attempt``: a dataclass with ``num_tokens: int = 512`` (positive) and ``requests: list`` (empty, its own)."""
    first, second = attempt(), attempt()
    expect(getattr(first, "num_tokens", None) == 512, "num_tokens should be 512 by default.")
    expect(getattr(first, "requests", None) == [], "requests should be an empty list by default.")
    first.requests.append("r1")
    expect(second.requests == [], "a request added to one budget appears in the other: they share one list.")
    expect(attempt(num_tokens=1).num_tokens == 1, "a budget of 1 token is small, and right.")
    for wrong in (0, -5):
        try:
            attempt(num_tokens=wrong)
        except ValueError as error:
            sentence = str(error)
            expect("num_tokens" in sentence, f"the error for {wrong} should name the field, it says {sentence!r}.")
            expect(str(wrong) in sentence, f"the error for {wrong} should name the value, it says {sentence!r}.")
        else:
            raise NotYet(f"num_tokens={wrong} was accepted: check it in __post_init__ and raise a ValueError.")


@exercise("the memory left after the weights, divided by what one token takes, in whole blocks.")
def check_tokens_that_fit(attempt: Callable[[float, float, float, int, int], int]) -> None:
    """``attempt(total_gib, utilization, weights_gib, bytes_per_token, block_size)``: tokens the cache has room for."""
    got = attempt(24, 0.9, 16, 131072, 16)
    expect(
        got != 24 * 2**30 // 131072 // 16 * 16,
        "the engine may not use all of the GPU, and the weights take their part first.",
    )
    expect(
        got % 16 == 0,
        f"tokens come in blocks of 16, and {got} is no multiple of 16: the rest of a block holds nothing.",
    )
    expect(
        got == 45872,
        f"24 GiB at 0.9, less 16 GiB of weights, has room for 45,872 tokens of 128 KiB; yours says {got:,}.",
    )
    expect(
        attempt(24, 0.5, 16, 131072, 16) == 0, "where the weights alone are over the limit, 0 tokens fit, not fewer."
    )
