"""Attempts at the exercises of chapters 8 and 9: wrong ones, right ones, and changes that change nothing."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from folovllm.book import faults
from folovllm.core.scheduler import Scheduler
from folovllm.request import SequenceStatus
from folovllm.worker.model_runner import ModelRunner


def latencies(
    gaps: Callable[[int], int] = lambda n: n - 1,
    start: str = "arrival_time",
    alone: float | None = 0.0,
    order: Callable[..., Any] = lambda ttft, tpot, e2e: (ttft, tpot, e2e),
) -> Callable[[Any, int], Any]:
    """Reads a request's moments; each part may be got wrong."""

    def attempt(metrics: Any, num_tokens: int) -> Any:
        first, end = metrics.first_token_time, metrics.finished_time
        tpot = (end - first) / gaps(num_tokens) if gaps(num_tokens) else alone
        return order(first - getattr(metrics, start), tpot, end - metrics.arrival_time)

    return attempt


class Whole:
    """A detokenizer that decodes everything each time."""

    def __init__(self, tokenizer: Any, params: Any, prompt_token_ids: list[int]) -> None:
        self.tokenizer, self.token_ids = tokenizer, []

    def add(self, token_id: int, stop_terminated: bool = False) -> None:
        if not stop_terminated:
            self.token_ids.append(token_id)

    def visible_text(self) -> str:
        return self.text

    def finish(self) -> None:
        pass

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.token_ids).rstrip("\ufffd")


class NoText:
    def __init__(self, *args: Any) -> None:
        self.whole = Whole(*args)

    def add(self, token_id: int, stop_terminated: bool = False) -> None:
        self.whole.add(token_id, stop_terminated)

    def visible_text(self) -> str:
        return self.whole.text

    def finish(self) -> None:
        pass


class FailsAtTheEnd(Whole):
    def finish(self) -> None:
        self.done()  # type: ignore[attr-defined]


class Pieces(Whole):
    @property
    def text(self) -> str:
        return "".join(self.tokenizer.decode([i]) for i in self.token_ids)


class DropsPieces(Whole):
    @property
    def text(self) -> str:
        return "".join(self.tokenizer.decode([i]) for i in self.token_ids).replace("\ufffd", "")


class HalfShown(Whole):
    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.token_ids)


class OneBehind(Whole):
    def visible_text(self) -> str:
        return self.text[:-1]


class OnlyAtTheEnd(Whole):
    def visible_text(self) -> str:
        return ""


class EndIsText(Whole):
    def add(self, token_id: int, stop_terminated: bool = False) -> None:
        self.token_ids.append(token_id)


class WithoutSpaces(Whole):
    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.token_ids).rstrip("\ufffd ")


class OneTokenBehind(Whole):
    def visible_text(self) -> str:
        return self.tokenizer.decode(self.token_ids[:-1]).rstrip("\ufffd")


class GivesItsText(Whole):
    def add(self, token_id: int, stop_terminated: bool = False) -> Any:
        super().add(token_id, stop_terminated)
        return self.text


class ShowsNews(Whole):
    num_shown = 0

    def visible_text(self) -> str:
        news, self.num_shown = self.text[self.num_shown :], len(self.text)
        return news


class OneForAll(Whole):
    def __init__(self, tokenizer: Any, params: Any, prompt_token_ids: list[int], token_ids: list[int] = []) -> None:  # noqa: B006
        self.tokenizer, self.token_ids = tokenizer, token_ids


class WithThePrompt(Whole):
    def __init__(self, tokenizer: Any, params: Any, prompt_token_ids: list[int]) -> None:
        self.tokenizer, self.token_ids = tokenizer, list(prompt_token_ids)


class TextIsAMethod(Whole):
    def text(self) -> str:  # type: ignore[override]
        return self.tokenizer.decode(self.token_ids).rstrip("\ufffd")

    def visible_text(self) -> str:
        return self.text()


class TakesLess(Whole):
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.token_ids = tokenizer, []


class Misspelt(Whole):
    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.tokens)


class KeptWhole:
    """Right, and decodes each piece once; its text is an attribute."""

    def __init__(self, tokenizer: Any, params: Any, prompt_token_ids: list[int]) -> None:
        self.tokenizer, self.token_ids, self.text = tokenizer, [], ""

    def visible_text(self) -> str:
        return self.text

    def finish(self) -> None:
        pass

    def add(self, token_id: int, stop_terminated: bool = False) -> None:
        if stop_terminated:
            return
        self.token_ids.append(token_id)
        piece = self.tokenizer.decode(self.token_ids)
        if not piece.endswith("\ufffd"):
            self.text, self.token_ids = self.text + piece, []


class NoFinish:
    def __init__(self, *_: Any) -> None:
        self.text = ""

    def add(self, token_id: int, stop_terminated: bool = False) -> None:
        self.text += "x"


def shown(
    which: Callable[[int, str], Any] = lambda place, stop: place + len(stop),
    held: Callable[[list[str]], int] = lambda stops: max(map(len, stops), default=1) - 1,
    cut: Callable[[str, int], str] = lambda text, num: text[: max(len(text) - num, 0)],
    at_the_end: bool = False,
    place: Callable[[str, str], int] = str.find,
    keep: int = 0,
) -> Callable[[str, list[str], bool], str]:
    """Shows what may be shown; each part may be got wrong."""

    def attempt(text: str, stops: list[str], finished: bool) -> str:
        found = [(place(text, stop), stop) for stop in stops if stop in text]
        if found:
            first, stop = min(found, key=lambda f: which(*f))
            return text[: first + keep * len(stop)]
        return text if finished and not at_the_end else cut(text, held(stops))

    return attempt


def shown_by_character(text: str, stops: list[str], finished: bool) -> str:
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text if finished else text[: max(len(text) + 1 - max(map(len, stops), default=1), 0)]


def passes(lengths: list[int], num_places: int, continuous: bool) -> int:
    if not continuous:
        return sum(max(lengths[i : i + num_places]) for i in range(0, len(lengths), num_places))
    free_at = [0] * num_places
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


def admits(
    goes_on: Callable[[Any, int], bool] = lambda s, budget: len(s.running) < s.config.max_num_seqs and budget > 0,
    pick: int = 0,
    if_none: str = "stop",
    spend: bool = True,
    closes: Callable[[Any], bool] = lambda s: s.config.batching == "static",
) -> type:
    """A scheduler; each part of its admission may be got wrong."""

    class Mine(Scheduler):
        def _admit(self, output: Any, budget: int) -> None:
            if closes(self) and self.running:
                return
            while self.waiting and goes_on(self, budget):
                seq = self.waiting[pick]
                num_new = self._admit_waiting(seq, output, budget)
                if not num_new and if_none == "stop":
                    break
                if not num_new and if_none == "try again":
                    continue
                seq.status = SequenceStatus.RUNNING
                self.running.append(seq)
                output.add(seq, num_new)
                budget -= num_new if spend else 0

    return Mine


def passes_in_place(lengths: list[int], num_places: int, continuous: bool) -> int:
    """Counts pass by pass, and empties the list that it was given."""
    running: list[int] = []
    count = 0
    while lengths or running:
        while (continuous or not running) and lengths and len(running) < num_places:
            running += [lengths.pop(0) for _ in range(1 if continuous else min(num_places, len(lengths)))]
        running = [left - 1 for left in running if left > 1]
        count += 1
    return count


def passes_of_places(num: Callable[[list[int], int], int]) -> Callable[[list[int], int, bool], int]:
    """Static batches as they should be, and ``num`` passes for continuous ones."""
    return lambda lens, places, continuous: num(lens, places) if continuous else passes(lens, places, False)


class AsksOurs(Scheduler):
    def _admit(self, output: Any, budget: int) -> None:
        super()._admit(output, budget)


class ForgetsTheStatus(Scheduler):
    def _admit(self, output: Any, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_new = self._admit_waiting(seq, output, budget)
            if not num_new:
                break
            self.running.append(seq)
            output.add(seq, num_new)
            budget -= num_new


class GoesThroughTheQueue(Scheduler):
    """Takes members out of the list that it goes through."""

    def _admit(self, output: Any, budget: int) -> None:
        for seq in self.waiting:
            num_new = self._admit_waiting(seq, output, budget) if len(self.running) < self.config.max_num_seqs else 0
            if not num_new:
                break
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            output.add(seq, num_new)
            budget -= num_new


class TriesTheNext(Scheduler):
    def _admit(self, output: Any, budget: int) -> None:
        for seq in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.config.max_num_seqs:
                break
            num_new = self._admit_waiting(seq, output, budget)
            if not num_new:
                continue
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            output.add(seq, num_new)
            budget -= num_new


class StatusFirst(Scheduler):
    """Right, with an attribute of its own for a batch that may grow."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_open = True

    def _admit(self, output: Any, budget: int) -> None:
        if self.config.batching == "static" and self.running and not self.is_open:
            return
        self.is_open = False
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            num_new = self._admit_waiting(seq, output, budget)
            if not num_new:
                return
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            output.add(seq, num_new)
            budget -= num_new
            self.is_open = bool(self.waiting) and len(self.running) < self.config.max_num_seqs


class MendedOrder(faults.YoungestFirst):
    _rank = Scheduler._rank


class OnlyTheTime(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        priority, arrival_time, arrival, index = super()._rank(seq)
        return priority, -arrival_time, arrival, -index


class MendedSeed(faults.SharedGenerator):
    _sample = ModelRunner._sample


class TurnedAgain(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        priority, arrival_time, arrival, index = super()._rank(seq)
        return priority, -arrival_time, -arrival, index


class LaterAnswersFirst(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        priority, *turned = super()._rank(seq)
        return priority, *(-part for part in turned)


class NoPriority(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        return Scheduler._rank(self, seq)[1:]


class Unranked(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        return 0


class AllTurned(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        return tuple(-part for part in super()._rank(seq))


class OneNumber(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        return -super()._rank(seq)


class CallsItself(faults.YoungestFirst):
    def _rank(self, seq: Any) -> Any:
        return self._rank(seq)


class AnotherName(faults.YoungestFirst):
    rank = Scheduler._rank


class OneForEachSeed(faults.SharedGenerator):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.by_seed: dict[Any, Any] = {}

    def _sample(self, hidden: Any, sampled: Any) -> Any:
        for seq, _ in sampled:
            seq.generator = self.by_seed.get(seq.sampling_params.seed)
        output = ModelRunner._sample(self, hidden, sampled)
        self.by_seed |= {seq.sampling_params.seed: seq.generator for seq, _ in sampled}
        return output


class NoReturn(faults.SharedGenerator):
    def _sample(self, hidden: Any, sampled: Any) -> Any:
        ModelRunner._sample(self, hidden, sampled)


class SuperOfTheFaulty(faults.SharedGenerator):
    def _sample(self, hidden: Any, sampled: Any) -> Any:
        return super(faults.SharedGenerator, self)._sample(hidden, sampled)


class NewEachStep(faults.SharedGenerator):
    def _sample(self, logits: Any, sampled: Any) -> Any:
        for seq, _ in sampled:
            seq.generator = None
        return ModelRunner._sample(self, logits, sampled)


WRONG: dict[str, dict[str, Any]] = {
    "check_latencies": {
        "over all tokens": latencies(lambda n: n),
        "one gap too many": latencies(lambda n: n + 1),
        "from the first token": latencies(start="first_token_time"),
        "nothing for one token": latencies(alone=float("nan")),
        "two numbers": latencies(order=lambda ttft, tpot, e2e: (ttft, tpot)),
        "another order": latencies(order=lambda ttft, tpot, e2e: (tpot, ttft, e2e)),
        "from the arrival": lambda m, n: (
            m.first_token_time - m.arrival_time,
            (m.finished_time - m.arrival_time) / max(n - 1, 1),
            m.finished_time - m.arrival_time,
        ),
        "the end from the first token": lambda m, n: (*latencies()(m, n)[:2], m.finished_time - m.first_token_time),
        "no pace for two": latencies(lambda n: n - 1 if n > 2 else 0),
        "tokens per second": latencies(order=lambda ttft, tpot, e2e: (ttft, 1 / tpot if tpot else 0, e2e)),
        "no number for one token": latencies(alone=None),
        "a dict": latencies(order=lambda ttft, tpot, e2e: {"ttft": ttft, "tpot": tpot, "e2e": e2e}),
        "whole seconds": latencies(order=lambda *times: tuple(map(int, times))),
        "divides by zero": lambda m, n: (m.first_token_time - m.arrival_time, 1 / (n - 1), 0.0),
        "milliseconds": latencies(order=lambda *times: tuple(1000 * t for t in times)),
    },
    "check_whole_characters": {
        "each token for itself": Pieces,
        "no text": NoText,
        "an end that fails": FailsAtTheEnd,
        "drops the pieces": DropsPieces,
        "shows halves": HalfShown,
        "one character behind": OneBehind,
        "nothing before the end": OnlyAtTheEnd,
        "the end token is text": EndIsText,
        "no finish": NoFinish,
        "a function": lambda *_: "",
        "spaces taken off": WithoutSpaces,
        "one token behind": OneTokenBehind,
        "add gives the text": GivesItsText,
        "only what is new": ShowsNews,
        "one list for all": OneForAll,
        "the prompt is text": WithThePrompt,
        "text is a method": TextIsAMethod,
        "takes the tokenizer only": TakesLess,
        "a misspelt name": Misspelt,
    },
    "check_shown_text": {
        "the first that begins": shown(which=lambda place, stop: place),
        "the first of the list": shown(which=lambda place, stop: 0),
        "the longest": shown(which=lambda place, stop: -len(stop)),
        "holds the whole string back": shown(held=lambda stops: max(map(len, stops), default=0)),
        "holds nothing back": shown(held=lambda stops: 0),
        "the shortest decides": shown(held=lambda stops: min(map(len, stops), default=1) - 1),
        "cuts with minus zero": shown(cut=lambda text, num: text[:-num]),
        "cuts from the other end": shown(cut=lambda text, num: text[: len(text) - num]),
        "holds back at the end": shown(at_the_end=True),
        "the last place": shown(place=str.rfind),
        "minus zero for one character": lambda text, stops, finished: (
            shown(cut=lambda text, num: text[:-num] if len(text) > num else "")(text, stops, finished)
            if stops
            else text
        ),
        "sorts the caller's list": lambda text, stops, finished: shown()(text, stops.sort(key=len) or stops, finished),
        "the stop string as well": shown(keep=1),
        "no stops, no text": shown(held=lambda stops: max(map(len, stops)) - 1),
        "holds back what is cut, too": lambda text, stops, finished: shown()(
            shown()(text, stops, finished), stops, finished
        ),
        "only what may begin one": lambda text, stops, finished: text.removesuffix(
            next((stop[:num] for stop in stops for num in range(len(stop), 0, -1) if text.endswith(stop[:num])), "")
        ),
        "only what is before": lambda text, stops, finished: text.split(stops[0])[0] if stops else text,
    },
    "check_mended_order": {
        "nothing mended": faults.YoungestFirst,
        "only half of it": OnlyTheTime,
        "priority forgotten": NoPriority,
        "all turned but the priority": LaterAnswersFirst,
        "no order": Unranked,
        "each part turned": AllTurned,
        "a minus before the tuple": OneNumber,
        "calls itself": CallsItself,
        "another name": AnotherName,
        "ours, and not the faulty one": Scheduler,
    },
    "check_passes": {
        "places times the longest": lambda lens, places, continuous: max(lens, default=0) * -(-len(lens) // places),
        "never white": lambda lens, places, continuous: -(-sum(lens) // places),
        "never white, and no shorter than the longest": passes_of_places(
            lambda lens, places: max(max(lens), -(-sum(lens) // places))
        ),
        "each place its share of the list": passes_of_places(
            lambda lens, places: max(sum(lens[i::places]) for i in range(places))
        ),
        "the place that is free first": passes_of_places(lambda lens, places: passes(lens, places, True) - min(lens)),
        "empties the list": passes_in_place,
        "always static": lambda lens, places, continuous: passes(lens, places, False),
        "always continuous": lambda lens, places, continuous: passes(lens, places, True),
        "the longest first": lambda lens, places, continuous: passes(sorted(lens, reverse=True), places, continuous),
        "the shortest first": lambda lens, places, continuous: passes(sorted(lens), places, continuous),
    },
    "check_admit": {
        "no limit of places": admits(lambda s, budget: budget > 0),
        "one place too many": admits(lambda s, budget: len(s.running) <= s.config.max_num_seqs),
        "one place too few": admits(lambda s, budget: len(s.running) < s.config.max_num_seqs - 1),
        "one in a step": admits(lambda s, budget: budget == s.max_num_batched_tokens),
        "the last of the queue": admits(pick=-1),
        "tries again": admits(if_none="try again"),
        "adds it all the same": admits(if_none="add"),
        "spends nothing": admits(spend=False),
        "always static": admits(closes=lambda s: True),
        "never static": admits(closes=lambda s: False),
        "nothing of its own": type("Ours", (Scheduler,), {}),
        "ours": Scheduler,
        "asks ours": AsksOurs,
        "forgets the status": ForgetsTheStatus,
        "goes through the queue": GoesThroughTheQueue,
        "tries the next": TriesTheNext,
        "no scheduler": object,
    },
    "check_mended_seed": {
        "nothing mended": faults.SharedGenerator,
        "a new one in each step": NewEachStep,
        "one for each seed": OneForEachSeed,
        "no return": NoReturn,
        "ours, and not the faulty one": ModelRunner,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_latencies": {"a list": latencies(order=lambda *times: list(times))},
    "check_whole_characters": {"decodes everything": Whole, "decodes each piece once": KeptWhole},
    "check_shown_text": {"in parts": shown(), "character by character": shown_by_character},
    "check_mended_order": {"our own rank": MendedOrder, "turned again": TurnedAgain},
    "check_passes": {
        "with a heap": passes,
        "pass by pass": lambda lens, places, continuous: passes_in_place(list(lens), places, continuous),
    },
    "check_admit": {"with a list of conditions": admits(), "an attribute of its own": StatusFirst},
    "check_mended_seed": {"our own sample": MendedSeed, "super of the faulty one": SuperOfTheFaulty},
}

SAYS: dict[str, dict[str, str]] = {
    "check_whole_characters": {"no text": "no attribute 'text'", "an end that fails": "no attribute 'done'"},
}

SAME: dict[str, dict[str, str]] = {
    "check_whole_characters": {
        "__init__: tokenizer as in the first call": "an engine has one tokenizer, so it is always the same",
        "__init__: params as in the first call": "the params are not used without stop strings",
        "__init__: prompt_token_ids as in the first call": "the prompt is not used by this detokenizer",
        "def add(self, token_id, stop_terminated=False): → def add(self, token_id, stop_terminated=True):": (
            "the engine always says whether it is the end token"
        ),
    },
    "check_shown_text": {
        "longest = max(map(len, stops), default=1) → longest = max(map(len, stops), default=0)": (
            "a text cut one character behind its end is whole"
        ),
    },
}
