"""What the tests of the figures read off a plot."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


def bars(ax: Axes, label: str | None = None) -> list[Rectangle]:
    """The bars of the series with this label, or all."""
    return [
        bar for group in ax.containers if label in (None, group.get_label()) for bar in getattr(group, "patches", [])
    ]


def heights(ax: Axes, label: str | None = None) -> list[float]:
    return pytest.approx([bar.get_height() for bar in bars(ax, label)], abs=1e-6)


def widths(ax: Axes, label: str | None = None) -> list[float]:
    return pytest.approx([bar.get_width() for bar in bars(ax, label)], abs=1e-6)


def bottoms(ax: Axes, label: str | None = None) -> list[float]:
    return pytest.approx([bar.get_y() for bar in bars(ax, label)], abs=1e-6)


def lefts(ax: Axes, label: str | None = None) -> list[float]:
    return pytest.approx([bar.get_x() for bar in bars(ax, label)], abs=1e-6)


def line(ax: Axes, label: str | None = None) -> tuple[list[float], list[float]]:
    """Places and values of the line with this label, or of the first."""
    found = next(line for line in ax.lines if label in (None, line.get_label()))
    return pytest.approx(list(found.get_xdata())), pytest.approx(list(found.get_ydata()))


def texts(ax: Axes) -> list[str]:
    """What is written into the plot itself."""
    return [" ".join(text.get_text().split()) for text in ax.texts if text.get_text().strip()]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]
