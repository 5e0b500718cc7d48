"""The numbers behind the figures of guessing and checking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from figure_helpers import bottoms, heights, legend, line, texts, ticks
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from folovllm.book import plotting
from folovllm.book.plotting.style import GREEN, SKY
from folovllm.book.recording import CheckedGuesses


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


PASSES = [
    CheckedGuesses("r", [], [0], 0),
    CheckedGuesses("r", [1, 2, 9], [1, 2, 3], 2),
    CheckedGuesses("r", [4, 5], [4, 5], 2),
]
FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_guesses": lambda: plotting.plot_guesses(PASSES, Letters()),
    "plot_overlap": lambda: plotting.plot_overlap(["a", "b", "c"], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
    "plot_tokens_per_pass": lambda: plotting.plot_tokens_per_pass({"card": (4, 0.5, 1.9), "tale": (2, 1.0, 2.8)}),
    "plot_gain": lambda: plotting.plot_gain([1, 4, 64], {"n-gram": [2.0, 1.5, 0.9], "draft": [1.8, 1.2, 0.5]}),
}


def drawn(name: str) -> Any:
    return FIGURES[name]()


def test_numbers_of_guesses() -> None:
    ax = drawn("plot_guesses")
    assert texts(ax) == ["a", "b", "c", "d", "e", "f"]
    boxes = [patch for patch in ax.patches if patch.get_width()]
    assert [to_hex(box.get_facecolor()).upper() for box in boxes] == [SKY, GREEN, GREEN, SKY, GREEN, GREEN]
    assert [box.get_x() for box in boxes] == list(range(6))
    assert [mark.get_xdata()[0] for mark in ax.lines if len(mark.get_xdata())] == [0, 1, 4]
    assert "A text of 6 tokens in boxes, which 3 passes gave: 4 boxes are filled" in ax.figure.alt
    long = plotting.plot_guesses([CheckedGuesses("r", [], [0], 0)] * 61, Letters())
    assert max(box.get_y() for box in long.patches) == pytest.approx(0.6)  # a second line


def test_numbers_of_overlap() -> None:
    ax = drawn("plot_overlap")
    assert heights(ax, "both: accepted") == [0.2, 0.3, 0.2]
    assert heights(ax, "model more: drawn after a refusal") == [0.3, 0, 0]
    assert heights(ax, "draft more: refused") == [0, 0, 0.3]
    assert bottoms(ax, "draft more: refused") == [0.2, 0.3, 0.2]
    assert ticks(ax.xaxis) == ["a", "b", "c"]
    assert "they have 0.70 in common, the model has 0.30 more and the draft 0.30" in ax.figure.alt


def test_numbers_of_tokens_per_pass() -> None:
    ax = drawn("plot_tokens_per_pass")
    rates, tokens = (np.array(values.expected) for values in line(ax, "4 guesses"))
    assert tokens[rates == 0.5] == pytest.approx(1.9375) and tokens[-1] == pytest.approx(5)
    assert line(ax, "2 guesses")[1].expected[-1] == pytest.approx(3)
    dots = [mark for mark in ax.lines if len(mark.get_xdata()) == 1]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(0.5, 1.9), (1.0, 2.8)]
    assert legend(ax) == ["2 guesses", "4 guesses", "card", "tale"]
    assert "card: 1.90 tokens per pass at a rate of 0.50, expected 1.94 of 4 guesses" in ax.figure.alt


def test_the_formula() -> None:
    assert plotting.expected_tokens(0.0, 4) == 1 and plotting.expected_tokens(1.0, 4) == 5
    assert plotting.expected_tokens(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))


def test_numbers_of_gain() -> None:
    ax = drawn("plot_gain")
    assert line(ax, "n-gram") == ([1, 4, 64], [2.0, 1.5, 0.9])
    assert line(ax, "draft")[1] == [1.8, 1.2, 0.5]
    assert legend(ax) == ["n-gram", "draft"] and ticks(ax.xaxis) == ["1", "4", "64"]
    assert "n-gram: 2.0 times as fast with 1, 0.9 with 64" in ax.figure.alt
