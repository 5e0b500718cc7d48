"""Attempts at the newer exercises of chapter 3, for test_exercises.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.request import SequenceStatus as Status

ARROWS = {
    (Status.WAITING, "scheduled"): Status.RUNNING,
    (Status.RUNNING, "preempted"): Status.WAITING,
    (Status.RUNNING, "swapped out"): Status.SWAPPED,
    (Status.SWAPPED, "swapped in"): Status.RUNNING,
    (Status.RUNNING, "stopped"): Status.FINISHED_STOPPED,
    (Status.RUNNING, "capped"): Status.FINISHED_LENGTH_CAPPED,
    (Status.RUNNING, "aborted"): Status.FINISHED_ABORTED,
    (Status.WAITING, "aborted"): Status.FINISHED_ABORTED,
    (Status.SWAPPED, "aborted"): Status.FINISHED_ABORTED,
    (Status.FINISHED_STOPPED, "ranked"): Status.FINISHED_IGNORED,
    (Status.FINISHED_LENGTH_CAPPED, "ranked"): Status.FINISHED_IGNORED,
    (Status.FINISHED_ABORTED, "ranked"): Status.FINISHED_IGNORED,
}


def machine(
    changed: dict[tuple[Status, str], Status] | None = None,
    without: tuple[tuple[Status, str], ...] = (),
    otherwise: Callable[[Status, str], Any] | None = None,
) -> Callable[[Status, str], Any]:
    """A state machine with some arrows changed or left out; ``otherwise`` is asked where there is no arrow."""
    arrows = {key: after for key, after in (ARROWS | (changed or {})).items() if key not in without}

    def attempt(status: Status, event: str) -> Any:
        if (status, event) in arrows:
            return arrows[status, event]
        if otherwise is not None:
            return otherwise(status, event)
        raise ValueError(f"a sequence that is {status.name} cannot be {event}")

    return attempt


def silent(status: Status, event: str) -> Any:
    raise ValueError


def by_event_alone(status: Status, event: str) -> Any:
    return next(after for (_, name), after in ARROWS.items() if name == event)


WRONG: dict[str, dict[str, Any]] = {
    "check_next_status": {
        "by the event alone": by_event_alone,
        "stays where there is no arrow": machine(otherwise=lambda status, event: status),
        "None where there is no arrow": machine(otherwise=lambda status, event: None),
        "a KeyError": lambda status, event: ARROWS[status, event],
        "an error without a word": machine(otherwise=silent),
        "texts": lambda status, event: machine()(status, event).value,
        "preempted is swapped": machine({(Status.RUNNING, "preempted"): Status.SWAPPED}),
        "swapped in is waiting": machine({(Status.SWAPPED, "swapped in"): Status.WAITING}),
        "aborts only what runs": machine(without=((Status.WAITING, "aborted"), (Status.SWAPPED, "aborted"))),
        "aborts what has ended": machine({(Status.FINISHED_STOPPED, "aborted"): Status.FINISHED_ABORTED}),
        "ranks twice": machine({(Status.FINISHED_IGNORED, "ranked"): Status.FINISHED_IGNORED}),
        "ranks what runs": machine({(Status.RUNNING, "ranked"): Status.FINISHED_IGNORED}),
        "swapped is scheduled": machine({(Status.SWAPPED, "scheduled"): Status.RUNNING}),
        "no length cap": machine({(Status.RUNNING, "capped"): Status.FINISHED_STOPPED}),
    }
}

RIGHT: dict[str, dict[str, Any]] = {"check_next_status": {"all arrows written down": machine()}}
