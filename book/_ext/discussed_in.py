"""Links every function and class of the API reference to the section that discusses it. Loaded by ``_config.yml``.

A chapter lists only what its text discusses, so whoever comes from the reference finds the text here. The section is
found, not written down: the first one that lists the code, else the first that names it in its prose or uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx

LISTING = re.compile(r"show_source\((?:\w+\.)*(\w+)\)")
IN_PROSE = re.compile(r"`(?:\w+\.)*(\w+)`")
IN_CODE = re.compile(r"\b(\w+)\(|import [^\n]*")
SKIPPED = ("You will learn to", "Where are we?", "Your turn", "In an interview", "What you can do now")


class Section(NamedTuple):
    """A section of a chapter."""

    notebook: str
    title: str

    @property
    def link(self) -> str:
        """A link to it from a page of the API reference, in reStructuredText."""
        anchor = nodes.make_id(self.title)  # as in the pages
        number = int(self.notebook.split("_")[0])
        return f"`Chapter {number}, {self.title} <../../notebooks/{self.notebook}.html#{anchor}>`__"


def read_sections(notebooks: Path) -> Iterator[tuple[Section, str, str]]:
    """Each section of the chapters that discusses something, with its prose and its code."""
    for path in sorted(notebooks.glob("[0-9]*.ipynb")):
        section, prose, code = None, "", ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                code += source + "\n"
                continue
            before, *rest = re.split(r"^## (.*)$", source, flags=re.MULTILINE)
            prose += before
            for title, text in zip(rest[::2], rest[1::2]):
                if section is not None and section.title not in SKIPPED:
                    yield section, prose, code
                section, prose, code = Section(path.stem, title.strip()), text, ""


def find_sections(notebooks: Path) -> dict[str, Section]:
    """The name of a function or class -> the section that discusses it."""
    found: dict[str, Section] = {}
    sections = list(read_sections(notebooks))
    for pattern, where in ((LISTING, 2), (IN_PROSE, 1), (IN_CODE, 2)):
        for entry in sections:
            for match in pattern.finditer(entry[where]):  # type: ignore[call-overload]
                for name in re.findall(r"\w+", match.group(1) or match.group(0)):
                    found.setdefault(name, entry[0])
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    sections = find_sections(Path(app.srcdir) / "notebooks")

    def add_link(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        section = sections.get(name.split(".")[-1])
        if what in ("function", "class") and section is not None:
            lines += ["", f"Discussed in {section.link}.", ""]

    app.connect("autodoc-process-docstring", add_link, priority=900)  # after all that read the docstring
    return {"parallel_read_safe": True, "parallel_write_safe": True}
