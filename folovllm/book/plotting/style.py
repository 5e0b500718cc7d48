"""The style that all figures share.

Type that is legible at the width of a phone, and the colours of `folovllm.book.palette`. `BookFigure` draws the same
figure for a dark page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from folovllm.book.palette import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, SKY, YELLOW
from folovllm.book.plotting.book_figure import HEAT, BookFigure

__all__ = [
    "BLUE",
    "DARK_RED",
    "GREEN",
    "GREY",
    "HEAT",
    "LIGHT",
    "ON_LIGHT_FILL",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "RED",
    "SKY",
    "STYLE",
    "YELLOW",
    "course",
    "listed",
    "new_figure",
    "to_array",
    "token_label",
]

# A notebook's backend is set up at its first use, and turns interactive mode on. Inside `new_figure`'s context that
# would be undone at the end, and no figure after the first would be shown; so it is set up here.
plt.switch_backend(plt.get_backend())

LIGHT = "#D9D9D9"
DARK_RED = "#B55000"
"""`RED` for letters: on white it has a contrast of 5.1, where `RED` has 3.9."""
ON_LIGHT_FILL = "#111111"
"""Letters on a box filled with any colour of the palette but `BLUE`, where they are white."""

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
    "legend.facecolor": "white",  # the ground, where a legend lies on bars
    "legend.edgecolor": "white",
    "legend.framealpha": 0.9,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def new_figure(height: float = 3.6, rows: int = 1, **kwargs: Any) -> Iterator[Any]:
    """New Axes in the book's style: one, or an array of ``rows``."""
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(rows, 1, figsize=(6.4, height), FigureClass=BookFigure, **kwargs)
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


def listed(parts: Iterable[Any]) -> str:
    """Things in a sentence: ``a, b and c``."""
    *most, last = [str(part) for part in parts]
    return f"{', '.join(most)} and {last}" if most else last


def course(values: Sequence[float], places: Sequence[Any] | None = None) -> str:
    """How a line runs, in words: ``rises from 1 at 0 to 5 at 9``; without ``places`` they are left out."""
    first, last = (f"{float(value):.3g}" for value in (values[0], values[-1]))
    at_first, at_last = (f" at {place}" for place in (places[0], places[-1])) if places is not None else ("", "")
    if first == last:
        return f"begins and ends at {first}"
    return f"{'rises' if values[-1] > values[0] else 'falls'} from {first}{at_first} to {last}{at_last}"
