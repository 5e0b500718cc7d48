"""The way from a prompt to its answer."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from folovllm.book.plotting.style import BLUE, DARK_RED, GREY, RED, listed, new_figure

PATH = ("text", "tokenizer", "Request", "scheduler", "model", "sampler", "detokenizer", "RequestOutput")
"""The way from a prompt to its answer."""


def plot_path(*here: str, told_by: str | None = None) -> Axes:
    """The way from prompt to answer, with the stations of a chapter filled in.

    Args:
        here: stations out of `PATH`.
        told_by: text above the path, for what governs all of it.
    """
    dark = "#333333"
    arrow = {"arrowstyle": "->", "color": dark, "shrinkA": 0, "shrinkB": 0}
    # Two rows, there and back: eight stations in one row are too small for a phone.
    places = [(i, 0.0) if i < 4 else (7 - i, -1.0) for i in range(len(PATH))]
    with new_figure(2.6) as ax:
        for i, (station, (x, y)) in enumerate(zip(PATH, places)):
            inside = station in here
            box = FancyBboxPatch((x - 0.4, y - 0.22), 0.8, 0.44, boxstyle="round,pad=0.02", lw=1.5)
            box.set(facecolor=BLUE if inside else "white", edgecolor=BLUE if inside else GREY)
            ax.add_patch(box)
            size = 9.8 if inside and len(station) > 12 else 11  # bold letters are wider, and the box is not
            weight, color = ("bold", "white") if inside else ("normal", dark)
            ax.text(x, y, station, ha="center", va="center", color=color, size=size, weight=weight)
            if i in (0, 1, 2):
                ax.annotate("", (x + 0.57, y), (x + 0.43, y), arrowprops=arrow)
            if i in (4, 5, 6):
                ax.annotate("", (x - 0.57, y), (x - 0.43, y), arrowprops=arrow)
        ax.annotate("", (3.15, -0.75), (3.15, -0.25), arrowprops=arrow)
        ax.annotate("", (2.75, -0.25), (2.1, -0.75), arrowprops={**arrow, "color": RED})
        ax.text(2.3, -0.5, "each new token goes back in", ha="right", va="center", color=DARK_RED, size=11)
        ax.set(xlim=(-0.5, 3.5), ylim=(-1.3, 0.95 if told_by else 0.35))
        if told_by:
            banner = {"facecolor": BLUE, "edgecolor": BLUE, "boxstyle": "round,pad=0.4"}
            ax.text(1.5, 0.65, told_by, ha="center", va="center", color="white", weight="bold", bbox=banner)
        ax.axis("off")
    filled = f"; {listed(here)} {'is' if len(here) == 1 else 'are'} filled in" if here else ""
    banner_says = f", below a banner that says {told_by}" if told_by else ""
    ax.figure.alt = (
        f"Diagram of {len(PATH)} stations in two rows, from {PATH[0]} to {PATH[-1]}{banner_says}{filled}. An arrow "
        "leads from the sampler back to the scheduler."
    )
    return ax
