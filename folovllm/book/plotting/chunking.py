"""Figures of long prompts that are read in chunks: what steps are made of, and who waits for them. Chapter 12."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.plotting.style import BLUE, GREEN, GREY, LIGHT, ORANGE, PALETTE, new_figure
from folovllm.engine.stats import StepStats

MILLISECONDS = 1e3


def plot_step_makeup(runs: Mapping[str, Sequence[StepStats]]) -> np.ndarray:
    """Tokens that each step computed, a prompt's on top of the decoding sequences'; a panel for each run."""
    most = {
        name: max(step.num_prefill_tokens + step.num_decode_tokens for step in steps) for name, steps in runs.items()
    }
    with new_figure(0.9 + 1.5 * len(runs), rows=len(runs), sharex=True) as axes:
        for ax, (name, steps) in zip(np.atleast_1d(axes), runs.items()):
            decodes = np.array([step.num_decode_tokens for step in steps])
            prefills = np.array([step.num_prefill_tokens for step in steps])
            ax.bar(range(len(steps)), decodes, width=1, color=BLUE, label="decode")
            ax.bar(range(len(steps)), prefills, bottom=decodes, width=1, color=ORANGE, label="prefill")
            ax.set_title(f"{name}: at most {most[name]:,} tokens in a step", fontsize=12)
            ax.set(ylabel="tokens", xlim=(-0.5, max(map(len, runs.values())) - 0.5))
        first, last = np.atleast_1d(axes)[[0, -1]]
        last.set_xlabel("step")
        first.legend(ncols=2, loc="upper right", fontsize=10.5)
        said = "; ".join(f"{name}: {len(steps)} steps of at most {most[name]:,} tokens" for name, steps in runs.items())
        first.figure.alt = f"Stacked bars of decode and prefill tokens in each step, a panel for each run. {said}."
    return axes


def plot_token_gaps(times: Mapping[str, Sequence[float]]) -> Axes:
    """Milliseconds between a stream's tokens: ``{name: seconds at which each token came}``."""
    gaps = {name: np.diff(seconds) * MILLISECONDS for name, seconds in times.items()}
    with new_figure(3.4) as ax:
        for color, (name, gap) in zip(PALETTE, gaps.items()):
            ax.plot(range(2, len(gap) + 2), gap, color=color, label=name, lw=2)
        ax.set(xlabel="token of the stream", ylabel="milliseconds since the last one", ylim=(0, None))
        ax.legend(ncols=len(gaps), loc="lower left", bbox_to_anchor=(0, 1))
        said = "; ".join(
            f"{name}: median {np.median(gap):.1f} ms, longest {gap.max():.1f} ms" for name, gap in gaps.items()
        )
        ax.figure.alt = f"Lines of the milliseconds between the tokens of one stream. {said}."
    return ax


def plot_frontier(points: Mapping[str, tuple[float, float]], slo: tuple[float, float] | None = None) -> Axes:
    """The wait for a first token against the worst gap between tokens, in seconds, one dot for each setting.

    Args:
        points: name -> (TTFT, ITL), in the order in which the dots are joined.
        slo: the TTFT and ITL that were promised; what keeps the promise is shaded.
    """
    ttft, itl = (MILLISECONDS * np.array(values) for values in zip(*points.values()))
    with new_figure(3.8) as ax:
        if slo is not None:
            right, top = MILLISECONDS * slo[0], MILLISECONDS * slo[1]
            ax.fill_between([ttft.min() * 0.8, right], top, itl.min() * 0.5, color=LIGHT, label="keeps the promise")
            ax.legend(loc="upper right")
        ax.plot(ttft, itl, color=GREY, lw=1)
        ax.scatter(ttft, itl, color=BLUE, s=50, zorder=3)
        for name, x, y in zip(points, ttft, itl):
            ax.annotate(name, (x, y), (7, 4), textcoords="offset points", fontsize=10.5)
        ax.set(xlabel="TTFT of the long prompts (ms)", ylabel="worst ITL of the chats (ms)", yscale="log")
        ax.set(xlim=(ttft.min() * 0.8, ttft.max() * 1.15), ylim=(itl.min() * 0.5, itl.max() * 1.8))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ends = [f"{name}: {x:.0f} and {y:.0f} ms" for name, x, y in zip(points, ttft, itl)]
        ax.figure.alt = f"Dots of long prompts' TTFT and chats' worst ITL for each budget. {'; '.join(ends)}."
    return ax


def plot_prompt_cost(steps: Mapping[str, Sequence[Any]]) -> Axes:
    """The time that one prompt takes, stacked by what it goes into: ``{budget: StepCost of each of its steps}``."""
    kinds = {"matrix products": ("linear", BLUE), "attention": ("attention", GREEN), "host": ("host", ORANGE)}
    totals = [sum(cost.total for cost in costs) * MILLISECONDS for costs in steps.values()]
    with new_figure(3.6) as ax:
        bottom = np.zeros(len(steps))
        for label, (part, color) in kinds.items():
            height = np.array([sum(getattr(cost, part) for cost in costs) for costs in steps.values()]) * MILLISECONDS
            ax.bar(range(len(steps)), height, bottom=bottom, color=color, label=label, width=0.7)
            bottom += height
        for place, (total, costs) in enumerate(zip(totals, steps.values())):
            label = f"{len(costs)} steps" if len(costs) > 1 else "one step"
            ax.text(place, total, label, ha="center", va="bottom", fontsize=10.5)
        ax.set(xlabel="tokens per step", ylabel="milliseconds in all", ylim=(0, max(totals) * 1.1))
        ax.set_xticks(range(len(steps)), list(steps))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
        said = "; ".join(
            f"{name}: {len(costs)} steps, {total:.0f} ms" for (name, costs), total in zip(steps.items(), totals)
        )
        ax.figure.alt = f"Stacked bars of the time that one prompt takes, by tokens per step. {said}."
    return ax
