"""Checks of the exercises: each takes an attempt and says in one sentence what is wrong with it, or that it is right.

An attempt may be anything, also unfinished or broken: what it raises becomes part of the sentence, never a traceback.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'Right' if self.passed else 'Not yet'}: {self.message}"


class NotYet(Exception):
    """Raised inside a check with the sentence about what is wrong."""


def expect(ok: bool, sentence: str) -> None:
    """Ends a check with ``sentence`` unless ``ok``."""
    if not ok:
        raise NotYet(sentence)


def exercise(praise: str) -> Callable[[Callable[[Any], None]], Callable[[Any], Verdict]]:
    """Makes a check out of a function that calls `expect`: ``praise`` is what a right attempt reads."""

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
        @functools.wraps(check)
        def run(attempt: Any) -> Verdict:
            try:
                check(attempt if isinstance(attempt, type) else _guarded(attempt))
            except NotYet as error:
                return Verdict(False, _one_line(str(error)))
            except Exception as error:  # in the check, which could not work with what the attempt gave
                return Verdict(False, f"what your code gives is not of the kind that was asked for ({_name(error)}).")
            return Verdict(True, praise)

        return run

    return decorate


def _guarded(attempt: Any) -> Callable[..., Any]:
    """The attempt, whose errors and forgotten ``return`` become sentences."""

    def call(*args: Any) -> Any:
        try:
            found = attempt(*args)
        except Exception as error:
            raise NotYet(f"your code raised {_name(error)}.") from None
        expect(found is not None, "your code gives back None: is there a return?")
        return found

    return call


def _name(error: Exception) -> str:
    message = _one_line(str(error), 200).rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _one_line(text: str, width: int = 290) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
