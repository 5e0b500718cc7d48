"""Figures of chapter 5: what a cache saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.plotting.style import BLUE, DARK_RED, PALETTE, RED, YELLOW, new_figure


def plot_tokens_computed(without_cache: Sequence[int], with_cache: Sequence[int]) -> Axes:
    """Tokens computed by each forward pass, added up: without a KV cache and with one."""
    with new_figure(3.6) as ax:
        for name, counts, color in (("without a cache", without_cache, RED), ("with a cache", with_cache, BLUE)):
            totals = np.cumsum(counts)
            ax.plot(range(1, len(counts) + 1), totals, color=color, lw=2.5)
            ax.text(
                len(counts),
                totals[-1],
                f" {name}:\n {totals[-1]:,}",
                color=DARK_RED if color == RED else color,
                va="center",
                fontsize=11,
            )
        ax.set(xlabel="tokens generated", ylabel="tokens computed, added up", xlim=(0, len(without_cache) * 1.4))
    return ax


def plot_step_times(without_cache: Sequence[float], with_cache: Sequence[float]) -> Axes:
    """Time of each forward pass as a multiple of the median cached one; the first reads the whole prompt (prefill)."""
    unit = float(np.median(with_cache[1:]))
    with new_figure(3.6) as ax:
        for name, times, color in (("without a cache", without_cache, RED), ("with a cache", with_cache, BLUE)):
            ax.plot(range(1, len(times) + 1), np.array(times) / unit, ".", color=color, label=name, ms=5)
        ax.plot(1, with_cache[0] / unit, "o", ms=10, mfc="none", mec=BLUE, mew=2, label="prefill")
        ax.set(xlabel="forward pass", ylabel="time (median decode step = 1)", ylim=(0, None))
        ax.legend(loc="upper left")
    return ax


def plot_product_times(rows: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Axes:
    """Time of a product with a weight against the rows of the other side, one line for each way to compute it."""
    with new_figure(3.6) as ax:
        for (name, times), color in zip(seconds.items(), PALETTE):
            ax.plot(rows, 1000 * np.array(times), "o-", color=color, label=name)
        ax.set(xlabel="rows", ylabel="time (ms)", ylim=(0, None))
        ax.set_xscale("log", base=2)
        ax.set_xticks(rows, [str(n) for n in rows])
        ax.legend(loc="upper left")
    return ax


def plot_along_text(values: Mapping[str, Sequence[float]], ylabel: str, choices: Sequence[int] = ()) -> Axes:
    """Numbers along a text, one per token; ``choices`` marks the tokens at which the grammar had a choice."""
    with new_figure(3.2) as ax:
        for place in choices:
            ax.axvspan(place - 0.5, place + 0.5, color=YELLOW, alpha=0.45, lw=0)
        for (name, series), color in zip(values.items(), PALETTE):
            ax.plot(range(len(series)), series, "o-", color=color, ms=3.5, lw=1, label=name)
        ax.set(xlabel="token of the text", ylabel=ylabel)
        if len(values) > 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(values))
    return ax
