"""What a check is made of: it takes an attempt and says in one sentence what is wrong with it, or that it is right.

An attempt may be anything, also unfinished or broken: what it raises becomes part of the sentence, never a traceback,
and a loop without an end is ended.
"""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import folovllm

NOT_THE_READERS = tuple(
    f"{Path(path).resolve()}{os.sep}"
    for path in (*folovllm.__path__, *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")))
)
"""Where code lies that is ours or a library's: an error that passed through none but these is not in the attempt."""

MAX_LINES = 500_000
"""Lines of an attempt that one call may run: far more than any right one needs, and half a second's worth."""


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'Right' if self.passed else 'Not yet'}: {self.message}"


class NotYet(Exception):
    """Raised inside a check with the sentence about what is wrong."""


class Endless(Exception):
    """Raised inside an attempt that goes round and round."""


def expect(ok: bool, sentence: str) -> None:
    """Ends a check with ``sentence`` unless ``ok``."""
    if not ok:
        raise NotYet(sentence)


def expect_subclass(attempt: Any, base: type) -> None:
    """Raises `NotYet` unless the attempt is a class that inherits from ``base``."""
    expect(
        isinstance(attempt, type) and issubclass(attempt, base),
        f"a class was asked for that begins with `class Name({base.__name__}):`, and yours does not.",
    )


def expect_own(attempt: type, base: type, name: str) -> None:
    """Raises `NotYet` unless the attempt has a method ``name`` of its own, which does without that of ``base``."""
    own = vars(attempt).get(name)
    expect(
        own is not None and own is not vars(base)[name],
        f"your class has no {name} of its own, so it is still the engine's that runs.",
    )
    code = getattr(inspect.unwrap(own) if callable(own) else own, "__code__", None)  # checks wrap a class's methods
    expect(
        code is None or name not in code.co_names,
        f"your {name} calls the engine's, and the exercise is to write it: do the work yourself.",
    )


def exercise(praise: str, gives: str = "") -> Callable[[Callable[[Any], None]], Callable[[Any], Verdict]]:
    """Makes a check out of a function that calls `expect`.

    Args:
        praise: what a right attempt reads.
        gives: what the attempt is asked to give, in words: "a list of token ids". A reader whose attempt gives
            something that the check cannot work with is told so.
    """

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
        @functools.wraps(check)
        def run(attempt: Any) -> Verdict:
            last: dict[str, Any] = {}
            try:
                check(_bounded_class(attempt) if isinstance(attempt, type) else _watched(attempt, last))
            except NotYet as error:
                return Verdict(False, _one_line(str(error)))
            except Exception as error:
                return Verdict(False, _one_line(_explain(error, last, gives)))
            return Verdict(True, praise)

        return run

    return decorate


def _watched(attempt: Any, last: dict[str, Any]) -> Callable[..., Any]:
    """The attempt; ``last`` keeps what its last call was given and gave, and a forgotten ``return`` is a sentence."""

    def call(*args: Any, **kwargs: Any) -> Any:
        last.clear()
        expect(callable(attempt), f"a function is asked for, and you gave {shown(attempt)}.")
        last["args"] = (*args, *kwargs.values())
        found = _bounded(attempt, *args, **kwargs)
        expect(found is not None, "your code gives back None: is there a return?")
        last["found"] = found
        return found

    return call


def _bounded(attempt: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the attempt gives.

    Raises:
        Endless: if it has run `MAX_LINES` lines and is not done. Nobody else would end a loop without an end.
    """
    num_lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_lines
        if event == "call":
            return trace if _is_the_readers(frame.f_code.co_filename) else None
        num_lines += event == "line"
        if num_lines > MAX_LINES:
            raise Endless(f"{MAX_LINES:,} lines and no end")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return attempt(*args, **kwargs)
    finally:
        sys.settrace(before)


def _bound(method: FunctionType) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _bounded(method, *args, **kwargs)

    return call


def _bounded_class(part: type) -> type:
    """A class like the reader's, whose own methods are bounded one by one: an engine may call them after an error."""
    own: dict[str, Any] = {
        name: member for name, member in vars(part).items() if isinstance(member, (FunctionType, property))
    }
    for name, member in own.items():
        method = member.fget if isinstance(member, property) else member
        if isinstance(method, FunctionType) and _is_the_readers(method.__code__.co_filename):
            bounded = _bound(method)
            own[name] = member.getter(bounded) if isinstance(member, property) else bounded
    return type(part.__name__, (part,), own)


def _explain(error: Exception, last: dict[str, Any], gives: str) -> str:
    """What to tell somebody whose attempt made the check stop with this error."""
    blamed = blame(error, last.get("args", ()))
    if blamed:
        return f"{blamed}."
    asked = f", and {gives} is asked for" if gives else ""
    if "found" in last:
        return f"your code gives {shown(last['found'])}{asked} ({_name(error)})."
    return f"your code could not be called as the exercise asks{asked} ({_name(error)})."


def blame(error: Exception, given: tuple[Any, ...] = ()) -> str:
    """What went wrong in the reader's code, and in which line; "" if the error did not pass through it.

    Args:
        error: what was raised.
        given: what the attempt was called with.
    """
    frames = traceback.walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in frames if _is_the_readers(frame.f_code.co_filename)]
    if not own:
        return ""
    frame, line = own[-1]
    where = f"line {line} of the cell, in {frame.f_code.co_name}"
    if isinstance(error, Endless):
        return f"your code does not come to an end ({where}): one of its loops may never end"
    if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
        is_attribute = hasattr(frame.f_locals.get("self"), error.name or "")
        cure = f"write self.{error.name}" if is_attribute else "run the cells above first, or import it"
        return f"your code uses {error.name}, which is not defined ({where}): {cure}"
    kinds = " and ".join(f"a {type(value).__name__}" for value in given)
    was_given = f"; it was given {kinds}" if kinds and isinstance(error, (TypeError, AttributeError)) else ""
    return f"your code raised {_name(error)} ({where}{was_given})"


def blame_part(error: Exception) -> str:
    """As `blame`, for a part of the engine; if the engine stopped later, it could not work with what the part did."""
    missing = ", as if a return were missing" if "NoneType" in str(error) else ""
    return blame(error) or f"the engine cannot work with what your class gives or does{missing} ({_name(error)})"


@functools.cache
def _is_the_readers(filename: str) -> bool:
    return not filename.startswith("<") and not str(Path(filename).resolve()).startswith(NOT_THE_READERS)


def shown(value: Any) -> str:
    """A value and its kind, short."""
    return f"{_one_line(reprlib.repr(value), 60)} (a {type(value).__name__})"


def _name(error: Exception) -> str:
    message = _one_line(str(error), 140).rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _one_line(text: str, width: int = 290) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
