"""Checks of single values, shared by everything a user fills in.

Each takes the field's name and value and gives the value back, or raises a `ValueError` of one sentence: which
field, what was allowed, what it got. A bool is not a number here, though Python says it is: ``top_k=True`` is
always a mistake.
"""

from __future__ import annotations

import math
import numbers
from typing import Any


def require(ok: bool, message: str) -> None:
    """Raises `ValueError` with ``message`` unless ``ok``."""
    if not ok:
        raise ValueError(message)


def check_int(name: str, value: Any) -> int:
    """An integer (Python's or NumPy's) as an ``int``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {show(value)}")
    if abs(int(value)).bit_length() > 64:
        raise ValueError(f"{name} must be an integer of at most 64 bits, got one of {int(value).bit_length()} bits")
    return int(value)


def show(value: Any) -> str:
    """``repr``, also for an integer that Python finds too long to print."""
    try:
        return repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"


def check_number(name: str, value: Any) -> float:
    """A finite number as a ``float``; NaN, infinities, bools and strings are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    require(math.isfinite(number), f"{name} must be a finite number, got {show(value)}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """True or False, and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {show(value)}")
    return value


def check_str(name: str, value: Any) -> str:
    """A string with at least one character."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty string, got {show(value)}")
    return value


def check_unicode(name: str, text: str) -> str:
    """A text that can be encoded; half a surrogate pair, which is what becomes of a wrongly decoded byte, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text, got {text[error.start]!r} at character {error.start}; decode it from its "
            "bytes once more, in the encoding they are in"
        ) from None
    return text


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {show(value)}")
    return value


def check_class(name: str, value: Any) -> type | None:
    """A class, or None."""
    if value is not None and not isinstance(value, type):
        raise ValueError(f"{name} must be a class or None, got {show(value)}")
    return value


def check_token_ids(name: str, value: Any) -> list[int]:
    """A list or tuple of non-negative integers as a list of its own."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of token ids, got {show(value)}")
    token_ids = [check_int(f"{name}[{i}]", token_id) for i, token_id in enumerate(value)]
    for i, token_id in enumerate(token_ids):
        require(token_id >= 0, f"{name}[{i}] must be a token id (0 or more), got {token_id}")
    return token_ids
