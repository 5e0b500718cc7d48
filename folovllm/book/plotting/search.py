"""Figures of chapter 17: the tree of a beam search, the blocks it shares, and what its width is good for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator

from folovllm.book.plotting.style import (
    BLUE,
    DARK_RED,
    GREY,
    ON_LIGHT_FILL,
    ORANGE,
    PALETTE,
    SKY,
    listed,
    new_figure,
    to_array,
    token_label,
)
from folovllm.book.searching import SearchStep
from folovllm.outputs import BeamSearchSequence

MARKERS = "osD^v"


def plot_beam_tree(steps: Sequence[SearchStep], tokenizer: Any, best: Sequence[int]) -> Axes:
    """The texts of a beam after each step, each with its newest token and the probability of the whole.

    Args:
        steps: of one search.
        tokenizer: its model's.
        best: the tokens of the text to follow through the tree.
    """
    num_rows = max(len(step.texts) for step in steps)
    kinds = {"the best at the end": BLUE, "goes on": SKY, "has ended": ORANGE, "is dropped": "white"}
    rows_of_best, num_dropped = [], 0
    with new_figure(1.3 + 0.72 * num_rows) as ax:
        for i, step in enumerate(steps):
            alive = {*steps[i + 1].parents} if i + 1 < len(steps) else set(range(len(step.texts)))
            for row, (text, parent) in enumerate(zip(step.texts, step.parents)):
                on_path = text.tokens == [*best[: len(text.tokens)]]
                has_ended = text.finish_reason == "stop"
                is_dropped = not (on_path or has_ended or row in alive)
                rows_of_best += [row] if on_path else []
                num_dropped += is_dropped
                color = BLUE if on_path else ORANGE if has_ended else "white" if is_dropped else SKY
                letters = "white" if on_path else "#555555" if is_dropped else ON_LIGHT_FILL
                box = FancyBboxPatch((i - 0.36, row - 0.3), 0.72, 0.6, boxstyle="round,pad=0.03", lw=1.2, zorder=2)
                box.set(facecolor=color, edgecolor=GREY if is_dropped else color)
                ax.add_patch(box)
                shown = f"{_label(tokenizer, text)}\n{math.exp(text.cum_logprob):.3f}"
                ax.text(i, row, shown, ha="center", va="center", color=letters, size=10.5, linespacing=1.1, zorder=3)
                if i:
                    look = {"color": BLUE, "lw": 2.5} if on_path else {"color": GREY, "lw": 1.2}
                    ax.plot([i - 0.61, i - 0.39], [parent, row], zorder=1, **look)
        ax.set(xlim=(-0.5, len(steps) - 0.5), ylim=(num_rows - 0.45, -0.55), xlabel="token", yticks=[])
        ax.set_xticks(range(len(steps)), [str(i + 1) for i in range(len(steps))])
        ax.spines["left"].set_visible(False)
        patches = [Patch(facecolor=color, edgecolor=GREY, label=name) for name, color in kinds.items()]
        look_of_legend = {"ncols": len(kinds), "fontsize": 10.5, "handlelength": 1, "columnspacing": 1}
        ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(-0.02, 1), **look_of_legend)
        path = [steps[i].texts[row] for i, row in enumerate(rows_of_best)]
        ax.figure.alt = (
            f"Tree of a beam along {len(steps)} tokens; each box is a text, with its newest token and its probability "
            f"so far. {num_dropped} texts are dropped. The best one, {' '.join(_label(tokenizer, t) for t in path)!r}, "
            f"has a probability of {math.exp(path[-1].cum_logprob):.3f}, and it stands in rows "
            f"{listed(row + 1 for row in rows_of_best)} of the drawing, where texts that end stand below all others."
        )
    return ax


def _label(tokenizer: Any, text: BeamSearchSequence) -> str:
    return "end" if text.finish_reason == "stop" else token_label(tokenizer, text.tokens[-1])


def plot_search_blocks(steps: Sequence[SearchStep]) -> Axes:
    """The blocks of the cache along the steps of a search: in the tables of all texts, of several, or of one."""
    used = sorted({block_id for step in steps for table in step.tables for block_id in table})
    kinds = {"in the table of every text": BLUE, "of several": SKY, "of one": ORANGE}
    counts = [{block_id: sum(block_id in table for table in step.tables) for block_id in used} for step in steps]
    with new_figure(min(1.5 + 0.16 * len(used), 6.5)) as ax:
        for i, (step, count) in enumerate(zip(steps, counts)):
            for row, block_id in enumerate(used):
                if count[block_id]:
                    is_all = count[block_id] == len(step.tables) > 1
                    color = BLUE if is_all else SKY if count[block_id] > 1 else ORANGE
                    ax.broken_barh([(i, 1)], (row - 0.45, 0.9), facecolor=color, edgecolor="white", linewidth=0.5)
        ax.set(xlim=(0, len(steps)), ylim=(len(used) - 0.4, -0.6), xlabel="step", ylabel="block")
        ax.set_yticks(range(0, len(used), 5), [str(used[row]) for row in range(0, len(used), 5)])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(
            handles=[Patch(color=color, label=label) for label, color in kinds.items()],
            loc="lower left",
            bbox_to_anchor=(-0.05, 1),
            ncols=3,
            fontsize=10.5,
            handlelength=1,
            columnspacing=1,
        )
        in_tables = [sum(count.values()) for count in counts]
        different = [sum(value > 0 for value in count.values()) for count in counts]
        worst = int(np.argmax(in_tables))
        ax.figure.alt = (
            f"Map of {len(used)} blocks along {len(steps)} steps of a search. In step {worst} the tables of "
            f"{len(steps[worst].tables)} texts have {in_tables[worst]} entries, which are {different[worst]} different "
            f"blocks, {sum(value == len(steps[worst].tables) for value in counts[worst].values())} of them in every "
            "table."
        )
    return ax


def plot_width(widths: Sequence[int], lines: Mapping[str, Sequence[float]], ylabel: str, best: float) -> Axes:
    """Something that grows better with the width of a beam, or does not.

    Args:
        widths: texts kept after each step.
        lines: what was searched -> a number for each width.
        ylabel: what the numbers are.
        best: what no search can surpass.
    """
    with new_figure(3.6) as ax:
        for (name, values), color, marker in zip(lines.items(), PALETTE, MARKERS):
            ax.plot(widths, values, color=color, lw=2, marker=marker, ms=6, label=name)
        ax.axhline(best, color=GREY, lw=1.5, ls="--", zorder=0, label="the best there is")
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.minorticks_off()
        ax.set(xlabel="width of the beam", ylabel=ylabel)
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.05, 1))
        told = "; ".join(f"{name} {listed(f'{value:.3g}' for value in values)}" for name, values in lines.items())
        ax.figure.alt = (
            f"Lines of {' '.join(ylabel.split())}, for widths of the beam of {listed(widths)}: {told}. "
            f"The best there is: {best:.3g}."
        )
    return ax


def plot_likelihoods(drawn: Sequence[float], marks: Mapping[str, float]) -> Axes:
    """How likely texts are that were drawn, and how likely those are that were searched for.

    Args:
        drawn: log probability of each text drawn, in nats.
        marks: name of another text -> its log probability.
    """
    values = to_array(drawn)
    with new_figure(3.6) as ax:
        edges = np.arange(math.floor(min(values)), math.ceil(max(values)) + 1)
        ax.hist(values, edges, color=SKY, edgecolor="white", linewidth=0.5)
        top = ax.get_ylim()[1]
        ax.set(ylim=(0, 1.28 * top))
        # The tallest is the rightmost, so that its name, on its left, stands above the others.
        for i, (name, value) in enumerate(sorted(marks.items(), key=lambda mark: -mark[1])):
            height = (1.2 - 0.13 * i) * top
            ax.plot([value, value], [0, height], color=DARK_RED, lw=2)
            ax.text(value, height, f"{name} ", ha="right", va="center", color=DARK_RED, size=11)
        ax.set(xlabel="log probability of the whole text (nats)", ylabel=f"of {len(values)} texts drawn")
        told = "; ".join(
            f"{name} at {value:.3g}, with {np.sum(values >= value)} of them at least as likely"
            for name, value in marks.items()
        )
        ax.figure.alt = (
            f"Histogram of the log probabilities of {len(values)} texts that were drawn, from {min(values):.3g} to "
            f"{max(values):.3g} nats, half of them below {np.median(values):.3g}. Marked are {told}."
        )
    return ax
