"""Takes out of every page what it loads and does not need. Loaded by ``_config.yml``.

The theme loads all of Font Awesome as JavaScript so that its users can add icons of their own. Nobody does here, and
the theme's own icons come from a web font of a tenth of that size: 1.5 MB less.

In code, names, punctuation and spaces are marked one by one, to be given the colour that code has anyway: up to 40 % of
a page with many listings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PLAIN = re.compile(r'<span class="[npw]">([^<]*)</span>')
"""Names, punctuation and spaces in highlighted code (Pygments' short names of tokens)."""

SCRIPT = "_static/scripts/fontawesome.js"


def lighten(app: Sphinx, exception: Exception | None) -> None:
    """Removes the script and its tag, and marks without a meaning, from the finished site."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    tag = re.compile(rf'\s*<script [^>]*src="[^"]*{re.escape(SCRIPT)}[^>]*></script>')
    for page in out.rglob("*.html"):
        text = PLAIN.sub(r"\1", tag.sub("", page.read_text(encoding="utf-8")))
        page.write_text(text, encoding="utf-8")
    (out / SCRIPT).unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("build-finished", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
