"""CUDA graphs where there is no CUDA, for the tests that record steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch


def patch_graphs(patch: pytest.MonkeyPatch, graph_cls: type, capture: Callable[..., Any]) -> None:
    """Puts a class and a context manager where torch has CUDA's graphs, and makes streams that are strings."""
    patch.setattr(torch.cuda, "CUDAGraph", graph_cls)
    patch.setattr(torch.cuda, "graph", capture)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "Stream", lambda: "a stream")
    for name in ("device", "stream"):
        patch.setattr(torch.cuda, name, contextlib.nullcontext)
