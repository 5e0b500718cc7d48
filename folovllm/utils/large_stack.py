"""Calls that need more of a stack than a thread usually has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_starting = threading.Lock()  # the size of a stack is set for the whole process, before a thread is started


def run_on_large_stack(function: Callable[[], T], num_bytes: int) -> T:
    """What a function returns, or raises, in a thread of its own with a stack of so many bytes."""
    with ThreadPoolExecutor(1) as executor:
        with _starting:
            usual = threading.stack_size(num_bytes)
            try:
                future = executor.submit(function)
            finally:
                threading.stack_size(usual)
        return future.result()
