"""Links every function and class of the API reference to the section that discusses it. Loaded by ``_config.yml``.

A chapter lists only what its text discusses, so whoever comes from the reference finds the text here. The section is
found, not written down: the first one that lists the code, else the first that names it in its prose or uses it. Two
things may have the same name, and a chapter may define one of its own; where it does not say which it means, there is
no link.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from api_reference import defined_as
from docutils import nodes
from sphinx.application import Sphinx

LISTING = re.compile(r"show_source\(((?:\w+\.)*\w+)\)")
IN_PROSE = re.compile(r"`((?:\w+\.)*\w+)`")
IN_CODE = re.compile(r"((?:\b\w+\.)*\b\w+)\(|import ([^\n]*)")
IMPORT = re.compile(r"^from (\S+) import (?:\(([^)]*)\)|(.*))$", re.MULTILINE)
DEFINITION = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)
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


class Mention(NamedTuple):
    """A place where something is named."""

    section: Section
    qualifier: str
    """The module or class that stands before the name; empty if none does."""


class Chapter(NamedTuple):
    """A chapter's sections, and whose names are in its code."""

    sections: list[tuple[Section, str, str]]
    """Each that discusses something, with its prose and its code."""
    imports: dict[str, str]
    """What it imports -> from which module."""
    own: set[str]
    """What it defines itself."""


def read_chapter(path: Path) -> Chapter:
    """A notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    imports = {
        name: module for module, several, one in IMPORT.findall(code) for name in re.findall(r"\w+", several or one)
    }
    return Chapter(list(read_sections(path.stem, cells)), imports, set(DEFINITION.findall(code)))


def read_sections(notebook: str, cells: list[dict[str, Any]]) -> Iterator[tuple[Section, str, str]]:
    """Each section that discusses something, with its prose and its code."""
    section, prose, code = None, "", ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            code += source + "\n"
            continue
        before, *rest = re.split(r"^## (.*)$", source, flags=re.MULTILINE)
        prose += before
        for title, text in zip(rest[::2], rest[1::2]):
            if section is not None and section.title not in SKIPPED:
                yield section, prose, code
            section, prose, code = Section(notebook, title.strip()), text, ""


def is_imported(name: str, module: str, full_name: str) -> bool:
    """Whether what a module of this package calls by a name is defined as that."""
    if module.partition(".")[0] != "folovllm":
        return False
    importlib.import_module(module)
    return defined_as(f"{module}.{name}") == full_name


class Sections:
    """The sections of all chapters, by what they name.

    Args:
        root: the project's folder.
    """

    def __init__(self, root: Path) -> None:
        self.chapters = {path.stem: read_chapter(path) for path in sorted((root / "notebooks").glob("[0-9]*.ipynb"))}
        self.mentions: dict[str, list[Mention]] = {}
        entries = [entry for chapter in self.chapters.values() for entry in chapter.sections]
        for pattern, where in ((LISTING, 2), (IN_PROSE, 1), (IN_CODE, 2)):
            for entry in entries:
                for match in pattern.finditer(entry[where]):  # type: ignore[call-overload]
                    for name in re.findall(r"[\w.]+", " ".join(filter(None, match.groups()))):
                        *before, last = name.split(".")
                        if before or pattern is IN_PROSE or last in self.chapters[entry[0].notebook].imports:
                            mention = Mention(entry[0], before[-1] if before else "")
                            self.mentions.setdefault(last, []).append(mention)
        definitions: Counter[str] = Counter()
        for path in (root / "folovllm").rglob("*.py"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            definitions.update(node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
        self.several = {name for name, number in definitions.items() if number > 1}

    def find(self, full_name: str) -> Section | None:
        """The section that discusses a function or class; None: there is none that surely does."""
        *parents, name = full_name.split(".")
        for section, qualifier in self.mentions.get(name, []):
            chapter = self.chapters[section.notebook]
            if qualifier:
                is_meant = qualifier in parents
            elif name in chapter.imports:
                is_meant = is_imported(name, chapter.imports[name], full_name)
            else:
                is_meant = name not in self.several | chapter.own
            if is_meant:
                return section
        return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    sections = Sections(Path(app.srcdir))

    def add_link(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        section = sections.find(name) if what in ("function", "class") else None
        if section is not None:
            lines += ["", f"Discussed in {section.link}.", ""]

    app.connect("autodoc-process-docstring", add_link, priority=900)  # after all that read the docstring
    return {"parallel_read_safe": True, "parallel_write_safe": True}
