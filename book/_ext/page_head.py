"""What a tab, a search engine and a chat window show of each page, and its buttons. Loaded by ``_config.yml``.

A description is the page's own beginning. The site does not know its address, so it names no picture for previews.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

LONGEST = 200
"""Letters of a description; what is longer is cut at a word."""

HOW_TO_RUN = "a-notebook-that-you-downloaded"
"""The anchor of that section of the page on setting up."""

START = """<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <title>{title}</title>
    <meta http-equiv="refresh" content="0; url={page}" />
  </head>
  <body><p><a href="{page}">{title}</a></p></body>
</html>
"""


def begin_of(doctree: nodes.document) -> str:
    """The first paragraphs of a page, up to `LONGEST` letters; what is set in a box does not count."""
    found = ""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, (nodes.section, nodes.document)) and not follows_raw(paragraph):
            found = f"{found} {' '.join(paragraph.astext().split())}".strip()
        if len(found) > LONGEST:
            return found[:LONGEST].rsplit(" ", 1)[0] + " …"
    return found


def follows_raw(paragraph: nodes.paragraph) -> bool:
    """Whether a paragraph is inside of raw HTML, as the strip under a chapter's title is."""
    place = paragraph.parent.index(paragraph)
    return place > 0 and isinstance(before := paragraph.parent[place - 1], nodes.raw) and "</" not in before.astext()


def describe(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Adds description and OpenGraph to a page's head, and gives the first page a title of its own."""
    book = app.config.html_title
    if pagename == app.config.root_doc:
        context["docstitle"] = ""
        context["title"] = f"{book}: {app.config.folovllm_subtitle}"
    title = nodes.Text(context.get("title", book)).astext()
    said = begin_of(doctree) if doctree is not None else ""
    if pagename.startswith("_modules/folovllm"):
        module = pagename.removeprefix("_modules/").replace("/", ".")
        context["title"] = title = f"Source of {module}"
        said = f"The source of {module}, as the book's chapters discuss it."
    said = said or f"{book}: {app.config.folovllm_subtitle}."
    plain_title = html.escape(html.unescape(strip_tags(title)))
    context["metatags"] = context.get("metatags", "") + (
        f'\n<meta name="description" content="{html.escape(said)}" />'
        f'\n<meta property="og:title" content="{plain_title}" />'
        f'\n<meta property="og:description" content="{html.escape(said)}" />'
        f'\n<meta property="og:site_name" content="{html.escape(book)}" />'
        f'\n<meta property="og:type" content="{"website" if pagename == app.config.root_doc else "article"}" />\n'
    )


def say_how_to_run(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Adds to the button that offers a notebook for download a link to what it takes to run it."""
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons" and pagename.startswith("notebooks/"):
            page = context["pathto"]("book/setup")
            link = {
                "type": "link",
                "url": f"{page}#{HOW_TO_RUN}",
                "text": "How to run it",
                "icon": "fas fa-circle-info",
            }
            group["buttons"].insert(1, {**link, "label": "how-to-run-button"})


def strip_tags(title: str) -> str:
    """A title without its markup."""
    return "".join(part.partition(">")[2] if i else part for i, part in enumerate(title.split("<")))


def write_start(app: Sphinx, exception: Exception | None) -> None:
    """Writes ``index.html``, which leads to the first page; where one is, Jupyter Book writes none."""
    if exception is None and app.builder.format == "html":
        text = START.format(title=html.escape(app.config.html_title), page=f"{app.config.root_doc}.html")
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("folovllm_subtitle", "how an LLM inference engine works", "html")
    app.connect("html-page-context", describe)
    app.connect("html-page-context", say_how_to_run, priority=900)  # after the theme has made its buttons
    app.connect("build-finished", write_start, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
