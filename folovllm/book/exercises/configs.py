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
    expect(isinstance(attempt, type), "the class itself is asked for, not a budget or a function.")
    first, second = attempt(), attempt()
    for name, default in (("num_tokens", 512), ("requests", [])):
        expect(hasattr(first, name), f"a budget has no {name}: write it into the class, with its type and a default.")
        found = getattr(first, name)
        expect(found == default, f"{name} should be {default} by default, yours is {found!r}.")
    first.requests.append("r1")
    is_shared = len(second.requests) > 0
    first.requests.pop()  # or a second look at the same class would find it
    expect(not is_shared, "a request added to one budget appears in the other: they share one list.")
    for name, given in (("num_tokens", 1), ("num_tokens", 64), ("requests", ["r1"]), ("requests", ["r2", "r3"])):
        _expect_kept(attempt, name, given)
    for wrong in (0, -5):
        _expect_a_sentence(attempt, wrong)


def _expect_kept(attempt: type, name: str, given: Any) -> None:
    """Ends a check unless a budget that is given one of its fields keeps it."""
    asked = f"Budget({name}={given!r})"
    try:
        found = getattr(attempt(**{name: given}), name)
    except TypeError as error:
        raise NotYet(
            f"{asked} is refused ({error}): a field of a dataclass has a type, as in `{name}: {type(given).__name__}`."
        ) from None
    except Exception as error:
        raise NotYet(f"{asked} is allowed, yours raises {type(error).__name__}.") from None
    expect(found == given, f"{asked} should keep {given!r}, and its {name} is {found!r}.")


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
    for args, right in (
        ((24, 0.9, 16, 131072, 16), 45872),
        ((24, 0.93, 16, 131072, 16), 51760),  # ends in the middle of a block
        ((80, 0.5, 15, 196608, 256), 136448),
        ((24, 0.5, 16, 131072, 16), 0),
    ):
        total, utilization, weights, per_token, block_size = args
        got = attempt(*args)
        if got == right:
            continue
        asked = (
            f"{total} GiB at {utilization}, less {weights} GiB of weights, in blocks of {block_size} tokens of "
            f"{per_token:,} bytes: {right:,} tokens fit, yours says {got:,}"
        )
        for wrong, why in _misunderstandings(*args):
            if wrong != right:
                expect(got != wrong and got // block_size * block_size != wrong, f"{asked}: {why}.")
        expect(got % block_size == 0, f"{asked}: that is no multiple of {block_size}, and only whole blocks exist.")
        expect(False, f"{asked}.")


def _misunderstandings(
    total: float, utilization: float, weights: float, per_token: int, block_size: int
) -> list[tuple[int, str]]:
    """Numbers of tokens that come of one mistake, and which it was."""

    def fit(gib: float, unit: int = 2**30) -> int:
        return int(gib * unit // (per_token * block_size)) * block_size

    free = total * utilization - weights
    return [
        (fit(max(free, 0)) // block_size, f"that is a number of blocks, and a block holds {block_size} tokens"),
        (int(max(free, 0) * 2**30 // per_token), "the last block is cut short, and only whole blocks exist"),
        (fit(max(free, 0)) + block_size, "the last block does not fit any more: round down, not up"),
        (fit(free), "the weights alone are over the limit, and then 0 tokens fit, not fewer"),
        (fit(total), f"only {utilization} of the GPU may be used, and the weights take their part first"),
        (fit(total * utilization), "the weights take their part first"),
        (fit(total - weights), f"only {utilization} of the GPU may be used: utilization is left out"),
        (fit((total - weights) * utilization), "the weights come off what may be used, not off the whole GPU"),
        (fit(max(free, 0), 10**9), "a GiB has 2**30 bytes, not 10**9"),
    ]
