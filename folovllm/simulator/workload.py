"""Who asks for what, and when: requests with a time of arrival, drawn from a seed or read from a file. Chapter 8.

The tokens of a prompt are random numbers. Only their number matters here, and which prompts begin alike.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from folovllm.engine.input_processor import Prompt
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils import cdiv
from folovllm.validation import check_int, check_number, require, show

VOCAB_SIZE = 32_000
"""Token ids in made-up prompts are below this: every model of a real size has as many."""

TRACE_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
"""What a trace must have."""
MAX_ARRIVAL = 1e12
"""Seconds: no request arrives later."""
MIN_RATE = 1e-9
"""Requests per second: there are no fewer."""

Length = int | tuple[int, int]
"""A number of tokens, or the least and the most of a uniform distribution."""


@dataclass(frozen=True)
class TimedRequest:
    """A request and when it arrives."""

    arrival: float
    """Seconds."""
    prompt: Prompt
    params: SamplingParams | int
    """An integer is a number of tokens: an answer of exactly that length, without text."""
    request_id: str = ""
    """Empty: its place in the workload."""

    def own_params(self) -> SamplingParams:
        """Params of its own, with one output at the end: copying the answer in each step would be quadratic."""
        final = RequestOutputKind.FINAL_ONLY
        if isinstance(self.params, SamplingParams):
            params = self.params.clone()
            params.output_kind = final
            return params
        return SamplingParams(max_tokens=self.params, ignore_eos=True, detokenize=False, output_kind=final)


class Workload:
    """Requests that arrive whatever becomes of those before them (an open loop).

    Args:
        requests: in any order.

    Raises:
        ValueError: if there is no request, one arrives before 0 s or after `MAX_ARRIVAL`, or two have the same name.
    """

    def __init__(self, requests: Iterable[TimedRequest]) -> None:
        requests = list(requests)
        for request in requests:
            check_number("arrival", request.arrival)
            require(request.arrival >= 0, f"arrival must be 0 s or later, got {request.arrival}")
            require(request.arrival <= MAX_ARRIVAL, f"arrival must be {MAX_ARRIVAL:g} s at most, got {request.arrival}")
        requests.sort(key=lambda request: request.arrival)
        require(len(requests) > 0, "a workload must have at least one request, got none")
        self.requests = [
            request if request.request_id else replace(request, request_id=f"request-{i}")
            for i, request in enumerate(requests)
        ]
        """By arrival."""
        names = {request.request_id for request in self.requests}
        require(len(names) == len(requests), "every request_id of a workload must be its own, got some of them twice")

    def follow_up(self, output: RequestOutput, finished: float) -> TimedRequest | None:
        """The request that arrives because this one, with this output, was finished at this second; None if none."""
        return None


def from_list(requests: Iterable[TimedRequest]) -> Workload:
    """A workload of requests that were written down; raises what `Workload` raises."""
    return Workload(requests)


def poisson(
    num_requests: int,
    rate: float,
    prompt_tokens: Length,
    output_tokens: Length,
    seed: int = 0,
    burstiness: float = 1.0,
    prefix_tokens: int = 0,
    num_prefixes: int = 1,
    vocab_size: int = VOCAB_SIZE,
) -> Workload:
    """Requests of strangers: how long until the next one arrives does not depend on the last.

    Args:
        num_requests: how many.
        rate: requests per second on average; ``math.inf`` has all arrive at once.
        prompt_tokens: length of each prompt, its prefix not counted.
        output_tokens: length of each answer.
        seed: of everything that is drawn.
        burstiness: the shape of the gamma distribution of the gaps, as in vLLM's ``bench serve``: 1 is a Poisson
            process, less comes in bursts, more is more regular.
        prefix_tokens: tokens that prompts begin with, such as a system prompt.
        num_prefixes: how many different ones there are; each request has one of them.
        vocab_size: token ids are below it.

    Raises:
        ValueError: if a number is out of range.
    """
    rate, burstiness = float(rate), check_number("burstiness", burstiness)
    _check_rate(rate)
    require(burstiness > 0, f"burstiness must be positive, got {burstiness}")
    rng, arrival = random.Random(seed), 0.0
    prefixes = [_tokens(rng, prefix_tokens, vocab_size) for _ in range(_positive("num_prefixes", num_prefixes))]
    requests = []
    for _ in range(_positive("num_requests", num_requests)):
        prompt = rng.choice(prefixes) + _tokens(rng, _draw(rng, "prompt_tokens", prompt_tokens), vocab_size)
        requests.append(TimedRequest(arrival, prompt, _draw(rng, "output_tokens", output_tokens)))
        arrival += rng.gammavariate(burstiness, 1.0) / (rate * burstiness)
    return Workload(requests)


@dataclass(frozen=True)
class _Turn:
    """What a user says, how long the answer is, and how long the user has thought before."""

    token_ids: list[int]
    num_output: int
    think: float


class ChatWorkload(Workload):
    """Users who wait for an answer, think, and go on with all that was said before (a closed loop).

    Args:
        first: each user's first request.
        turns: each user's further turns, by the name that their requests begin with.
    """

    def __init__(self, first: Iterable[TimedRequest], turns: dict[str, list[_Turn]]) -> None:
        super().__init__(first)
        self._turns = turns

    def follow_up(self, output: RequestOutput, finished: float) -> TimedRequest | None:
        """The user's next turn, after some thinking."""
        user, _, number = output.request_id.partition("/")
        turns = self._turns[user]
        if int(number) >= len(turns):
            return None
        turn = turns[int(number)]
        prompt = [*output.prompt_token_ids, *output.outputs[0].token_ids, *turn.token_ids]
        return TimedRequest(finished + turn.think, prompt, turn.num_output, f"{user}/{int(number) + 1}")


def chats(
    num_users: int,
    num_turns: int,
    rate: float,
    system_tokens: int,
    user_tokens: Length,
    answer_tokens: Length,
    think: float = 5.0,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> ChatWorkload:
    """Conversations: each prompt is the whole of the conversation so far.

    Args:
        num_users: conversations.
        num_turns: questions in each.
        rate: new users per second on average.
        system_tokens: tokens that all conversations begin with.
        user_tokens: length of each question.
        answer_tokens: length of each answer.
        think: seconds from an answer to the next question on average, exponentially distributed.
        seed: of everything that is drawn.
        vocab_size: token ids are below it.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_rate(check_number("rate", rate))
    require(check_number("think", think) > 0, f"think must be positive, got {think}")
    rng, arrival = random.Random(seed), 0.0
    system = _tokens(rng, system_tokens, vocab_size)
    first: list[TimedRequest] = []
    turns: dict[str, list[_Turn]] = {}
    for i in range(_positive("num_users", num_users)):
        user = f"user-{i}"
        said = []
        for _ in range(_positive("num_turns", num_turns)):
            asked = _tokens(rng, _draw(rng, "user_tokens", user_tokens), vocab_size)
            said.append(_Turn(asked, _draw(rng, "answer_tokens", answer_tokens), rng.expovariate(1 / think)))
        first.append(TimedRequest(arrival, system + said[0].token_ids, said[0].num_output, f"{user}/1"))
        turns[user] = said
        arrival += rng.expovariate(rate)
    return ChatWorkload(first, turns)


def replay(path: str | Path, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Workload:
    """The requests of a trace: a CSV file with a header and a line for each request.

    Args:
        path: the file. Its columns are ``arrival_s``, ``prompt_tokens`` and ``output_tokens``; prompts whose
            ``prefix_id`` is the same begin with the same ``prefix_tokens`` tokens. Other columns are ignored.
        seed: of the token ids.
        vocab_size: token ids are below it.

    Raises:
        ValueError: if the file cannot be read, or a line of it; the sentence names the line.
    """
    rng, requests = random.Random(seed), []
    prefixes: dict[str, list[int]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # some programs begin a file with a mark
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV file ({error})") from None
    require(
        set(TRACE_COLUMNS) <= set(columns),
        f"{path} must have the columns {', '.join(TRACE_COLUMNS)} in its first line, parted by commas; it has "
        f"{show(columns)}",
    )
    for line, row in rows:
        try:
            arrival = check_number("arrival_s", float(row["arrival_s"]))
            num_prompt, num_output = int(row["prompt_tokens"]), int(row["output_tokens"])
            num_shared, name = int(row.get("prefix_tokens") or 0), row.get("prefix_id") or ""
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"line {line} of {path} must have arrival_s (seconds), prompt_tokens and output_tokens, got {error}"
            ) from None
        require(
            num_output > 0 <= num_shared <= num_prompt > 0,
            f"line {line} of {path} must have at least one token in and out, and no more shared ones than the prompt "
            f"has, got {num_prompt}, {num_output} and {num_shared}",
        )
        prefix = prefixes.setdefault(name, [])
        prefix += _tokens(rng, num_shared - len(prefix), vocab_size)
        prompt = prefix[:num_shared] + _tokens(rng, num_prompt - num_shared, vocab_size)
        requests.append(TimedRequest(arrival, prompt, num_output))
    return Workload(requests)


def make_workload(name: str, num_requests: int, rate: float, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Workload:
    """A workload by name, of prompts and answers of some hundreds of tokens.

    Args:
        name: "chat" (conversations of four turns), "poisson" (strangers), "burst" (strangers who come together, with a
            burstiness of 0.25), or the path of a CSV file for `replay`, which needs the seed alone.
        num_requests: how many; of chats the next multiple of 4.
        rate: requests per second on average.
        seed: of everything that is drawn.
        vocab_size: the model's; token ids are below it, and below `VOCAB_SIZE`.

    Raises:
        ValueError: if there is neither such a name nor such a file, or a number is out of range.
    """
    vocab_size = min(vocab_size, VOCAB_SIZE)
    if name == "chat":
        num_users = cdiv(_positive("num_requests", num_requests), 4)
        _check_rate(rate)  # not a fourth of it
        return chats(num_users, 4, rate / 4, 200, (20, 200), (50, 350), seed=seed, vocab_size=vocab_size)
    if name in ("poisson", "burst"):
        burstiness = 0.25 if name == "burst" else 1.0
        return poisson(num_requests, rate, (100, 900), (50, 350), seed, burstiness, vocab_size=vocab_size)
    is_file = Path(name).exists() and not Path(name).is_dir()  # or a pipe
    require(is_file, f"workload must be chat, poisson, burst or a CSV file, got {name!r}")
    return replay(name, seed, vocab_size)


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Random token ids; none if ``count`` is negative."""
    return rng.choices(range(vocab_size), k=max(count, 0))


def _draw(rng: random.Random, name: str, length: Length) -> int:
    """A length, drawn if there is anything to draw."""
    least, most = length if isinstance(length, tuple) else (length, length)
    is_range = 1 <= check_int(name, least) <= check_int(name, most)
    require(is_range, f"{name} must be 1 or more, or a range of such numbers, got {length}")
    return rng.randint(least, most)


def _check_rate(rate: float) -> None:
    require(rate > 0, f"rate must be positive, got {rate:g}")
    require(rate >= MIN_RATE, f"rate must be at least {MIN_RATE:g} requests per second, got {rate:g}")


def _positive(name: str, value: int) -> int:
    require(check_int(name, value) > 0, f"{name} must be positive, got {value}")
    return value
