"""Figures of chapter 5: what a cache saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from folovllm.book.plotting.style import BLUE, DARK_RED, GREY, PALETTE, RED, YELLOW, new_figure


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
                va="bottom" if counts is with_cache else "center",  # the flat curve's label stays above the axis
                fontsize=11,
            )
        ax.set(xlabel="tokens generated", ylabel="tokens computed, added up", xlim=(0, len(without_cache) * 1.4))
        ax.figure.alt = (
            f"Two curves of the tokens computed for {len(without_cache)} generated ones, added up: without a cache a "
            f"parabola up to {sum(without_cache):,}, with a cache a line up to {sum(with_cache):,}."
        )
    return ax


def plot_pass_times(num_tokens: Sequence[int], seconds: Sequence[float], cached_seconds: float) -> Axes:
    """Time of a pass against the tokens in it, as multiples of a pass that reads one token with the rest in a cache.

    Args:
        num_tokens: tokens in each pass without a cache.
        seconds: what each of these passes took.
        cached_seconds: what the pass with a cache took; it is the unit.
    """
    ratios = np.array(seconds) / cached_seconds
    with new_figure(3.6) as ax:
        top = max(*ratios, 1.0) * 1.25
        ax.plot([1, top], [1, top], color=GREY, ls="--", label="if each token cost as much as the first")
        ax.plot(num_tokens, ratios, "o-", color=RED, label="without a cache: the whole text", ms=5)
        ax.plot([1], [1], "o", color=BLUE, label="with a cache: the newest token", ms=9)
        ax.set(xlabel="tokens in the pass", ylabel="time (cached pass = 1)", xlim=(0, None), ylim=(0, top))
        ax.legend(loc="lower right", fontsize=10.5)
        told = ", ".join(f"{n} tokens {ratio:.2g}" for n, ratio in zip(num_tokens, ratios))
        ax.figure.alt = f"Time of a pass against the tokens in it, in units of a cached pass of one token: {told}."
    return ax


def plot_along_text(values: Mapping[str, Sequence[float]], ylabel: str, choices: Sequence[int] = ()) -> Axes:
    """Numbers along a text, one per token; ``choices`` marks the tokens at which the grammar had a choice."""
    with new_figure(3.2) as ax:
        for place in choices:
            ax.axvspan(place - 0.5, place + 0.5, color=to_rgba(YELLOW, 0.45), lw=0)
        for (name, series), color in zip(values.items(), PALETTE):
            ax.plot(range(len(series)), series, "o-", color=color, ms=3.5, lw=1, label=name)
        ax.set(xlabel="token of the text", ylabel=ylabel)
        if len(values) > 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(values))
        told = ", ".join(f"{name} from {min(s):.3f} to {max(s):.3f}" for name, s in values.items())
        marked = f", and {len(choices)} places marked at which the grammar had a choice" if choices else ""
        ax.figure.alt = f"Along {len(next(iter(values.values())))} tokens of a text, {ylabel}: {told}{marked}."
    return ax
