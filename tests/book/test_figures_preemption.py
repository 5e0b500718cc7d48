"""The numbers behind the figures of preemption."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from figure_helpers import bottoms, heights, line, ticks
from matplotlib.axes import Axes
from test_figures_timeline import record, stripes

from folovllm.book import plotting
from folovllm.book.plotting.preemption import crossings
from folovllm.engine.stats import StepStats

RECORDS = [
    record(0, prefill={"a-0": 4, "b-0": 4}, stats=StepStats(num_used_blocks=2)),
    record(1, decode=["a-0"], preempted=["b-0"], waiting=["b-0"], stats=StepStats(num_used_blocks=2)),
    record(2, decode=["a-0"], swapped=["b-0"], stats=StepStats(num_used_blocks=1)),
    record(3, prefill={"b-0": 5}, stats=StepStats(num_used_blocks=2)),
    record(4, decode=["b-0"], stats=StepStats(num_used_blocks=2)),
]
COSTS = {"a model": {"tokens": [100, 200, 300], "recompute": [0.0, 0.001, 0.005], "swap": [0.001, 0.002, 0.003]}}

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_used_blocks": lambda: plotting.plot_used_blocks({"enough": RECORDS[:1], "tight": RECORDS}),
    "plot_states": lambda: plotting.plot_states({"recompute": RECORDS, "swap": RECORDS}),
    "plot_resume_costs": lambda: plotting.plot_resume_costs({**COSTS, "another": COSTS["a model"]}),
    "plot_admission": lambda: plotting.plot_admission({1: 504, 2: 689}, {1: 480, 2: 272}, needed=504),
}

BLUE, ORANGE, YELLOW, PURPLE = "#0072b2", "#e69f00", "#f0e442", "#cc79a7"


def test_numbers_of_used_blocks() -> None:
    ax = plotting.plot_used_blocks({"tight": RECORDS})
    assert line(ax, "tight") == ([0, 1, 2, 3, 4], [2, 2, 1, 2, 2])
    assert [list(cross.get_xdata()) for cross in ax.lines if cross.get_marker() == "x"] == [[1], []]
    assert "1 preemptions" in ax.figure.alt


def test_numbers_of_states() -> None:
    first, second = plotting.plot_states({"recompute": RECORDS, "swap": RECORDS})[:, 0]
    assert ticks(first.yaxis) == ["a-0", "b-0"] and first.get_title(loc="left") == "recompute"
    expected = [(ORANGE, 0, 0, 1), (BLUE, 0, 1, 3)]
    expected += [(YELLOW, 1, 1, 2), (PURPLE, 1, 2, 3), (ORANGE, 1, 0, 1), (ORANGE, 1, 3, 4), (BLUE, 1, 4, 5)]
    assert stripes(first) == stripes(second) == expected
    assert [list(cross.get_xdata()) for cross in first.lines] == [[], [1]]


def test_numbers_of_resume_costs() -> None:
    (ax,) = plotting.plot_resume_costs(COSTS)[:, 0]
    assert line(ax, "recompute") == ([100, 200, 300], [0, 1, 5]) and line(ax, "swap out and in")[1] == [1, 2, 3]
    (dot,) = [found for found in ax.lines if found.get_marker() == "o"]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == (pytest.approx([700 / 3]), pytest.approx([7 / 3]))
    assert "233 tokens" in [text.get_text() for text in ax.texts] and "cross at 233 tokens" in ax.figure.alt


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([0, 0, 0], [1, 1, 1], []),
        ([0, 2, 0], [1, 1, 1], [0.5, 1.5]),
        ([1, 1, 2], [1, 1, 1], []),
        ([0, 1, 2], [1, 1, 1], [1.0]),
        ([5, 5, 5], [5, 5, 5], []),
    ],
)
def test_crossings(first: list[float], second: list[float], expected: list[float]) -> None:
    assert crossings([0, 1, 2], first, second) == pytest.approx(expected)


def test_numbers_of_admission() -> None:
    computed, passes = plotting.plot_admission({1: 504, 2: 689}, {1: 480, 2: 272}, needed=504)
    assert heights(computed, "once") == [504, 504] and heights(computed, "again") == [0, 185]
    assert bottoms(computed, "again") == [504, 504] and heights(passes) == [480, 272]
