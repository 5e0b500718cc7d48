"""Figures of chapter 6: what happens inside a forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from folovllm.book.plotting.style import BLUE, GREY, LIGHT, ORANGE, PALETTE, RED, new_figure, to_array

DARK = "#333333"


def plot_layer(config: Any) -> Axes:
    """One layer of a decoder, with the sizes of its shape: the residual stream on the left, its two branches beside it.

    Args:
        config: a `folovllm.model.decoder.DecoderConfig`.
    """
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    q_k_v = f"q, k, v\n{hidden:,} → {q_size + 2 * kv_size:,}"
    branches = (
        ("norm", q_k_v, "rotate\nq and k", "look\nback", f"o\n→ {hidden:,}"),
        ("norm", f"gate, up\n{hidden:,} → {2 * inner:,}", "silu(gate)\n× up", f"down\n→ {hidden:,}"),
    )
    arrow = {"arrowstyle": "->", "color": DARK, "shrinkA": 0, "shrinkB": 0}
    with new_figure(3.9) as ax:
        ax.plot([0, 0], [1.0, -3.15], color=BLUE, lw=5, solid_capstyle="butt", zorder=1)
        ax.text(0, 1.1, f"residual stream: {hidden:,} numbers per token", ha="left", va="bottom", color=BLUE, size=11)
        for top, (name, boxes) in zip((0.35, -1.65), zip(("attention", "MLP"), branches)):
            for i, text in enumerate(boxes):
                x, sees_others = 0.72 + 1.05 * i, text.startswith("look")
                box = FancyBboxPatch((x - 0.4, top - 0.33), 0.8, 0.66, boxstyle="round,pad=0.03", lw=1.5)
                box.set(facecolor=BLUE if sees_others else "white", edgecolor=BLUE if sees_others else GREY)
                ax.add_patch(box)
                ax.text(x, top, text, ha="center", va="center", size=9, color="white" if sees_others else DARK)
                ax.annotate("", (x - 0.43, top), (0.05 if i == 0 else x - 0.62, top), arrowprops=arrow)
            ax.plot([x, x], [top - 0.38, top - 0.8], color=DARK, lw=1)
            ax.annotate("", (0.17, top - 0.8), (x, top - 0.8), arrowprops=arrow)
            ax.text(
                (x + 0.17) / 2, top - 0.75, f"{name}'s part is added", ha="center", va="bottom", size=10, color=DARK
            )
            ax.add_patch(Circle((0, top - 0.8), 0.15, facecolor="white", edgecolor=BLUE, lw=1.5, zorder=2))
            ax.text(0, top - 0.8, "+", ha="center", va="center", size=13, color=BLUE)
        ax.text(0.2, -3.1, f"to the next of {config.num_layers} layers", ha="left", va="bottom", size=11, color=DARK)
        ax.set(xlim=(-0.3, 5.5), ylim=(-3.25, 1.5))
        ax.axis("off")
        ax.figure.alt = (
            f"Diagram of a layer: a stream of {hidden:,} numbers per token runs down, and two branches read it and add "
            f"to it. They have {' and '.join(str(len(boxes)) for boxes in branches)} boxes; "
            "only the box look back is filled."
        )
    return ax


def plot_attention_map(probs: Any, labels: Sequence[str], *marks: tuple[int, int]) -> Axes:
    """How much each token takes from each: query down, key across.

    Args:
        probs: ``[num_tokens, num_tokens]``, of one head.
        labels: the tokens as text.
        marks: pairs of a query and a key to put a frame around.
    """
    weights = to_array(probs)
    with new_figure(max(3.4, 1.2 + 0.19 * len(labels))) as ax:
        ax.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        size = 9 if len(labels) <= 32 else 7
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        ax.set_yticks(range(len(labels)), labels, fontsize=size)
        ax.set(xlabel="key: who is looked at", ylabel="query: who looks")
        for row, column in marks:
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=RED, lw=2))
        told = "; ".join(
            f"token {row} ({labels[row]}) takes {weights[row, column]:.2f} from token {column} ({labels[column]})"
            for row, column in marks
        )
        ax.figure.alt = f"Heat map of attention among {len(labels)} tokens, empty above the diagonal. Framed: {told}."
    return ax


def plot_dials(frequencies: Any, pairs: Sequence[int], positions: Sequence[int]) -> Axes:
    """The hand of each pair of numbers at each position, as dials: a row per position, a column per pair.

    Args:
        frequencies: radians per position of every pair.
        pairs: which of them to draw.
        positions: at which positions.
    """
    turns = to_array(frequencies)[list(pairs)]
    with new_figure(0.9 + 5.3 * len(positions) / (len(pairs) + 1)) as ax:
        for row, position in enumerate(positions):
            for column, turn in enumerate(turns):
                x, y = math.sin(position * turn), -math.cos(position * turn)  # up at position 0, and clockwise
                ax.add_patch(Circle((column, row), 0.4, facecolor="white", edgecolor=GREY, lw=1))
                ax.plot([column, column + 0.36 * x], [row, row + 0.36 * y], color=BLUE, lw=2.5, solid_capstyle="round")
        ax.set(xlim=(-0.6, len(turns) - 0.4), ylim=(-0.6, len(positions) - 0.4), aspect="equal")
        ax.set_xticks(range(len(turns)), [f"pair {pair}" for pair in pairs], fontsize=10)
        ax.set_yticks(range(len(positions)), [f"{position:,}" for position in positions])
        ax.set(ylabel="position")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.invert_yaxis()
        ax.figure.alt = (
            f"Dials of {len(pairs)} pairs at {len(positions)} positions. One position turns pair {pairs[0]} by "
            f"{math.degrees(turns[0]):.3g} degrees and pair {pairs[-1]} by {math.degrees(turns[-1]):.3g}."
        )
    return ax


def plot_score_by_distance(scores: Mapping[str, Sequence[float]]) -> Axes:
    """Scores of a query with a key that is 0, 1, 2, … tokens before it, a line for each kind of head."""
    with new_figure(3.4) as ax:
        for (name, values), color in zip(scores.items(), PALETTE):
            ax.plot(to_array(values), color=color, lw=2.5 if color == BLUE else 1.4, label=name)
        ax.axhline(0, color=LIGHT, lw=1, zorder=0)
        ax.set(xlabel="distance from key to query (tokens)", ylabel="score (same place = 1)", xlim=(0, None))
        ax.legend(ncols=len(scores), loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
        lowest = "; ".join(
            f"{name}: {min(values):.2f} at its lowest, {values[-1]:.2f} at the end" for name, values in scores.items()
        )
        distance = len(next(iter(scores.values()))) - 1
        ax.figure.alt = f"Lines of the score against a distance of up to {distance} tokens. {lowest}."
    return ax


def plot_shared_heads(kinds: Mapping[str, tuple[int, int]]) -> Axes:
    """Which query heads look at which head of keys and values, for ``{name: (num_heads, num_kv_heads)}``."""
    width = max(num_heads for num_heads, _ in kinds.values())
    with new_figure(0.4 + 1.45 * len(kinds)) as ax:
        for i, (name, (num_heads, num_kv_heads)) in enumerate(kinds.items()):
            top, group = -1.6 * i, num_heads // num_kv_heads
            for head in range(num_heads):
                kv_head = head // group
                middle = kv_head * group + (group - 1) / 2
                ax.plot([head, middle], [top - 0.2, top - 0.5], color=GREY, lw=1.2, zorder=0)
                ax.add_patch(Rectangle((head - 0.4, top - 0.2), 0.8, 0.4, facecolor=BLUE, edgecolor="none"))
                ax.text(head, top, str(head), ha="center", va="center", color="white", size=9)
                if head % group == 0:
                    ax.add_patch(Rectangle((middle - 0.4, top - 0.9), 0.8, 0.4, facecolor=ORANGE, edgecolor="none"))
                    ax.text(middle, top - 0.7, str(kv_head), ha="center", va="center", color="#111111", size=9)
            ax.text(-0.5, top + 0.28, name, ha="left", va="bottom", size=11)
            ax.text(width - 0.3, top, "queries", ha="left", va="center", size=10, color=BLUE)
            ax.text(width - 0.3, top - 0.7, "keys, values", ha="left", va="center", size=10, color=DARK)
        ax.set(xlim=(-0.6, width + 1.3), ylim=(-1.6 * len(kinds) + 0.6, 0.65))
        ax.axis("off")
        ax.figure.alt = "Diagram of query heads above heads of keys and values. " + "; ".join(
            f"{name}: {num_heads} query heads share {num_kv_heads}" for name, (num_heads, num_kv_heads) in kinds.items()
        )
        ax.figure.alt += "."
    return ax


def plot_masks(masks: Mapping[str, Any]) -> Axes:
    """Which tokens each token may see, as grids beside each other: query down, key across; filled where it may.

    Args:
        masks: title -> ``[num_queries, num_keys]`` of booleans.
    """
    gap, left = 1.7, 0.0
    shapes = [np.shape(mask) for mask in masks.values()]
    width, height = sum(columns + gap for _, columns in shapes), max(rows for rows, _ in shapes)
    with new_figure(6.4 * (height + 3.4) / (width + 1)) as ax:
        for title, mask in masks.items():
            allowed = np.asarray(mask, dtype=bool)
            for row, column in np.ndindex(allowed.shape):
                color = BLUE if allowed[row, column] else "white"
                ax.add_patch(Rectangle((left + column, row), 1, 1, facecolor=color, edgecolor=GREY, lw=0.8))
            ax.text(left, -0.3, title, ha="left", va="bottom", size=10)
            left += allowed.shape[1] + gap
        ax.text(0, height + 0.2, "key →", ha="left", va="top", size=10, color=DARK)
        ax.text(-0.3, 0, "query →", ha="right", va="top", size=10, color=DARK, rotation=270)
        ax.set(xlim=(-1.2, width - 1), ylim=(height + 1.2, -2.2), aspect="equal")
        ax.axis("off")
        ax.figure.alt = "Grids of who may see whom, query down and key across. " + "; ".join(
            f"{' '.join(title.split())}: {np.asarray(mask, dtype=bool).sum()} of {np.asarray(mask).size} squares filled"
            for title, mask in masks.items()
        )
        ax.figure.alt += "."
    return ax


def plot_logit_lens(tokens: Sequence[Sequence[str]], probs: Sequence[Sequence[float]], labels: Sequence[str]) -> Axes:
    """What each layer's stream would predict, a row per layer from the bottom, a column per token read.

    Args:
        tokens: ``[num_layers + 1][num_tokens]``, the likeliest next token as text.
        probs: its probability.
        labels: the tokens that are read.
    """
    with new_figure(1.1 + 0.48 * len(tokens)) as ax:
        ax.imshow(to_array(probs), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row, column in np.ndindex(len(tokens), len(labels)):
            color = "white" if probs[row][column] > 0.72 else "black"
            ax.text(column, row, tokens[row][column], ha="center", va="center", size=9, color=color)
        ax.set_xticks(range(len(labels)), labels, fontsize=10)
        ax.set_yticks(range(len(tokens)), ["embedding", *(f"layer {i}" for i in range(len(tokens) - 1))], fontsize=10)
        ax.set(xlabel="token that is read")
        columns = list(zip(labels, tokens[0], tokens[-1], probs[-1]))[-3:]
        told = "; ".join(
            f"after {label}: {low} at first, {high} at the end ({p:.2f})" for label, low, high, p in columns
        )
        ax.figure.alt = f"Grid of predictions after the embedding and each of {len(tokens) - 1} layers: {told}."
    return ax
