"""Links to files of the package lead to their pages of highlighted source. Loaded by ``_config.yml``.

A page says ``[source](../folovllm/config.py)``: in JupyterLab that opens the file. On the site MyST would offer the
file for download; here it becomes the page that ``sphinx.ext.viewcode`` makes of the module.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)


def source_page(path: str) -> str:
    """The page of a module's source: ``folovllm/core/scheduler.py`` gives ``_modules/folovllm/core/scheduler``."""
    return "_modules/" + path.removesuffix(".py").removesuffix("/__init__")


class LinkSources(SphinxTransform):
    """Turns downloads of the package's files into links, while a page is read: later they would be copied."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        docname = self.env.docname
        for node in list(self.document.findall(download_reference)):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(docname), node["reftarget"]))
            if not path.startswith("folovllm/") or not path.endswith(".py"):
                continue
            if not Path(self.env.srcdir, path).is_file():
                logger.warning("there is no %s", path, location=node)
            address = posixpath.relpath(f"{source_page(path)}.html", posixpath.dirname(docname))
            text = node[0].children if isinstance(node[0], nodes.inline) else node.children  # without a download's look
            node.replace_self(nodes.reference("", "", *text, internal=True, refuri=address))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_transform(LinkSources)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
