"""A lock that waiting threads get in turn."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType


class FairLock:
    """A lock that one thread taking it in a loop cannot keep from the others.

    Its owner cannot take it again, except within `lend`.
    """

    def __init__(self) -> None:
        self._lock, self._turn = threading.RLock(), threading.Lock()
        self._owner: int | None = None
        self._is_lent = False
        self._depth = 0  # how often its owner has taken it again

    def __enter__(self) -> None:
        """Waits for the lock.

        Raises:
            RuntimeError: if this thread has it: it would wait for itself.
        """
        if self._owner == threading.get_ident():
            if not self._is_lent:
                raise RuntimeError(
                    "this thread is in the middle of a step of the engine; call it when the step is over"
                )
            self._is_lent, self._depth = False, self._depth + 1
            return
        try:
            # The thread that waits for the lock holds the turn, so the one that has just released it comes after.
            with self._turn:
                self._lock.acquire()
            self._owner = threading.get_ident()
        except BaseException:  # Ctrl-C, perhaps just after the lock was got; only its owner can release it
            with contextlib.suppress(RuntimeError):
                self._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth:
            self._is_lent, self._depth = True, self._depth - 1
        else:
            self.release()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Lets the thread that has the lock take it again within the block."""
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False

    def take_if_free(self) -> bool:
        """Takes the lock if it is free, without waiting; returns whether it did. `release` gives it back."""
        if self._owner == threading.get_ident() or not self._lock.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        """Gives back what `take_if_free` took."""
        self._owner = None
        self._lock.release()
