"""Where the built site is, and which pages it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
BUILD = "jupyter-book build . --all -W -n --keep-going"


def pages_of_the_book() -> list[str]:
    """The pages that ``_toc.yml`` names, in its order, without their endings."""

    def walk(entry: dict[str, Any]) -> Iterator[str]:
        yield from (entry[key] for key in ("root", "file") if key in entry)
        for key in ("parts", "chapters", "sections"):
            for child in entry.get(key, []):
                yield from walk(child)

    return list(walk(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))


def require_site() -> None:
    """Fails the test that calls it when there is no built site.

    Raises:
        AssertionError: with the command that builds it.
    """
    if not (SITE / "objects.inv").is_file():
        raise AssertionError(f"there is no built site in {SITE.relative_to(ROOT)}; build it first: {BUILD}")
