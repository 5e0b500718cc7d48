"""What autodoc needs to be told about this package's docstrings. Loaded by ``_config.yml``.

Sections ("Args:", "Returns:", "Raises:") are read by napoleon's parser, but not by its extension, which takes the
first colon in the docstring of an attribute for the end of a type.

Names are linked as the module that says them understands them: by its import statements, or else by those of
``folovllm`` itself. Half of the former stand under ``TYPE_CHECKING``, where autodoc cannot follow them, and then Sphinx
guesses by the last part of a name: it would link the ``Sequence`` of ``collections.abc`` to that of `folovllm.request`.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
from typing import Any

from docutils.nodes import Node, TextElement, document
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring

import folovllm

DOCSTRINGS = Config(napoleon_use_rtype=False)


def read_sections(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns the sections of a docstring into reStructuredText, in place."""
    lines[:] = [line for line in lines if not line.startswith("Create new instance of ")]  # a named tuple's own words
    if what not in ("attribute", "data"):
        lines[:] = GoogleDocstring(lines, DOCSTRINGS).lines()


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, return_annotation: str
) -> tuple[str, None] | None:
    """A dataclass is made from its fields, whose types are listed below it; enums and protocols are not called."""
    if isinstance(obj, enum.EnumMeta) or getattr(obj, "_is_protocol", False):
        return "", None
    if not isinstance(obj, type) or not dataclasses.is_dataclass(obj):
        return None
    parameters = []
    for field in dataclasses.fields(obj):
        if field.default is not dataclasses.MISSING:
            parameters.append(f"{field.name}={field.default!r}")
        elif field.default_factory is not dataclasses.MISSING:
            parameters.append(f"{field.name}={field.default_factory.__name__}()")
        else:
            parameters.append(field.name)
    return f"({', '.join(parameters)})", None


@functools.cache
def imported_names(module: str) -> dict[str, str]:
    """What the import statements of a module call each thing: ``{"Tensor": "torch.Tensor", "np": "numpy"}``."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.ImportFrom, ast.Import))
        for alias in node.names
    }


def defined_as(name: str) -> str | None:
    """Where a thing of this package is defined, from a name it can be imported by; None if there is no such thing."""
    root, *parts = name.split(".")
    obj: Any = folovllm if root == "folovllm" else None
    for part in parts:
        if not hasattr(obj, part):
            return None
        obj = getattr(obj, part)
    qualname = getattr(obj, "__qualname__", None)
    return f"{obj.__module__}.{qualname}" if qualname else name


def qualify_names(app: Sphinx, doctree: document) -> None:
    """Writes every Python name that is to be linked as the name by which Sphinx knows the thing."""
    for node in doctree.findall(pending_xref):
        if node.get("refdomain") != "py":
            continue
        node.attributes.pop("refspecific", None)  # its mere presence makes Sphinx guess
        head, dot, rest = node["reftarget"].partition(".")
        module = node.get("py:module")
        name = (imported_names(module).get(head, head) if module else head) + dot + rest
        if name == node["reftarget"] and not defined_as(f"{module}.{name}") and head in folovllm.__all__:
            name = f"folovllm.{name}"
        if name.startswith("folovllm."):
            name = defined_as(name) or name
        node["reftarget"] = name


def resolve_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: TextElement) -> Node | None:
    """What to show for a Python name that has no entry; None makes it a warning."""
    if node.get("refdomain") != "py":
        return None
    name, module = node["reftarget"], node.get("py:module")
    root = name.partition(".")[0]
    is_imported = any(root == full.partition(".")[0] for full in imported_names(module).values()) if module else False
    if root != "folovllm" and (is_imported or importlib.util.find_spec(root)):  # an extra may not be installed
        return contnode  # other people's sites are on other hosts, so their names are not looked up
    # It may exist and be too small to have an entry: a constant without a docstring.
    return contnode if defined_as(f"{module}.{name}") or defined_as(name) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", read_sections)
    app.connect("doctree-read", qualify_names)
    app.connect("missing-reference", resolve_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
