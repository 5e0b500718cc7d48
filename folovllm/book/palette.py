"""The book's colours, for figures and players alike; matplotlib is not needed for them.

They are those of Okabe and Ito (2008), which readers with any kind of colour vision can tell apart.
"""

from __future__ import annotations

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW)

DARK_PAPER = "#121212"
"""The ground of the site's dark page."""


def mix(color: str, other: str, share: float) -> str:
    """A colour between two, each given as ``#rrggbb``: ``share`` of it is ``other``."""
    parts = zip(*([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (color, other)))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in parts)


_LIGHTER = tuple(color for color in PALETTE if color != ORANGE)
REQUEST_COLORS = (*_LIGHTER, *(mix(color, "#000000", 0.4) for color in _LIGHTER))
"""The colours of requests, in the order in which they came, and darker ones; orange says that a prompt is read."""

DARK_REQUEST_COLORS = (*_LIGHTER, "#9a8fe8", *(mix(color, "#ffffff", 0.4) for color in _LIGHTER[1:]))
"""The same on a dark page, where what was darker is as much lighter; a lighter blue would be another sky."""
