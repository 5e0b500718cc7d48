"""The numbers behind the figures of prefix caching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from figure_helpers import bottoms, heights, legend, line, texts
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from folovllm.book import plotting

CHAINS = {
    "A": [("aa11", "Once"), ("bb22", "upon")],
    "B": [("aa11", "Once"), ("cc33", "there")],
    "C": [("dd44", "Long")],
}

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_hash_tree": lambda: plotting.plot_hash_tree(CHAINS),
    "plot_turns": lambda: plotting.plot_turns({"off": [(20, 0), (50, 0)], "on": [(20, 0), (18, 32)]}),
    "plot_hit_rates": lambda: plotting.plot_hit_rates(
        {"tail first": {10: 0.2, 20: 0.5, 30: 0.9}, "head first": {10: 0.1, 20: 0.4, 30: 0.9}}
    ),
    "plot_ttft_by_turn": lambda: plotting.plot_ttft_by_turn({"off": [0.1, 0.15], "on": [0.1, 0.01]}),
}


def drawn(name: str) -> Any:
    axes = FIGURES[name]()
    return axes if isinstance(axes, Axes) else list(axes.flat)


def test_numbers_of_hash_tree() -> None:
    ax = drawn("plot_hash_tree")
    assert texts(ax) == ["Once", "aa11", "upon", "bb22", "there", "cc33", "Long", "dd44", "A", "B", "C"]
    filled = [to_hex(box.get_facecolor()) != "#ffffff" for box in ax.patches]
    assert filled == [True, False, False, False], "a block of two chains is drawn once, and filled"
    ends = [[*edge.get_xdata(), *edge.get_ydata()] for edge in ax.lines]
    assert ends == [pytest.approx([0.42, 0.58, 0.5, 0.0]), pytest.approx([0.42, 0.58, 0.5, 1.0])]
    assert "5 blocks with 4 different hashes, 1 of them filled" in ax.figure.alt


def test_numbers_of_turns() -> None:
    off, on = drawn("plot_turns")
    assert heights(off, "computed") == [20, 50] and heights(on, "computed") == [20, 18]
    assert heights(on, "found in the cache") == [0, 32] and bottoms(on, "found in the cache") == [20, 18]
    assert on.get_title(loc="left") == "on: 38 tokens computed"
    assert texts(off) == ["20", "50"]
    assert "off: 20, 50 computed, 0 found; on: 20, 18 computed, 32 found" in off.figure.alt


def test_numbers_of_hit_rates() -> None:
    ax = drawn("plot_hit_rates")
    assert line(ax, "tail first") == ([10, 20, 30], [20, 50, 90])
    assert line(ax, "head first") == ([10, 20, 30], [10, 40, 90])
    assert "head first: 10 % with 10 blocks, 90 % with 30" in ax.figure.alt


def test_numbers_of_ttft_by_turn() -> None:
    ax = drawn("plot_ttft_by_turn")
    assert line(ax, "off") == ([1, 2], [100, 150])
    assert line(ax, "on") == ([1, 2], [100, 10])
    assert legend(ax) == ["off", "on"]
    assert "on: 100.0 ms in the first turn, 10.0 ms in the last" in ax.figure.alt
