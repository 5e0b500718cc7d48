"""The style that all figures share.

A white card that stays white on a dark page, type that is legible at the width of a phone, and the colours of Okabe and
Ito (2008), which readers with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

# A notebook's backend is set up at its first use, and turns interactive mode on. Inside `new_figure`'s context that
# would be undone at the end, and no figure after the first would be shown; so it is set up here.
plt.switch_backend(plt.get_backend())

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW)
LIGHT = "#D9D9D9"
DARK_RED = "#B55000"
"""`RED` for letters: on white it has a contrast of 5.1, where `RED` has 3.9."""

STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "legend.frameon": False,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def new_figure(height: float = 3.6, rows: int = 1, **kwargs: Any) -> Iterator[Any]:
    """New Axes in the book's style: one, or an array of ``rows``."""
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(rows, 1, figsize=(6.4, height), **kwargs)
        yield axes


def token_label(tokenizer: Any, token_id: int) -> str:
    """A token as readers see it: spaces as ``␣``, new lines as ``⏎``; its id where the font may lack the letters."""
    text = tokenizer.decode([token_id])
    shown = text.replace(" ", "␣").replace("\n", "⏎")
    if not text.isascii() or not text.strip() or not shown.isprintable():
        return f"#{token_id}"
    # Dollars would begin a formula.
    return shown.replace("$", r"\$")


def to_array(values: Any) -> np.ndarray:
    """Numbers from a tensor on any device, or from a list."""
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
