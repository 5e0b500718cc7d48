"""Puts the glossary's terms into the index, each with its entry and its chapter. Loaded by ``_config.yml``.

The search ranks entries of the index first, so that whoever looks for "preemption" finds the entry and the chapter
before the functions whose names have the word in them. A term's chapter is the one that its entry links to at its end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

GLOSSARY = "book/glossary"
ENTRY = re.compile(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
CHAPTER = re.compile(r"\(\.\./notebooks/(\w+)\.ipynb(?:#([\w-]+))?\)\.?\s*\Z")


def read_terms(glossary: Path) -> dict[str, list[tuple[str, str]]]:
    """The terms of each chapter, each with the section it is about, where the glossary names one."""
    found: dict[str, list[tuple[str, str]]] = {}
    for term, text in ENTRY.findall(glossary.read_text(encoding="utf-8")):
        chapter = CHAPTER.search(text)
        if chapter:
            found.setdefault(f"notebooks/{chapter[1]}", []).append((term.strip(), chapter[2] or ""))
    return found


def entry(term: str, anchor: str) -> tuple[str, str, str, str, None]:
    """An entry of the index, one of those that the search ranks first."""
    return ("single", term.replace(";", ","), anchor, "main", None)


class AddEntries(SphinxTransform):
    """Adds the entries of one page."""

    default_priority = 700  # before the index is read off the page

    def apply(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        sections = list(self.document.findall(nodes.section))
        if self.env.docname == GLOSSARY:
            terms = [(section[0].astext(), section["ids"][0]) for section in sections[1:]]
        else:
            found = self.app.config.folovllm_terms.get(self.env.docname, [])
            terms = [(term, anchor or sections[0]["ids"][0]) for term, anchor in found]
        if terms:
            sections[0].insert(1, addnodes.index(entries=[entry(*term) for term in terms]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("folovllm_terms", read_terms(Path(app.srcdir, f"{GLOSSARY}.md")), "")
    app.add_transform(AddEntries)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
