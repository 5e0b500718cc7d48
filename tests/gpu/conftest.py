"""These tests need a GPU; `run.py` runs them and writes the report, and a plain ``pytest`` does not collect them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "integration"), str(TESTS / "benchmarks")]  # what helps there helps here


@pytest.fixture(scope="session", autouse=True)
def _a_gpu_is_there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """An engine takes most of a card's memory, and the next test's engine wants it."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def large_checkpoint(_a_gpu_is_there: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in Qwen3-0.6B's shape."""
    from throughput import make_large_checkpoint

    folder = tmp_path_factory.mktemp("large")
    make_large_checkpoint(folder)
    return folder
