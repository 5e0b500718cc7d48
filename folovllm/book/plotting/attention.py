"""Figures of chapter 14: what reading a cache costs, a softmax in pieces, and what a captured step saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.in_place import OnlineSoftmax
from folovllm.book.plotting.style import (
    BLUE,
    GREY,
    LIGHT,
    ON_LIGHT_FILL,
    ORANGE,
    PALETTE,
    RED,
    SKY,
    course,
    listed,
    new_figure,
    to_array,
)

MARKERS = "osD^v"


def plot_bytes_moved(contexts: Sequence[int], moved: Mapping[str, Sequence[float]]) -> Axes:
    """Bytes that a layer's attention moves in one step, against the tokens of a text.

    Args:
        contexts: tokens of the text, or of the longest.
        moved: way to read the cache -> bytes for each context.
    """
    with new_figure(3.8) as ax:
        for (name, values), color, marker in zip(moved.items(), PALETTE, MARKERS):
            ax.plot(contexts, to_array(values) / 2**20, color=color, lw=2, marker=marker, ms=5, label=name)
        ax.set(xlabel="tokens of the longest text", ylabel="MiB moved in a layer", xlim=(0, None), ylim=(0, None))
        ax.set_xticks(contexts)
        ax.legend(loc="upper left")
        lines = "; ".join(
            f"{name}: {course([value / 2**20 for value in values], contexts)}" for name, values in moved.items()
        )
        ax.figure.alt = f"Lines of MiB moved in a layer against the tokens of the longest text. {lines}."
    return ax


def plot_online_softmax(
    scores: Any, block_size: int, steps: Sequence[OnlineSoftmax], unscaled: Sequence[OnlineSoftmax] = ()
) -> np.ndarray:
    """A softmax block by block: scores with the running maximum, the running sum, and one number of the average.

    Args:
        scores: ``[num_keys]``, of one query.
        block_size: keys per block.
        steps: the state after each block.
        unscaled: the states of one that forgets to rescale, to be drawn beside them.
    """
    row = to_array(scores)
    ends = [min((i + 1) * block_size, len(row)) for i in range(len(steps))]
    middles = [(i * block_size + end - 1) / 2 for i, end in enumerate(ends)]
    ways = {"rescaled": (steps, BLUE, "o")} | ({"never rescaled": (unscaled, RED, "X")} if unscaled else {})
    with new_figure(6.4, rows=3, sharex=True, height_ratios=(1.25, 1, 1)) as axes:
        for i, end in enumerate(ends):
            keys = np.arange(i * block_size, end)
            axes[0].bar(keys, row[keys], 0.8, color=(BLUE, SKY)[i % 2])
        maxima = [float(step.maximum) for step in steps]
        axes[0].stairs(maxima, np.array([0, *ends]) - 0.5, baseline=None, color=ORANGE, lw=2.5, label="maximum so far")
        axes[0].set(ylabel="score")
        for name, (states, color, marker) in ways.items():
            look = {"color": color, "marker": marker, "ms": 7, "lw": 1.5, "label": name}
            axes[1].plot(middles, [float(step.total) for step in states], **look)
            axes[2].plot(middles, [float(step.result()[0]) for step in states], **look)
        axes[1].set(ylabel="sum so far", ylim=(0, None))
        axes[2].axhline(float(steps[-1].result()[0]), color=GREY, lw=1.5, ls="--", zorder=0)
        starts = [i * block_size for i in range(len(steps))]
        axes[2].set(ylabel="average so far\n(first number)", xlabel=f"key, in blocks of {block_size}", xticks=starts)
        handles = [*axes[0].get_legend_handles_labels()[0], *axes[1].get_legend_handles_labels()[0]]
        axes[0].legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(-0.05, 1), fontsize=10.5)
        for ax in axes:
            for end in ends[:-1]:
                ax.axvline(end - 0.5, color=LIGHT, lw=1, zorder=0)
        told = "; ".join(
            f"{name}, the sum {course([float(step.total) for step in states])}, and the average ends at "
            f"{float(states[-1].result()[0]):.3g}"
            for name, (states, _, _) in ways.items()
        )
        axes[0].figure.alt = (
            f"Three panels along {len(row)} keys in {len(steps)} blocks. The maximum after each block: "
            f"{listed(f'{value:.3g}' for value in maxima)}. {told.capitalize()}."
        )
    return axes


def plot_operations(ways: Mapping[str, Mapping[str, int]]) -> Axes:
    """What is launched in one step, a stacked bar for each way to run it.

    Args:
        ways: the way -> for each part of the step how many operations it asks for.
    """
    parts = list(dict.fromkeys(part for counts in ways.values() for part in counts))
    colors = dict(zip(parts, (*PALETTE, GREY)))
    with new_figure(1.6 + 0.62 * len(ways)) as ax:
        lefts = np.zeros(len(ways))
        for part in parts:
            widths = np.array([counts.get(part, 0) for counts in ways.values()])
            ax.barh(range(len(ways)), widths, 0.62, left=lefts, color=colors[part], label=part)
            for place, (left, width) in enumerate(zip(lefts, widths)):
                if width >= 0.06 * sum(next(iter(ways.values())).values()):
                    letters = "white" if colors[part] == BLUE else ON_LIGHT_FILL
                    ax.text(left + width / 2, place, str(width), ha="center", va="center", color=letters, fontsize=10)
            lefts = lefts + widths
        for place, total in enumerate(lefts):
            ax.text(total, place, f" {total:.0f}", ha="left", va="center", fontsize=11, weight="bold")
        ax.set_yticks(range(len(ways)), list(ways))
        ax.invert_yaxis()
        ax.set(xlabel="operations launched in a step", xlim=(0, 1.1 * lefts.max()))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.05, 1), fontsize=10, handlelength=1, columnspacing=1)
        told = "; ".join(
            f"{way}: {sum(counts.values())} in all ({', '.join(f'{n} {part}' for part, n in counts.items())})"
            for way, counts in ways.items()
        )
        ax.figure.alt = f"Stacked bars of the operations launched in a step. {told}."
    return ax


def plot_buckets(buckets: Sequence[int]) -> Axes:
    """How many rows a captured step computes, and how many of them for nothing, against the running sequences.

    Args:
        buckets: the numbers of rows that steps are captured for, in ascending order.
    """
    running = np.arange(1, buckets[-1] + 1)
    computed = np.array([next(size for size in buckets if size >= count) for count in running])
    wasted = computed - running
    with new_figure(3.6) as ax:
        ax.bar(running, running, 0.85, color=BLUE, label="rows of sequences")
        ax.bar(running, wasted, 0.85, bottom=running, color=ORANGE, label="rows for nothing")
        ax.set(xlabel="sequences that decode in a step", ylabel="rows computed", xlim=(0.4, buckets[-1] + 0.6))
        ax.set_xticks(buckets)
        ax.legend(loc="upper left")
        shares = wasted / computed
        worst = int(shares.argmax())
        ax.figure.alt = (
            f"Bars of the rows computed for {running[0]} to {running[-1]} sequences, in buckets of {listed(buckets)}. "
            f"The largest share for nothing is {wasted[worst]} of {computed[worst]} rows, for {running[worst]} "
            f"{'sequence' if running[worst] == 1 else 'sequences'}; on average it is {shares.mean():.0%}."
        )
    return ax


def plot_idle_processors(programs: Mapping[str, Sequence[int]], num_seqs: Sequence[int], num_processors: int) -> Axes:
    """What share of a GPU's processors has work in one layer's attention, against the sequences of a step.

    Args:
        programs: way to divide the work -> for each number of sequences, into how many programs.
        num_seqs: sequences of a step.
        num_processors: how many programs run at once.
    """
    with new_figure(3.4) as ax:
        told = []
        for (name, counts), color, marker in zip(programs.items(), PALETTE, MARKERS):
            shares = 100 * np.minimum(1, to_array(counts) / num_processors)
            ax.plot(num_seqs, shares, color=color, lw=2, marker=marker, ms=5, label=name)
            told.append(f"{name}: {course(list(shares), num_seqs)} %")
        ax.axhline(100, color=LIGHT, lw=1, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(num_seqs, [str(count) for count in num_seqs])
        ax.minorticks_off()
        ax.set(xlabel="sequences that decode in a step", ylabel=f"busy, of {num_processors}\nprocessors (%)")
        ax.set(ylim=(0, 108))
        ax.legend(loc="lower right")
        ax.figure.alt = (
            f"Lines of the share of {num_processors} processors that have work, against the sequences of a step. "
            f"{'; '.join(told)}."
        )
    return ax
