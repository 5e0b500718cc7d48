"""The numbers behind the figures of blocks, tables and flat passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from figure_helpers import heights, line, texts, ticks
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from folovllm import LLMEngine, SamplingParams
from folovllm.book import plotting
from folovllm.book.plotting.paging import FlatPass, Pages
from folovllm.llm import make_engine_config
from folovllm.tales import EMBEDDED_MODEL

SHARED = Pages({"a": ["It", "was", "so"], "b": ["It", "was", "late"]}, {"a": [2, 0], "b": [2, 1]}, 2, 4)
FLAT = FlatPass(
    words=["was", "In", "a", "wood"],
    owners=["A", "B", "B", "B"],
    positions=[4, 0, 1, 2],
    slots=[8, 2, 3, 0],
    kinds={"A": "decode", "B": "prefill"},
    tables={"A": [0, 4], "B": [1, 0]},
)

SAMPLES = {1: [(2, 100, 0), (2, 140, 0)], 16: [(1, 4, 3), (3, 13, 27)]}
"""In both steps two texts, or four in all: 240 and 17 entries, 0 and 30 empty slots."""

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_pages": lambda: plotting.plot_pages({"before": SHARED, "after": SHARED}),
    "plot_flat_pass": lambda: plotting.plot_flat_pass(FLAT),
    "plot_texts_at_once": lambda: plotting.plot_texts_at_once({512: 4, 16: 32}, {512: 616, 16: 96}),
    "plot_block_size_costs": lambda: plotting.plot_block_size_costs(SAMPLES),
}

BLUE, GREEN, GREY, WHITE = "#0072b2", "#009e73", "#999999", "#ffffff"


def boxes(ax: Axes) -> list[tuple[str, float, float]]:
    """``(colour, left, middle)`` of each box."""
    found = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return [(to_hex(b.get_facecolor()), b.get_x(), round(b.get_y() + b.get_height() / 2, 6)) for b in found]


def test_numbers_of_pages() -> None:
    axes = plotting.plot_pages({"two": SHARED})
    (ax,) = axes.flat
    left, right = boxes(ax)[:8], boxes(ax)[8:]
    assert [color for color, _, _ in left] == [BLUE] * 3 + [WHITE] + [GREEN] * 3 + [WHITE]
    assert [color for color, _, _ in right] == [BLUE, WHITE, GREEN, WHITE, GREY, GREY, WHITE, WHITE]
    # An arrow for each entry of a table, from the row of the block to the number in it.
    arrows = [(text.xyann[1], text.xy[1]) for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert arrows == [(0, 2), (1, 0), (2.6, 2), (3.6, 1)]
    assert texts(ax)[-8:] == ["so", "0", "late", "1", "It", "was", "2", "3"]
    assert "[2, 0]" in ax.figure.alt and "in several tables: [2]" in ax.figure.alt


def test_numbers_of_flat_pass() -> None:
    ax = plotting.plot_flat_pass(FLAT)
    assert [(color, left) for color, left, _ in boxes(ax)] == [(BLUE, 0), (GREEN, 1), (GREEN, 2), (GREEN, 3)]
    written = texts(ax)
    assert written[:6] == ["was", "4", "8", "In", "0", "2"]
    assert written[-4:] == ["A: decode", "blocks 0, 4", "B: prefill", "blocks 1, 0"]
    assert "[8, 2, 3, 0]" in ax.figure.alt


def test_numbers_of_texts_at_once() -> None:
    most, passes = plotting.plot_texts_at_once({512: 4, 16: 32}, {512: 616, 16: 96})
    assert heights(most) == [4, 32] and heights(passes) == [616, 96]
    assert ticks(passes.xaxis) == ["512", "16"] and texts(most) == ["4", "32"]


def test_numbers_of_block_size_costs() -> None:
    empty, entries = plotting.plot_block_size_costs(SAMPLES)
    assert line(empty) == ([1, 16], [0, 7.5]) and line(entries) == ([1, 16], [60, 4.25])


def test_pages_of_an_engine() -> None:
    config = make_engine_config(str(EMBEDDED_MODEL), dtype="float32", max_model_len=16, block_size=4, num_blocks=6)
    engine = LLMEngine(config)
    params = SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True)
    engine.add_request("r", "Long ago, in the swamp", params)
    engine.step()
    pages = plotting.pages_of(engine)
    assert pages.tables == {"r-0": [0, 1], "r-1": [0, 1]} and pages.words["r-0"] == pages.words["r-1"]
    assert len(pages.words["r-0"]) == 6 and pages.owners(1) == ["r-0", "r-1"] and pages.owners(2) == []
    engine.step()
    pages = plotting.pages_of(engine)
    assert pages.tables["r-0"][0] == pages.tables["r-1"][0] == 0 and pages.tables["r-0"][1] != pages.tables["r-1"][1]


def test_flat_pass_of_an_engine() -> None:
    config = make_engine_config(
        str(EMBEDDED_MODEL),
        dtype="float32",
        max_model_len=32,
        block_size=8,
        num_blocks=8,
        enable_chunked_prefill=True,
        max_num_batched_tokens=10,
    )
    engine = LLMEngine(config)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("A", [5, 6, 7], params)
    engine.add_request("B", list(range(10, 21)), params)
    engine.step()
    engine.add_request("C", [8, 9], params)
    flat = plotting.flat_pass_of(engine, engine.scheduler.schedule())
    assert flat.kinds == {"A": "decode", "B": "a chunk", "C": "prefill"}
    assert flat.owners == ["A"] + ["B"] * 4 + ["C"] * 2
    assert flat.positions == [3, 7, 8, 9, 10, 0, 1] and flat.slots == [3, 15, 16, 17, 18, 24, 25]
    assert flat.tables == {"A": [0], "B": [1, 2], "C": [3]}
