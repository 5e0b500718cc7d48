"""What came out: when each request got its tokens, what each step was made of, and what it all cost. Chapter 8.

TTFT is the time to the first token, TPOT the time per output token after it, ITL the gap between two tokens. All are
seconds of the virtual clock, computed by a formula and not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.stats import StepStats
from folovllm.outputs import RequestOutput, RunnerOutput
from folovllm.simulator.clock import to_us
from folovllm.simulator.cost import Roofline, StepCost
from folovllm.simulator.runner import CostRunner
from folovllm.utils import cdiv
from folovllm.validation import check_choice, require


@dataclass
class Bill:
    """What one request has used."""

    computed_tokens: int = 0
    """Tokens that went through the model, those that a preemption made it compute again included."""
    cached_tokens: int = 0
    """Tokens that were found in the prefix cache instead."""
    kv_bytes_read: float = 0.0
    """Bytes of keys and values read for it; 0 where the cost is not a `Roofline`."""
    block_steps: int = 0
    """KV blocks that it held, summed over steps."""
    steps_waited: int = 0
    """Steps that ran without it between its arrival and its last token."""
    gpu_seconds: float = 0.0
    """Its share of each step that it took part in, by tokens computed, times the number of cards."""
    dollars: float = 0.0


@dataclass
class RequestRecord:
    """What happened to one request. Times are seconds."""

    request_id: str
    replica: int
    arrival: float
    num_prompt_tokens: int
    admitted: float | None = None
    """When the first step that computed a token of it began."""
    token_times: list[float] = field(default_factory=list)
    """When each token of its answer came."""
    output: RequestOutput | None = None
    """Its final output; None while it runs."""
    bill: Bill = field(default_factory=Bill)
    num_preemptions: int = 0
    """How often it lost its blocks."""

    @property
    def finished(self) -> float:
        """When its last token came."""
        return self.token_times[-1]

    @property
    def num_output_tokens(self) -> int:
        """Tokens of its answer."""
        return len(self.token_times)

    @property
    def queue(self) -> float:
        """Seconds in the queue before its first step."""
        assert self.admitted is not None  # a report has finished requests only
        return self.admitted - self.arrival

    @property
    def ttft(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None if there is only one."""
        if self.num_output_tokens < 2:
            return None
        return (self.finished - self.token_times[0]) / (self.num_output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between each token and the next."""
        return [after - before for before, after in pairwise(self.token_times)]

    @property
    def e2e(self) -> float:
        """Seconds from its arrival to its last token."""
        return self.finished - self.arrival


@dataclass(frozen=True)
class StepRecord:
    """One step of one replica. Times are seconds."""

    replica: int
    start: float
    end: float
    cost: StepCost
    stats: StepStats
    """What it did: tokens of prompts and of answers, sequences, blocks, preemptions."""


METRICS: dict[str, Callable[[RequestRecord], Iterable[float]]] = {
    "queue": lambda request: [request.queue],
    "ttft": lambda request: [request.ttft],
    "tpot": lambda request: [] if request.tpot is None else [request.tpot],
    "itl": lambda request: request.itl,
    "e2e": lambda request: [request.e2e],
}
"""The values that a request adds to each metric."""


@dataclass(frozen=True, repr=False)
class Report:
    """Everything that a workload's run has shown."""

    requests: list[RequestRecord]
    """By arrival; those of the window, and all are finished."""
    steps: list[StepRecord]
    """In the order of their beginning."""
    start: float
    end: float
    """The window: seconds from which and to which tokens, requests and money are counted."""
    dollars_per_hour: float
    """Of all replicas."""
    tokens: list[float]
    """When each output token in the window came, those of requests that arrived before it included."""

    def steady(self, from_s: float, to_s: float) -> Report:
        """The report of a window: requests that arrive in it, steps that begin in it, tokens that come in it.

        Over a whole run the throughput says little: at the end the last few requests run alone.

        Raises:
            ValueError: if no request arrives in it.
        """
        requests = [request for request in self.requests if from_s <= request.arrival < to_s]
        require(len(requests) > 0, f"a window must have a request arrive in it, got none from {from_s} s to {to_s} s")
        return replace(
            self,
            requests=requests,
            steps=[step for step in self.steps if from_s <= step.start < to_s],
            start=from_s,
            end=to_s,
            tokens=[time for time in self.tokens if from_s <= time < to_s],
        )

    def values(self, metric: str) -> list[float]:
        """The values of a metric in seconds: one for each request, of "itl" one for each gap.

        Args:
            metric: "queue", "ttft", "tpot", "itl" or "e2e".
        """
        check_choice("metric", metric, tuple(METRICS))
        return [value for request in self.requests for value in METRICS[metric](request)]

    def percentile(self, metric: str, percent: float) -> float:
        """The value that ``percent`` % of the values are not above, in seconds, interpolated as NumPy does it."""
        return percentile(self.values(metric), percent)

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.end - self.start

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return len(self.tokens) / self.seconds

    @property
    def num_preemptions(self) -> int:
        """How often a sequence lost its blocks."""
        return sum(step.stats.num_preempted for step in self.steps)

    @property
    def hit_rate(self) -> float:
        """The share of admitted sequences' tokens that the prefix cache had."""
        queried = sum(step.stats.num_queried_tokens for step in self.steps)
        return sum(step.stats.num_cached_tokens for step in self.steps) / queried if queried else 0.0

    @property
    def dollars_per_million_tokens(self) -> float:
        """What a million output tokens cost, idle time included."""
        return self.dollars_per_hour * self.seconds / 3600 / len(self.tokens) * 1e6 if self.tokens else math.inf

    def attainment(self, **slo: float) -> float:
        """The share of requests that met every bound, as in ``attainment(ttft=0.2, tpot=0.05)``.

        Args:
            slo: the most seconds for "queue", "ttft", "tpot", "e2e", and for "itl" (the longest gap).
        """
        for metric in slo:
            check_choice("metric", metric, tuple(METRICS))
        met = [
            all(value <= bound for metric, bound in slo.items() for value in METRICS[metric](request))
            for request in self.requests
        ]
        return sum(met) / len(met)

    def goodput(self, **slo: float) -> float:
        """Requests per second of the window that met every bound of `attainment`."""
        return self.attainment(**slo) * len(self.requests) / self.seconds

    def __str__(self) -> str:
        rows = [
            f"{len(self.requests):,} requests in {self.seconds:.1f} s of a virtual clock (computed, not measured)",
            f"output tokens  {len(self.tokens):,}, {self.throughput:,.0f} per second",
            f"steps          {len(self.steps):,}, preemptions {self.num_preemptions:,}, prompt tokens found in the "
            f"cache {self.hit_rate:.0%}",
        ]
        if self.dollars_per_hour and self.tokens:
            rows.append(f"money          ${self.dollars_per_million_tokens:.2f} per million output tokens")
        rows += ["", f"{'ms':<6}" + "".join(f"{name:>12}" for name in ("mean", "median", "p90", "p99", "worst"))]
        for metric in METRICS:
            if values := sorted(self.values(metric)):
                found = [sum(values) / len(values), *(percentile(values, p) for p in (50, 90, 99, 100))]
                rows.append(f"{metric:<6}" + "".join(f"{value * 1e3:>12,.1f}" for value in found))
        return "\n".join(rows)

    __repr__ = __str__  # what a notebook shows


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that ``percent`` % of all values are not above, interpolated between two neighbours.

    Raises:
        ValueError: if there is no value, or ``percent`` is not from 0 to 100.
    """
    ordered = sorted(values)
    require(len(ordered) > 0, "values must hold at least one number, got none")
    require(0 <= percent <= 100, f"percent must be from 0 to 100, got {percent}")
    place = percent / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class Recorder:
    """Writes down what the steps of one engine do; a step hook.

    Args:
        replica: the engine's number.
        engine: on a virtual clock; whoever adds a request to it calls `arrived`.
    """

    def __init__(self, replica: int, engine: LLMEngine) -> None:
        require(
            isinstance(engine.runner, CostRunner),
            "an engine must be on a virtual clock to be simulated; call folovllm.simulator.runner.charge(engine, cost)",
        )
        assert isinstance(engine.runner, CostRunner)
        self.replica, self.engine, self.runner = replica, engine, engine.runner
        cost = self.runner.cost
        self.kv_token_bytes = cost.shape.kv_token_bytes if isinstance(cost, Roofline) else 0
        self.num_cards = cost.tensor_parallel_size if isinstance(cost, Roofline) else 1
        self.records: dict[str, RequestRecord] = {}
        self.steps: list[StepRecord] = []
        self._waiting_since: dict[str, int] = {}  # the number of the step that a request waits since

    def arrived(self, request_id: str, arrival: float, num_prompt_tokens: int) -> None:
        """Begins a request's record."""
        self.records[request_id] = RequestRecord(request_id, self.replica, arrival, num_prompt_tokens)
        self._waiting_since[request_id] = len(self.steps)

    def __call__(self, scheduler_output: SchedulerOutput, runner_output: RunnerOutput, stats: StepStats) -> None:
        """Records a step."""
        cost, end_us = self.runner.last_cost, self.engine.clock.now_us()
        assert cost is not None  # a step has just been charged for
        start, end = (end_us - to_us(cost.total)) / 1e6, end_us / 1e6
        self._share(scheduler_output, start, end)
        for seq in scheduler_output.preempted:
            self._waiting_since[seq.request_id] = len(self.steps)
        for (seq, _), token_ids in zip(scheduler_output.sampled, runner_output.sampled_token_ids):
            self.records[seq.request_id].token_times += [end] * len(token_ids)
        self.steps.append(StepRecord(self.replica, start, end, cost, stats))

    def _share(self, scheduler_output: SchedulerOutput, start: float, end: float) -> None:
        """Adds to each request its share of a step."""
        block_size, num_step = self.runner.block_size, len(self.steps)
        token_seconds = (end - start) * self.num_cards / max(sum(scheduler_output.num_new_tokens), 1)
        for seq, num_new in zip(scheduler_output.seqs, scheduler_output.num_new_tokens):
            record, num_tokens = self.records[seq.request_id], seq.num_computed_tokens
            bill = record.bill
            bill.kv_bytes_read += num_tokens * self.kv_token_bytes
            bill.block_steps += cdiv(num_tokens, block_size)
            bill.gpu_seconds += token_seconds * num_new
            if seq.request_id in self._waiting_since:
                bill.steps_waited += num_step - self._waiting_since.pop(seq.request_id)
                if record.admitted is None:
                    record.admitted = start

    def finish(self, output: RequestOutput) -> RequestRecord:
        """Completes a request's record with its final output."""
        record, metrics = self.records[output.request_id], output.metrics
        assert metrics is not None  # the engine's outputs have them
        record.output, record.num_preemptions, bill = output, metrics.num_preemptions, record.bill
        bill.computed_tokens, bill.cached_tokens = metrics.num_computed_tokens, metrics.num_cached_tokens
        bill.dollars = bill.gpu_seconds * self.runner.cost.dollars_per_hour / self.num_cards / 3600
        return record


def make_report(recorders: list[Recorder]) -> Report:
    """The report of all requests that the engines have finished."""
    requests = [record for recorder in recorders for record in recorder.records.values()]
    requests = sorted((r for r in requests if r.output is not None), key=lambda request: request.arrival)
    tokens = sorted(time for request in requests for time in request.token_times)
    return Report(
        requests=requests,
        steps=sorted((step for recorder in recorders for step in recorder.steps), key=lambda step: step.start),
        start=requests[0].arrival,
        end=tokens[-1],
        dollars_per_hour=sum(recorder.runner.cost.dollars_per_hour for recorder in recorders),
        tokens=tokens,
    )
