"""Source listings for the notebooks, fetched from the module when the cell runs.

A listing that is never typed cannot go stale: when the code changes, the notebook's stored output no longer matches
and the test of the book fails until the page is run again.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Any

FOLD_ABOVE = 30
"""Lines; a longer listing is shown folded."""


@dataclass(frozen=True)
class Listing:
    """The source of one object, shown by a notebook as highlighted Python."""

    title: str
    """Where the object is: module and qualified name."""
    source: str

    def __repr__(self) -> str:
        return f"{self.title} ({len(self.source.splitlines())} lines)"

    def _repr_markdown_(self) -> str:
        code = f"```python\n{self.source}\n```"
        num_lines = len(self.source.splitlines())
        if num_lines <= FOLD_ABOVE:
            return f"`{self.title}`\n\n{code}"
        return f"<details><summary><code>{self.title}</code> ({num_lines} lines)</summary>\n\n{code}\n\n</details>"


def show_source(obj: Any) -> Listing:
    """The source of a function, method, property, class or module, as it is in the package.

    Raises:
        TypeError: if ``obj`` has no Python source (a number, a string, a C function).
    """
    target: Any = obj.fget if isinstance(obj, property) else obj
    source = textwrap.dedent(inspect.getsource(target)).rstrip()
    if isinstance(target, ModuleType):
        return Listing(target.__name__, source)
    return Listing(f"{target.__module__}.{target.__qualname__}", source)
