"""A cell that is run again does no harm, and shows what it showed before.

Readers do run cells again, so each one is run twice in a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from nbval.plugin import IPyNbCell

if workers := os.environ.get(
    "PYTEST_XDIST_WORKER_COUNT"
):  # as in tests/conftest.py, which may not be read here
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1))
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Runs a cell once more when it has passed."""
    yield
    if isinstance(item, IPyNbCell):
        try:
            item.runtest()
        except Exception:
            said = "The cell passed, and then it was run again."
            item.add_report_section("call", "second run", said)
            raise
