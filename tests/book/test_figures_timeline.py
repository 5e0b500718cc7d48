"""The numbers behind the figures of steps, places and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from figure_helpers import line, texts, ticks
from matplotlib.axes import Axes

from folovllm import SamplingParams
from folovllm.book import judges, plotting
from folovllm.book.plotting.timeline import stretches
from folovllm.book.recording import StepRecord, run_requests, steps_to_first_token
from folovllm.engine.stats import StepStats


def record(step: int, **fields: Any) -> StepRecord:
    """A record in which nothing happened but what ``fields`` say."""
    nothing: dict[str, Any] = {"prefill": {}, "decode": [], "places": {}, "waiting": [], "swapped": [], "preempted": []}
    nothing |= {"tables": {}, "ref_counts": [0, 0, 0], "finished": [], "stats": StepStats(), "time_us": step}
    return StepRecord(**nothing | fields)


RECORDS = [
    record(0, prefill={"a-0": 5}, places={"a-0": 0}, waiting=["b-0"], tables={"a-0": [0]}, ref_counts=[1, 0, 0]),
    record(1, decode=["a-0"], places={"a-0": 0}, waiting=["b-0"], tables={"a-0": [0, 2]}, ref_counts=[1, 0, 1]),
    record(
        2,
        prefill={"b-0": 3},
        decode=["a-0"],
        places={"a-0": 0, "b-0": 1},
        tables={"a-0": [0, 2], "b-0": [0]},
        ref_counts=[2, 0, 1],
    ),
    record(3, decode=["b-0"], places={"b-0": 1}, tables={"b-0": [0]}, ref_counts=[1, 0, 0]),
]

RUN = [
    record(0, prefill={"a": 5}, waiting=["b"], arrived=["a", "b"], tokens=["a"]),
    record(1, decode=["a"], waiting=["b"], tokens=["a"]),
    record(2, prefill={"b": 3}, decode=["a"], tokens=["a", "b"]),
    record(3, decode=["b"], tokens=["b"]),
]
LOAD = ([1, 2], {"static": [0.5, 4.0], "continuous": [0.1, 0.2]}, "TTFT (s)")

FIGURES: dict[str, Callable[[], Axes]] = {
    "plot_gantt": lambda: plotting.plot_gantt(RECORDS),
    "plot_places": lambda: plotting.plot_places(RECORDS, 3),
    "plot_block_map": lambda: plotting.plot_block_map(RECORDS, 3),
    "plot_anatomy": lambda: plotting.plot_anatomy(RUN, "b"),
    "plot_queue": lambda: plotting.plot_queue({"one": RUN, "two": RUN[:2]}),
    "plot_first_tokens": lambda: plotting.plot_first_tokens({"one": RUN, "two": RUN}),
    "plot_load": lambda: plotting.plot_load(*LOAD),
}


def stripes(ax: Axes) -> list[tuple[str, float, float, float]]:
    """``(colour, row, from, to)`` of each coloured stripe."""
    from matplotlib.colors import to_hex

    found = []
    for group in ax.collections:
        for path in group.get_paths():
            (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            found.append((to_hex(group.get_facecolor()[0]), round((low + high) / 2, 6), left, right))
    return found


BLUE, GREEN, ORANGE, LIGHT, GREY = "#0072b2", "#009e73", "#e69f00", "#d9d9d9", "#999999"


def test_numbers_of_gantt() -> None:
    ax = plotting.plot_gantt(RECORDS)
    assert ticks(ax.yaxis) == ["a-0", "b-0"]
    assert stripes(ax) == [
        (ORANGE, 0, 0, 1),
        (BLUE, 0, 1, 3),
        (LIGHT, 1, 0, 2),
        (ORANGE, 1, 2, 3),
        (GREEN, 1, 3, 4),
    ]


def test_numbers_of_places() -> None:
    assert stripes(plotting.plot_places(RECORDS, 3)) == [(BLUE, 0, 0, 3), (GREEN, 1, 2, 4)]


def test_numbers_of_block_map() -> None:
    found = stripes(plotting.plot_block_map(RECORDS, 3))
    assert found == [(BLUE, 0, 0, 2), (BLUE, 2, 1, 3), (GREEN, 0, 3, 4), (GREY, 0, 2, 3)]


def test_stretches() -> None:
    assert stretches([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
    assert stretches([]) == []


def test_numbers_of_anatomy() -> None:
    ax = plotting.plot_anatomy(RUN, "b")
    assert stripes(ax) == [(LIGHT, 0.5, 0, 1), (LIGHT, 0.5, 1, 2), (ORANGE, 0.5, 2, 3), (GREEN, 0.5, 3, 4)]
    assert texts(ax) == ["TTFT", "1 x TPOT"]
    assert "arrival at step 0" in ax.figure.alt and "TTFT, 3 steps" in ax.figure.alt


def test_numbers_of_queue() -> None:
    assert line(plotting.plot_queue({"one": RUN}), "one")[1] == [1, 1, 0, 0]


def test_numbers_of_first_tokens() -> None:
    ax = plotting.plot_first_tokens({"one": RUN})
    assert line(ax, "one") == ([0, 1, 3], [0, 50, 100])
    assert texts(ax) == ["2"]


def test_numbers_of_load() -> None:
    assert line(plotting.plot_load(*LOAD), "static") == ([1, 2], [0.5, 4.0])


def test_what_a_recording_says() -> None:
    """On a pretended model: two places, the third request waits; one wants two answers."""
    engine = judges.make_engine({"max_num_seqs": 2, "block_size": 4, "num_blocks": 16})
    two = SamplingParams(max_tokens=2, seed=0, ignore_eos=True, detokenize=False)
    both = SamplingParams(max_tokens=2, seed=0, n=2, ignore_eos=True, detokenize=False)
    requests = [("a", [5, 6, 7], two), ("b", [5], two), ("c", [8, 9], both)]
    outputs, records = run_requests(engine, requests, [0, 0, 1])
    assert set(outputs) == {"a", "b", "c"} and not engine.step_hooks
    assert [r.arrived for r in records] == [["a", "b"], ["c-0"], ["c-1"], []]
    assert [r.prefill for r in records] == [{"a": 3, "b": 1}, {}, {"c-0": 2}, {}]
    assert [r.decode for r in records] == [[], ["a", "b"], [], ["c-0", "c-1"]]
    assert [r.waiting for r in records] == [[], ["c-0"], [], []]
    assert [r.finished for r in records] == [[], ["a", "b"], [], ["c-0", "c-1"]]
    assert [r.places for r in records] == [{"a": 0, "b": 1}] * 2 + [{"c-0": 0, "c-1": 1}] * 2
    assert steps_to_first_token(records) == {"a": 1, "b": 1, "c-0": 2, "c-1": 1}
