"""The numbers behind the figures, worked out by hand for small inputs, and whether everybody can read them."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from figure_helpers import bars, bottoms, heights, lefts, legend, line, texts, ticks, widths
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

from folovllm.book import plotting
from folovllm.book.palette import DARK_REQUEST_COLORS, REQUEST_COLORS
from folovllm.book.plotting import PATH, STATUS_COLORS, book_figure, style
from folovllm.book.plotting.style import PALETTE
from folovllm.tales import EMBEDDED_MODEL

GIB = 2**30


class Tokens:
    """Stands in for a tokenizer: token 0 is " a", token 1 is "b", and so on."""

    TEXTS = (" a", "b", "\n", "é", "<x>", "f", "g", "h", " ", "\x01", "$$", "_k", "l", "m", "n", "o")

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.TEXTS[i] for i in token_ids)


TOKENS = Tokens()


def model_of(**shapes: tuple[int, ...]) -> nn.Module:
    """Something with weights of these names and shapes, ``__`` for a dot, on the meta device."""
    weights = {
        name.replace("__", "."): nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()
    }
    return types.SimpleNamespace(named_parameters=lambda: weights.items())  # type: ignore[return-value]


SMALL = model_of(
    model__embed_tokens__weight=(256, 2),
    model__layers__0__self_attn__q_proj__weight=(128, 2),
    model__layers__0__mlp__up_proj__weight=(384, 2),
    model__layers__1__self_attn__q_norm__weight=(64, 2),
    model__layers__1__mlp__up_proj__weight=(512, 2),
    model__norm__weight=(128,),
)
"""Float32: outside 2 KiB of embedding and 0.5 of norms; layer 0: 1 of attention, 3 of MLP; layer 1: 0.5 and 4."""

LARGE = model_of(
    lm_head__weight=(2**14, 2**14), layers__0__attn__weight=(2**14, 2**15), layers__0__mlp__weight=(2**14, 2**16)
)
"""2**28 weights of embedding, 2**29 of attention, 2**30 of MLP."""


def step(num_prefill_tokens: int, num_decode_tokens: int, num_seqs: int) -> Any:
    """What an engine says about a step, as far as the figures look at it."""
    return types.SimpleNamespace(
        num_prefill_tokens=num_prefill_tokens, num_decode_tokens=num_decode_tokens, num_seqs=num_seqs
    )


PROBS = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_path": lambda: plotting.plot_path("model", "sampler", told_by="a config"),
    "plot_token_bars": lambda: plotting.plot_token_bars({"one": PROBS, "two": PROBS.flip(0)}, TOKENS, top=3),
    "plot_temperatures": lambda: plotting.plot_temperatures({0.5: PROBS, 2.0: PROBS.flip(0)}, TOKENS, top=2),
    "plot_entropy": lambda: plotting.plot_entropy([0.1, 1.0, 2.0], [0.0, 1.5, 2.0], limit=2.3),
    "plot_kept": lambda: plotting.plot_kept(PROBS, {"x": PROBS > 0.25, "y": PROBS > 0.05}, TOKENS, top=4),
    "plot_inverse_cdf": lambda: plotting.plot_inverse_cdf(PROBS, 0.55, TOKENS),
    "plot_draws": lambda: plotting.plot_draws(PROBS, [1, 1, 4, 3, 1, 0, 0, 4, 1, 4], TOKENS, top=3),
    "plot_memory_split": lambda: plotting.plot_memory_split(10, [0.1, 0.5, 1.0], 2 * GIB, 2**20, block_size=1000),
    "plot_block_waste": lambda: plotting.plot_block_waste([3, 5, 8], [1, 4, 16]),
    "plot_dtype_errors": lambda: plotting.plot_dtype_errors({"a": torch.tensor([1e-3, 1e-5]), "b": [1e-2, 1e-4]}),
    "plot_state_machine": plotting.plot_state_machine,
    "plot_timeline": lambda: plotting.plot_timeline(
        {
            "s-0": ["waiting", "running", "running", "finished_stopped"],
            "s-1": ["waiting", "waiting", "running", "finished_length_capped"],
        }
    ),
    "plot_cumulative_logprobs": lambda: plotting.plot_cumulative_logprobs({"s-0": [-1.0, -0.5], "s-1": [-0.25] * 3}),
    "plot_fork_blocks": lambda: plotting.plot_fork_blocks(40, 8, 16, [1, 4]),
    "plot_weights_by_layer": lambda: plotting.plot_weights_by_layer(SMALL),
    "plot_weights_by_dtype": lambda: plotting.plot_weights_by_dtype(
        {"L": LARGE, "M": LARGE}, {"float32": 32, "4-bit": 4}
    ),
    "plot_measured_against_predicted": lambda: plotting.plot_measured_against_predicted(
        [10, 20], {"loaded": [1.0, 2.0], "read": [11.0, 19.0]}
    ),
    "plot_kv_capacity": lambda: plotting.plot_kv_capacity(
        {"A": 2**17, "B": 2**18}, {"A": 2**19, "B": 2**18}, {"A": 8 * GIB, "B": 99 * GIB}, 10, 1024
    ),
    "plot_tokens_computed": lambda: plotting.plot_tokens_computed([5, 6, 7], [5, 1, 1]),
    "plot_pass_times": lambda: plotting.plot_pass_times([1, 7, 16], [0.02, 0.03, 0.06], 0.02),
    "plot_steps": lambda: plotting.plot_steps([step(7, 0, 2), step(0, 2, 2), step(3, 1, 2)]),
    "plot_along_text": lambda: plotting.plot_along_text({"m": [1.0, 0.5, 1.0], "g": [1.0, 0.6, 0.9]}, "p", choices=[1]),
}
"""A small example of each figure; the tests below know its numbers."""


LATER = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_figures_*.py"))]
"""A file for the figures of each later subject, with ``FIGURES`` and ``test_numbers_of_…`` as here."""

EXAMPLES = {
    name: example for figures in (FIGURES, *(module.FIGURES for module in LATER)) for name, example in figures.items()
}


def drawn(name: str) -> Any:
    """The Axes of an example: one, or a list."""
    axes = FIGURES[name]()
    return axes if isinstance(axes, Axes) else list(axes.flat)


def test_every_figure_of_the_book_is_tested() -> None:
    plots = {name for name, _ in inspect.getmembers(plotting, inspect.isfunction) if name.startswith("plot_")}
    assert plots == set(EXAMPLES), "add an example of each new figure to FIGURES, and a test of its numbers"
    names = [name for module in (sys.modules[__name__], *LATER) for name in vars(module)]
    tested = {name.removeprefix("test_numbers_of_") for name in names if name.startswith("test_numbers_of_")}
    assert tested == {name.removeprefix("plot_") for name in plots}, "test the numbers of each figure"


# The numbers


def test_numbers_of_path() -> None:
    ax = drawn("plot_path")
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    filled = [station for station, box in zip(PATH, boxes) if to_hex(box.get_facecolor()) != "#ffffff"]
    assert len(boxes) == len(PATH) == 8
    assert filled == ["model", "sampler"]
    assert texts(ax) == [*PATH, "each new token goes back in", "a config"]
    assert len(plotting.plot_path("Request").texts) == len(texts(ax)) - 1 + 8  # no banner; the 8 arrows are empty texts


def test_numbers_of_token_bars() -> None:
    ax = drawn("plot_token_bars")
    # The first series decides the order: tokens 1, 4, 3 with 0.4, 0.3, 0.2.
    assert widths(ax, "one") == [0.4, 0.3, 0.2]
    assert widths(ax, "two") == [0.2, 0.1, 0.4]
    assert ticks(ax.yaxis) == ["b", "<x>", "#3"]
    assert ax.yaxis_inverted()
    assert bottoms(ax, "one") == [-0.4, 0.6, 1.6]
    assert bottoms(ax, "two") == [0.0, 1.0, 2.0]
    assert legend(ax) == ["one", "two"]


def test_numbers_of_temperatures() -> None:
    ax = drawn("plot_temperatures")
    assert ticks(ax.yaxis) == ["T = 0.5", "T = 2"]
    assert widths(ax, "b") == [0.4, 0.2]
    assert widths(ax, "<x>") == [0.3, 0.1]
    assert lefts(ax, "<x>") == [0.4, 0.2]
    assert widths(ax, "all others") == [0.3, 0.7]
    assert lefts(ax, "all others") == [0.7, 0.3]
    assert ax.get_xlim() == (0, 1)
    assert legend(ax) == ["b", "<x>", "all others"]


def test_numbers_of_entropy() -> None:
    ax = drawn("plot_entropy")
    assert line(ax) == ([0.1, 1.0, 2.0], [0.0, 1.5, 2.0])
    assert list(ax.lines[1].get_ydata()) == [2.3, 2.3]
    assert ax.get_ylim()[0] == 0 < 2.3 < ax.get_ylim()[1]


def test_numbers_of_kept() -> None:
    first, second = drawn("plot_kept")
    assert heights(first) == [0.4, 0.3, 0.2, 0.1]
    assert heights(second) == [0.4, 0.3, 0.2, 0.1]
    white = [[to_hex(bar.get_facecolor()) == "#ffffff" for bar in bars(ax)] for ax in (first, second)]
    assert white == [[False, False, True, True], [False] * 4]
    assert first.get_title(loc="left") == "x: keeps 2 of 5"
    assert second.get_title(loc="left") == "y: keeps 4 of 5"
    assert ticks(second.xaxis) == ["b", "<x>", "#3", "␣a"]


def test_numbers_of_inverse_cdf() -> None:
    ax = drawn("plot_inverse_cdf")
    # Token 2 is impossible and not shown; 0.55 lies between 0.1 + 0.4 and 0.1 + 0.4 + 0.2, in the slice of token 3.
    assert ticks(ax.xaxis) == ["␣a", "b", "#3", "<x>"]
    assert heights(ax, "its own probability") == [0.1, 0.4, 0.2, 0.3]
    assert bottoms(ax, "its own probability") == [0, 0.1, 0.5, 0.7]
    assert heights(ax, "all tokens before it") == [0, 0.1, 0.5, 0.7]
    colors = [to_hex(bar.get_facecolor()) for bar in bars(ax, "its own probability")]
    assert [color == colors[2] for color in colors] == [False, False, True, False]
    assert texts(ax) == ["u = 0.550"]
    arrow = next(text for text in ax.texts if not text.get_text())
    assert arrow.xy == (2, 0.55)
    assert [label.get_weight() == "bold" for label in ax.get_xticklabels()] == [False, False, True, False]


@pytest.mark.parametrize("u, hit", [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.4999, 1), (0.6999, 2), (0.999, 3)])
def test_the_arrow_hits_the_token_that_would_be_drawn(u: float, hit: int) -> None:
    from folovllm.sample.sampler import draw

    ax = plotting.plot_inverse_cdf(PROBS, u, TOKENS)
    shown = [0, 1, 3, 4][next(int(text.xy[0]) for text in ax.texts if not text.get_text())]
    assert shown == [0, 1, 3, 4][hit] == int(draw(PROBS[None], [u]))


def test_numbers_of_draws() -> None:
    ax = drawn("plot_draws")
    assert heights(ax, "drawn, of 10") == [4, 3, 1]  # tokens 1, 4 and 3
    _, _, (spread,) = next(group for group in ax.containers if hasattr(group, "has_yerr"))
    low, high = np.array([segment[:, 1] for segment in spread.get_segments()]).T
    expected, deviation = [4, 3, 2], [math.sqrt(2.4), math.sqrt(2.1), math.sqrt(1.6)]
    assert (low + high) / 2 == pytest.approx(expected, rel=1e-6)
    assert (high - low) / 4 == pytest.approx(deviation, rel=1e-6)
    assert ticks(ax.xaxis) == ["b", "<x>", "#3"]


def test_numbers_of_memory_split() -> None:
    ax = drawn("plot_memory_split")
    # 10 GiB, weights of 2: at 0.1 they do not fit, at 0.5 three GiB are left, at 1.0 eight.
    assert heights(ax, "weights") == [2, 2, 2]
    assert heights(ax, "KV cache") == [0, 3, 8]
    assert bottoms(ax, "KV cache") == [2, 2, 2]
    assert heights(ax, "left to others") == [8, 5, 0]
    assert bottoms(ax, "left to others") == [2, 5, 10]
    # A MiB a token, blocks of 1,000 tokens: of 3,072 MiB three blocks, of 8,192 eight.
    assert texts(ax) == ["does not fit", "3,000 tokens", "8,000 tokens"]
    assert ticks(ax.xaxis) == ["0.1", "0.5", "1"]


def test_numbers_of_block_waste() -> None:
    ax = drawn("plot_block_waste")
    # 3 + 5 + 8 = 16 tokens; blocks of 4 reserve 4 + 8 + 8 = 20 slots, blocks of 16 reserve 48.
    assert heights(ax, "hold a token") == [1, 16 / 20, 16 / 48]
    assert heights(ax, "reserved and empty") == [0, 4 / 20, 32 / 48]
    assert bottoms(ax, "reserved and empty") == [1, 16 / 20, 16 / 48]
    assert texts(ax) == ["0%", "20%", "67%"]
    assert ticks(ax.xaxis) == ["1", "4", "16"]


def test_numbers_of_dtype_errors() -> None:
    ax = drawn("plot_dtype_errors")
    assert line(ax, "a") == ([1, 2], [1e-3, 1e-5])
    assert line(ax, "b") == ([1, 2], [1e-2, 1e-4])
    assert ax.get_yscale() == "log"


def test_numbers_of_state_machine() -> None:
    from folovllm.request import SequenceStatus

    ax = drawn("plot_state_machine")
    names = {status.value.replace("finished_", "").replace("_", " ").upper() for status in SequenceStatus}
    assert names <= set(texts(ax)), "every status has a box"
    moves = {"scheduled", "preempted", "swapped out", "swapped in", "finished", "aborted", "ranked"}
    assert moves <= set(texts(ax))
    assert sum(text.arrow_patch is not None for text in ax.texts if hasattr(text, "arrow_patch")) == len(moves)
    assert set(STATUS_COLORS) == {status.value for status in SequenceStatus}


def test_numbers_of_timeline() -> None:
    ax = drawn("plot_timeline")
    found = [
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor()).upper())
        for bar in bars(ax)
        if bar.get_width()
    ]
    waiting, running, stopped, capped = (
        STATUS_COLORS[name] for name in ("waiting", "running", "finished_stopped", "finished_length_capped")
    )
    assert found == [
        (0, 0, 1, waiting),
        (0, 1, 2, running),
        (0, 3, 1, stopped),
        (1, 0, 2, waiting),
        (1, 2, 1, running),
        (1, 3, 1, capped),
    ]
    assert ticks(ax.yaxis) == ["s-0", "s-1"]
    assert ax.yaxis_inverted()
    assert legend(ax) == ["waiting", "running", "stopped", "length capped"]
    assert ax.figure.alt.endswith("s-0 is stopped after step 3; s-1 is length capped after step 3.")


def test_a_sequence_may_return_to_a_state() -> None:
    history = ["waiting", "running", "swapped", "swapped", "running", "waiting", "running"]
    ax = plotting.plot_timeline({"s": history})
    shown: list[str | None] = [None] * len(history)
    for bar in bars(ax):
        for step in range(int(bar.get_x()), int(bar.get_x() + bar.get_width())):
            shown[step] = to_hex(bar.get_facecolor()).upper()  # a later bar covers an earlier one
    assert shown == [STATUS_COLORS[status] for status in history]


def test_numbers_of_cumulative_logprobs() -> None:
    ax = drawn("plot_cumulative_logprobs")
    assert line(ax, "s-0") == ([1, 2], [-1.0, -1.5])
    assert line(ax, "s-1") == ([1, 2, 3], [-0.25, -0.5, -0.75])


def test_numbers_of_fork_blocks() -> None:
    ax = drawn("plot_fork_blocks")
    # 48 tokens are 3 blocks; 2 of them are full of prompt, and shared by all.
    assert heights(ax, "a copy each") == [3, 12]
    assert heights(ax, "prompt's full blocks shared") == [3, 6]
    assert texts(ax) == ["3", "3", "12", "6"]
    assert ticks(ax.xaxis) == ["1", "4"]


def test_numbers_of_weights_by_layer() -> None:
    ax = drawn("plot_weights_by_layer")
    assert ticks(ax.xaxis) == ["outside", "0", "1"]
    assert heights(ax, "embedding") == [2, 0, 0]
    assert heights(ax, "attention") == [0, 1, 0]
    assert heights(ax, "MLP") == [0, 3, 4]
    assert heights(ax, "norms") == [0.5, 0, 0.5]
    assert bottoms(ax, "MLP") == [2, 1, 0]
    assert bottoms(ax, "norms") == [2, 4, 4]


def test_numbers_of_weights_by_dtype() -> None:
    first, second = drawn("plot_weights_by_dtype")
    for ax in (first, second):
        # 2**28 weights are 1 GiB in float32 and an eighth of it in four bits; embeddings keep 16, half of it.
        assert widths(ax, "embedding") == [1, 0.5]
        assert widths(ax, "attention") == [2, 0.25]
        assert widths(ax, "MLP") == [4, 0.5]
        assert widths(ax, "norms") == [0, 0]
        assert lefts(ax, "MLP") == [3, 0.75]
        assert texts(ax) == ["7.0", "1.2"]
        assert ticks(ax.yaxis) == ["float32", "4-bit"]
    assert first.get_title(loc="left") == "L: 1.88 billion weights"


def test_numbers_of_measured_against_predicted() -> None:
    ax = drawn("plot_measured_against_predicted")
    assert line(ax, "loaded") == ([10, 20], [1, 2])
    assert line(ax, "read") == ([10, 20], [11, 19])
    diagonal = line(ax, "measured = predicted")
    assert diagonal[0] == [0, 22] and diagonal[1] == [0, 22]
    assert ax.get_xlim() == (0, 22)


def test_numbers_of_kv_capacity() -> None:
    ax = drawn("plot_kv_capacity")
    # Of 10 GiB nine may be used; A's weights leave one, and 1,024 tokens of 128 KiB are an eighth of it.
    # Without grouped heads a token has 512 KiB.
    assert widths(ax) == [512, 128, 256, 256]
    assert texts(ax) == ["8 texts fit, not 2", "weights do not fit"]
    assert ticks(ax.yaxis) == ["A", "B"]
    assert legend(ax) == ["without grouped heads", "as it is"]


def test_weights_that_fit_alone_leave_room_for_no_sequence() -> None:
    ax = plotting.plot_kv_capacity({"A": 2**20}, {"A": 2**21}, {"A": 9 * GIB - 2**20}, 10, 1024)
    assert texts(ax) == ["no text fits"], "the weights do fit; what does not is a single text"


def test_numbers_of_tokens_computed() -> None:
    ax = drawn("plot_tokens_computed")
    first, second = ax.lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 3], [5, 11, 18])
    assert list(second.get_ydata()) == [5, 6, 7]
    assert texts(ax) == ["without a cache: 18", "with a cache: 7"]


def test_numbers_of_pass_times() -> None:
    ax = drawn("plot_pass_times")
    # The pass with a cache, 0.02 s, is the unit.
    assert line(ax, "without a cache: the whole text") == ([1, 7, 16], [1, 1.5, 3])
    assert line(ax, "with a cache: the newest token") == ([1], [1])
    (proportional,) = (found for found in ax.lines if found.get_label() == "if each token cost as much as the first")
    assert list(proportional.get_xdata()) == list(proportional.get_ydata())
    assert ax.get_ylim()[0] == 0


def test_numbers_of_steps() -> None:
    ax = drawn("plot_steps")
    assert heights(ax, "decode") == [0, 2, 1] and heights(ax, "prefill") == [7, 0, 3]
    assert bottoms(ax, "prefill") == [0, 2, 1]


def test_numbers_of_along_text() -> None:
    ax = drawn("plot_along_text")
    assert line(ax, "m") == ([0, 1, 2], [1.0, 0.5, 1.0])
    assert line(ax, "g") == ([0, 1, 2], [1.0, 0.6, 0.9])
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(0.5, 1)]
    assert ax.get_ylabel() == "p"


def test_a_wrong_number_behind_a_figure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    test_numbers_of_memory_split()
    monkeypatch.setattr(plotting.configs, "GIB", 10**9)
    with pytest.raises(AssertionError):
        test_numbers_of_memory_split()


# Legibility


@functools.cache
def figure_of(name: str) -> tuple[Figure, list[str]]:
    """The figure of an example, drawn, so that everything in it has its place; and what was warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = np.atleast_1d(EXAMPLES[name]()).flat[0].get_figure()
        figure.canvas.draw()
    return figure, [str(warning.message) for warning in caught]


def written(figure: Figure) -> list[Text]:
    """Every text that can be seen."""
    beyond = set()  # labels of ticks beyond the ends of their axis, which matplotlib keeps and does not draw
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not ax.axison or not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in found if text not in beyond]


@pytest.mark.parametrize("name", EXAMPLES)
class TestLegibility:
    def test_it_gives_back_axes_and_leaves_the_readers_settings_alone(self, name: str) -> None:
        before = dict(matplotlib.rcParams)
        axes = EXAMPLES[name]()
        assert isinstance(axes, Axes) or (isinstance(axes, np.ndarray) and all(isinstance(a, Axes) for a in axes.flat))
        assert dict(matplotlib.rcParams) == before

    def test_the_font_has_every_letter(self, name: str) -> None:
        _, warned = figure_of(name)
        assert not [text for text in warned if "glyph" in text.lower()]

    def test_it_is_legible_on_a_phone(self, name: str) -> None:
        figure, _ = figure_of(name)
        assert figure.get_figwidth() <= 7, "wider figures are shrunk on the page, and their letters with them"
        small = {text.get_text(): text.get_fontsize() for text in written(figure) if text.get_fontsize() < 9}
        assert not small, f"letters below 9 pt: {small}"

    def test_nothing_is_written_outside_or_over_something_else(self, name: str) -> None:
        figure, _ = figure_of(name)
        frame, boxes = figure.bbox.padded(8), [(text, text.get_window_extent()) for text in written(figure)]
        inside = [frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for _, b in boxes]
        outside = [text.get_text() for (text, _), ok in zip(boxes, inside) if not ok]
        assert not outside, f"outside of the figure: {outside}"
        upright = [(text.get_text(), box.padded(-1)) for text, box in boxes if text.get_rotation() == 0]
        over = [(a, b) for i, (a, one) in enumerate(upright) for b, two in upright[i + 1 :] if one.overlaps(two)]
        assert not over, f"written over each other: {over}"

    def test_its_colors_come_from_the_palette(self, name: str) -> None:
        allowed = INK | {color.lower() for color in PALETTE}
        figure, _ = figure_of(name)
        for ax in figure.axes:
            used = {to_hex(thing.get_color()) for thing in [*ax.lines, *ax.texts]}
            for patch in ax.patches:
                used |= {to_hex(patch.get_facecolor()), to_hex(patch.get_edgecolor())}
            foreign = {color for color in used - allowed if not any(is_darker(color, other) for other in PALETTE)}
            assert not foreign, f"neither of the palette nor a darker shade of it: {foreign}"

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_its_letters_stand_out(self, name: str, theme: str) -> None:
        """WCAG 2 asks for a contrast of 4.5 to the ground, and of 3 for large letters."""
        figure, weak = figure_of(name)[0], {}
        with contextlib.nullcontext() if theme == "light" else book_figure.darkened(figure):
            for text, grounds in grounds_of(figure):
                large = text.get_fontsize() >= 18 or (text.get_fontsize() >= 14 and text.get_weight() == "bold")
                for ground in grounds:
                    if contrast(text.get_color(), ground) < (3 if large else 4.5):
                        says = f"{to_hex(text.get_color())} on {ground}, {contrast(text.get_color(), ground):.1f}"
                        weak[text.get_text().strip()] = says
        assert not weak, f"too pale: {weak}"

    def test_it_says_what_it_shows(self, name: str) -> None:
        """For those who do not see it: the figure's text, which the notebook stores and the page has as alt text."""
        alt = repr(figure_of(name)[0])
        assert 40 <= len(alt) <= 600 and alt[0].isupper() and alt.endswith("."), f"set ax.figure.alt: {alt!r}"
        assert "nan" not in alt.split() and "\n" not in alt, alt

    def test_its_dark_picture_is_as_large(self, name: str) -> None:
        figure = figure_of(name)[0]
        figure.set_layout_engine("none")  # else each drawing may move the layout a little
        before, light = picture_of(figure), io.BytesIO()
        figure.savefig(light, format="png", dpi=figure.dpi, bbox_inches="tight")
        with Image.open(light) as one, Image.open(io.BytesIO(book_figure.draw_dark(figure))) as other:
            assert one.size == other.size
            assert to_hex(np.array(other.getpixel((2, 2))[:3]) / 255) == book_figure.DARK_PAPER
        assert (picture_of(figure) == before).all(), "the figure did not get its own colours back"


def test_a_marker_whose_edge_follows_its_line_gets_its_own_colour_back() -> None:
    with style.new_figure() as ax:
        (cross,) = ax.plot([0], [0], "x", color="black")
    with book_figure.darkened(ax.figure):
        assert to_hex(cross.get_markeredgecolor()) != "#000000"
    assert to_hex(cross.get_markeredgecolor()) == "#000000"


def picture_of(figure: Figure) -> np.ndarray:
    """The pixels of a figure, ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)  # a figure that was closed has another one
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def grounds_of(figure: Figure) -> list[tuple[Text, list[str]]]:
    """What each text is written on: the colours of at least a fifth of its box, were it not there."""
    letters = written(figure)
    before = [text.get_alpha() for text in letters]
    for text in letters:
        text.set_alpha(0)
    pixels = picture_of(figure)
    found = []
    for text, alpha in zip(letters, before):
        text.set_alpha(alpha)
        box = text.get_window_extent()
        top, bottom = (round(len(pixels) - y) for y in (box.y1, box.y0))
        part = pixels[max(top, 0) : bottom, max(round(box.x0), 0) : round(box.x1)].reshape(-1, 3)
        colors, counts = np.unique(part @ [1 << 16, 1 << 8, 1], return_counts=True)
        found.append((text, [f"#{color:06x}" for color, n in zip(colors, counts) if n >= 0.2 * len(part)]))
    return found


def test_no_number_is_typed_into_a_description() -> None:
    """Beside a number that is typed, the plotted one changes unseen."""
    for path in sorted(Path(plotting.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", None) == "alt":
                formats = {
                    id(c)
                    for f in ast.walk(node.value)
                    if isinstance(f, ast.FormattedValue) and f.format_spec
                    for c in ast.walk(f.format_spec)
                }
                typed = [
                    c.value
                    for c in ast.walk(node.value)
                    if isinstance(c, ast.Constant) and isinstance(c.value, str) and id(c) not in formats
                ]
                wrong = [text for text in typed if any(char.isdigit() for char in text)]
                assert not wrong, f"{path.name}, line {node.lineno}: {wrong} has a number that is not the plot's"


def test_sentences_are_made_of_numbers() -> None:
    assert style.listed(["a"]) == "a"
    assert style.listed(["a", 2, "c"]) == "a, 2 and c"
    assert style.course([1.0, 7.0, 5.0]) == "rises from 1 to 5"
    assert style.course([5, 1.2345], [0, 9]) == "falls from 5 at 0 to 1.23 at 9"
    assert style.course([2, 9, 2]) == "begins and ends at 2"


def test_colors_of_a_dark_page() -> None:
    assert to_hex(book_figure.dark_color("white")) == book_figure.DARK_PAPER
    assert book_figure.dark_color("none") == "none"
    for color in (*PALETTE, style.GREY):
        assert book_figure.dark_color(color) == color, "data keeps its colour"
        assert contrast(color, book_figure.DARK_PAPER) >= 3, "and can be seen on the dark page, as WCAG 2 asks of lines"
        darker = [0.6 * part for part in to_rgb(color)]
        assert luminance(book_figure.dark_color(darker)) > luminance(color), "a darker shade becomes a lighter one"
    assert book_figure.dark_color((1, 1, 1, 0.5))[3] == 0.5
    stripe = book_figure.dark_color((*to_rgb(style.YELLOW), 0.45))[3]
    ground = [stripe * y + (1 - stripe) * d for y, d in zip(to_rgb(style.YELLOW), to_rgb(book_figure.DARK_PAPER))]
    assert contrast(style.BLUE, ground) > 2.5, "a line can be seen on a stripe"


def test_no_two_requests_have_nearly_the_same_colour():
    for colors in (REQUEST_COLORS, DARK_REQUEST_COLORS):
        shades = [np.array(to_rgb(color)) for color in colors]
        assert min(np.abs(a - b).sum() for a, b in itertools.combinations(shades, 2)) > 0.25
    assert [to_hex(book_figure.dark_color(color)) for color in REQUEST_COLORS] == [
        c.lower() for c in DARK_REQUEST_COLORS
    ]


INK = {"#000000", "#111111", "#333333", "#555555", "#cccccc", "#ffffff", style.GREY.lower(), style.LIGHT.lower()}
"""Black, greys and white, beside the palette."""


def is_darker(color: str, other: str) -> bool:
    """Whether a colour is a darker shade of another one, as letters need it on a white ground."""
    shade, full = np.array(to_rgb(color)), np.array(to_rgb(other))
    factor = float(shade @ full / (full @ full))
    return factor < 1 and bool(np.allclose(shade, factor * full, atol=0.01))


def luminance(color: Any) -> float:
    """How light a colour is, as WCAG 2 counts it."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: Any, other: Any) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_counted_as_wcag_does() -> None:
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)


def test_the_palette_is_that_of_okabe_and_ito() -> None:
    published = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(PALETTE) == published and len(PALETTE) == 7


DRAWABLE = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
"""matplotlib's own font, which is there on every machine."""


def can_be_drawn(label: str) -> bool:
    return bool(label.strip()) and all(DRAWABLE.get_char_index(ord(char)) for char in label)


@pytest.mark.parametrize("token_id", range(len(Tokens.TEXTS)), ids=[repr(text) for text in Tokens.TEXTS])
def test_any_token_has_a_label_that_can_be_drawn(token_id: int) -> None:
    """Also a control character, dollars (matplotlib's mathematics), an underscore (left out of legends)."""
    assert can_be_drawn(style.token_label(TOKENS, token_id))
    probs = torch.zeros(len(Tokens.TEXTS))
    probs[token_id] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plotting.plot_temperatures({1.0: probs}, TOKENS, top=1)
        ax.get_figure().canvas.draw()
    assert len(legend(ax)) == 2, "the token is missing in the legend"
    assert not any(text.get_text().count("$") > text.get_text().count(r"\$") for text in ax.get_legend().get_texts())


def test_every_token_of_the_embedded_model_has_a_label() -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    labels = [style.token_label(tokenizer, token_id) for token_id in range(tokenizer.get_vocab_size())]
    missing = sorted({label for label in labels if not can_be_drawn(label)})
    assert not missing, f"{len(missing)} labels cannot be drawn: {missing[:9]}"
