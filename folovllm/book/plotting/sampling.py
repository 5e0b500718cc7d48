"""Figures of chapter 2: probabilities, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from folovllm.book.plotting.style import (
    BLUE,
    DARK_RED,
    GREY,
    LIGHT,
    ORANGE,
    PALETTE,
    RED,
    SKY,
    course,
    listed,
    new_figure,
    to_array,
    token_label,
)


def plot_token_bars(series: Mapping[str, Tensor], tokenizer: Any, top: int = 10) -> Axes:
    """Probabilities ``[vocab_size]`` of the likeliest tokens, one bar per series; the first decides the order."""
    first = next(iter(series.values()))
    token_ids = first.topk(top).indices.tolist()
    with new_figure(0.9 + 0.33 * top) as ax:
        width = 0.8 / len(series)
        for i, (name, probs) in enumerate(series.items()):
            places = np.arange(top) + (i - (len(series) - 1) / 2) * width
            ax.barh(places, to_array(probs[token_ids]), width, label=name, color=PALETTE[i])
        ax.set(yticks=range(top), yticklabels=[token_label(tokenizer, t) for t in token_ids], xlabel="probability")
        ax.invert_yaxis()
        if len(series) > 1:
            ax.legend(loc="lower right")
    labels = [token_label(tokenizer, t) for t in token_ids]
    rows = {
        name: listed(f"{label} {float(p):.3f}" for label, p in zip(labels, probs[token_ids[:3]]))
        for name, probs in series.items()
    }
    ax.figure.alt = (
        f"Bars of the probabilities of the {top} likeliest tokens, from {labels[0]} to {labels[-1]}. The first of "
        f"them, by series: {'; '.join(f'{name}: {row}' for name, row in rows.items())}."
    )
    return ax


def plot_temperatures(probs: Mapping[float, Tensor], tokenizer: Any, top: int = 6) -> Axes:
    """How each temperature shares out the probability ``[vocab_size]``: one bar each, cut into the likeliest tokens."""
    token_ids = next(iter(probs.values())).topk(top).indices.tolist()
    names = [token_label(tokenizer, t) for t in token_ids]
    with new_figure(1.6 + 0.5 * len(probs)) as ax:
        left = np.zeros(len(probs))
        shares = np.stack([to_array(p[token_ids]) for p in probs.values()])  # [num_temperatures, top]
        for name, color, share in zip(names, PALETTE, shares.T):
            ax.barh(range(len(probs)), share, left=left, color=color, label=name, edgecolor="white")
            left += share
        ax.barh(range(len(probs)), 1 - left, left=left, color=LIGHT, label="all others", edgecolor="white")
        ax.set(yticks=range(len(probs)), yticklabels=[f"T = {t:g}" for t in probs], xlim=(0, 1), xlabel="probability")
        ax.invert_yaxis()
        # Passed explicitly, since matplotlib leaves out labels that begin with an underscore.
        ax.legend(
            ax.containers,
            [*names, "all others"],
            loc="lower center",
            bbox_to_anchor=(0.45, 1),
            ncols=4,
            fontsize=10.5,
            columnspacing=1,
            handlelength=1,
        )
    leading = {t: (share[0], 1 - share.sum()) for t, share in zip(probs, shares)}
    ax.figure.alt = (
        f"Stacked bars of how the probability is shared out at each temperature, cut into {listed(names)} and all "
        f"others. {names[0]} and all others get "
        f"{listed(f'{a:.2f} and {b:.2f} at T = {t:g}' for t, (a, b) in leading.items())}."
    )
    return ax


def plot_entropy(temperatures: Sequence[float], entropies: Sequence[float], limit: float) -> Axes:
    """Entropy in nats against temperature, and the ``limit`` that equal probabilities would have."""
    with new_figure() as ax:
        ax.plot(temperatures, entropies, marker="o")
        ax.axhline(limit, color=GREY, ls="--")
        ax.text(temperatures[0], limit * 1.02, "every token equally likely", va="bottom", color="#555555")
        ax.set(xlabel="temperature", ylabel="entropy (nats)", ylim=(0, limit * 1.15))
    ax.figure.alt = (
        f"Line of the entropy in nats against temperature: it {course(entropies, temperatures)}. A dashed line at "
        f"{limit:.3g} marks the entropy of equal probabilities."
    )
    return ax


def plot_kept(probs: Tensor, kept: Mapping[str, Tensor], tokenizer: Any, top: int = 14) -> np.ndarray:
    """What each filter keeps of a distribution ``[vocab_size]``: one panel each, kept tokens filled, others hollow."""
    token_ids = probs.topk(top).indices
    heights = to_array(probs[token_ids])
    with new_figure(0.9 + 1.45 * len(kept), rows=len(kept), sharex=True, sharey=True) as axes:
        for ax, (name, mask), color in zip(np.atleast_1d(axes), kept.items(), PALETTE):
            stays = mask[token_ids].cpu().numpy()
            ax.bar(range(top), heights, color=[color if s else "white" for s in stays], edgecolor=color, lw=1.2)
            ax.set_title(f"{name}: keeps {int(mask.sum())} of {len(mask):,}", fontsize=12)
        labels = [token_label(tokenizer, t) for t in token_ids.tolist()]
        np.atleast_1d(axes)[-1].set_xticks(range(top), labels, rotation=60, ha="right", rotation_mode="anchor")
    np.atleast_1d(axes)[0].figure.alt = (
        f"A panel for each filter, with the same {top} likeliest tokens, kept ones filled and others hollow: "
        f"{listed(f'{name} keeps {int(mask.sum())}' for name, mask in kept.items())} of {len(probs):,} tokens."
    )
    return axes


def plot_inverse_cdf(probs: Tensor, uniform: float, tokenizer: Any) -> Axes:
    """The cumulative distribution of ``[vocab_size]`` over its possible tokens, the number drawn, the token it hits."""
    token_ids = probs.nonzero().flatten()
    own = to_array(probs[token_ids])
    cumulative = np.cumsum(own)
    hit = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    labels = [token_label(tokenizer, t) for t in token_ids.tolist()]
    with new_figure(3.8) as ax:
        places = range(len(labels))
        ax.bar(places, cumulative - own, color=LIGHT, width=0.96, label="all tokens before it")
        colors = [ORANGE if place == hit else BLUE for place in places]
        ax.bar(places, own, bottom=cumulative - own, color=colors, width=0.96, label="its own probability")
        ax.annotate("", (hit, uniform), (-0.6, uniform), arrowprops={"arrowstyle": "->", "color": RED, "lw": 2})
        ax.text(-0.55, uniform + 0.02, f"u = {uniform:.3f}", color=DARK_RED, weight="bold")
        ax.set(ylabel="cumulative probability", xlim=(-0.6, len(labels) - 0.4))
        ax.set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor")
        ax.get_xticklabels()[hit].set(color=DARK_RED, weight="bold")
    ax.figure.alt = (
        f"Staircase of the cumulative probability over {len(labels)} tokens. An arrow at the height of {uniform:.3f} "
        f"ends at the step of {labels[hit]}, which reaches from {cumulative[hit] - own[hit]:.3f} to "
        f"{cumulative[hit]:.3f}."
    )
    return ax


def plot_draws(probs: Tensor, token_ids: Sequence[int], tokenizer: Any, top: int = 10) -> Axes:
    """How often each token was drawn, beside how often it should have been on average."""
    likeliest = probs.topk(top).indices.tolist()
    counts = [list(token_ids).count(t) for t in likeliest]
    expected = to_array(probs[likeliest]) * len(token_ids)
    with new_figure(3.4) as ax:
        ax.bar(range(top), counts, color=SKY, label=f"drawn, of {len(token_ids):,}")
        # Two standard deviations of a count: about 19 of 20 bars should end inside.
        spread = 2 * np.sqrt(expected * (1 - to_array(probs[likeliest])))
        ax.errorbar(
            range(top), expected, spread, fmt="o", color=RED, capsize=4, label="expected, ±2 standard deviations"
        )
        ax.set(ylabel="times drawn")
        ax.set_xticks(
            range(top), [token_label(tokenizer, t) for t in likeliest], rotation=60, ha="right", rotation_mode="anchor"
        )
        ax.legend()
    deviations = np.sqrt(expected * (1 - to_array(probs[likeliest])))
    inside = int((np.abs(counts - expected) <= 2 * deviations).sum())
    ax.figure.alt = (
        f"Bars of how often each of the {top} likeliest tokens came up in {len(token_ids):,} draws, from "
        f"{counts[0]:,} times to {counts[-1]:,}, beside the expected counts: {inside} of the bars end within two "
        "standard deviations."
    )
    return ax
