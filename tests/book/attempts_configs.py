"""Attempts at the exercises of chapter 1, wrong and right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def budget(default: Any = 512, shared: list | None = None, check: Callable[[Any], None] = lambda n: None) -> type:
    """A class of budgets, as somebody might write it."""

    class Budget:
        def __init__(self, num_tokens: Any = default) -> None:
            check(num_tokens)
            self.num_tokens = num_tokens
            self.requests = [] if shared is None else shared

    return Budget


def refuse(condition: Callable[[Any], bool], message: str = "num_tokens must be positive, got {}") -> Callable:
    def check(num_tokens: Any) -> None:
        if condition(num_tokens):
            raise ValueError(message.format(num_tokens))

    return check


def asserted(num_tokens: Any) -> None:
    assert num_tokens > 0, f"num_tokens must be positive, got {num_tokens}"


WRONG: dict[str, dict[str, Any]] = {
    "check_num_blocks": {
        "rounds down": lambda n, size: n // size,
        "always one more": lambda n, size: n // size + 1,
        "at least one": lambda n, size: max(1, n // size),
        "rounds to the nearest": lambda n, size: round(n / size),
        "arguments the other way": lambda n, size: -(-size // n),
    },
    "check_budget": {
        "shared list": budget(shared=[], check=refuse(lambda n: n <= 0)),
        "no check": budget(),
        "accepts 0": budget(check=refuse(lambda n: n < 0)),
        "accepts negative numbers": budget(check=refuse(lambda n: n == 0)),
        "refuses 1": budget(check=refuse(lambda n: n <= 1)),
        "another default": budget(default=256, check=refuse(lambda n: n <= 0)),
        "no default": dataclasses.make_dataclass("Budget", [("num_tokens", int), ("requests", list)]),
        "no list": dataclasses.make_dataclass("Budget", [("num_tokens", int, 512)]),
        "does not name the field": budget(check=refuse(lambda n: n <= 0, "must be positive, got {}")),
        "does not name the value": budget(check=refuse(lambda n: n <= 0, "num_tokens must be positive")),
        "asserts": budget(check=asserted),
        "an object, no class": budget(check=refuse(lambda n: n <= 0))(),
    },
    "check_tokens_that_fit": {
        "the whole GPU": lambda total, util, weights, per_token, size: int(total * 2**30 // per_token // size) * size,
        "no weights": lambda total, util, weights, per_token, size: int(total * util * 2**30 // per_token),
        "not in blocks": lambda total, util, weights, per_token, size: int(
            (total * util - weights) * 2**30 // per_token
        ),
        "rounds blocks up": lambda total, util, weights, per_token, size: (
            math.ceil(max(total * util - weights, 0) * 2**30 / per_token / size) * size
        ),
        "counts blocks": lambda total, util, weights, per_token, size: (
            int(max(total * util - weights, 0) * 2**30 // per_token) // size
        ),
        "rounds": lambda total, util, weights, per_token, size: (
            round(max(total * util - weights, 0) * 2**30 / per_token / size) * size
        ),
        "one block size": lambda total, util, weights, per_token, size: (
            int(max(total * util - weights, 0) * 2**30 // per_token) // 16 * 16
        ),
        "fewer than none": lambda total, util, weights, per_token, size: (
            int((total * util - weights) * 2**30 // (per_token * size)) * size
        ),
        "weights off the whole": lambda total, util, weights, per_token, size: (
            int(max((total - weights) * util, 0) * 2**30 // (per_token * size)) * size
        ),
        "GB for GiB": lambda total, util, weights, per_token, size: (
            int(max(total * util - weights, 0) * 10**9 // (per_token * size)) * size
        ),
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_num_blocks": {
        "adds first": lambda n, size: (n + size - 1) // size,
        "ceil": lambda n, size: math.ceil(n / size),
    },
    "check_budget": {"no dataclass": budget(check=refuse(lambda n: n <= 0))},
}

SAME: dict[str, dict[str, str]] = {
    "check_tokens_that_fit": {
        "return int(free // (bytes_per_token * block_size)) * block_size"
        " → return int(free / (bytes_per_token * block_size)) * block_size": "int() rounds down what is not negative",
    },
}
