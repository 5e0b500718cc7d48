"""Build time of the site and the weight of its pages: ``python tests/benchmarks/site.py``.

The build is the one of ``./setup_env.sh book``, from nothing, in a temporary copy. A page weighs its HTML and all that
it names: images, style sheets, scripts and fonts, but not the script that draws the maths, and nothing compressed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from side_by_side import ROOT, print_table, verdict

ROUNDS = 3
TARGET_SECONDS = 30
TARGET_BYTES = 1_500_000  # a page
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "_build", "venv")


class Named(HTMLParser):
    """Collects the files that a page makes the browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Images and scripts by ``src``; ``link`` for style sheets, icons and what is loaded ahead."""
        given = dict(attributes)
        loads = {"stylesheet", "icon", "preload", "modulepreload"} & set((given.get("rel") or "").split())
        url = given.get("href") if tag == "link" and loads else given.get("src")
        if url and tag != "a":
            self.urls.add(url)


def build(folder: Path) -> float:
    """Seconds to build the site in ``folder`` from nothing; ends the program if it cannot be built."""
    shutil.rmtree(folder / "_build", ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [sys.executable, str(jupyter_book), "build", ".", "--all", "-W", "-n", "--keep-going"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        told = [line for line in done.stdout.splitlines() if "WARNING" in line or "ERROR" in line]
        sys.exit("\n".join(["The site could not be built:", *(told or done.stdout.splitlines()[-20:])]))
    return seconds


def weigh(page: Path) -> tuple[int, int]:
    """Bytes of a page's HTML, and of the files it names."""
    parser = Named()
    parser.feed(page.read_text(encoding="utf-8"))
    local = [urlsplit(url) for url in parser.urls]
    files = {(page.parent / unquote(url.path)).resolve() for url in local if not url.scheme and not url.netloc}
    return page.stat().st_size, sum(f.stat().st_size for f in files if f.is_file() and "mathjax" not in str(f).lower())


def main() -> None:
    """Measures, and prints the tables."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "book"
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
        seconds = statistics.median(build(folder) for _ in range(ROUNDS))
        html = folder / "_build" / "html"
        # _static holds fragments of the theme, no pages
        pages = [path for path in html.rglob("*.html") if "_static" not in path.parts]
        weights = {path.relative_to(html).as_posix(): weigh(path) for path in pages}
    rows = [
        ["jupyter-book build . --all", f"{seconds:.1f} s", f"< {TARGET_SECONDS} s", verdict(seconds < TARGET_SECONDS)]
    ]
    print_table([f"median of {ROUNDS} builds", "time", "target", ""], rows)
    print()
    rows = []
    for page, (own, named) in sorted(weights.items(), key=lambda item: -sum(item[1])):
        sizes = [f"{size / 1e6:.2f} MB" for size in (own, named, own + named)]
        rows.append([page, *sizes, f"<= {TARGET_BYTES / 1e6} MB", verdict(own + named <= TARGET_BYTES)])
    print_table([f"{len(rows)} pages", "HTML", "its files", "in all", "target", ""], rows)


if __name__ == "__main__":
    main()
