"""Attempts at the exercises of chapter 1, wrong and right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def budget(default: Any = 512, shared: list | None = None, check: Callable[[Any], None] = lambda n: None) -> type:
    """A class of budgets, as somebody might write it."""

    class Budget:
        def __init__(self, num_tokens: Any = default, requests: list | None = None) -> None:
            check(num_tokens)
            self.num_tokens = num_tokens
            self.requests = ([] if shared is None else shared) if requests is None else requests

    return Budget


@dataclasses.dataclass
class NoFields:
    """Two names without a type, so the dataclass has no field and takes no argument."""

    num_tokens = 512

    def __post_init__(self) -> None:
        self.requests: list = []
        refuse(lambda n: n <= 0)(self.num_tokens)


@dataclasses.dataclass
class NoneForAList:
    """``None`` stays what it is."""

    num_tokens: int = 512
    requests: list = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        refuse(lambda n: n <= 0)(self.num_tokens)


@dataclasses.dataclass
class AlwaysEmpty(NoneForAList):
    """A list of its own for each budget, also for one that was given a list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requests = []


@dataclasses.dataclass
class EmptyInsteadOfNone(NoneForAList):
    """The default is ``None``, and what a budget has is a list."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.requests = [] if self.requests is None else self.requests


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
        "no field": NoFields,
        "nothing at all": dataclasses.make_dataclass("Budget", []),
        "None for a list": NoneForAList,
        "forgets the list that it is given": AlwaysEmpty,
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
        "all of the GPU": lambda total, util, weights, per_token, size: (
            int(max(total - weights, 0) * 2**30 // (per_token * size)) * size
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
    "check_budget": {"no dataclass": budget(check=refuse(lambda n: n <= 0)), "not None for long": EmptyInsteadOfNone},
}

SAYS: dict[str, dict[str, str]] = {
    "check_budget": {
        "no field": "a field of a dataclass has a type, as in `num_tokens: int`",
        "nothing at all": "a budget has no num_tokens",
        "None for a list": "requests should be [] by default, yours is None",
        "forgets the list that it is given": "should keep ['r1']",
    },
    "check_tokens_that_fit": {
        "the whole GPU": "only 0.9 of the GPU may be used, and the weights take their part first",
        "no weights": ": the weights take their part first",
        "not in blocks": "only whole blocks exist",
        "rounds blocks up": "round down, not up",
        "counts blocks": "that is a number of blocks",
        "rounds": "round down, not up",
        "one block size": "that is no multiple of 256",
        "fewer than none": "0 tokens fit, not fewer",
        "weights off the whole": "the weights come off what may be used, not off the whole GPU",
        "all of the GPU": "utilization is left out",
        "GB for GiB": "a GiB has 2**30 bytes",
    },
}
"""What is wrong with an attempt, in words that its sentence must have."""

SAME: dict[str, dict[str, str]] = {
    "check_tokens_that_fit": {
        "return int(free // (bytes_per_token * block_size)) * block_size"
        " → return int(free / (bytes_per_token * block_size)) * block_size": "int() rounds down what is not negative",
    },
}
