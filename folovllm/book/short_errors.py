"""Errors as the pages show them: the reader's own lines and the sentence, without the frames of other people's code.

A name that is not defined is nearly always that of a cell above that was not run since a restart, and is told so.

Importing `folovllm.book` in a notebook switches this on. ``%xmode Verbose`` shows every frame again, and ``%tb`` shows
those of the last error.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

ESCAPES = re.compile(r"\x1b\[[\d;]*m")
"""What colours a text in a terminal."""


def is_elsewhere(frame: str) -> bool:
    """Whether a part of IPython's traceback is a frame in a file, not in a cell."""
    return ESCAPES.sub("", frame).startswith("File ")


def point_above(error: BaseException, trace: TracebackType) -> None:
    """Adds "run the cells above first" to the message of a `NameError` that a cell raised itself."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    in_a_cell = trace.tb_frame.f_globals.get("__name__") == "__main__"
    if in_a_cell and isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
        error.args = (f"{error}: run the cells above first",)


def shorten_errors() -> None:
    """Makes the notebook that calls this show short errors; outside of a notebook it does nothing."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((Exception,), show_short)


def show_short(
    shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType, tb_offset: int | None = None
) -> list[str]:
    """Shows an error in IPython; returns the parts of what it showed.

    Args:
        shell: IPython's shell.
        kind: the error's class.
        error: the error.
        trace: where it was raised.
        tb_offset: how many of the first frames are IPython's own.
    """
    if isinstance(error, SyntaxError):
        return shell.showsyntaxerror()
    point_above(error, trace)
    parts = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
    if shell.InteractiveTB.mode != "Verbose":
        *frames, last = parts
        parts = [frame for frame in frames if not is_elsewhere(frame)] + [last]
    shell._showtraceback(kind, error, parts)
    return parts
