"""Numbers chapters once. Loaded by ``_config.yml``.

A notebook's title says "3. Requests and sequences", for readers in JupyterLab. The site counts its chapters itself
(``numbered`` in ``_toc.yml``), since that is what gives the figures their numbers: "Fig. 3.1". So on the site the
number in the title is taken off, but for chapter 0, which is not counted; a test checks that the two agree.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class TakeNumberOff(SphinxTransform):
    """Removes the number at the beginning of a notebook's title."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        title = next(self.document.findall(nodes.title), None)
        if title is not None and re.match(r"notebooks/(?!00)", self.env.docname):
            first = next(title.findall(nodes.Text))
            first.parent.replace(first, nodes.Text(re.sub(r"^\d+\. ", "", first)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_transform(TakeNumberOff)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
