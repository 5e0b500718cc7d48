"""The clock that an engine is given: the machine's, or a simulated one in its place."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        ...


class WallClock:
    """The machine's time. It never goes back, even when the machine's clock is set."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        return (self._offset_ns + time.perf_counter_ns()) // 1000
