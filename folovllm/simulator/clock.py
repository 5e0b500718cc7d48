"""A clock that is set, not read: time passes when a step is charged for. Chapter 7.

Microseconds are integers, so the same steps give the same times on every machine, whatever else it does.
"""

from __future__ import annotations

from folovllm.validation import check_int, require


class VirtualClock:
    """A `folovllm.utils.clock.Clock` that begins at 0 and stands still until it is moved."""

    def __init__(self) -> None:
        self._now_us = 0

    def now_us(self) -> int:
        """Microseconds since the clock began."""
        return self._now_us

    def advance(self, duration_us: int) -> None:
        """Lets time pass.

        Raises:
            ValueError: if it would go back.
        """
        duration_us = check_int("duration_us", duration_us)
        require(duration_us >= 0, f"duration_us must not be negative, got {duration_us}")
        self._now_us += duration_us

    def advance_to(self, time_us: int) -> None:
        """Lets time pass until ``time_us``, and does nothing if that is over."""
        self._now_us = max(self._now_us, check_int("time_us", time_us))


def to_us(seconds: float) -> int:
    """Seconds as whole microseconds."""
    return round(seconds * 1e6)
