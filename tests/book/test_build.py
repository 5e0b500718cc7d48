"""``book/build.py``, on a book of two pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from site_pages import ROOT

CONFIG = """
title: Small
only_build_toc_files: false
exclude_patterns: [_build]
execute:
  execute_notebooks: "off"
"""


def notebook(text: str) -> str:
    cell = {"id": "a", "cell_type": "markdown", "metadata": {}, "source": text}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


class Book:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "_build" / "html"
        for name in ("book", "notebooks"):
            (root / name).mkdir(parents=True)
        shutil.copy(ROOT / "book" / "build.py", root / "book")
        (root / "_config.yml").write_text(CONFIG)
        (root / "_toc.yml").write_text("{format: jb-book, root: book/welcome, chapters: [file: notebooks/01_one]}")
        (root / "book" / "welcome.md").write_text("# Welcome\n")
        (root / "notebooks" / "01_one.ipynb").write_text(notebook("# One"))

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.root / "book" / "build.py"), *arguments]
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)

    def built(self) -> int:
        """Another number after each build."""
        return self.site.stat().st_ino

    def text(self) -> str:
        return (self.site / "notebooks" / "01_one.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Book:
    book = Book(tmp_path_factory.mktemp("template") / "a book")
    done = book.build("--strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return book


@pytest.fixture
def book(template: Book, tmp_path: Path) -> Book:
    """The book, built strictly."""
    copy = Book(tmp_path / "a book")
    shutil.copytree(template.root, copy.root, dirs_exist_ok=True)
    return copy


def test_nothing_to_do(book: Book) -> None:
    before = book.built()
    for name in ("_build", "venv", "tests", ".git", "book/__pycache__"):  # on these no page depends
        (book.root / name).mkdir(exist_ok=True)
        (book.root / name / "scratch.md").touch()
    for arguments in ([], ["--strict"]):
        assert book.build(*arguments).returncode == 0
    assert book.built() == before


def test_a_change_is_built_into_a_new_site(book: Book) -> None:
    before = book.built()
    (book.root / "notebooks" / "01_one.ipynb").write_text(notebook("# One\n\nChanged."))
    assert book.build().returncode == 0
    assert book.built() != before
    assert "Changed." in book.text()
    assert sorted(path.name for path in (book.root / "_build").iterdir()) == ["html", "lock", "site.json"]


@pytest.mark.parametrize("name", ["notebooks/Untitled.ipynb", "Untitled.ipynb", "mine/01_one-Copy1.ipynb"])
def test_a_scratch_notebook_is_a_line_for_readers_and_an_error_for_tests(book: Book, name: str) -> None:
    (book.root / name).parent.mkdir(exist_ok=True)
    (book.root / name).write_text(notebook("# Scratch"))
    for _ in range(2):
        done = book.build()
        assert done.returncode == 0
        (line,) = done.stderr.splitlines()
        assert line.startswith("[WARNING] ") and name in line
    before = book.built()
    done = book.build("--strict")
    assert done.returncode == 1
    assert name in done.stderr
    assert book.built() == before, "what was there stays"


def test_a_site_that_cannot_be_built_leaves_the_old_one(book: Book) -> None:
    (book.root / "_toc.yml").write_text("{format: jb-book, root: book/none}")
    for _ in range(2):
        done = book.build()
        assert done.returncode == 1
        assert "book/none" in done.stderr
    assert "One" in book.text()
