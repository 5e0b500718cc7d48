"""Figures of an engine at work, drawn from `folovllm.book.recording`: requests, places and blocks along the steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from folovllm.book.palette import REQUEST_COLORS
from folovllm.book.plotting.style import DARK_RED, GREY, LIGHT, ORANGE, new_figure
from folovllm.book.recording import StepRecord, steps_to_first_token


def colors_of(records: Sequence[StepRecord]) -> dict[str, str]:
    """A colour for each sequence, in the order in which they first appear; with many, colours come back."""
    names = dict.fromkeys(
        name for record in records for name in (*record.prefill, *record.decode, *record.places, *record.waiting)
    )
    return {name: REQUEST_COLORS[i % len(REQUEST_COLORS)] for i, name in enumerate(names)}


def stretches(steps: Sequence[int]) -> list[tuple[int, int]]:
    """``(first, length)`` of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and sum(found[-1]) == step:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((step, 1))
    return found


def plot_gantt(records: Sequence[StepRecord]) -> Axes:
    """One line per sequence: grey while it waits, orange while its prompt is read, its own colour while it decodes."""
    colors = colors_of(records)
    with new_figure(min(1.5 + 0.3 * len(colors), 6.5)) as ax:
        for row, (name, color) in enumerate(colors.items()):
            kinds = (
                (LIGHT, [i for i, r in enumerate(records) if name in r.waiting or name in r.swapped]),
                (ORANGE, [i for i, r in enumerate(records) if name in r.prefill]),
                (color, [i for i, r in enumerate(records) if name in r.decode]),
            )
            for kind, steps in kinds:
                ax.broken_barh(stretches(steps), (row - 0.38, 0.76), facecolor=kind, edgecolor="none")
        ax.set(xlim=(0, len(records)), ylim=(-0.6, len(colors) - 0.4), xlabel="step")
        ax.set_yticks(range(len(colors)), list(colors), fontsize=12 if len(colors) <= 12 else 9)
        ax.invert_yaxis()
        ax.legend(
            handles=[Patch(color=LIGHT, label="waits"), Patch(color=ORANGE, label="prompt is read")],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
        )
        waits = {name: sum(name in (*r.waiting, *r.swapped) for r in records) for name in colors}
        longest = max(waits, key=lambda name: waits[name])
        num_waiting = sum(wait > 0 for wait in waits.values())
        waiting = f"{num_waiting} of them wait, {longest} the longest, for {waits[longest]} steps"
        ax.figure.alt = (
            f"A line for each of {len(colors)} requests along {len(records)} steps: grey while it waits, orange while "
            "its prompt is read, then in its own colour; "
            f"{waiting if num_waiting else 'none of them waits'}."
        )
    return ax


def plot_places(records: Sequence[StepRecord], num_places: int) -> Axes:
    """The places of the batch along the steps, each in the colour of the sequence that has it; white: nobody has it."""
    colors = colors_of(records)
    with new_figure(1.3 + 0.34 * num_places) as ax:
        for name, color in colors.items():
            for place in {r.places[name] for r in records if name in r.places}:
                steps = [i for i, r in enumerate(records) if r.places.get(name) == place]
                ax.broken_barh(stretches(steps), (place - 0.4, 0.8), facecolor=color, edgecolor="white", linewidth=1)
        ax.set(xlim=(0, len(records)), ylim=(-0.6, num_places - 0.4), xlabel="step", ylabel="place in the batch")
        ax.set_yticks(range(num_places))
        ax.invert_yaxis()
        taken = sum(len(r.places) for r in records)
        ax.figure.alt = (
            f"Map of {num_places} places of a batch along {len(records)} steps, each in the colour of the request that "
            f"has it, {len(colors)} in all; {taken} of {num_places * len(records)} place-steps are taken, the others "
            "are white."
        )
    return ax


def plot_block_map(records: Sequence[StepRecord], num_blocks: int) -> Axes:
    """The blocks of the cache along the steps, each in its owner's colour; grey: in several tables; white: free."""
    colors = colors_of(records)
    with new_figure(min(1.4 + 0.16 * num_blocks, 6.5)) as ax:
        for name, color in colors.items():
            for block_id in sorted({b for r in records for b in r.tables.get(name, ())}):
                steps = [
                    i
                    for i, r in enumerate(records)
                    if block_id in r.tables.get(name, ()) and r.ref_counts[block_id] == 1
                ]
                ax.broken_barh(stretches(steps), (block_id - 0.45, 0.9), facecolor=color, edgecolor="none")
        for block_id in range(num_blocks):
            steps = [i for i, r in enumerate(records) if r.ref_counts[block_id] > 1]
            ax.broken_barh(stretches(steps), (block_id - 0.45, 0.9), facecolor=GREY, edgecolor="none")
        ax.set(xlim=(0, len(records)), ylim=(-0.6, num_blocks - 0.4), xlabel="step", ylabel="block")
        ax.invert_yaxis()
        used = [sum(count > 0 for count in r.ref_counts) for r in records]
        shared = max(sum(count > 1 for count in r.ref_counts) for r in records)
        ax.figure.alt = (
            f"Map of {num_blocks} blocks along {len(records)} steps, each in the colour of the request that has it, "
            f"blank while it is free; at most {max(used)} are in use, and at most {shared} in several tables, which "
            "are grey."
        )
    return ax


def plot_anatomy(records: Sequence[StepRecord], name: str) -> Axes:
    """One request's line, a box per step, and what its user feels: the wait for the first token, then the gaps."""
    arrival = next(i for i, r in enumerate(records) if name in r.arrived)
    tokens = [i for i, r in enumerate(records) if name in r.tokens]
    first, last = tokens[0] + 1, tokens[-1] + 1
    color = colors_of(records)[name]
    with new_figure(2.4) as ax:
        for step in range(arrival, last):
            kind = ORANGE if name in records[step].prefill else color if name in records[step].decode else LIGHT
            ax.broken_barh([(step, 1)], (0, 1), facecolor=kind, edgecolor="white")
        for step in tokens:
            ax.plot(step + 1, 1.18, "v", color="#333333", markersize=5)
        spans = (("TTFT", arrival, first), (f"{len(tokens) - 1} x TPOT", first, last))
        for label, start, end in spans:
            ax.annotate("", (start, -0.3), (end, -0.3), arrowprops={"arrowstyle": "<->", "color": DARK_RED})
            ax.text((start + end) / 2, -0.45, label, ha="center", va="top", color=DARK_RED)
        ax.set(xlim=(arrival - 0.5, last + 0.5), ylim=(-1.1, 1.5), xlabel="step", yticks=[])
        ax.spines["left"].set_visible(False)
        ax.figure.alt = (
            f"The steps of request {name} as boxes, from its arrival at step {arrival} to its end after step {last}: "
            "grey while it waits, orange while its prompt is read, then in colour; an arrow marks TTFT, "
            f"{first - arrival} steps, another the {len(tokens) - 1} tokens after the first, {last - first} steps."
        )
    return ax


def plot_queue(runs: Mapping[str, Sequence[StepRecord]]) -> Axes:
    """How many requests wait after each step, a curve for each run."""
    with new_figure(3.2) as ax:
        for (label, records), style in zip(runs.items(), ("-", "--", ":", "-.")):
            waiting = [len(r.waiting) for r in records]
            ax.step(range(len(records)), waiting, style, where="post", label=label, clip_on=False)
        ax.set(xlabel="step", ylabel="requests waiting", ylim=(0, None), xlim=(0, None))
        ax.legend()
        told = (
            f"with {label} at most {max(len(r.waiting) for r in records)}, over {len(records)} steps"
            for label, records in runs.items()
        )
        ax.figure.alt = f"Requests that wait after each step, a curve for each run: {'; '.join(told)}."
    return ax


def plot_first_tokens(runs: Mapping[str, Sequence[StepRecord]]) -> Axes:
    """Which share of the requests has its first token after how many steps, a rising curve for each run."""
    waits = {label: sorted(steps_to_first_token(records).values()) for label, records in runs.items()}
    with new_figure(3.4) as ax:
        corners = (((7, -4), "left", "top"), ((-7, 4), "right", "bottom")) * 2
        for (label, steps), style, (offset, ha, va) in zip(waits.items(), ("-", "--", ":", "-."), corners):
            shares = [100 * (i + 1) / len(steps) for i in range(len(steps))]
            ax.step([0, *steps], [0, *shares], style, where="post", label=label)
            median = statistics.median(steps)
            ax.plot(median, 50, "o", color=ax.lines[-1].get_color())
            ax.annotate(f"{median:g}", (median, 50), offset, textcoords="offset points", ha=ha, va=va)
        ax.set(xlabel="steps until the first token", ylabel="requests (%)", ylim=(0, 103), xlim=(0, None))
        ax.legend(loc="lower right")
        told = (
            f"{label}: half of them within {statistics.median(s):g} steps, all within {s[-1]}"
            for label, s in waits.items()
        )
        ax.figure.alt = f"Share of requests that have their first token after a number of steps; {'; '.join(told)}."
    return ax


def plot_load(rates: Sequence[float], seconds: Mapping[str, Sequence[float]], ylabel: str) -> Axes:
    """Seconds that users wait against the requests that come per second, a curve for each run, logarithmic."""
    with new_figure(3.4) as ax:
        for (label, values), style in zip(seconds.items(), ("o-", "s--", "^:", "d-.")):
            ax.plot(rates, values, style, label=label)
        ax.set(xlabel="requests per second", ylabel=ylabel, yscale="log", xlim=(0, None))
        ax.legend(ncols=len(seconds), loc="lower left", bbox_to_anchor=(0, 1))
        told = (
            f"{label} {values[0]:.3g} s at {rates[0]:g} and {values[-1]:.3g} s at {rates[-1]:g} requests per second"
            for label, values in seconds.items()
        )
        ax.figure.alt = f"{ylabel} against load on a logarithmic scale: {'; '.join(told)}."
    return ax
