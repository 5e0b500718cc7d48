"""A lock that is given out in turn, and not to whoever has it already."""

from __future__ import annotations

import pytest

from folovllm.utils.fair_lock import FairLock


def test_whoever_has_it_is_told_and_does_not_wait_for_itself():
    lock = FairLock()
    with lock:
        with pytest.raises(RuntimeError, match="in the middle of a step"), lock:
            pass
        assert not lock.take_if_free()
    assert lock.take_if_free()
    lock.release()


def test_where_it_is_lent_it_can_be_taken_again_but_not_within():
    lock = FairLock()
    with lock:
        with lock.lend():
            for _ in range(2):
                with lock, pytest.raises(RuntimeError), lock:
                    pass
        with pytest.raises(RuntimeError), lock:
            pass
    with lock:
        pass


def test_an_interrupt_while_it_is_taken_leaves_it_free():
    class Interrupted:
        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise KeyboardInterrupt

    lock = FairLock()
    turn, lock._turn = lock._turn, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        lock.__enter__()
    lock._turn = turn
    assert lock.take_if_free()
    lock.release()
