"""The pictures of figures for dark pages: files in ``book/dark``, since a notebook keeps one picture of a figure.

Each carries a stamp of the light picture that it was drawn beside, and of the colours it was drawn in, so that a test
notices a stale one.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from folovllm.book.plotting import book_figure

FOLDER = Path(__file__).resolve().parents[2] / "book" / "dark"
KEY = "Drawn beside"
"""The PNG's text that holds the stamp."""


def path_of(figure_name: str) -> Path:
    """Where the dark picture of a figure is."""
    return FOLDER / f"{figure_name}.png"


def stamp_for(light: str) -> str:
    """The stamp of a dark picture that was drawn beside a light one, given in base64 as a notebook stores it."""
    colors = (book_figure.DARK_PAPER, book_figure.NEUTRALS, book_figure.PALETTE, book_figure.ON_FILLS)
    return hashlib.sha256(f"{''.join(light.split())} {colors}".encode()).hexdigest()[:32]


def write(figure_name: str, dark: str, light: str) -> None:
    """Keeps a dark picture, given in base64 as its light one; 256 colours are enough for it and half of the bytes."""
    FOLDER.mkdir(exist_ok=True)
    stamp = PngInfo()
    stamp.add_text(KEY, stamp_for(light))
    with Image.open(io.BytesIO(base64.b64decode(dark))) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(path_of(figure_name), optimize=True, pnginfo=stamp)


def read_stamp(figure_name: str) -> str | None:
    """The stamp of a figure's dark picture; None if there is no picture."""
    if not path_of(figure_name).is_file():
        return None
    with Image.open(path_of(figure_name)) as picture:
        return picture.text.get(KEY)  # type: ignore[attr-defined]
