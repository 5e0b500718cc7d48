"""Screenshots of every page of the built site, for the eye: ``python tests/book/screenshots.py FOLDER [PAGE ...]``.

Each page three times, from top to bottom: light and dark at 1280 pixels, and light at the width of a phone. Look at
them after every change of ``book/_static/folovllm.css``.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from headless import PHONE, chromium_page, find_chromium
from site_pages import SITE, pages_of_the_book

VIEWS = {"light": (1280, False), "dark": (1280, True), "phone": (PHONE, False), "phone-dark": (PHONE, True)}
TALLEST = 16_000
"""Pixels; Chromium draws no taller picture."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", help="such as notebooks/01_configs; all of them when none is named")
    args = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        parser.exit(1, "Chromium was not found; install it (on Debian the package is called chromium)\n")
    args.folder.mkdir(parents=True, exist_ok=True)
    names = args.pages or pages_of_the_book()
    with chromium_page(binary) as page:
        for name in names:
            for view, (width, dark) in VIEWS.items():
                page.set_dark(dark)
                page.set_width(width)
                page.open(SITE / f"{name}.html")
                # A window as tall as the page: the sidebars are as tall as the window.
                height = page.evaluate("document.documentElement.scrollHeight")
                page.set_width(width, min(height, TALLEST))
                shot = page.call("Page.captureScreenshot")
                path = args.folder / f"{name.replace('/', '-')}-{view}.png"
                path.write_bytes(base64.b64decode(shot["data"]))
                print(path)


if __name__ == "__main__":
    main()
