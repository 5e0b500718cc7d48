"""A figure that says in words what it shows, and that can be drawn for a dark page.

The dark picture is the same figure with its neutral colours exchanged: the ground becomes that of the site's dark page,
letters become light. Colours that stand for data stay, so that both pictures and the text name the same ones.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text

from folovllm.book.palette import BLUE, DARK_PAPER, DARK_REQUEST_COLORS, GREY, PALETTE, REQUEST_COLORS

NEUTRALS = {
    "#ffffff": DARK_PAPER,
    "#000000": "#e6e9ed",
    "#333333": "#d5dae0",
    "#555555": "#b4bcc6",
    "#cccccc": "#50575f",
    "#d9d9d9": "#454c55",
}
"""Colours of the ground, of letters and of faint lines, and what they become on a dark page."""

EXCHANGED = {**NEUTRALS, **{a: b for a, b in zip(REQUEST_COLORS, DARK_REQUEST_COLORS) if a not in PALETTE}}
"""All colours that become a certain other one."""

ON_FILLS = ("#ffffff", "#111111")
"""Colours of letters and signs on a filled box, which stay as they are, since the box does."""

HEAT = LinearSegmentedColormap.from_list("heat", ["white", BLUE])
"""The colours of heat maps: nothing is the ground, the most is blue."""

DARK_HEAT = LinearSegmentedColormap.from_list("dark heat", [DARK_PAPER, BLUE])

DARK_PICTURE = "image/x-dark-png"
"""The MIME type of the dark picture among a cell's outputs; no frontend knows it, so none shows it."""

ASK_FOR_DARK = "FOLOVLLM_DARK_FIGURES"
"""The environment variable with which tests/book/refresh.py asks for dark pictures, too."""


class BookFigure(Figure):
    """A figure whose text is a description of what it shows."""

    alt = ""
    """What the figure shows, in words, with the plotted numbers; the function that plots them sets it."""

    def __repr__(self) -> str:
        return self.alt or super().__repr__()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        if not os.environ.get(ASK_FOR_DARK):
            return {}
        return {DARK_PICTURE: base64.b64encode(draw_dark(self)).decode()}


def draw_dark(figure: Figure) -> bytes:
    """The PNG of a figure for a dark page, as large as the one that a notebook shows."""
    picture = io.BytesIO()
    with darkened(figure):
        figure.savefig(picture, format="png", dpi=figure.dpi, bbox_inches="tight")
    return picture.getvalue()


@contextlib.contextmanager
def darkened(figure: Figure) -> Iterator[None]:
    """Gives a figure the colours of a dark page, and afterwards those it had."""
    figure.draw_without_rendering()  # matplotlib makes the last labels of its axes when it draws
    put_back: list[tuple[Callable[[Any], Any], Any]] = []
    for artist in _artists(figure):
        for setter, old, new in list(_exchanges(artist)):  # all of the old first: a marker's edge may follow its line
            put_back.append((setter, old))
            setter(new)
    try:
        yield
    finally:
        for setter, old in reversed(put_back):
            setter(old)


def _artists(figure: Figure) -> Iterator[Artist]:
    """Everything that is drawn, boxes of texts and arrows of annotations included, which matplotlib does not list."""
    for artist in figure.findobj():
        yield artist
        if isinstance(artist, Text) and (box := artist.get_bbox_patch()) is not None:
            yield box
        if isinstance(artist, Annotation) and artist.arrow_patch is not None:
            yield artist.arrow_patch


def _exchanges(artist: Artist) -> Iterator[tuple[Callable[[Any], Any], Any, Any]]:
    """How to set each colour of an artist, what it is, and what it is on a dark page."""
    if isinstance(artist, ScalarMappable) and artist.get_array() is not None:
        if artist.get_cmap().name in (HEAT.name, "Blues"):
            yield artist.set_cmap, artist.get_cmap(), DARK_HEAT
    elif isinstance(artist, Text):
        yield artist.set_color, artist.get_color(), _dark_letter(artist.get_color())
    elif isinstance(artist, Line2D):
        for part in ("color", "markerfacecolor", "markeredgecolor"):
            old = getattr(artist, f"get_{part}")()
            yield getattr(artist, f"set_{part}"), old, dark_color(old)
    elif isinstance(artist, (Patch, Collection)):
        for part in ("facecolor", "edgecolor"):
            old = getattr(artist, f"get_{part}")()
            if isinstance(old, np.ndarray):  # a collection has a row for each of its members
                yield getattr(artist, f"set_{part}"), old, [dark_color(row) for row in old]
            elif not isinstance(old, str):
                yield getattr(artist, f"set_{part}"), old, dark_color(old)


def dark_color(color: Any) -> Any:
    """What a colour becomes on a dark page: the palette stays, a darker shade of it becomes as much lighter."""
    if isinstance(color, str) and color.lower() in ("none", "auto", ON_FILLS[1]):
        return color
    red_green_blue, alpha = np.array(to_rgba(color)[:3]), to_rgba(color)[3]
    exchanged = EXCHANGED.get(to_hex(red_green_blue))
    if exchanged is not None:
        return (*to_rgba(exchanged)[:3], alpha)
    for full in (np.array(to_rgba(name)[:3]) for name in (*PALETTE, GREY)):
        factor = float(red_green_blue @ full / (full @ full))
        if factor < 0.99 and np.allclose(red_green_blue, factor * full, atol=0.01):
            return (*(full + (1 - factor) * (1 - full)), alpha)
    # A bright colour through which a dark ground is seen stands out more there, and would hide what lies on it.
    return color if alpha == 1 else (*red_green_blue, alpha / 3)


def _dark_letter(color: Any) -> Any:
    """What the colour of letters becomes: lighter until they have the contrast of 4.5 that WCAG 2 asks for."""
    if to_hex(color) in ON_FILLS:
        return color
    shade = np.array(to_rgba(dark_color(color))[:3])
    while _luminance(shade) + 0.05 < 4.5 * (_luminance(np.array(to_rgba(DARK_PAPER)[:3])) + 0.05):
        shade = shade + 0.05 * (1 - shade)
    return tuple(shade)


def _luminance(color: np.ndarray) -> float:
    """How light a colour is, as WCAG 2 counts it."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
