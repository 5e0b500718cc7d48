"""Checks of single values, shared by everything a user fills in.

Each takes the field's name and value and gives the value back, or raises a `ValueError` of one sentence: which
field, what was allowed, what it got. A number may be Python's, NumPy's, or a tensor without dimensions. A bool is not
a number here, though Python says it is: ``top_k=True`` is always a mistake. Neither is 16.0 an integer: a count that
was computed as a float works only as long as it happens to come out even.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

MAX_SHOWN = 500
"""Characters of a refused value that an error shows."""


def require(ok: bool, message: str) -> None:
    """Raises `ValueError` with ``message`` unless ``ok``."""
    if not ok:
        raise ValueError(message)


def check_int(name: str, value: Any) -> int:
    """An integer of at most 64 bits as an ``int``."""
    number = _unwrap(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {show(value)}")
    if abs(int(number)).bit_length() > 64:
        raise ValueError(f"{name} must be an integer of at most 64 bits, got one of {int(number).bit_length()} bits")
    return int(number)


def show(value: Any) -> str:
    """``repr`` on one line and cut when it is long, also of an integer that Python finds too long to print."""
    try:
        text = " ".join(repr(value).splitlines())
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to print"
    return shorten(text)


def shorten(text: str) -> str:
    """A text, cut behind `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_number(name: str, value: Any) -> float:
    """A finite number as a ``float``; NaN, infinities, bools and strings are refused."""
    number = _unwrap(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"{name} must be a number, got {show(value)}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    require(math.isfinite(number), f"{name} must be a finite number, got {show(value)}")
    return number


def _unwrap(value: Any) -> Any:
    """The plain number in an array or a tensor without dimensions, of whichever library."""
    if isinstance(value, (int, float)):
        return value
    # A class has these attributes too, but nothing in them.
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not isinstance(value, type)
    return value.item() if is_scalar else value


def check_bool(name: str, value: Any) -> bool:
    """True or False, and nothing that merely behaves like them."""
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


def check_list(name: str, value: Any, entries: str, ordered: bool = True) -> list[Any]:
    """The entries of a list, tuple, range, generator, array, tensor and so on, unchecked, as a list of its own.

    Args:
        entries: what they should be, for the error.
        ordered: whether the order of the entries means something, so that a set is refused.
    """
    # These can be iterated over too, but never hold what was meant.
    is_other = isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or (ordered and isinstance(value, Set))
    if isinstance(value, Iterable) and not is_other:
        # NumPy's and torch's own way is a hundred times faster, and fails for an array without dimensions alone.
        held = value.tolist() if hasattr(value, "tolist") else list(value)
        if isinstance(held, list):
            return held
    raise ValueError(f"{name} must be a list of {entries}, got {show(value)}")


def check_token_ids(name: str, value: Any, ordered: bool = True) -> list[int]:
    """Non-negative integers as a list of its own; see `check_list`. A prompt of 100,000 tokens takes milliseconds."""
    token_ids = check_list(name, value, "token ids", ordered)
    all_right = set(map(type, token_ids)) <= {int} and (not token_ids or 0 <= min(token_ids) <= max(token_ids) < 2**64)
    if all_right:
        return token_ids
    token_ids = [check_int(f"{name}[{i}]", token_id) for i, token_id in enumerate(token_ids)]
    for i, token_id in enumerate(token_ids):
        require(token_id >= 0, f"{name}[{i}] must be a token id (0 or more), got {token_id}")
    return token_ids


def check_texts(name: str, value: Any) -> list[str]:
    """Non-empty texts, in any order, as a list of its own; see `check_list` and `check_unicode`."""
    texts = check_list(name, value, "strings", ordered=False)
    return [check_unicode(f"{name}[{i}]", check_str(f"{name}[{i}]", text)) for i, text in enumerate(texts)]
