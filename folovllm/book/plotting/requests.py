"""Figures of chapter 3: states, and what forks share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from folovllm.book.plotting.style import BLUE, GREEN, GREY, LIGHT, ORANGE, PALETTE, PURPLE, RED, SKY, YELLOW, new_figure
from folovllm.utils import cdiv

STATUS_COLORS = {
    "waiting": YELLOW,
    "running": BLUE,
    "swapped": PURPLE,
    "finished_stopped": GREEN,
    "finished_length_capped": ORANGE,
    "finished_aborted": RED,
    "finished_ignored": LIGHT,
}
"""One colour per `SequenceStatus`, the same in every figure."""


def plot_state_machine() -> Axes:
    """The states of a sequence, and what moves it from one to the next."""
    places = {"waiting": (0, 0), "running": (1.5, 0), "swapped": (1.5, -1.15), "finished_ignored": (3.35, -1.58)}
    ends = {
        "finished_stopped": "end token or stop text",
        "finished_length_capped": "max_tokens reached",
        "finished_aborted": "user gone, or an error",
    }
    places |= {end: (3.35, 0.55 - 0.62 * i) for i, end in enumerate(ends)}
    notes = ends | {"finished_ignored": "not among the n best"}
    dark = "#333333"

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str, at: tuple[float, float]) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": dark, "shrinkA": 0, "shrinkB": 0})
        ax.text(*at, text, ha="center", va="center", fontsize=9.5, color=dark)

    with new_figure(3.9) as ax:
        for name, (x, y) in places.items():
            width = 1.1 if name in notes else 0.76
            box = FancyBboxPatch((x - width / 2, y - 0.12), width, 0.24, boxstyle="round,pad=0.03", lw=1.5)
            box.set(facecolor="white", edgecolor=STATUS_COLORS[name] if name != "finished_ignored" else GREY)
            ax.add_patch(box)
            ax.text(x, y, _label(name).upper(), ha="center", va="center", fontsize=9.5)
            ax.text(x, y - 0.25, notes.get(name, ""), ha="center", va="center", fontsize=9, color="#555555")
        arrow((0.43, 0.05), (1.07, 0.05), "scheduled", (0.75, 0.2))
        arrow((1.07, -0.05), (0.43, -0.05), "preempted", (0.75, -0.22))
        arrow((1.4, -0.17), (1.4, -0.98), "swapped\nout", (1.05, -0.58))
        arrow((1.6, -0.98), (1.6, -0.17), "swapped\nin", (1.92, -0.58))
        arrow((1.93, 0.05), (2.72, 0.4), "finished", (2.2, 0.4))
        ax.plot([0, 0, 2.42, 2.42], [-0.17, -1.55, -1.55, -0.69], color=dark, lw=1)
        ax.plot([1.93, 2.42], [-1.15, -1.15], color=dark, lw=1)
        arrow((2.42, -0.69), (2.76, -0.69), "aborted", (0.36, -1.4))
        arrow((3.35, -1.06), (3.35, -1.42), "ranked", (3.66, -1.24))
        ax.add_patch(FancyBboxPatch((2.76, -1.02), 1.18, 1.77, boxstyle="round,pad=0.02", fill=False, ls="--", ec=GREY))
        ax.set(xlim=(-0.5, 4.05), ylim=(-1.95, 0.85))
        ax.axis("off")
        reached = ", ".join(f"{_label(end)} ({reason})" for end, reason in ends.items())
        ax.figure.alt = (
            "State diagram. Waiting and running are joined by arrows both ways (scheduled, preempted), so are running "
            f"and swapped (swapped out, swapped in). An arrow leads from running to a group of ends: {reached}; "
            "waiting and swapped lead to aborted as well. An arrow leads from the ends to ignored: not among the best."
        )
    return ax


def _label(status: str) -> str:
    """A status as a reader sees it."""
    return status.replace("finished_", "").replace("_", " ")


def plot_timeline(statuses: Mapping[str, Sequence[str]]) -> Axes:
    """The status of each sequence as coloured bars along time: ``{seq_id: [status at first, after step 1, …]}``."""
    told = []
    with new_figure(1.5 + 0.42 * len(statuses)) as ax:
        for row, (name, history) in enumerate(statuses.items()):
            start = 0
            for status, stretch in itertools.groupby(history):
                length = len(list(stretch))
                ax.barh(row, length, left=start, color=STATUS_COLORS[status], edgecolor="white", height=0.7)
                start += length
            told.append(f"{name} is {_label(history[-1])} after step {start - length}")
        present = [s for s in STATUS_COLORS if any(s in history for history in statuses.values())]
        for status in present:
            ax.barh(0, 0, color=STATUS_COLORS[status], label=_label(status))
        ax.set(yticks=range(len(statuses)), yticklabels=list(statuses), xlabel="step")
        ax.invert_yaxis()
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=len(present), fontsize=10.5, handlelength=1)
        ax.figure.alt = f"Timeline of {len(statuses)} sequences along the steps: {'; '.join(told)}."
    return ax


def plot_cumulative_logprobs(logprobs: Mapping[str, Sequence[float]]) -> Axes:
    """The sum of each sequence's log probabilities, token by token."""
    with new_figure(3.6) as ax:
        # None of the colours that statuses have on the same page.
        for (name, values), color in zip(logprobs.items(), (PURPLE, SKY, GREY, "#333333", *PALETTE)):
            ax.step(range(1, len(values) + 1), np.cumsum(values), where="post", label=name, color=color, lw=2)
        ax.set(xlabel="tokens generated", ylabel="cumulative log probability")
        ax.legend(loc="lower left", fontsize=10.5)
        ends = ", ".join(f"{sum(values):.1f} nats for {name}" for name, values in logprobs.items())
        ax.figure.alt = (
            f"Falling staircases of cumulative log probability against tokens generated. They end at {ends}."
        )
    return ax


def plot_fork_blocks(prompt_len: int, output_len: int, block_size: int, num_seqs: Sequence[int]) -> Axes:
    """Blocks that ``n`` answers to one prompt take: each with a copy of the prompt, and sharing it."""
    total = cdiv(prompt_len + output_len, block_size)
    shared = prompt_len // block_size  # full blocks of the prompt; the one that is partly full is written to, so copied
    copied = [n * total for n in num_seqs]
    forked = [shared + n * (total - shared) for n in num_seqs]
    with new_figure(3.4) as ax:
        places = np.arange(len(num_seqs))
        ax.bar(places - 0.2, copied, 0.4, color=ORANGE, label="a copy each")
        ax.bar(places + 0.2, forked, 0.4, color=BLUE, label="prompt's full blocks shared")
        for place, a, b in zip(places, copied, forked):
            ax.text(place - 0.2, a, str(a), ha="center", va="bottom", fontsize=10.5)
            ax.text(place + 0.2, b, str(b), ha="center", va="bottom", fontsize=10.5)
        ax.set(xlabel="answers (n)", ylabel=f"blocks of {block_size}", ylim=(0, max(copied) * 1.12))
        ax.set_xticks(places, [str(n) for n in num_seqs])
        ax.legend(loc="upper left")
        ax.figure.alt = (
            f"Pairs of bars, blocks of {block_size} tokens for {', '.join(map(str, num_seqs))} answers to one prompt "
            f"of {prompt_len:,} tokens: with a copy each {', '.join(map(str, copied))}; with the prompt's full blocks "
            f"shared {', '.join(map(str, forked))}."
        )
    return ax
