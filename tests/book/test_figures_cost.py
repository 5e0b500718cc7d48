"""The numbers behind the figures of chapter 7, and what times a layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from figure_helpers import legend, line, texts, ticks
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from folovllm.book import measuring, plotting
from folovllm.book.plotting.style import BLUE, ORANGE
from folovllm.simulator.cost import Efficiency, ModelShape, Roofline
from folovllm.simulator.presets import GPUS, MODELS

H100 = Roofline(MODELS["qwen3-8b"], GPUS["h100"], Efficiency.data_sheet())
TINY = ModelShape("tiny", 2, 32, 48, 4, 2, 8, 100, True, 128)

FIGURES: dict[str, Callable[[], Axes]] = {
    "plot_machine": lambda: plotting.plot_machine(H100, 100_000),
    "plot_cost_ratio": lambda: plotting.plot_cost_ratio(
        [1, 2, 4], {"measured": [2.0, 2.0, 6.0], "predicted": [1.0, 1.0, 2.0]}, "tokens", ("ridge", 2.5)
    ),
    "plot_roofline": lambda: plotting.plot_roofline(1e14, 1e12, {"one": (1, 9e11), "many": (500, 8e13)}),
    "plot_step_parts": lambda: plotting.plot_step_parts(
        [0, 100, 200], {"weights": [0.004] * 3, "kv": [0, 0.001, 0.002]}
    ),
    "plot_throughput": lambda: plotting.plot_throughput(
        {"16": [1, 2, 4, 8, 16], "2,000": [1, 2]}, {"16": [200, 400, 800, 1600, 3000], "2,000": [190, 300]}
    ),
}


def test_numbers_of_machine() -> None:
    ax = plotting.plot_machine(H100, 100_000)
    sizes = {to_hex(p.get_facecolor()): p.get_height() for p in ax.patches if isinstance(p, Rectangle)}
    memory = GPUS["h100"].memory
    assert sizes[BLUE.lower()] * memory == pytest.approx(2 * 8_190_427_136)
    assert sizes[ORANGE.lower()] * memory == pytest.approx(100_000 * 147_456)
    assert "weights: 16.4 GB" in texts(ax) and "3.35 TB/s" in texts(ax)


def test_numbers_of_cost_ratio() -> None:
    ax = FIGURES["plot_cost_ratio"]()
    assert line(ax, "measured") == ([1, 2, 4], [1, 1, 3])
    assert line(ax, "predicted") == ([1, 2, 4], [1, 1, 2])
    assert line(ax, "ridge")[0] == [2.5, 2.5]
    assert ticks(ax.xaxis) == ["1", "2", "4"]


def test_numbers_of_roofline() -> None:
    ax = FIGURES["plot_roofline"]()
    xs, ys = (np.asarray(values) for values in ax.lines[0].get_data())
    assert ys[-1] == 100 and np.interp(10, xs, ys) == pytest.approx(10, rel=0.01)
    assert "ridge: 100" in texts(ax)
    assert line(ax, "many") == ([500], [80])


def test_numbers_of_step_parts() -> None:
    ax = FIGURES["plot_step_parts"]()
    tops = [group.get_paths()[0].vertices[:, 1].max() for group in ax.collections]
    assert tops == pytest.approx([4, 6]), "milliseconds, one on the other"
    assert legend(ax) == ["weights", "kv"] and not texts(ax), "kv never takes as long as the weights"
    ax = plotting.plot_step_parts([0, 100], {"weights": [0.004] * 2, "kv": [0, 0.008]})
    assert texts(ax) == ["equal at 50"]


def test_numbers_of_throughput() -> None:
    ax = FIGURES["plot_throughput"]()
    assert line(ax, "2,000") == ([1, 2], [190, 300])
    assert ticks(ax.xaxis) == ["1", "4", "16"]


def test_the_fastest_of_several_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(measuring.time, "thread_time", lambda: next(clock))
    calls: list[int] = []
    assert measuring.best_of(lambda: calls.append(1), repeats=3) == 1.0
    assert len(calls) == 4, "the first call warms up and is not timed"


def test_a_timed_layer_runs_the_engines_code() -> None:
    layer = measuring.TimedLayer(TINY)
    assert layer.num_weights == 2 * 6 * 8 * 32 + 3 * 32 * 48
    assert layer.kv_token_bytes == 2 * 2 * 8 * 4
    assert layer.time_rows(3) > 0 and layer.time_decode(2, 17) > 0


def test_a_machine_has_a_bandwidth_and_a_peak() -> None:
    assert measuring.measure_bandwidth(2**16) > 0
    assert measuring.measure_flops(16) > 0
