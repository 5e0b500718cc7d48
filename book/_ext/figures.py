"""Shows each figure of a notebook in the page's colours, and says in words what it shows. Loaded by ``_config.yml``.

A notebook keeps one picture of a figure, the light one, and beside it the figure's text, which the function that drew
it made from its numbers: that is the picture's alternative text. The dark picture is a file in ``book/dark``
(tests/book/refresh.py made it). The page has both, shows the one of its theme, and loads neither before it is in sight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)


def describe_figures(app: Sphinx, docname: str, source: list[str]) -> None:
    """Writes the text of each figure where MyST looks for the alternative text of a cell's images."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": "".join(data.get("text/plain", ""))}
    source[0] = json.dumps(notebook)


class AddDarkPictures(SphinxTransform):
    """Sets the dark picture of each figure beside the light one."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        for figure in list(self.document.findall(nodes.figure)):
            for light in list(figure.findall(nodes.image)):
                light["loading"] = "lazy"
                names = [name for name in figure["names"] if name.startswith("fig-")]
                if not names or not self.env.docname.startswith("notebooks/"):
                    continue
                path = f"book/dark/{names[0]}.png"
                if not Path(self.env.srcdir, path).is_file():
                    logger.warning("%s is missing: run tests/book/refresh.py", path, location=figure)
                    continue
                dark = light.deepcopy()
                dark["uri"] = f"/{path}"
                light["classes"].append("only-light")
                dark["classes"].append("only-dark")
                light.parent.insert(light.parent.index(light) + 1, dark)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", describe_figures)
    app.add_transform(AddDarkPictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
