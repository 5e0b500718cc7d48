"""Figures of the engine at work: steps, places, blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.plotting.style import BLUE, GREY, LIGHT, ON_LIGHT_FILL, ORANGE, PALETTE, RED, listed, new_figure


def plot_steps(steps: Sequence[Any]) -> Axes:
    """Tokens that each step computed, prefill and decode one on the other: ``LLMEngine.stats()``."""
    with new_figure(3.2) as ax:
        decodes = np.array([step.num_decode_tokens for step in steps])
        prefills = np.array([step.num_prefill_tokens for step in steps])
        ax.bar(range(len(steps)), decodes, width=1, color=BLUE, label="decode")
        ax.bar(range(len(steps)), prefills, bottom=decodes, width=1, color=ORANGE, label="prefill")
        ax.set(xlabel="step", ylabel="tokens computed", xlim=(-0.5, len(steps) - 0.5))
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    totals = decodes + prefills
    ax.figure.alt = (
        f"Stacked bars of the tokens computed by each of {len(steps):,} steps, prefill on decode: {prefills.sum():,} "
        f"tokens of prefill and {decodes.sum():,} of decode, at most {totals.max():,} in one step (step "
        f"{totals.argmax():,})."
    )
    return ax


def plot_running(runs: Mapping[str, Sequence[Any]]) -> Axes:
    """How many sequences each step of each run computed: ``{name: LLMEngine.stats()}``."""
    with new_figure(3.2) as ax:
        for color, (name, steps) in zip(PALETTE, runs.items()):
            ax.step(
                range(len(steps) + 1), [*(s.num_seqs for s in steps), 0], where="post", color=color, label=name, lw=2
            )
        ax.set(xlabel="step", ylabel="sequences in the step", ylim=(0, None))
        ax.legend(ncols=len(runs), loc="lower left", bbox_to_anchor=(0, 1))
    says = {
        name: f"{len(steps):,} steps, at most {max(s.num_seqs for s in steps):,} at once"
        for name, steps in runs.items()
    }
    ax.figure.alt = (
        "Lines of how many sequences each step computes: "
        f"{listed(f'{name} takes {what}' for name, what in says.items())}."
    )
    return ax


def plot_block_tables(tables: Sequence[Mapping[str, Sequence[int]]], num_blocks: int) -> Axes:
    """The cache after each step, one row per step and one square per block, with its owner's name and colour."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    with new_figure(1.1 + 0.42 * len(tables)) as ax:
        for row, table in enumerate(tables):
            owners: dict[int, list[str]] = {block_id: [] for block_id in range(num_blocks)}
            for name, block_ids in table.items():
                for block_id in block_ids:
                    owners[block_id].append(name)
            for block_id, who in owners.items():
                color = PALETTE[names.index(who[0]) % len(PALETTE)] if who else "white"
                ax.barh(row, 0.92, left=block_id + 0.04, height=0.86, color=color, edgecolor=GREY, linewidth=0.8)
                ax.text(
                    block_id + 0.5,
                    row,
                    "+".join(who),
                    ha="center",
                    va="center",
                    fontsize=10,
                    color="white" if color == BLUE else ON_LIGHT_FILL,
                )
        ax.set(
            xlim=(0, num_blocks),
            xticks=[i + 0.5 for i in range(num_blocks)],
            xticklabels=range(num_blocks),
            xlabel="block",
            yticks=range(len(tables)),
            ylabel="step",
        )
        ax.invert_yaxis()
    free = [num_blocks - len({block_id for blocks in table.values() for block_id in blocks}) for table in tables]
    ax.figure.alt = (
        f"Grid of {num_blocks} blocks after each of {len(tables)} steps, each block with the name of the sequence "
        f"that has it ({listed(names)}); {free[0]} are free after the first step and {free[-1]} after the last."
    )
    return ax


def plot_reserved(seq_lens: Sequence[Sequence[int]], block_sizes: Mapping[str, int]) -> Axes:
    """Slots reserved after each step for each block size, and slots that hold a token: ``seq_lens[step]`` in tokens."""
    with new_figure(3.4) as ax:
        for color, (name, size) in zip((RED, BLUE, *PALETTE[2:]), block_sizes.items()):
            reserved = [sum(-(-length // size) * size for length in lens) for lens in seq_lens]
            ax.plot(reserved, color=color, lw=2, label=name)
        ax.fill_between(range(len(seq_lens)), [sum(lens) for lens in seq_lens], color=LIGHT, label="hold a token")
        ax.set(xlabel="step", ylabel="slots of the cache", ylim=(0, None), xlim=(0, len(seq_lens) - 1))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
    held = [sum(lens) for lens in seq_lens]
    most = {
        name: max(sum(-(-length // size) * size for length in lens) for lens in seq_lens)
        for name, size in block_sizes.items()
    }
    ax.figure.alt = (
        f"Lines of the slots reserved along {len(seq_lens):,} steps, above the area of those that hold a token: at "
        f"most {listed(f'{slots:,} are reserved with {name}' for name, slots in most.items())}, where {max(held):,} "
        "hold a token."
    )
    return ax
