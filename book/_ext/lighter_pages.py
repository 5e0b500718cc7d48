"""Takes a script of 1.5 MB out of every page. Loaded by ``_config.yml``.

The theme loads all of Font Awesome as JavaScript so that its users can add icons of their own. Nobody does here, and
the theme's own icons come from a web font of a tenth of that size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

SCRIPT = "_static/scripts/fontawesome.js"


def drop_icon_script(app: Sphinx, exception: Exception | None) -> None:
    """Removes the script and its tag from the finished site."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    tag = re.compile(rf'\s*<script [^>]*src="[^"]*{re.escape(SCRIPT)}[^>]*></script>')
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(tag.sub("", text), encoding="utf-8")
    (out / SCRIPT).unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("build-finished", drop_icon_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
