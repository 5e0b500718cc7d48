"""Figures of an engine at work, drawn from `folovllm.book.recording`: requests, places and blocks along the steps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch

from folovllm.book.plotting.style import GREY, LIGHT, ORANGE, PALETTE, new_figure
from folovllm.book.recording import StepRecord

LIGHTER = tuple(color for color in PALETTE if color != ORANGE)
COLORS = (*LIGHTER, *(to_hex([0.6 * part for part in to_rgb(color)]) for color in LIGHTER))
"""The colours of requests, in the order in which they came, and darker ones; orange says that a prompt is read."""


def colors_of(records: Sequence[StepRecord]) -> dict[str, str]:
    """A colour for each sequence, in the order in which they first appear; with many, colours come back."""
    names = dict.fromkeys(
        name for record in records for name in (*record.prefill, *record.decode, *record.places, *record.waiting)
    )
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


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
    waited = {name: sum(name in r.waiting or name in r.swapped for r in records) for name in colors}
    longest = max(waited, key=lambda name: waited[name])
    ax.figure.alt = (
        f"Lines of {len(colors)} sequences along {len(records):,} steps: grey while one waits, orange while its "
        f"prompt is read, in its own colour while it decodes. {sum(map(bool, waited.values()))} of them have to wait, "
        f"{longest} longest, for {waited[longest]:,} steps."
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
        f"Map of {num_places} places of the batch along {len(records):,} steps, each in the colour of the sequence "
        f"that has it: {len(colors)} sequences pass through, and {taken / (num_places * max(len(records), 1)):.0%} of "
        "the map is taken."
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
    in_use = [sum(count > 0 for count in r.ref_counts) for r in records]
    shared = max(sum(count > 1 for count in r.ref_counts) for r in records)
    ax.figure.alt = (
        f"Map of {num_blocks} blocks of the cache along {len(records):,} steps, each in its owner's colour: at most "
        f"{max(in_use):,} are in use at once, and at most {shared:,} are in several tables."
    )
    return ax
