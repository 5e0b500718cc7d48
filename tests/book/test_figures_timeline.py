"""The numbers behind the figures of steps, places and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from figure_helpers import ticks
from matplotlib.axes import Axes

from folovllm.book import plotting
from folovllm.book.plotting.timeline import stretches
from folovllm.book.recording import StepRecord
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

FIGURES: dict[str, Callable[[], Axes]] = {
    "plot_gantt": lambda: plotting.plot_gantt(RECORDS),
    "plot_places": lambda: plotting.plot_places(RECORDS, 3),
    "plot_block_map": lambda: plotting.plot_block_map(RECORDS, 3),
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
