"""Builds the site into ``_build/html``: ``./setup_env.sh book`` and the tests run it.

The new site is built beside the old one and takes its place when it is done, so there is always one to read. Where
nothing has changed since, there is nothing to do.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
SITE = BUILD / "html"
STAMP = BUILD / "site.json"
"""What the site was built from, whether strictly, and the warnings there were."""

NO_INPUT = re.compile(r"\..*|_build|venv|tests|build|dist|__pycache__|.*\.egg-info")
"""Names of files and folders that no page depends on."""

JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
"""Not its script in ``bin``, whose first line breaks where the path has a space, and it is no module to run."""


class BuildError(Exception):
    """The site could not be built; the message is what the build said."""


def input_files() -> Iterator[Path]:
    """Every file that a page may depend on, in a fixed order: Sphinx looks for pages in all folders."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not NO_INPUT.fullmatch(name))
        yield from (Path(folder, name) for name in sorted(files) if not NO_INPUT.fullmatch(name))


def fingerprint() -> str:
    """A hash of all input files and of the versions of all installed packages."""
    digest = hashlib.sha256(sys.version.encode())
    for path in input_files():
        digest.update(f"\0{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        digest.update(path.read_bytes())
    for package in sorted({f"{dist.name} {dist.version}" for dist in importlib.metadata.distributions()}):
        digest.update(f"\0{package}".encode())
    return digest.hexdigest()


def read_stamp() -> dict:
    """What the site that is there was built from; empty when there is none."""
    if not (SITE / "index.html").is_file() or not STAMP.is_file():
        return {}
    return json.loads(STAMP.read_text(encoding="utf-8"))


def run_jupyter_book(output: Path, strict: bool) -> str:
    """Builds into ``output``; returns what was said, warnings only.

    Raises:
        BuildError: if there is no site at the end, or if there were warnings and ``strict``.
    """
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", ".", "--path-output", str(output), "--all", "--quiet"]
    if strict:
        command += ["-W", "-n", "--keep-going"]
    pipe = subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise BuildError(done.stdout.strip() or f"Jupyter Book ended with {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits for other processes that build this site: pytest-xdist's workers, or two terminals."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(strict: bool) -> list[str]:
    """Builds the site unless it is up to date; returns the warnings there were, always none when ``strict``.

    Raises:
        BuildError: see `run_jupyter_book`. The site that was there before is still there.
    """
    with one_at_a_time():
        inputs, stamp = fingerprint(), read_stamp()
        if stamp.get("inputs") == inputs and stamp["strict"] >= strict:
            return stamp["warnings"]
        new, old = BUILD / "new", BUILD / "old"
        shutil.rmtree(new, ignore_errors=True)
        said = run_jupyter_book(new, strict)
        warnings = [line.replace(f"{ROOT}/", "") for line in said.splitlines() if re.search("WARNING|ERROR", line)]
        STAMP.unlink(missing_ok=True)
        if SITE.exists():
            SITE.rename(old)
        (new / "_build" / "html").rename(SITE)
        STAMP.write_text(json.dumps({"inputs": inputs, "strict": strict, "warnings": warnings}), encoding="utf-8")
        shutil.rmtree(new)
        shutil.rmtree(old, ignore_errors=True)
        return warnings


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strict", action="store_true", help="a warning is an error, and a name without an entry too")
    args = parser.parse_args()
    try:
        warnings = build(args.strict)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if warnings:
        more = f" (and {len(warnings) - 1} more, in {STAMP.relative_to(ROOT)})" if len(warnings) > 1 else ""
        print(f"[WARNING] {warnings[0]}{more}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
