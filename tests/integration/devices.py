"""Where the engine's tests run: on the CPU, or where ``FOLOVLLM_TEST_DEVICE`` says, as `tests/gpu/run.py` has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("FOLOVLLM_TEST_DEVICE", "cpu")
HERE: dict[str, Any] = {"device": DEVICE, "dtype": "float32"}
"""What an `LLM` is given, since 16 bits, a GPU's default, would not give the same tokens under all settings."""
BACKENDS = ("gather", "sdpa") if DEVICE == "cpu" else ("gather", "sdpa", "triton")
"""The attention backends that serve there with any block size; Triton's interpreter would take hours."""
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="this is how a CPU does it")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In it torch makes floats of this dtype where it is not told which."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
