"""What several unit tests need: everything a user may type where a value belongs, and the sentence of an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

HUGE = 10**400
"""An integer that no float can hold."""
UNPRINTABLE = 10**5000
"""An integer that Python (since 3.11) refuses to turn into text; hypothesis cannot print it either."""

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([HUGE, -HUGE, 2**32, 2**64]),
    st.floats(-3, 3),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 5e-324, 1.7e308]),
    st.sampled_from(["", "auto", "slow", "half", "float32", "1", "nan", "true", "None"]),
    st.text(max_size=6),
    st.binary(max_size=4),
    st.fractions(),
    st.sampled_from([Fraction(1, 2), Fraction(HUGE), Fraction(1, HUGE), Decimal("0.5"), 1j]),
    st.sampled_from([np.int8(1), np.int64(-1), np.uint8(7), np.float16(0.5), np.float32(1), np.float64("nan")]),
    st.sampled_from([np.bool_(True), np.str_("auto"), np.float64("inf"), np.longdouble("1e4000")]),
    st.sampled_from([object, len, ..., range(3), frozenset({1})]),
    # Nearly right:
    st.lists(st.integers(-1, 9), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(0, 9), st.integers(-101, 101) | st.floats(-101, 101) | st.fractions(-1, 1), max_size=2),
)
ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(-1, 9), st.floats(), st.text(max_size=3), st.none()), inner, max_size=3),
    ),
    max_leaves=4,
)
"""Numbers of every make, texts, bytes, None, and lists, tuples and dicts of them."""


def error_of(make: Callable[..., Any], *args: Any, error: type[Exception] = ValueError, **kwargs: Any) -> str:
    """The sentence that ``make`` refuses these arguments with."""
    with pytest.raises(error) as caught:
        make(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message, f"more than one line: {message}"
    return message
