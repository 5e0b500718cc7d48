"""Figures of prefixes that are found again: chains of hashes, turns of a chat, what a pool can keep. Chapter 13."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from folovllm.book.plotting.style import BLUE, GREY, LIGHT, ORANGE, PALETTE, new_figure

MILLISECONDS = 1e3


def _place_leaves(chains: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, tuple[int, float]]:
    """Column and row of each hash: a chain's last block on a row of its own, others in the middle of what follows."""
    rows: dict[str, list[int]] = {}
    columns: dict[str, int] = {}
    for row, chain in enumerate(chains.values()):
        for column, (block_hash, _) in enumerate(chain):
            rows.setdefault(block_hash, []).append(row)
            columns[block_hash] = column
    return {block_hash: (columns[block_hash], float(np.mean(found))) for block_hash, found in rows.items()}


def plot_hash_tree(chains: Mapping[str, Sequence[tuple[str, str]]]) -> Axes:
    """Chains of block hashes as a tree, shared blocks drawn once: ``{request: (hash, text) of each block}``."""
    places = _place_leaves(chains)
    texts = {block_hash: text for chain in chains.values() for block_hash, text in chain}
    users = {block_hash: sum(block_hash in dict(chain) for chain in chains.values()) for block_hash in texts}
    depth = max(map(len, chains.values()))
    with new_figure(0.4 + 1.0 * len(chains)) as ax:
        for chain in chains.values():
            for (parent, _), (child, _) in pairwise(chain):
                (x0, y0), (x1, y1) = places[parent], places[child]
                ax.plot([x0 + 0.42, x1 - 0.42], [y0, y1], color=GREY, lw=1.5, zorder=0)
        for block_hash, (x, y) in places.items():
            shared = users[block_hash] > 1
            box = FancyBboxPatch((x - 0.4, y - 0.38), 0.8, 0.76, boxstyle="round,pad=0.02", lw=1.5)
            box.set(facecolor=BLUE if shared else "white", edgecolor=BLUE)
            ax.add_patch(box)
            color = "white" if shared else "black"
            words = textwrap.fill(texts[block_hash].strip(), 12)
            ax.text(x, y - 0.12, words, ha="center", va="center", color=color, fontsize=10.5)
            ax.text(x, y + 0.25, block_hash[:6], ha="center", va="center", color=color, fontsize=10.5)
        for row, (name, chain) in enumerate(chains.items()):
            ax.text(places[chain[-1][0]][0] + 0.47, row, name, va="center", color="#333333")
        ax.set(xlim=(-0.45, depth - 0.35), ylim=(len(chains) - 0.5, -0.5))
        ax.axis("off")
        num_shared = sum(count > 1 for count in users.values())
        ax.figure.alt = (
            f"Tree of the blocks of {len(chains)} requests, from left to right: {sum(map(len, chains.values()))} "
            f"blocks with {len(texts)} different hashes, {num_shared} of them filled because requests share them."
        )
    return ax


def plot_turns(turns: Mapping[str, Sequence[tuple[int, int]]]) -> np.ndarray:
    """Tokens of each turn of a chat, computed below and found in the cache above: ``{run: (computed, found)}``."""
    with new_figure(0.9 + 1.6 * len(turns), rows=len(turns), sharex=True, sharey=True) as axes:
        for ax, (name, counts) in zip(np.atleast_1d(axes), turns.items()):
            computed, found = np.array(counts).T
            places = range(1, len(counts) + 1)
            ax.bar(places, computed, color=ORANGE, label="computed", width=0.7)
            ax.bar(places, found, bottom=computed, color=LIGHT, label="found in the cache", width=0.7)
            for place, count in zip(places, computed):
                ax.text(place, count, f"{count:,}", ha="center", va="bottom", fontsize=10.5)
            ax.set_title(f"{name}: {computed.sum():,} tokens computed", fontsize=12)
            ax.set(ylabel="tokens")
        first, last = np.atleast_1d(axes)[[0, -1]]
        last.set_xlabel("turn")
        first.set_ylim(0, 1.15 * max(sum(pair) for counts in turns.values() for pair in counts))
        last.legend(loc="upper left", fontsize=10.5)
        said = "; ".join(
            f"{name}: {', '.join(f'{computed:,}' for computed, _ in counts)} computed, "
            f"{sum(found for _, found in counts):,} found"
            for name, counts in turns.items()
        )
        first.figure.alt = f"Stacked bars of the tokens of each turn, a panel for each run. {said}."
    return axes


def plot_hit_rates(rates: Mapping[str, Mapping[int, float]]) -> Axes:
    """Share of the tokens found in the cache against the blocks it has, a line for each order of eviction."""
    with new_figure(3.6) as ax:
        for color, marker, (name, points) in zip(PALETTE, "osD^v", rates.items()):
            percent = [100 * rate for rate in points.values()]
            ax.plot(list(points), percent, color=color, marker=marker, ms=5, label=name)
        ax.set(xlabel="blocks in the cache", ylabel="tokens found (%)", ylim=(0, 100))
        ax.legend(fontsize=10.5)
        said = "; ".join(
            f"{name}: {100 * points[least]:.0f} % with {least} blocks, {100 * points[most]:.0f} % with {most}"
            for name, points in rates.items()
            for least, most in [(min(points), max(points))]
        )
        ax.figure.alt = f"Lines of the share of tokens found against blocks in the cache. {said}."
    return ax


def plot_ttft_by_turn(ttft: Mapping[str, Sequence[float]]) -> Axes:
    """Milliseconds to the first token in each turn of a chat: ``{run: seconds of each turn}``."""
    with new_figure(3.4) as ax:
        for color, marker, (name, seconds) in zip(PALETTE, "osD", ttft.items()):
            turns, waits = range(1, len(seconds) + 1), MILLISECONDS * np.array(seconds)
            ax.plot(turns, waits, color=color, marker=marker, label=name, lw=2)
        ax.set(xlabel="turn", ylabel="milliseconds to the first token", ylim=(0, None))
        ax.legend(ncols=len(ttft), loc="lower left", bbox_to_anchor=(0, 1))
        said = "; ".join(
            f"{name}: {MILLISECONDS * seconds[0]:.1f} ms in the first turn, "
            f"{MILLISECONDS * seconds[-1]:.1f} ms in the last"
            for name, seconds in ttft.items()
        )
        ax.figure.alt = f"Lines of the milliseconds to the first token by turn. {said}."
    return ax
