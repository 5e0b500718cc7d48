"""Where the built site is, and which pages it has."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"


def pages_of_the_book() -> list[str]:
    """The pages that ``_toc.yml`` names, in its order, without their endings."""

    def walk(entry: dict[str, Any]) -> Iterator[str]:
        yield from (entry[key] for key in ("root", "file") if key in entry)
        for key in ("parts", "chapters", "sections"):
            for child in entry.get(key, []):
                yield from walk(child)

    return list(walk(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))


@functools.cache
def require_site() -> None:
    """Builds the site, strictly, unless it is there and up to date. Several processes may ask at once.

    Raises:
        AssertionError: with what the build said, if it failed.
    """
    done = subprocess.run(
        [sys.executable, ROOT / "book" / "build.py", "--strict"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"the site cannot be built:\n{done.stdout}")
