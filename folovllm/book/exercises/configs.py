"""Checks of the exercises of chapter 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import NotYet, exercise, expect


@exercise(
    "blocks are handed out whole, so the last one is counted even when a single token is in it.",
    gives="a number of blocks",
)
def check_num_blocks(attempt: Callable[[int, int], int]) -> None:
    """``attempt(num_tokens, block_size)``: blocks that a sequence takes."""
    for num_tokens, block_size, right, why in (
        (17, 16, 2, "the 17th token needs a second block of 16"),
        (32, 16, 2, "32 tokens fill two blocks of 16 exactly"),
        (1, 8, 1, "one token takes a whole block"),
        (100, 1, 100, "with blocks of one token 100 tokens take 100"),
        (25, 8, 4, "25 tokens fill three blocks of 8, and one token is left"),
    ):
        got = attempt(num_tokens, block_size)
        expect(got == right, f"{why}, yours says {got!r}.")


@exercise("two budgets never share a list, and a mistake is refused where it is typed.", gives="a dataclass")
def check_budget(attempt: type) -> None:
    """``attempt``: a dataclass with ``num_tokens: int = 512`` (positive) and ``requests: list`` (empty, its own)."""
    expect(isinstance(attempt, type), f"Budget should be a class, and it is {attempt!r}.")
    first, second = attempt(), attempt()
    expect(getattr(first, "num_tokens", None) == 512, "num_tokens should be 512 by default.")
    expect(getattr(first, "requests", None) == [], "requests should be an empty list by default.")
    first.requests.append("r1")
    is_shared = len(second.requests) > 0
    first.requests.pop()  # or a second look at the same class would find it
    expect(not is_shared, "a request added to one budget appears in the other: they share one list.")
    for right in (1, 64):
        expect(attempt(num_tokens=right).num_tokens == right, f"a budget of {right} is allowed, and should be kept.")
    for wrong in (0, -5):
        _expect_a_sentence(attempt, wrong)


def _expect_a_sentence(attempt: type, wrong: int) -> None:
    try:
        attempt(num_tokens=wrong)
    except ValueError as error:
        sentence = str(error)
        expect("num_tokens" in sentence, f"the error for {wrong} should name the field, it says {sentence!r}.")
        expect(str(wrong) in sentence, f"the error for {wrong} should name the value, it says {sentence!r}.")
    except Exception as error:
        raise NotYet(f"num_tokens={wrong} should raise a ValueError, not {type(error).__name__}.") from None
    else:
        raise NotYet(f"num_tokens={wrong} was accepted: check it in __post_init__ and raise a ValueError.")


@exercise(
    "the memory left after the weights, divided by what one token takes, in whole blocks.", gives="a number of tokens"
)
def check_tokens_that_fit(attempt: Callable[[float, float, float, int, int], int]) -> None:
    """``attempt(total_gib, utilization, weights_gib, bytes_per_token, block_size)``: tokens the cache has room for."""
    got: Any = attempt(24, 0.9, 16, 131072, 16)
    expect(
        got != 24 * 2**30 // 131072 // 16 * 16,
        "the engine may not use all of the GPU, and the weights take their part first.",
    )
    expect(got != 45872 // 16, f"{got:,} is a number of blocks, and tokens are asked for: a block holds 16 of them.")
    expect(
        got % 16 == 0,
        f"tokens come in blocks of 16, and {got:,} is no multiple of 16: a block that is cut short does not exist.",
    )
    for args, right, why in (
        ((24, 0.9, 16, 131072, 16), 45872, "24 GiB at 0.9, less 16 GiB of weights, have room for 45,872 of 128 KiB"),
        ((24, 0.93, 16, 131072, 16), 51760, "at 0.93 the cache ends in the middle of a block, and 51,760 fit"),
        ((80, 0.5, 15, 196608, 256), 136448, "80 GiB at 0.5, less 15, have room for 136,448 of 192 KiB, by 256"),
        (
            (24, 0.5, 16, 131072, 16),
            0,
            "where the weights alone are over the limit, 0 tokens fit, not fewer",
        ),
    ):
        got = attempt(*args)
        expect(got == right, f"{why}; yours says {got:,}.")
