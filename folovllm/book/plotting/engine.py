"""Figures of the engine at work: steps, places, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.plotting.style import BLUE, ORANGE, new_figure


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
