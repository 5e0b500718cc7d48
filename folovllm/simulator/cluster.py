"""Runs a workload through one engine or several behind a router. Chapters 8, 9, 12 and 13.

Each replica is a whole engine with a clock of its own, and the earliest event is always next: an arrival, the end of a
request, or a step of the replica whose clock is behind all others'. Prefill and decode on different machines are not
here: the engine hands no KV blocks over, so it would not be the real engine any more.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.output_processor import OutputSink
from folovllm.llm import make_engine_config
from folovllm.outputs import RequestOutput
from folovllm.simulator.clock import VirtualClock, to_us
from folovllm.simulator.cost import Cost, Efficiency, Gpu, ModelShape, Roofline
from folovllm.simulator.presets import get_gpu, get_model
from folovllm.simulator.report import Recorder, Report, RequestRecord, make_report
from folovllm.simulator.runner import make_engine
from folovllm.simulator.workload import TimedRequest, Workload
from folovllm.validation import check_choice, check_int, require

MAX_IMBALANCE = 1.5
"""How many times as many requests as the idlest replica one may have before a router stops looking at prefixes."""
MIN_IMBALANCE = 16
"""And how many more, so that few requests are no imbalance."""


@dataclass
class Replica:
    """One engine of a cluster, as a router sees it."""

    index: int
    engine: LLMEngine
    recorder: Recorder
    sink: OutputSink = field(default_factory=OutputSink)
    num_unfinished: int = 0
    """Requests that were sent to it and are not finished yet."""

    @property
    def clock(self) -> VirtualClock:
        """The engine's."""
        return cast(VirtualClock, self.engine.clock)

    def count_cached_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens the engine has in its prefix cache."""
        cache, block_hash, num_found = self.engine.cache, b"", 0
        for start in range(0, len(token_ids) - cache.block_size + 1, cache.block_size):
            block_hash = cache.hash_block(block_hash, list(token_ids[start : start + cache.block_size]))
            if cache.pool.get_cached_block(block_hash) is None:
                break
            num_found = start + cache.block_size
        return num_found

    def add(self, request: TimedRequest) -> None:
        """Adds a request that has just arrived."""
        arrival_us = to_us(request.arrival)
        self.clock.advance_to(arrival_us)
        self.engine.add_request(
            request.request_id, request.prompt, request.own_params(), arrival_us / 1e6, sink=self.sink
        )
        num_prompt_tokens = len(self.engine.output_processor.states[request.request_id].request.prompt_token_ids)
        self.recorder.arrived(request.request_id, arrival_us / 1e6, num_prompt_tokens)
        self.num_unfinished += 1


Router = Callable[[TimedRequest, Sequence[Replica]], int]
"""Chooses the replica, by its index, that a request is sent to."""


def round_robin() -> Router:
    """A router that takes the replicas in turn."""
    turns = itertools.count()
    return lambda request, replicas: next(turns) % len(replicas)


def least_loaded(request: TimedRequest, replicas: Sequence[Replica]) -> int:
    """The replica with the fewest unfinished requests."""
    return min(replicas, key=lambda replica: replica.num_unfinished).index


def prefix_aware(request: TimedRequest, replicas: Sequence[Replica]) -> int:
    """The replica that has most of the prompt in its cache, unless it has far more to do than another.

    Of those that have the same, the one with the fewest unfinished requests. A text is not looked at.
    """
    loads = [replica.num_unfinished for replica in replicas]
    if max(loads) - min(loads) > MIN_IMBALANCE and max(loads) > MAX_IMBALANCE * min(loads):
        return least_loaded(request, replicas)
    token_ids = [] if isinstance(request.prompt, (str, dict)) else cast("Sequence[int]", request.prompt)
    found = [replica.count_cached_tokens(token_ids) for replica in replicas]
    return max(replicas, key=lambda replica: (found[replica.index], -replica.num_unfinished)).index


ROUTERS: dict[str, Callable[[], Router]] = {
    "round_robin": round_robin,
    "least_loaded": lambda: least_loaded,
    "prefix_aware": lambda: prefix_aware,
}
"""Each makes a router with a memory of its own."""


def serve(engines: Sequence[LLMEngine], workload: Workload, router: str | Router = "round_robin") -> Report:
    """Runs a workload to its end.

    Args:
        engines: idle, each on a virtual clock of its own (`folovllm.simulator.runner.charge` or ``make_engine``).
        workload: who asks for what, and when.
        router: "round_robin", "least_loaded", "prefix_aware", or a function.

    Raises:
        ValueError: if an engine is not on a virtual clock that stands at 0, or a request can never be served.
    """
    require(len(engines) > 0, "engines must hold at least one, got none")
    if isinstance(router, str):
        check_choice("router", router, tuple(ROUTERS))
        router = ROUTERS[router]()
    replicas = [Replica(i, engine, Recorder(i, engine)) for i, engine in enumerate(engines)]
    for replica in replicas:
        now = replica.clock.now_us() / 1e6
        require(now == 0, f"an engine's clock must stand at 0 s when a workload begins, got {now} s; call charge again")
    _check_lengths(workload, min(engine.max_model_len for engine in engines))
    for replica in replicas:
        replica.engine.step_hooks.append(replica.recorder)
    try:
        _run(replicas, workload, router)
    finally:
        for replica in replicas:
            replica.engine.close(replica.sink)
            replica.engine.step_hooks.remove(replica.recorder)
    return make_report([replica.recorder for replica in replicas])


def _check_lengths(workload: Workload, longest: int) -> None:
    """Refuses requests whose answers would be cut, of those that are known beforehand: their counts shall be exact."""
    for request in workload.requests:
        if isinstance(request.params, int) and not isinstance(request.prompt, (str, Mapping)):
            num_prompt = len(request.prompt)
            require(
                num_prompt + request.params <= longest,
                f"{request.request_id} asks for {request.params} tokens after {num_prompt}, and max_model_len is "
                f"{longest}: raise it, or shorten the workload",
            )


def _run(replicas: list[Replica], workload: Workload, router: Router) -> None:
    """The events in the order of time."""
    order = itertools.count()  # of events at the same microsecond
    events: list[tuple[int, int, TimedRequest | tuple[Replica, RequestOutput]]] = [
        (to_us(request.arrival), next(order), request) for request in workload.requests
    ]
    heapq.heapify(events)
    while True:
        busy = [replica for replica in replicas if replica.sink.unfinished]
        behind = min(busy, key=lambda replica: replica.clock.now_us(), default=None)
        if events and (behind is None or events[0][0] <= behind.clock.now_us()):
            _, _, event = heapq.heappop(events)
            if isinstance(event, TimedRequest):
                replicas[router(event, replicas)].add(event)
                continue
            replica, output = event
            replica.num_unfinished -= 1
            following = workload.follow_up(output, replica.recorder.records[output.request_id].finished)
            if following is not None:
                heapq.heappush(events, (to_us(following.arrival), next(order), following))
        elif behind is not None:
            for output in behind.engine.wait(behind.sink):
                record: RequestRecord = behind.recorder.finish(output)
                heapq.heappush(events, (to_us(record.finished), next(order), (behind, output)))
        else:
            return


def simulate(
    workload: Workload,
    gpu: str | Gpu = "h100",
    model: str | ModelShape = "qwen3-8b",
    *,
    replicas: int = 1,
    router: str | Router = "round_robin",
    efficiency: Efficiency | None = None,
    tensor_parallel_size: int = 1,
    cost: Cost | None = None,
    **config: Any,
) -> Report:
    """Runs a workload through the real engine, scheduler and cache, for a model and a card that are not there.

    Args:
        workload: who asks for what, and when.
        gpu: the card, by name or by its data sheet.
        model: the model, by name, by a checkpoint's folder, or by its shape.
        replicas: engines behind the router.
        router: as for `serve`.
        efficiency: what of the data sheet is reached; None: `Efficiency`'s own numbers.
        tensor_parallel_size: cards that share each layer of one engine.
        cost: says how long steps take; None: a `Roofline` of the above.
        config: any field of `ModelConfig`, `CacheConfig` and `SchedulerConfig`.

    Raises:
        ValueError: if there is no such card, model or field, or a request can never be served.
    """
    gpu = get_gpu(gpu) if isinstance(gpu, str) else gpu
    shape = get_model(model) if isinstance(model, str) else model
    roofline = Roofline(shape, gpu, efficiency or Efficiency(), tensor_parallel_size)
    require(check_int("replicas", replicas) > 0, f"replicas must be positive, got {replicas}")
    # A config for each: an engine fills in what was left out.
    engines = [make_engine(make_engine_config(shape.name, **config), roofline, cost) for _ in range(replicas)]
    return serve(engines, workload, router)
