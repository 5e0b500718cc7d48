"""What is mended in the finished pages, because the theme has no setting for it. Loaded by ``_config.yml``.

Lighter: the theme loads all of Font Awesome as JavaScript so that its users can add icons of their own (nobody does
here, and its own icons come from a web font of a tenth of that size), the search's index on every page, and MathJax on
pages without a formula. In code, names, punctuation and spaces are marked one by one, to be given the colour that code
has anyway: up to 40 % of a page with many listings.

For everybody: what axe-core finds (tests/book/test_accessibility.py), and pages without a script, which follow the
system's light or dark by a style sheet made from the theme's own (`STYLE_SHEETS`).
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PLAIN = re.compile(r'<span class="[npw]">([^<]*)</span>')
"""Names, punctuation and spaces in highlighted code (Pygments' short names of tokens)."""

FONT_AWESOME = "_static/scripts/fontawesome.js"
SCRIPT = r'\s*<script [^>]*src="[^"]*{}[^>]*></script>'
FOR_SEARCH = re.compile(SCRIPT.format(r"(?:searchtools|language_data|searchindex)\.js"))
MATHS = re.compile(SCRIPT.format("mathjax/"))
FORMULA = re.compile(r'<(?:span|div) class="math')

STYLE_SHEETS = (
    "styles/pydata-sphinx-theme.css",
    "styles/sphinx-book-theme.css",
    "pygments.css",
    "sphinx-design.min.css",
    "folovllm.css",
)
"""Those with rules for one of the two themes, in the order in which pages load them."""

RULE = re.compile(r'([^{}@;]*html\[data-theme="?(light|dark)"?\][^{}]*)\{([^{}]*)\}')
THEME = re.compile(r'html\[data-theme="?(?:light|dark)"?\]')

MENDED = (
    # The link for those who read by keyboard leads past the row of buttons.
    ('<a href="#main-content">Skip', '<a href="#article">Skip'),
    ('<article class="bd-article">', '<article class="bd-article" id="article" tabindex="-1">'),
    # Names for what has none, or another one than what is seen.
    (
        '<summary><span class="toctree-toggle" role="presentation">',
        '<summary aria-label="Its pages"><span class="toctree-toggle">',
    ),
    ('<summary aria-label="Toggle hidden content">', "<summary>"),
    (
        '<div id="pst-primary-sidebar" class=',
        '<div id="pst-primary-sidebar" role="region" aria-label="The book" class=',
    ),
    # A table of contents for print only; on paper nobody follows its links.
    ('<nav aria-label="Page">', '<nav aria-label="Contents, for print">'),
)
PARAMETERS = re.compile(r'(<span class="sig-paren">\(</span>)\s*<dl>(.*?)</dl>\s*', re.DOTALL)
"""The parameters of a signature, which Sphinx sets as definitions without a term."""

PERCENT = re.compile(r"(?<=\d) %(?! [\d(])")
"""Where a line must not end; before a number or a bracket it would be Python's remainder."""

IMAGE = re.compile(r'<img ([^>]*?)src="([^"]*_images/[^"]*\.png)"')


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Mends all pages of the finished site."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    for page in out.rglob("*.html"):
        if out / "_static" not in page.parents:
            page.write_text(mend(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    (out / FONT_AWESOME).unlink(missing_ok=True)
    (out / "_static" / "noscript.css").write_text(style_without_script(out / "_static"), encoding="utf-8")


def mend(text: str, page: Path) -> str:
    """One page, mended."""
    text = re.sub(SCRIPT.format(re.escape(FONT_AWESOME)), "", text)
    text = PLAIN.sub(r"\1", text)
    text = PERCENT.sub("\u00a0%", text)
    if page.name != "search.html":
        text = FOR_SEARCH.sub("", text)
    if not FORMULA.search(text):
        text = MATHS.sub("", text)
    for old, new in MENDED if "<article" in text else MENDED[1:]:
        text = text.replace(old, new)
    text = PARAMETERS.sub(lambda match: match[1] + as_divisions(match[2].strip()), text)
    text = IMAGE.sub(lambda match: f"{match[0]} {size_of(page.parent / match[2])}", text)
    root = re.search(r'data-content_root="([^"]*)"', text)
    link = f'<link rel="stylesheet" href="{root[1] if root else ""}_static/noscript.css" />'
    return text.replace("</head>", f"<noscript>{link}</noscript></head>", 1)


def as_divisions(parameters: str) -> str:
    """Parameters one a line, without the meaning of a list of definitions."""
    lines = re.sub(",</dd>$", "</dd>", parameters).replace("<dd>", "<div>").replace("</dd>", "</div>")
    return f'<div class="sig-params">{lines}</div>'


def size_of(picture: Path) -> str:
    """The size of a PNG as attributes, so that the text below does not move when it is loaded."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return f'width="{width}" height="{height}"'


def style_without_script(static: Path) -> str:
    """The rules for the theme that a script would choose, for the one that the system asks for."""
    rules: dict[str, list[str]] = {"light": [], "dark": []}
    for name in STYLE_SHEETS:
        text = re.sub(r"/\*.*?\*/", "", (static / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        for selectors, theme, body in RULE.findall(text):
            rules[theme].append(f"{THEME.sub('html', selectors).strip()}{{{body.strip()}}}")
    light, dark = ("\n".join(rules[theme]) for theme in ("light", "dark"))
    return (
        f"@media not (prefers-color-scheme: dark) {{\n{light}\n}}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
        + (Path(__file__).parent / "noscript.css").read_text(encoding="utf-8")
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
