"""Figures of guessing and checking: what was guessed, how often it was right, and what it gives. Chapter 16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.book.plotting.style import (
    BLUE,
    GREEN,
    GREY,
    ON_LIGHT_FILL,
    ORANGE,
    SKY,
    new_figure,
    to_array,
    token_label,
)
from folovllm.book.recording import CheckedGuesses

STYLES, MARKERS = ("-", "--", ":", "-."), "os^D"
"""Of lines and dots that have one colour."""

LINE_WIDTH = 52
"""Characters in a line of `plot_guesses`."""


def expected_tokens(acceptance_rate: float, num_guesses: int) -> float:
    """Tokens per pass if each guess is right with this probability, whatever the others are (Leviathan et al. 2023)."""
    return sum(acceptance_rate**place for place in range(num_guesses + 1))


def plot_guesses(passes: Sequence[CheckedGuesses], tokenizer: Any) -> Axes:
    """A text as the passes gave it: a line begins each pass, accepted guesses are green, the model's own light blue."""
    num_guessed = sum(found.num_accepted for found in passes)
    num_tokens = sum(len(found.tokens) for found in passes)
    boxes, column, row = [], 0, 0
    for found in passes:
        for place, token_id in enumerate(found.tokens):
            label = token_label(tokenizer, token_id)
            if column + len(label) > LINE_WIDTH:
                column, row = 0, row + 1
            boxes.append((column, row, label, place < found.num_accepted, place == 0))
            column += len(label)
    with new_figure(0.7 + 0.34 * (row + 1)) as ax:
        for column, row, label, is_guess, begins in boxes:
            color = GREEN if is_guess else SKY
            ax.add_patch(Rectangle((column, row - 0.4), len(label), 0.8, facecolor=color, edgecolor="white", lw=0.8))
            ax.text(
                column + len(label) / 2, row, label, ha="center", va="center", fontsize=9, family="monospace",
                color=ON_LIGHT_FILL,
            )  # fmt: skip
            if begins:
                ax.plot([column, column], [row - 0.48, row + 0.48], color=BLUE, lw=2.2, solid_capstyle="butt")
        for color, label in ((GREEN, "accepted guess"), (SKY, "the model's own")):
            ax.add_patch(Rectangle((0, 0), 0, 0, facecolor=color, label=label))
        ax.plot([], [], color=BLUE, lw=2.2, label="a pass begins")
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10, handlelength=1.2)
        ax.set(xlim=(-0.5, LINE_WIDTH + 0.5), ylim=(row + 0.6, -0.6))
        ax.axis("off")
        ax.figure.alt = (
            f"A text of {num_tokens} tokens in boxes, which {len(passes)} passes gave: {num_guessed} boxes are filled, "
            "the accepted guesses, and a line begins each pass."
        )
    return ax


def plot_overlap(labels: Sequence[str], model: Any, draft: Any) -> Axes:
    """The probabilities of some tokens by the model and by its draft; what both have in common is accepted.

    Args:
        labels: of the tokens.
        model: the model's probability of each.
        draft: the draft model's.
    """
    p, q = to_array(model), to_array(draft)
    common, places = np.minimum(p, q), np.arange(len(labels))
    with new_figure(3.6) as ax:
        ax.bar(places, common, color=GREEN, width=0.8, label="both: accepted")
        ax.bar(places, p - common, bottom=common, color=BLUE, width=0.8, label="model more: drawn after a refusal")
        ax.bar(places, q - common, bottom=common, color=ORANGE, width=0.8, label="draft more: refused")
        ax.set_xticks(places, labels, rotation=60, ha="right", fontsize=10)
        ax.set(ylabel="probability", ylim=(0, None))
        ax.legend(fontsize=10, loc="upper right")
        ax.figure.alt = (
            f"Bars of the probabilities of {len(labels)} tokens by a model and its draft: they have "
            f"{common.sum():.2f} in common, the model has {(p - common).sum():.2f} more and the draft "
            f"{(q - common).sum():.2f}."
        )
    return ax


def plot_tokens_per_pass(measured: Mapping[str, tuple[int, float, float]]) -> Axes:
    """Tokens per pass against the share of guesses that are right: the formula's curves, and what was measured.

    Args:
        measured: name -> (guesses per pass, acceptance rate, tokens per pass).
    """
    rates = np.linspace(0, 1, 101)
    with new_figure(3.8) as ax:
        for num, style in zip(sorted({num for num, _, _ in measured.values()}), STYLES):
            expected = [expected_tokens(rate, num) for rate in rates]
            ax.plot(rates, expected, style, color=GREY, lw=2, label=f"{num} guesses")
        for (name, (_, rate, tokens)), (color, nth) in zip(measured.items(), _colored(measured)):
            ax.plot([rate], [tokens], MARKERS[nth % 4], color=color, ms=8, zorder=3, label=name)
        ax.set(xlabel="acceptance rate of a guess", ylabel="tokens per pass", xlim=(0, 1.02), ylim=(1, None))
        ax.legend(loc="upper left", fontsize=10.5)
        said = "; ".join(
            f"{name}: {tokens:.2f} tokens per pass at a rate of {rate:.2f}, expected "
            f"{expected_tokens(rate, num):.2f} of {num} guesses"
            for name, (num, rate, tokens) in measured.items()
        )
        ax.figure.alt = (
            f"Curves of the tokens per pass that the formula expects, with dots for what was measured. {said}."
        )
    return ax


def _colored(names: Iterable[str]) -> list[tuple[str, int]]:
    """A colour for each: that of a draft model's guesses or of looked-up ones, and how many before it have it."""
    colors = [ORANGE if "draft" in name else BLUE for name in names]
    return [(color, colors[:i].count(color)) for i, color in enumerate(colors)]


def plot_gain(batches: Sequence[int], gains: Mapping[str, Sequence[float]]) -> Axes:
    """How many times as fast an answer comes with guessing, against the sequences in a step; below 1 it is slower."""
    with new_figure(3.8) as ax:
        ax.axhline(1, color=GREY, lw=1.2)
        for (name, values), (color, nth) in zip(gains.items(), _colored(gains)):
            style = MARKERS[nth % 4] + STYLES[nth % 4]
            ax.plot(batches, values, style, color=color, ms=4, lw=2, label=name)
        ax.set_xscale("log", base=2)
        marked = [batch for batch in batches if batch & (batch - 1) == 0 and batch.bit_length() % 2]
        ax.set_xticks(marked, [f"{batch:,}" for batch in marked])
        ax.minorticks_off()
        ax.set(xlabel="sequences in a step", ylabel="times as fast", ylim=(0, None))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=10.5)
        said = "; ".join(
            f"{name}: {values[0]:.1f} times as fast with {batches[0]}, {values[-1]:.1f} with {batches[-1]:,}"
            for name, values in gains.items()
        )
        ax.figure.alt = f"Lines of the gain by guessing against sequences in a step. {said}."
    return ax
