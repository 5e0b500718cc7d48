"""Figures of chapter 11: a full cache, who had to leave it, and what coming back costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from folovllm.book.plotting.requests import STATUS_COLORS
from folovllm.book.plotting.style import BLUE, GREEN, GREY, ON_LIGHT_FILL, ORANGE, PURPLE, RED, new_figure
from folovllm.book.plotting.timeline import stretches
from folovllm.book.recording import StepRecord


def plot_used_blocks(runs: Mapping[str, Sequence[StepRecord]]) -> Axes:
    """Blocks in use after each step of each run; a cross where somebody had to leave."""
    with new_figure(3.4) as ax:
        told = []
        for color, (name, records) in zip((GREEN, BLUE, PURPLE), runs.items()):
            used = [record.stats.num_used_blocks for record in records]
            ax.step(range(len(used)), used, where="post", color=color, lw=2, label=name)
            left = [i for i, record in enumerate(records) if record.preempted]
            ax.plot(left, [used[i] for i in left], "x", color=RED, ms=7, mew=2)
            told.append(
                f"{name}: at most {max(used)} blocks in {len(records)} steps, "
                f"{sum(len(record.preempted) for record in records)} preemptions"
            )
        ax.plot([], [], "x", color=RED, ms=7, mew=2, label="preemption")
        ax.set(xlabel="step", ylabel="blocks in use", ylim=(0, None), xlim=(0, None))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
        ax.figure.alt = f"Step curves of blocks in use. {'; '.join(told)}."
    return ax


def plot_states(runs: Mapping[str, Sequence[StepRecord]]) -> np.ndarray:
    """The state of each sequence at each step, one panel per run; a cross where it had to leave."""
    names = list(dict.fromkeys(n for records in runs.values() for r in records for n in (*r.prefill, *r.waiting)))
    longest = max(map(len, runs.values()))
    told = []
    with new_figure(0.9 + len(runs) * (0.75 + 0.23 * len(names)), len(runs), squeeze=False, sharex=True) as axes:
        for ax, (title, records) in zip(axes.flat, runs.items()):
            for row, name in enumerate(names):
                for color, steps in _states_of(name, records):
                    ax.broken_barh(stretches(steps), (row - 0.4, 0.8), facecolor=color, edgecolor="none")
                left = [i for i, record in enumerate(records) if name in record.preempted]
                ax.plot(left, [row] * len(left), "x", color=ON_LIGHT_FILL, ms=6, mew=1.6)
            ax.set(xlim=(0, longest), ylim=(-0.6, len(names) - 0.4), title=title)
            ax.set_yticks(range(len(names)), names, fontsize=9)
            ax.invert_yaxis()
            counts = [sum(name in record.preempted for record in records) for name in names]
            told.append(f"{title}: preemptions of {', '.join(f'{n} {c}' for n, c in zip(names, counts))}")
        axes[-1, 0].set_xlabel("step")
        kinds = {"waiting": STATUS_COLORS["waiting"], "prompt, or again": ORANGE, "running": BLUE}
        if any(record.swapped for records in runs.values() for record in records):
            kinds["swapped"] = STATUS_COLORS["swapped"]
        handles: list[Artist] = [Patch(color=color, label=label) for label, color in kinds.items()]
        handles.append(Line2D([], [], ls="", marker="x", color="#333333", ms=6, mew=1.6, label="has to leave"))
        axes[0, 0].figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=10, handlelength=1.2)
        axes[0, 0].figure.alt = f"Lines of states along {longest} steps, crosses for preemptions. {'; '.join(told)}."
    return axes


def _states_of(name: str, records: Sequence[StepRecord]) -> list[tuple[str, list[int]]]:
    """The steps that a sequence spends in each state, with the state's colour."""
    return [
        (STATUS_COLORS["waiting"], [i for i, r in enumerate(records) if name in r.waiting]),
        (STATUS_COLORS["swapped"], [i for i, r in enumerate(records) if name in r.swapped]),
        (ORANGE, [i for i, r in enumerate(records) if name in r.prefill]),
        (BLUE, [i for i, r in enumerate(records) if name in r.decode]),
    ]


def crossings(xs: Sequence[float], first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Where one line crosses another through the same ``xs``; both are straight between neighbours."""
    gaps = np.array(first, dtype=float) - np.array(second, dtype=float)
    return [
        float(xs[i] + (xs[j] - xs[i]) * gaps[i] / (gaps[i] - gaps[j]))
        for i, j in pairwise(np.flatnonzero(gaps))
        if gaps[i] * gaps[j] < 0
    ]


def plot_resume_costs(costs: Mapping[str, Mapping[str, Sequence[float]]]) -> np.ndarray:
    """Seconds that a preempted sequence adds to the others' step when it is computed again, and when it is swapped.

    Args:
        costs: title of a panel -> "tokens" that the sequence had computed, and seconds to "recompute" and to "swap".
    """
    told = []
    with new_figure(0.9 + 2.3 * len(costs), len(costs), squeeze=False) as axes:
        for ax, (title, lines) in zip(axes.flat, costs.items()):
            tokens, again, swap = lines["tokens"], lines["recompute"], lines["swap"]
            ax.plot(tokens, [1000 * s for s in again], color=ORANGE, lw=2, label="recompute")
            ax.plot(tokens, [1000 * s for s in swap], color=PURPLE, lw=2, label="swap out and in")
            crossed = crossings(tokens, again, swap)
            for x in crossed:
                y = 1000 * float(np.interp(x, tokens, swap))
                ax.plot([x], [y], "o", color="#333333", ms=7)
                ax.annotate(f"{x:,.0f} tokens", (x, y), (-9, 9), textcoords="offset points", ha="right", fontsize=10)
            ax.set(ylabel="added, in ms", ylim=(0, None), xlim=(0, None), title=title)
            told.append(
                f"{title}: at {tokens[-1]:,} tokens {1000 * again[-1]:.3g} ms for computing again and "
                f"{1000 * swap[-1]:.3g} ms for swapping; the lines cross at "
                f"{', '.join(f'{x:,.0f}' for x in crossed) or 'no'} tokens"
            )
        axes[0, 0].legend(loc="upper left")
        axes[-1, 0].set_xlabel("tokens that the preempted sequence had computed")
        axes[0, 0].figure.alt = f"Lines of added milliseconds against length. {'; '.join(told)}."
    return axes


def plot_admission(computed: Mapping[int, int], passes: Mapping[int, int], needed: int) -> np.ndarray:
    """Tokens computed and passes, against how many texts are let in at once.

    Args:
        computed: ``max_num_seqs`` -> tokens computed, those that were computed again included.
        passes: ``max_num_seqs`` -> passes until the last text has ended.
        needed: tokens that have to be computed once.
    """
    places = range(len(computed))
    with new_figure(4.6, rows=2, sharex=True) as axes:
        again = [count - needed for count in computed.values()]
        axes[0].bar(places, [needed] * len(places), 0.7, color=GREY, label="once")
        axes[0].bar(places, again, 0.7, bottom=needed, color=ORANGE, label="again")
        axes[1].bar(places, list(passes.values()), 0.7, color=GREEN)
        for ax, counts, label in zip(axes, (computed, passes), ("tokens computed", "passes")):
            for place, count in zip(places, counts.values()):
                ax.text(place, count, str(count), ha="center", va="bottom", fontsize=10)
            ax.set(ylabel=label, ylim=(0, 1.2 * max(counts.values())))
        axes[1].set_xticks(places, [str(num) for num in computed])
        axes[0].legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes[1].set_xlabel("texts let in at once, at most (max_num_seqs)")
        told = "; ".join(f"{n}: {computed[n]} tokens, {passes[n]} passes" for n in computed)
        axes[0].figure.alt = f"Bars of tokens computed and of passes against max_num_seqs. {told}."
    return axes
