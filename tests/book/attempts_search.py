"""Attempts at the exercises of chapter 17, wrong and right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from folovllm.book import faults
from folovllm.engine.beam_search import BeamSearch
from folovllm.outputs import BeamSearchSequence


def best_of(
    score: Callable[[Any, float], float] = lambda a, p: a.cumulative_logprob / len(a.token_ids) ** p,
    whole: Callable[[Any], bool] = lambda a: a.finish_reason != "abort",
    reverse: bool = True,
) -> Callable[..., list[Any]]:
    """A ranking; each part may be got wrong."""

    def attempt(answers: list[Any], n: int, length_penalty: float) -> list[Any]:
        return sorted(answers, key=lambda a: (whole(a), score(a, length_penalty)), reverse=reverse)[:n]

    return attempt


def sorts_in_place(answers: list[Any], n: int, length_penalty: float) -> list[Any]:
    answers.sort(key=lambda a: a.cumulative_logprob / len(a.token_ids) ** length_penalty, reverse=True)
    return answers[:n]


def scored(score: Callable[[BeamSearchSequence, int, float], float]) -> type:
    """A search whose score is made of a text, the length of its prompt, and the penalty."""

    class Scored(BeamSearch):
        def score(self, text: BeamSearchSequence) -> float:
            return score(text, len(self.prompt_token_ids), self.params.length_penalty)

    return Scored


class Unchanged(BeamSearch):
    pass


def stepping(
    place: Callable[[int, int], bool] = lambda place, width: place < width,
    kept: Callable[[int], int | None] = lambda width: width,
    enough: Callable[[int, int], bool] = lambda ended, width: ended == width,
    ranked_by: Callable[[BeamSearch, BeamSearchSequence], float] = BeamSearch.score,
    start: Callable[[BeamSearchSequence], float] = lambda text: text.cum_logprob,
    reverse: bool = True,
) -> type:
    """A search with a step of its own; each part may be got wrong."""

    class Stepping(BeamSearch):
        def step(self, logprobs: Iterable[dict[int, Any]]) -> None:
            width = self.params.beam_width
            longer = []
            for text, found in zip(self.beams, logprobs):
                for token_id, entry in found.items():
                    new = BeamSearchSequence(
                        [*text.tokens, token_id], [*text.logprobs, found], start(text) + entry.logprob
                    )
                    new.finish_reason = self.finish_reason(text, token_id)
                    longer.append(new)
            longer.sort(key=lambda text: text.cum_logprob, reverse=reverse)
            self.beams = [text for text in longer if not text.finish_reason][: kept(width)]
            self.finished += [text for i, text in enumerate(longer) if text.finish_reason and place(i, width)]
            self.finished.sort(key=lambda text: ranked_by(self, text), reverse=True)
            del self.finished[width:]
            if enough(len(self.finished), width):
                self.beams = []

    return Stepping


class LosesTheLogprobs(BeamSearch):
    def step(self, logprobs: Iterable[dict[int, Any]]) -> None:
        search = stepping()(self.prompt_token_ids, self.params, self.end_token_ids)
        search.beams, search.finished = self.beams, self.finished
        search.step(logprobs)
        self.beams, self.finished = search.beams, search.finished
        for text in self.beams:
            text.logprobs = []


class GreedyForEach(BeamSearch):
    """Goes on with the likeliest token of each text, and so never gets a second one."""

    def step(self, logprobs: Iterable[dict[int, Any]]) -> None:
        for text, found in zip(list(self.beams), logprobs):
            token_id, entry = next(iter(found.items()))
            text.tokens.append(token_id)
            text.cum_logprob += entry.logprob


class Nothing(BeamSearch):
    def step(self, logprobs: Iterable[dict[int, Any]]) -> None:
        pass


class StillCountsThePrompt(faults.CountsThePrompt):
    pass


class IgnoresThePenalty(faults.CountsThePrompt):
    def score(self, text: BeamSearchSequence) -> float:
        return text.cum_logprob


class AlwaysTheMean(faults.CountsThePrompt):
    def score(self, text: BeamSearchSequence) -> float:
        return text.cum_logprob / (len(text.tokens) - len(self.prompt_token_ids))


class OneTooMany(faults.CountsThePrompt):
    def score(self, text: BeamSearchSequence) -> float:
        return text.cum_logprob / (len(text.tokens) - len(self.prompt_token_ids) + 1) ** self.params.length_penalty


class ByHand(faults.CountsThePrompt):
    def score(self, text: BeamSearchSequence) -> float:
        length = len(text.tokens[len(self.prompt_token_ids) :])
        return text.cum_logprob * length**-self.params.length_penalty


class EnginesOwn(faults.CountsThePrompt):
    score = BeamSearch.score


WRONG: dict[str, dict[str, Any]] = {
    "check_best_of": {
        "the sum": best_of(score=lambda a, p: a.cumulative_logprob),
        "always the mean": best_of(score=lambda a, p: a.cumulative_logprob / len(a.token_ids)),
        "times the length": best_of(score=lambda a, p: a.cumulative_logprob * len(a.token_ids) ** p),
        "aborted ones too": best_of(whole=lambda a: True),
        "only those that stopped": best_of(whole=lambda a: a.finish_reason == "stop"),
        "the worst": best_of(reverse=False),
        "in place": sorts_in_place,
        "all of them": lambda answers, n, length_penalty: best_of()(answers, len(answers), length_penalty),
        "places": lambda answers, n, length_penalty: [a.index for a in best_of()(answers, n, length_penalty)],
    },
    "check_gnmt": {
        "the engine's": Unchanged,
        "no class": lambda: 1.0,
        "with the prompt": scored(lambda text, prompt, p: text.cum_logprob / ((5 + len(text.tokens)) / 6) ** p),
        "without 6": scored(lambda text, prompt, p: text.cum_logprob / (5 + len(text.tokens) - prompt) ** p),
        "without 5": scored(lambda text, prompt, p: text.cum_logprob / ((len(text.tokens) - prompt) / 6) ** p),
        "multiplied": scored(lambda text, prompt, p: text.cum_logprob * ((5 + len(text.tokens) - prompt) / 6) ** p),
        "the power of a part": scored(
            lambda text, prompt, p: text.cum_logprob / ((5 + (len(text.tokens) - prompt) ** p) / 6)
        ),
        "a text": scored(lambda text, prompt, p: "score"),  # type: ignore[arg-type, return-value]
    },
    "check_beam_step": {
        "the engine's": Unchanged,
        "ends from anywhere": stepping(place=lambda place, width: True),
        "ends one place further": stepping(place=lambda place, width: place <= width),
        "ends in the first place only": stepping(place=lambda place, width: place < 1),
        "one too few": stepping(kept=lambda width: width - 1 or 1),
        "all that go on": stepping(kept=lambda width: None),
        "never enough": stepping(enough=lambda ended, width: False),
        "one is enough": stepping(enough=lambda ended, width: ended >= 1),
        "ranked by the sum": stepping(ranked_by=lambda search, text: text.cum_logprob),
        "ranked by the mean": stepping(
            ranked_by=lambda search, text: text.cum_logprob / (len(text.tokens) - len(search.prompt_token_ids))
        ),
        "the newest token alone": stepping(start=lambda text: 0.0),
        "the least likely": stepping(reverse=False),
        "no logprobs": LosesTheLogprobs,
        "greedy": GreedyForEach,
        "nothing": Nothing,
    },
    "check_own_length": {
        "as it was": StillCountsThePrompt,
        "no penalty": IgnoresThePenalty,
        "always the mean": AlwaysTheMean,
        "one too many": OneTooMany,
        "another class": Unchanged,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_best_of": {"sorted": best_of()},
    "check_gnmt": {
        "by a power": scored(lambda text, prompt, p: text.cum_logprob * (6 / (5 + len(text.tokens) - prompt)) ** p)
    },
    "check_beam_step": {"all texts made": stepping()},
    "check_own_length": {"by hand": ByHand, "the engine's own": EnginesOwn},
}
