"""Checks of the exercises of chapter 17."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import exercise, expect, expect_own, expect_subclass
from folovllm.engine.beam_search import BeamSearch
from folovllm.outputs import BeamSearchSequence, CompletionOutput
from folovllm.sampling_params import BeamSearchParams

_Told = tuple[int, float, str]
"""Tokens, log probability and finish reason of an answer."""

ANSWERS: tuple[tuple[tuple[_Told, ...], int, float, tuple[int, ...], str], ...] = (
    (((3, -4.0, "stop"), (3, -2.0, "stop"), (3, -3.0, "length")), 2, 0.0, (1, 2), "three answers of 3 tokens"),
    (
        ((2, -4.0, "stop"), (8, -6.0, "length"), (4, -5.0, "stop"), (1, -3.9, "stop")),
        1,
        1.0,
        (1,),
        "the likeliest has 1 token and the best per token 8",
    ),
    (((2, -4.0, "stop"), (8, -6.0, "stop"), (4, -5.0, "stop")), 3, 0.0, (0, 2, 1), "a penalty of 0"),
    (((9, -6.0, "stop"), (4, -3.5, "stop"), (1, -2.5, "stop")), 3, 0.5, (1, 0, 2), "a penalty of 0.5"),
    (((9, -6.0, "stop"), (4, -0.5, "abort"), (5, -7.0, "length")), 2, 1.0, (0, 2), "an answer that was aborted"),
    (((2, -1.0, "abort"), (3, -9.0, "stop"), (2, -0.5, "abort")), 3, 1.0, (1, 2, 0), "two answers that were aborted"),
    (((4, -2.0, "stop"), (2, -1.0, "stop"), (6, -3.0, "stop")), 3, 1.0, (0, 1, 2), "three that are equally good"),
)
"""Answers, how many are wanted, the penalty, their places from the best on, and in words."""


@exercise("the best ones, by what you call best.", gives="a list of answers")
def check_best_of(attempt: Callable[[Sequence[CompletionOutput], int, float], list[CompletionOutput]]) -> None:
    """``attempt(answers, n, length_penalty)``: the ``n`` best of some answers, the best first."""
    for told, n, penalty, right, case in ANSWERS:
        answers = [
            CompletionOutput(i, "", list(range(num_tokens)), logprob, None, reason)
            for i, (num_tokens, logprob, reason) in enumerate(told)
        ]
        given = list(answers)
        got = attempt(given, n, penalty)
        expect(given == answers, f"{case}: the list that you were given is another afterwards; make a new one.")
        expect(
            isinstance(got, list) and all(isinstance(answer, CompletionOutput) for answer in got),
            f"{case}: a list of answers is asked for, and yours is {got!r:.80}.",
        )
        places = [answer.index for answer in got]
        expect(
            places == [*right],
            f"{case} (tokens, log probability, finish reason: {[*told]}): the best {n} are {[*right]}, and yours are "
            f"{places}.",
        )


class Gnmt(BeamSearch):
    """Ranks by the length penalty of GNMT (Wu et al. 2016, section 7)."""

    def score(self, text: BeamSearchSequence) -> float:
        """Log probability, divided by ``((5 + length) / 6) ** length_penalty``."""
        length = len(text.tokens) - len(self.prompt_token_ids)
        return text.cum_logprob / ((5 + length) / 6) ** self.params.length_penalty


def _compare_scores(attempt: type[BeamSearch], ours: type[BeamSearch]) -> None:
    """Texts of some lengths are to have the same score."""
    for num_prompt, num_tokens, logprob, penalty in (
        (3, 7, -4.0, 1.0),
        (1, 1, -2.0, 1.0),
        (9, 7, -5.0, 0.0),
        (2, 19, -3.0, 0.6),
        (40, 2, -8.0, 2.0),
    ):
        prompt, params = [5] * num_prompt, BeamSearchParams(2, 50, length_penalty=penalty)
        text = BeamSearchSequence([5] * (num_prompt + num_tokens), [{}] * num_tokens, logprob)
        right, got = (cls(prompt, params).score(text) for cls in (ours, attempt))
        is_number = isinstance(got, (int, float))
        expect(
            is_number and math.isclose(got, right),
            f"an answer of length {num_tokens} after a prompt of length {num_prompt}, with the log probability "
            f"{logprob} and length_penalty {penalty}: the score should be {right:.4f}, yours is "
            f"{f'{got:.4f}' if is_number else repr(got)}.",
        )


@exercise("a penalty that is gentle with short texts, in the running search.", gives="a number")
def check_gnmt(attempt: type) -> None:
    """``attempt``: a `BeamSearch` whose ``score`` is that of GNMT."""
    expect_subclass(attempt, BeamSearch)
    expect_own(attempt, BeamSearch, "score")
    _compare_scores(attempt, Gnmt)
    judges.judge_search(attempt, Gnmt)


@exercise("text by text and step by step the search of the engine.")
def check_beam_step(attempt: type) -> None:
    """``attempt``: a `BeamSearch` with a ``step`` of its own."""
    expect_subclass(attempt, BeamSearch)
    expect_own(attempt, BeamSearch, "step")
    judges.judge_search(attempt)


@exercise("an answer's length is its own, whatever was asked.", gives="a number")
def check_own_length(attempt: type) -> None:
    """``attempt``: a mended `folovllm.book.faults.CountsThePrompt`."""
    expect_subclass(attempt, faults.CountsThePrompt)
    _compare_scores(attempt, BeamSearch)
    judges.judge_search(attempt)
