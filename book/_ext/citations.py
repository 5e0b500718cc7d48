"""Links every citation to its entry in the references, and every entry to the chapters that cite it.

A citation is written as text, "Kwon et al. 2023" or "Okabe and Ito (2008)", in a chapter, a page or a docstring. One
without an entry is a warning, which fails a strict build. Loaded by ``_config.yml``.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)

CITATION = re.compile(r"([A-Z][\w-]+)(\s+et\s+al\.|\s+and\s+[A-Z][\w-]+|),?\s+\(?((?:19|20)\d\d)\b(?:(?<=\(\d{4})\))?")
"""One author, one and others, or two; and the year. A single name may be a month: with an entry it is a citation."""

PAGE = "book/references"

NOT_LINKED = (nodes.reference, nodes.literal, nodes.literal_block, nodes.raw)
"""What a citation may stand in without being one, or without becoming a link."""


def key_of(match: re.Match[str]) -> str:
    """The anchor of a citation's entry: ``kwon-2023``."""
    return f"{match[1].lower()}-{match[3]}"


def read_entries(source: Path) -> set[str]:
    """The anchors of all entries: those that a line of the references begins with, in bold."""
    text = source.read_text(encoding="utf-8")
    return {
        key_of(match) for line in re.findall(r"^- \*\*(.*?)\*\*", text, re.MULTILINE) if (match := CITATION.match(line))
    }


def read_chapters(notebooks: Path) -> dict[str, list[Path]]:
    """The chapters that cite each entry."""
    found: dict[str, list[Path]] = {}
    for path in sorted(notebooks.glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for key in dict.fromkeys(key_of(match) for match in CITATION.finditer(prose)):
            found.setdefault(key, []).append(path)
    return found


class LinkCitations(SphinxTransform):
    """Turns citations into links, and gives the entries that they lead to their anchors."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        if self.env.docname == PAGE:
            self.mark_entries()
            return
        for text in list(self.document.findall(nodes.Text)):
            if CITATION.search(text) and not any(isinstance(node, NOT_LINKED) for node in above(text)):
                pieces = list(self.linked(str(text), text))
                if len(pieces) > 1:
                    text.parent.replace(text, pieces)

    def linked(self, text: str, place: nodes.Text) -> Iterator[nodes.Node]:
        """A text in pieces, its citations as links."""
        end = 0
        for match in CITATION.finditer(text):
            if key_of(match) not in self.app.config.folovllm_entries:
                if match[2]:
                    logger.warning("%r has no entry in book/references.md", match[0], location=place.parent)
                continue
            page = posixpath.relpath(f"{PAGE}.html", posixpath.dirname(self.env.docname))
            yield nodes.Text(text[end : match.start()])
            yield nodes.reference("", match[0], internal=True, refuri=f"{page}#{key_of(match)}")
            end = match.end()
        yield nodes.Text(text[end:])

    def mark_entries(self) -> None:
        """Gives each entry its anchor, and links to the chapters that cite it."""
        for item in self.document.findall(nodes.list_item):
            match = CITATION.match(item.astext())
            if match is None:
                continue
            item["ids"].append(key_of(match))
            chapters = self.app.config.folovllm_chapters.get(key_of(match), [])
            for i, path in enumerate(chapters):
                item[0] += nodes.Text(" Cited in " if i == 0 else " and " if i == len(chapters) - 1 else ", ")
                name = f"chapter {int(path.stem.split('_')[0])}"
                item[0] += nodes.reference("", name, internal=True, refuri=f"../notebooks/{path.stem}.html")
            if chapters:
                item[0] += nodes.Text(".")


def above(node: nodes.Node) -> Iterator[nodes.Node]:
    """Everything that a node is inside of."""
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    root = Path(app.srcdir)
    app.add_config_value("folovllm_entries", sorted(read_entries(root / f"{PAGE}.md")), "env")
    app.add_config_value("folovllm_chapters", read_chapters(root / "notebooks"), "")
    app.add_transform(LinkCitations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
