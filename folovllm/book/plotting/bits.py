"""Figures of chapter 15: rounding, packing, errors that are handed on, and where fewer bytes stop paying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.book.plotting.style import (
    BLUE,
    GREY,
    LIGHT,
    ON_LIGHT_FILL,
    ORANGE,
    PALETTE,
    RED,
    course,
    listed,
    new_figure,
    to_array,
)

MARKERS = "osD^v"


def plot_grid(weights: Any, scale: float, bits: int = 4) -> Axes:
    """Numbers, and which of the few values on a grid each is rounded to.

    Args:
        weights: ``[num_weights]``.
        scale: distance of two values.
        bits: of a value.
    """
    numbers, zero = to_array(weights), 2 ** (bits - 1)
    grid = scale * np.arange(-zero, zero)
    nearest = scale * np.clip(np.round(numbers / scale), -zero, zero - 1)
    with new_figure(3.2) as ax:
        ax.hlines(range(len(numbers)), grid[0], grid[-1], color=LIGHT, lw=1, zorder=0)
        ax.vlines(grid, -0.6, len(numbers) - 0.4, color=LIGHT, lw=1, zorder=0)
        for row, (number, value) in enumerate(zip(numbers, nearest)):
            ax.plot([number, value], [row, row], color=RED, lw=2, zorder=3)
        ax.plot(nearest, range(len(numbers)), "s", color=BLUE, ms=7, ls="none", label="value on the grid")
        ax.plot(numbers, range(len(numbers)), "o", color=ORANGE, ms=6, ls="none", label="weight")
        ax.set_yticks(range(len(numbers)), [str(row) for row in range(len(numbers))])
        ax.invert_yaxis()
        ax.set(xlabel="number", ylabel="weight")
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.05, 1), handletextpad=0.2)
        errors = np.abs(nearest - numbers)
        worst = int(errors.argmax())
        ax.figure.alt = (
            f"A grid of {len(grid)} values from {grid[0]:.3g} to {grid[-1]:.3g}, {scale:.3g} apart, and {len(numbers)} "
            f"weights, each joined to its nearest. The farthest is weight {worst}: {numbers[worst]:.3g} becomes "
            f"{nearest[worst]:.3g}."
        )
    return ax


def plot_packed(values: Sequence[int], bits: int = 4) -> Axes:
    """Values side by side in one number: the first in the lowest bits, which stand on the right.

    Args:
        values: whole numbers from 0 on.
        bits: of a value.
    """
    num_bits = bits * len(values)
    with new_figure(2.1) as ax:
        for i, value in enumerate(values):
            left = num_bits - bits * (i + 1)
            fill = PALETTE[i % len(PALETTE)]
            ax.add_patch(Rectangle((left, 0), bits, 1, facecolor=fill, edgecolor="white", lw=2))
            color = "white" if fill == BLUE else ON_LIGHT_FILL
            ax.text(left + bits / 2, 0.5, f"{value:0{bits}b}", ha="center", va="center", color=color, size=11)
            ax.text(left + bits / 2, 1.12, str(value), ha="center", va="bottom", size=12, weight="bold")
        lowest = [bits * i for i in range(len(values))]
        ax.set_xticks([num_bits - bit - 0.5 for bit in lowest], [str(bit) for bit in lowest])
        ax.tick_params(axis="x", length=0)
        ax.set(xlim=(-0.2, num_bits + 0.2), ylim=(-0.05, 1.6), xlabel="bit", yticks=[])
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.figure.alt = (
            f"A row of {len(values)} boxes of {bits} bits, the highest bits on the left and the lowest on the right: "
            f"{listed(f'{value:0{bits}b} for {value}' for value in reversed(values))}."
        )
    return ax


def plot_group_sizes(group_sizes: Sequence[int], bits_per_weight: Sequence[float], errors: Sequence[float]) -> Axes:
    """What larger groups save and what they cost: the error against bits per weight, scales included.

    Args:
        group_sizes: weights that share a scale.
        bits_per_weight: for each of them.
        errors: squared error of the weights over their square.
    """
    percent = 100 * to_array(errors)
    with new_figure(3.4) as ax:
        ax.plot(bits_per_weight, percent, "o-", color=BLUE, lw=2, ms=7)
        for size, x, y in zip(group_sizes, bits_per_weight, percent):
            label = f"{size} share a scale" if size == max(group_sizes) else f"{size}"
            ax.annotate(label, (x, y), (6, 5), textcoords="offset points", size=11)
        ax.set(xlabel="bits per weight, scales included", ylabel="squared error (%)", ylim=(0, None))
        ax.margins(x=0.08)
        told = "; ".join(
            f"{size} weights: {bits:.3g} bits, {error:.3g} %"
            for size, bits, error in zip(group_sizes, bits_per_weight, percent)
        )
        ax.figure.alt = f"Dots of the squared error of the weights against bits per weight, by size of a group. {told}."
    return ax


def plot_rotated(row: Any, rotated: Any, bits: int = 8) -> Axes:
    """The numbers of a row before and after a rotation, and how wide the steps are that they are rounded to.

    Args:
        row: ``[num_in]``.
        rotated: the same row in other coordinates, ``[num_in]``.
        bits: of a value.
    """
    kinds = {"as they are": (to_array(row), ORANGE, "o"), "rotated": (to_array(rotated), BLUE, "s")}
    steps = {name: np.abs(numbers).max() / (2 ** (bits - 1) - 1) for name, (numbers, _, _) in kinds.items()}
    with new_figure(3.4) as ax:
        ax.axhline(0, color=LIGHT, lw=1, zorder=0)
        for name, (numbers, color, marker) in kinds.items():
            label = f"{name}: steps of {steps[name]:.2f}"
            ax.plot(range(len(numbers)), numbers, marker, color=color, ms=5, ls="none", label=label)
        ax.set(xlabel="place in the row", ylabel="number")
        ax.legend(loc="center right")
        largest = [np.abs(numbers).max() for numbers, _, _ in kinds.values()]
        ax.figure.alt = (
            f"Dots of {len(to_array(row))} numbers. As they are, the largest is {largest[0]:.3g} in size, and steps "
            f"are {steps['as they are']:.2f} wide. Rotated, none is larger than {largest[1]:.3g}, and steps are "
            f"{steps['rotated']:.2f} wide."
        )
    return ax


def plot_moved_error(column: int, correlations: Any, changes: Any) -> np.ndarray:
    """What rounding one column does to those after it, below how much their inputs go together with its own.

    Args:
        column: the one that was rounded.
        correlations: of its input with that of each column, ``[num_columns]``.
        changes: of each column's weight, in steps of the grid, ``[num_columns]``.
    """
    together, moved = to_array(correlations), to_array(changes)
    places = np.arange(len(together))
    with new_figure(4.2, rows=2, sharex=True) as axes:
        axes[0].bar(places, together, color=GREY)
        axes[1].bar(places, moved, color=ORANGE)
        for ax, series in zip(axes, (together, moved)):
            ax.bar([column], [series[column]], color=BLUE, label=f"column {column}, rounded")
            ax.axhline(0, color=GREY, lw=1)
        axes[0].set(ylabel="inputs go\ntogether", ylim=(-1.08, 1.08))
        axes[1].set(ylabel="change of weight\n(steps)", xlabel="input column")
        axes[0].legend(loc="lower right")
        rest = np.delete(places, column)
        most = int(rest[np.abs(moved[rest]).argmax()])
        axes[0].figure.alt = (
            f"Two panels of bars along {len(together)} columns. Above, how much each input goes together with that of "
            f"column {column}; below, by how many steps of the grid each weight changes. Column {column} changes "
            f"by {moved[column]:.2f}; the largest change after it is {moved[most]:.2f}, in column {most}, whose input "
            f"goes together with it by {together[most]:.2f}."
        )
    return axes


def plot_kl_by_bits(bits: Sequence[int], divergences: Mapping[str, Sequence[float]], unquantized: float) -> Axes:
    """KL(grammar || model) against the bits of a weight, for several ways to get there.

    Args:
        bits: in descending order.
        divergences: way -> nats for each of ``bits``.
        unquantized: nats of the model as it was.
    """
    with new_figure(3.9) as ax:
        ax.axhline(unquantized, color=GREY, ls="--", lw=1.5, label="not quantized")
        for (name, values), color, marker in zip(divergences.items(), (RED, BLUE, *PALETTE), MARKERS):
            ax.plot(bits, values, color=color, lw=2, marker=marker, ms=7, label=name)
        ax.set_yscale("log")
        ticks = [tick for tick in (0.01, 0.1, 1, 10, 100, 1000) if unquantized / 3 < tick < 3 * _largest(divergences)]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xticks(bits)
        ax.invert_xaxis()
        ax.set(xlabel="bits of a weight", ylabel="KL(grammar || model), nats")
        ax.legend(loc="upper left")
        told = "; ".join(
            f"{name} {course(values, [f'{n} bits' for n in bits])}" for name, values in divergences.items()
        )
        ax.figure.alt = (
            f"Lines of KL(grammar || model) against bits of a weight, on a logarithmic scale. Not quantized it is "
            f"{unquantized:.3g} nats; {told}."
        )
    return ax


def _largest(series: Mapping[str, Sequence[float]]) -> float:
    return max(max(values) for values in series.values())


def plot_error_by_layer(errors: Mapping[str, Sequence[float]]) -> Axes:
    """How far the residual stream is from that of the unquantized model, after each layer.

    Args:
        errors: way -> squared distance over the square, for each layer.
    """
    with new_figure(3.4) as ax:
        width = 0.8 / len(errors)
        for i, ((name, values), color) in enumerate(zip(errors.items(), (RED, BLUE, *PALETTE))):
            places = np.arange(len(values)) + (i - (len(errors) - 1) / 2) * width
            ax.bar(places, 100 * to_array(values), width, color=color, label=name)
        num_layers = len(next(iter(errors.values())))
        ax.set_xticks(range(num_layers), [str(layer) for layer in range(num_layers)])
        ax.set(xlabel="layer", ylabel="error after it (%)")
        ax.legend(ncols=len(errors), loc="lower left", bbox_to_anchor=(-0.05, 1))
        told = "; ".join(f"{name}: {listed(f'{100 * v:.3g} %' for v in values)}" for name, values in errors.items())
        ax.figure.alt = f"Bars of the error of the residual stream after each of {num_layers} layers. {told}."
    return ax


def plot_time_by_rows(rows: Sequence[int], seconds: Mapping[str, Sequence[float]], ridges: Mapping[str, float]) -> Axes:
    """Time of a step's matrix products against its tokens, for weights of different widths.

    Args:
        rows: tokens of a step, ascending.
        seconds: width -> for each of ``rows``.
        ridges: width -> the tokens from which on arithmetic takes longer than reading.
    """
    with new_figure(4.0) as ax:
        for (name, values), color, style in zip(seconds.items(), PALETTE, ("-", "-", "-", ":")):
            milliseconds = 1000 * to_array(values)
            ax.plot(rows, milliseconds, style, color=color, lw=2.5 if style == "-" else 3.5, label=name)
            if name in ridges:
                place = ridges[name], milliseconds[0]
                ax.plot(*place, "o", color=color, ms=8)
                look = {"textcoords": "offset points", "ha": "right", "size": 11}
                ax.annotate(f"{ridges[name]:.0f}", place, (0, 7), **look)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        marked = [row for row in rows if row & (row - 1) == 0 and row.bit_length() % 2]
        ax.set_xticks(marked, [f"{row:,}" for row in marked])
        bottom, top = 1000 * min(map(min, seconds.values())), 1000 * _largest(seconds)
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if bottom < tick < top]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel="tokens in the step", ylabel="matrix products (ms)")
        ax.legend(loc="upper left")
        told = "; ".join(
            f"{name}: {1000 * values[0]:.3g} ms for {rows[0]}"
            + (f", the ridge at {ridges[name]:.0f} tokens" if name in ridges else "")
            + f", {1000 * values[-1]:.3g} ms for {rows[-1]:,}"
            for name, values in seconds.items()
        )
        ax.figure.alt = f"Lines of the time of matrix products against tokens in the step. {told}."
    return ax


def plot_gain_by_rows(
    rows: Sequence[int], computed: Sequence[float], measured: Mapping[str, Mapping[int, float]]
) -> Axes:
    """How many times as fast a product is with fewer bits, against its rows.

    Args:
        rows: of the computed line, ascending.
        computed: gain for each of ``rows``.
        measured: where -> rows -> gain.
    """
    with new_figure(3.8) as ax:
        ax.axhline(1, color=RED, ls="--", lw=1.2)
        ax.plot(rows, computed, color=GREY, lw=2, label="computed")
        for (name, gains), color, marker in zip(measured.items(), PALETTE, MARKERS):
            ax.plot(list(gains), list(gains.values()), color=color, lw=1, marker=marker, ms=7, label=name)
        ax.set_xscale("log", base=2)
        marked = [row for row in rows if row & (row - 1) == 0 and row.bit_length() % 2]
        ax.set_xticks(marked, [f"{row:,}" for row in marked])
        ax.minorticks_off()
        ax.set(xlabel="rows (tokens in the step)", ylabel="times as fast as 16 bits", ylim=(0, None))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.12, 1), fontsize=11, columnspacing=1)
        lines = {"computed": dict(zip(rows, computed)), **measured}
        told = "; ".join(
            f"{name} {course(list(gains.values()), [f'{row:,}' for row in gains])}" for name, gains in lines.items()
        )
        ax.figure.alt = f"Lines of how many times as fast products are with few bits, against rows. {told}."
    return ax
