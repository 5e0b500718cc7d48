"""Checks of the exercises of chapters 8 and 9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import exercise, expect, expect_own, expect_subclass
from folovllm.core.scheduler import Scheduler
from folovllm.outputs import RequestMetrics


@exercise(
    "the wait for the first token, the pace after it, and the whole, each from the right two moments.",
    gives="a tuple of three numbers",
)
def check_latencies(attempt: Callable[[RequestMetrics, int], tuple[float, float, float]]) -> None:
    """``attempt(metrics, num_tokens)``: TTFT, TPOT and end-to-end latency in seconds."""
    for arrival, first, finished, num_tokens in (
        (10.0, 12.0, 24.0, 5),
        (3.0, 3.5, 4.5, 3),
        (7.0, 9.0, 9.0, 1),
        (1.0, 2.0, 2.25, 2),
    ):
        metrics = RequestMetrics(arrival, first_token_time=first, finished_time=finished)
        told = f"arrived at {arrival:g} s, first token at {first:g} s, end at {finished:g} s, tokens: {num_tokens}"
        got = tuple(attempt(metrics, num_tokens))
        expect(len(got) == 3, f"three numbers were asked for, TTFT, TPOT and end to end, yours gives {len(got)}.")
        gaps = num_tokens - 1
        right = (
            ("TTFT", first - arrival, "from the arrival to the first token"),
            (
                "TPOT",
                (finished - first) / gaps if gaps else 0.0,
                f"the time after the first token, over the gaps between tokens ({gaps})",
            ),
            ("the end-to-end latency", finished - arrival, "from the arrival to the end"),
        )
        for (name, value, why), yours in zip(right, got):
            ok = abs(yours - value) < 1e-9
            expect(ok, f"{told}: {name} is {value:g} s ({why}), yours says {yours!r}.")


@exercise("nobody sees half a character, nothing is taken back, and nothing is held longer than it must be.")
def check_whole_characters(attempt: type) -> None:
    """``attempt`` is a detokenizer: what the engine calls is ``add``, ``visible_text``, ``finish`` and ``text``."""
    from folovllm.book import judges

    judges.judge_detokenizer(attempt, stops=False)


@exercise("the stop string that is complete first ends the text, and what may become one is held back until then.")
def check_shown_text(attempt: Callable[[str, list[str], bool], str]) -> None:
    """``attempt(text, stops, finished)``: what a user may see of a text so far."""
    for text, stops, finished, right, why in (
        ("All is wel", ["END"], False, "All is w", "two characters are held back, one less than END has"),
        ("A tale, the E", ["END", "\n"], False, "A tale, the", "the longest stop string decides"),
        ("All is well", ["END"], True, "All is well", "it is finished, so no stop string can follow"),
        ("All is well", [], False, "All is well", "there are no stop strings"),
        ("So it ENDs here", ["END"], False, "So it ", "the text is cut where the stop string begins"),
        ("ENDless END", ["END"], True, "", "the first place counts"),
        ("abcdef", ["bcde", "cd"], False, "ab", "cd is complete one character earlier"),
        ("abcdef", ["cd", "bcde"], False, "ab", "cd is complete one character earlier, whatever the order"),
        ("one two", ["two", "one"], False, "", "one is complete first"),
        ("ab", ["abcd"], False, "", "all of it may be the beginning of a stop string"),
        ("All is well", ["\n"], False, "All is well", "a stop string of one character has no beginning to wait for"),
    ):
        given = list(stops)
        got = attempt(text, given, finished)
        expect(given == stops, "your code changes the list of stop strings, which belongs to the caller.")
        state = "finished" if finished else "not finished"
        expect(got == right, f"{text!r} with stop={stops}, {state}: {right!r} ({why}), yours shows {got!r}.")


FEW_PLACES: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 2, "block_size": 16, "num_blocks": 24},
    {
        "max_num_seqs": 4,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 12,
        "block_size": 16,
        "num_blocks": 40,
    },
    {"max_num_seqs": 6, "block_size": 4, "num_blocks": 18, "max_num_batched_tokens": 70},
    {"max_num_seqs": 3, "batching": "static", "block_size": 16, "num_blocks": 40},
)
"""Settings in which places, the budget or blocks are short, and static batches, which a reader writes last."""


@exercise("who came first is served first again, and no request waits for ever.")
def check_mended_order(attempt: type) -> None:
    """``attempt`` mends `folovllm.book.faults.YoungestFirst`."""
    from folovllm.book import faults, judges

    expect_subclass(attempt, faults.YoungestFirst)
    by_priority = {"policy": "priority", **FEW_PLACES[0]}
    judges.judge_scheduler(attempt, same_steps=True, settings=(FEW_PLACES[0], FEW_PLACES[2], by_priority))


@exercise("each step of both kinds of batches is counted, and every place is filled as soon as it is free.")
def check_passes(attempt: Callable[[list[int], int, bool], int]) -> None:
    """``attempt(lens, num_places, continuous)``: passes until all answers, of these lengths, are complete."""
    for lens, num_places, continuous, right, why in (
        ([5, 3, 2], 1, True, 10, "one place: one answer after the other"),
        ([5, 3, 2], 3, False, 5, "all fit into one batch, which lasts as long as its longest answer"),
        ([5, 1, 4, 1], 2, False, 9, "batches of 5 and 1, then 4 and 1"),
        ([5, 1, 4, 1], 2, True, 6, "4 takes the place of the first 1 after pass 1, the last 1 that of 4 or 5"),
        ([1, 2, 5, 1], 2, False, 7, "batches of 1 and 2, then 5 and 1"),
        ([2, 9, 2, 2, 2], 2, True, 9, "the short answers pass through one place beside the long one"),
        ([2, 9, 2, 2, 2], 2, False, 13, "batches of 2 and 9, of 2 and 2, and of 2"),
        ([2, 2, 3], 2, True, 5, "the last one begins after pass 2, beside an empty place"),
        ([7], 4, True, 7, "more places than answers help nobody"),
        ([], 4, False, 0, "there is nothing to do"),
    ):
        given, kind = list(lens), "continuous" if continuous else "static"
        got = attempt(given, num_places, continuous)
        expect(
            got == right and not isinstance(got, bool),
            f"answers of {lens} tokens, places: {num_places}, {kind}: {right} passes ({why}), yours says {got!r}.",
        )
        expect(given == lens, f"the passes are right, but the list {lens} is {given} afterwards: work on a copy.")


@exercise("the engine runs on your scheduler, and each of its steps is the one that ours would have taken.")
def check_admit(attempt: type) -> None:
    """``attempt`` is a scheduler with an ``_admit`` of its own, for waiting requests."""
    from folovllm.book import judges

    expect_subclass(attempt, Scheduler)
    expect_own(attempt, Scheduler, "_admit")
    judges.judge_scheduler(attempt, same_steps=True, settings=FEW_PLACES)


@exercise("each sequence draws from a generator of its own, so its answer does not depend on who sits beside it.")
def check_mended_seed(attempt: type) -> None:
    """``attempt`` mends `folovllm.book.faults.SharedGenerator`."""
    from folovllm.book import faults, judges

    expect_subclass(attempt, faults.SharedGenerator)
    judges.judge_runner(attempt)
