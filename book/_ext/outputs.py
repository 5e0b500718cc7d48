"""Lets printed sentences be broken where a page is narrower than they are. Loaded by ``_config.yml``.

What a cell prints may be a table, whose columns must stay below each other, so that it scrolls; of anything else a
reader would not see that it goes on.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

COLUMNS = re.compile(r"\S {2,}\S")


def mark_sentences(app: Sphinx, doctree: nodes.document) -> None:
    """Gives what was printed without columns a class of its own."""
    for block in doctree.findall(nodes.literal_block):
        if {"output", "stream"} <= set(block["classes"]) and not COLUMNS.search(block.astext()):
            block["classes"].append("sentences")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", mark_sentences)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
