"""Checks of the exercises of chapter 3."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import NotYet, exercise, expect
from folovllm.utils import cdiv


def _shown(status: Any) -> str:
    """A status by its name; anything else as what it is."""
    from folovllm.request import SequenceStatus

    if isinstance(status, SequenceStatus):
        return status.name
    if isinstance(status, str):
        return f"the text {status!r} (give a member of SequenceStatus)"
    return f"{status!r} (give a member of SequenceStatus)"


ENDS = {"stopped": "FINISHED_STOPPED", "capped": "FINISHED_LENGTH_CAPPED", "aborted": "FINISHED_ABORTED"}
ARROWS = {
    ("WAITING", "scheduled"): "RUNNING",
    ("RUNNING", "preempted"): "WAITING",
    ("RUNNING", "swapped out"): "SWAPPED",
    ("SWAPPED", "swapped in"): "RUNNING",
    **{("RUNNING", event): end for event, end in ENDS.items()},
    **{(status, "aborted"): ENDS["aborted"] for status in ("WAITING", "SWAPPED")},
    **{(end, "ranked"): "FINISHED_IGNORED" for end in ENDS.values()},
}
"""Which event leads from which state to which."""


@exercise("every arrow of the figure is there, and nothing moves without one.", gives="a SequenceStatus")
def check_next_status(attempt: Callable[[Any, str], Any]) -> None:
    """``attempt(status, event)``: the state after an event, or a ValueError where the figure has no arrow."""
    from folovllm.request import SequenceStatus

    for (before, event), after in ARROWS.items():
        arrow = f"a sequence that is {before} and is {event} becomes {after}"
        try:
            got = attempt(SequenceStatus[before], event)
        except (ValueError, LookupError) as error:
            raise NotYet(f"{arrow}, yours raises {type(error).__name__}.") from None
        expect(got is SequenceStatus[after], f"{arrow}, yours gives {_shown(got)}.")
    events = [*dict.fromkeys(event for _, event in ARROWS), "forgotten"]
    for status, event in itertools.product(SequenceStatus, events):
        if (status.name, event) not in ARROWS:
            _expect_refused(attempt, status, event)


def _expect_refused(attempt: Callable[[Any, str], Any], status: Any, event: str) -> None:
    """Ends a check unless the attempt raises a ValueError that says what cannot be."""
    no_arrow = f"no arrow leads away from {status.name} by {event!r}"
    try:
        got = attempt(status, event)
    except ValueError as error:
        said = str(error).lower()
        expect(
            event in said and (status.value in said or status.name.lower() in said),
            f"{no_arrow}, and your ValueError says {str(error)!r}: name the status and the event in it.",
        )
        return
    except NotYet:
        raise NotYet(f"{no_arrow}: raise a ValueError, yours gives None.") from None
    except LookupError as error:
        raise NotYet(f"{no_arrow}: raise a ValueError, yours raises {type(error).__name__}.") from None
    raise NotYet(f"{no_arrow}: raise a ValueError, yours gives {_shown(got)}.")


@exercise("ends are looked for before the limit, and not before min_tokens.", gives="a SequenceStatus")
def check_finish_status(attempt: Callable[[Any, int], Any]) -> None:
    """``attempt(seq, eos_token_id)``: RUNNING, FINISHED_STOPPED or FINISHED_LENGTH_CAPPED."""
    four: dict[str, Any] = {"eos": 2, "stop": (7,), "most": 4, "least": 0}
    cases: list[tuple[list[int], dict[str, Any], str]] = [
        ([5], {}, "one ordinary token of four, and an end token in the prompt, which does not count: it runs on"),
        ([5, 5, 5], {}, "three ordinary tokens of four: it runs on"),
        ([5, 2], {}, "the end token stops it"),
        ([5, 7], {}, "a token of stop_token_ids stops it too"),
        ([5, 9], {"stop": (7, 9)}, "every token of stop_token_ids stops it, not only the first"),
        ([5, 5, 5, 5], {}, "four ordinary tokens of four: the length cap ends it"),
        ([5, 5, 5, 2], {}, "the last allowed token is the end token: it stopped, it was not cut"),
        ([5, 2], {"least": 3}, "an end token before min_tokens does not end the text"),
        ([5, 7], {"least": 3}, "a token of stop_token_ids before min_tokens does not end it either"),
        ([5, 2, 5], {"least": 3}, "only the last token counts, an earlier end token was passed over"),
        ([5, 5, 2], {"least": 3}, "at min_tokens an end token counts again"),
        ([5, 2], {"eos": 3}, "the end token of this model is another one, so 2 is an ordinary token"),
        ([5, 7], {"stop": (8,)}, "this request stops at 8, so 7 is an ordinary token"),
        ([5, 5, 5, 5], {"most": 6}, "four ordinary tokens of six: it runs on"),
    ]
    for output, changed, why in cases:
        _expect_status(attempt, output, {**four, **changed}, why)
    for output, eos, stop, most in itertools.product(
        ([1], [1, 1], [3, 1], [1, 3], [1, 1, 3], [1, 6, 4]), (3, 4), ((), (4,), (6, 1)), (1, 2, 3)
    ):
        if len(output) > most:
            continue  # it has ended before
        for least in range(most + 1):
            fields = {"eos": eos, "stop": stop, "most": most, "least": least}
            _expect_status(attempt, output, fields, why="")


def _expect_status(attempt: Callable[[Any, int], Any], output: list[int], fields: dict[str, Any], why: str) -> None:
    """Ends a check unless the attempt says how a sequence with this output stands."""
    from folovllm.request import Sequence, SequenceData, SequenceStatus
    from folovllm.sampling_params import SamplingParams

    eos, stop, most, least = fields["eos"], list(fields["stop"]), fields["most"], fields["least"]
    params = SamplingParams(max_tokens=most, stop_token_ids=stop, min_tokens=least)
    right = SequenceStatus.RUNNING
    if len(output) >= least and output[-1] in (eos, *stop):
        right = SequenceStatus.FINISHED_STOPPED
    elif len(output) >= most:
        right = SequenceStatus.FINISHED_LENGTH_CAPPED
    got = attempt(Sequence("s", "r", SequenceData([eos, 2, 2], list(output)), params), eos)
    given = f"output {output}, end token {eos}, stop_token_ids {stop}, min_tokens {least}, max_tokens {most}"
    because = f" ({why})" if why else ""
    expect(got is right, f"{given}: {right.name} is expected{because}, yours gives {_shown(got)}.")


@exercise(
    "full blocks of the prompt are counted once, and blocks that are written into once for each fork.",
    gives="a number of blocks",
)
def check_blocks_of_forks(attempt: Callable[[int, int, int, int], int]) -> None:
    """``attempt(prompt_len, output_len, block_size, n)``: blocks that ``n`` forks of one prompt take."""
    alone = "a single sequence shares nothing"
    cases = {
        (32, 16, 16, 1): alone,
        (32, 16, 16, 4): "two shared blocks and one of its own for each of four",
        (40, 8, 16, 4): "two shared blocks; the third is half prompt, and copied by each fork",
        (40, 16, 16, 4): "the output begins in a copied block, so 16 more tokens touch two blocks",
        (40, 0, 16, 4): "nothing has been written yet, so even the partly full block is shared",
        (32, 0, 16, 4): "nothing has been written yet, and both blocks are full",
        (10, 3, 16, 4): "no block of the prompt is full, so nothing is shared once all have written",
        (40, 16, 8, 3): "five shared blocks, and two of its own for each of three",
    }
    for lengths in itertools.product((1, 4, 5, 12, 23), (0, 1, 3, 8), (1, 4, 5), (1, 2, 7)):
        cases.setdefault(lengths, alone if lengths[-1] == 1 else "count which blocks of the prompt nobody writes into")
    for (prompt_len, output_len, block_size, n), why in cases.items():
        got = attempt(prompt_len, output_len, block_size, n)
        total, full = cdiv(prompt_len + output_len, block_size), prompt_len // block_size
        right = total if output_len == 0 else full + n * (total - full)
        blocks = f"{right} block{'s' if right > 1 else ''}"
        told = f"prompt {prompt_len}, output {output_len}, blocks of {block_size}, n = {n}"
        expect(got == right and not isinstance(got, bool), f"{told}: {blocks} ({why}), yours says {got}.")
