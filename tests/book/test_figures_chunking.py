"""The numbers behind the figures of chunked prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from figure_helpers import bottoms, heights, legend, line, texts, ticks
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from folovllm.book import plotting
from folovllm.engine.stats import StepStats
from folovllm.simulator.cost import StepCost


def steps(*tokens: tuple[int, int]) -> list[StepStats]:
    """Steps with so many tokens of prompts and of answers."""
    return [StepStats(num_prefill_tokens=prefill, num_decode_tokens=decode) for prefill, decode in tokens]


FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_step_makeup": lambda: plotting.plot_step_makeup(
        {"off": steps((1188, 1), (0, 2)), "budget 32": steps((31, 1), (31, 1), (0, 2))}
    ),
    "plot_token_gaps": lambda: plotting.plot_token_gaps({"off": [1.0, 1.01, 1.05, 1.06], "32": [0.0, 0.008, 0.016]}),
    "plot_frontier": lambda: plotting.plot_frontier(
        {"off": (0.3, 0.4), "512": (0.35, 0.02), "256": (0.5, 0.012)}, slo=(0.4, 0.05)
    ),
    "plot_prompt_cost": lambda: plotting.plot_prompt_cost(
        {"1,000": [StepCost(0.02, 0.003, host=0.001)], "500": [StepCost(0.012, 0.001, host=0.001)] * 2}
    ),
}


def drawn(name: str) -> Any:
    axes = FIGURES[name]()
    return axes if isinstance(axes, Axes) else list(axes.flat)


def test_numbers_of_step_makeup() -> None:
    off, chunked = drawn("plot_step_makeup")
    assert heights(off, "decode") == [1, 2] and heights(off, "prefill") == [1188, 0]
    assert heights(chunked, "prefill") == [31, 31, 0] and bottoms(chunked, "prefill") == [1, 1, 2]
    assert off.get_title(loc="left") == "off: at most 1,189 tokens in a step"
    assert chunked.get_title(loc="left") == "budget 32: at most 32 tokens in a step"
    assert "off: 2 steps of at most 1,189 tokens; budget 32: 3 steps of at most 32 tokens" in off.figure.alt


def test_numbers_of_token_gaps() -> None:
    ax = drawn("plot_token_gaps")
    assert line(ax, "off") == ([2, 3, 4], [10, 40, 10])
    assert line(ax, "32") == ([2, 3], [8, 8])
    assert legend(ax) == ["off", "32"]
    assert "off: median 10.0 ms, longest 40.0 ms" in ax.figure.alt


def test_numbers_of_frontier() -> None:
    ax = drawn("plot_frontier")
    (dots,) = [group for group in ax.collections if isinstance(group, PathCollection)]
    assert dots.get_offsets().tolist() == pytest.approx(np.array([[300, 400], [350, 20], [500, 12]]))
    assert texts(ax) == ["off", "512", "256"]
    (promise,) = [group for group in ax.collections if not isinstance(group, PathCollection)]
    corner = promise.get_paths()[0].vertices
    assert (corner[:, 0].max(), corner[:, 1].max()) == pytest.approx((400, 50))
    assert plotting.plot_frontier({"a": (0.1, 0.2), "b": (0.2, 0.1)}).get_legend() is None
    assert "512: 350 and 20 ms" in ax.figure.alt


def test_numbers_of_prompt_cost() -> None:
    ax = drawn("plot_prompt_cost")
    assert heights(ax, "matrix products") == [20, 24]
    assert heights(ax, "attention") == [3, 2] and bottoms(ax, "attention") == [20, 24]
    assert heights(ax, "host") == [1, 2] and bottoms(ax, "host") == [23, 26]
    assert texts(ax) == ["one step", "2 steps"]
    assert ticks(ax.xaxis) == ["1,000", "500"]
    assert "1,000: 1 steps, 24 ms; 500: 2 steps, 28 ms" in ax.figure.alt
