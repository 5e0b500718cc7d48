"""The numbers behind the figures of chapter 14, and of what they are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from figure_helpers import heights, legend, line, texts, ticks, widths
from matplotlib.axes import Axes

from folovllm.attention.gather import GatherAttention
from folovllm.attention.sdpa import SdpaAttention
from folovllm.book import in_place, plotting
from folovllm.book.counting import OperationCounter
from folovllm.book.faults import KeepsOldWeights
from folovllm.book.in_place import InPlaceAttention, make_step, softmax_steps

SCORES = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
VALUES = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
STEPS = softmax_steps(SCORES, VALUES, 2)
UNSCALED = softmax_steps(SCORES, VALUES, 2, KeepsOldWeights)
MOVED = {"in place": [2.0**20, 2.0**21], "a copy": [3 * 2.0**20, 3 * 2.0**21]}
WAYS = {"eager": {"norms": 60, "products": 17}, "recorded": {"copies": 5, "products": 1}}

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_bytes_moved": lambda: plotting.plot_bytes_moved([64, 128], MOVED),
    "plot_online_softmax": lambda: plotting.plot_online_softmax(SCORES, 2, STEPS, UNSCALED),
    "plot_operations": lambda: plotting.plot_operations(WAYS),
    "plot_buckets": lambda: plotting.plot_buckets([1, 2, 4]),
    "plot_idle_processors": lambda: plotting.plot_idle_processors({"one": [8, 16], "four": [32, 64]}, [1, 2], 32),
}


def test_numbers_of_bytes_moved() -> None:
    ax = plotting.plot_bytes_moved([64, 128], MOVED)
    assert line(ax, "in place") == ([64, 128], [1, 2]) and line(ax, "a copy") == ([64, 128], [3, 6])
    assert "a copy: rises from 3 at 64 to 6 at 128" in ax.figure.alt


def test_numbers_of_online_softmax() -> None:
    maximum, total, average = plotting.plot_online_softmax(SCORES, 2, STEPS, UNSCALED)
    assert heights(maximum) == SCORES.tolist()
    (stairs,) = [patch for patch in maximum.patches if patch.get_label() == "maximum so far"]
    assert stairs.get_data().values.tolist() == [1, 2, 3] and stairs.get_data().edges.tolist() == [-0.5, 1.5, 3.5, 4.5]
    places, ends = [0.5, 2.5, 4], (2, 4, 5)
    sums = [float((SCORES[:n] - SCORES[:n].max()).exp().sum()) for n in ends]
    assert line(total, "rescaled") == (places, sums)
    assert line(average, "rescaled") == (places, [float(SCORES[:n].softmax(0) @ VALUES[:n, 0]) for n in ends])
    # Never rescaled, each block's weights are relative to the largest score until then.
    relative = (SCORES - torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0])).exp()
    assert line(total, "never rescaled") == (places, [float(relative[:n].sum()) for n in ends])
    assert f"ends at {float(relative @ VALUES[:, 0] / relative.sum()):.3g}" in maximum.figure.alt
    assert legend(maximum) == ["maximum so far", "rescaled", "never rescaled"]


def test_an_online_softmax_alone() -> None:
    axes = plotting.plot_online_softmax(SCORES, 5, softmax_steps(SCORES, VALUES, 5))
    assert legend(axes[0]) == ["maximum so far", "rescaled"] and "in 1 blocks" in axes[0].figure.alt


def test_numbers_of_operations() -> None:
    ax = plotting.plot_operations(WAYS)
    assert widths(ax, "norms") == [60, 0] and widths(ax, "products") == [17, 1] and widths(ax, "copies") == [0, 5]
    assert texts(ax) == ["60", "17", "5", "77", "6"] and ticks(ax.yaxis) == ["eager", "recorded"]
    assert "eager: 77 in all (60 norms, 17 products)" in ax.figure.alt


def test_numbers_of_buckets() -> None:
    ax = plotting.plot_buckets([1, 2, 4])
    assert heights(ax, "rows of sequences") == [1, 2, 3, 4] and heights(ax, "rows for nothing") == [0, 0, 1, 0]
    assert "1 of 4 rows, for 3 sequences" in ax.figure.alt and "for 1 to 4 sequences" in ax.figure.alt


def test_numbers_of_idle_processors() -> None:
    ax = plotting.plot_idle_processors({"one": [8, 16], "four": [32, 64]}, [1, 2], 32)
    assert line(ax, "one") == ([1, 2], [25, 50]) and line(ax, "four") == ([1, 2], [100, 100])


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_in_place_is_what_the_reference_is(block_size: int) -> None:
    kv_cache, metadata, q, kv = make_step([37, 5, 60, 9], [1, 1, 12, 9], block_size)
    outputs = []
    for cls in (SdpaAttention, InPlaceAttention):
        backend = cls(kv_cache.clone())
        backend.begin(metadata)
        outputs.append(backend(0, q, kv))
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "cls, num_texts_copied", [(InPlaceAttention, 0), (SdpaAttention, 1 + 1 / 8), (GatherAttention, 2)]
)
def test_bytes_gathered(cls: type, num_texts_copied: float) -> None:
    """A text of 128 tokens beside one of 16: `sdpa` copies both, `gather` as much for the short one as for the long."""
    kv_cache, metadata, q, kv = make_step([128, 16], [1, 1], 16)
    backend = cls(kv_cache)
    with OperationCounter() as counter:
        backend.begin(metadata)
        backend(0, q, kv)
    assert counter.bytes_gathered == num_texts_copied * 128 * 2 * 2 * 32 * 4


def test_operations_are_counted_with_who_asks() -> None:
    class Part:
        def double(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 2).transpose(0, 1).contiguous() * 2  # two views, a copy and a product

    with OperationCounter() as counter, torch.inference_mode():
        Part().double(torch.ones(4))
        torch.nn.functional.linear(torch.ones(1, 3), torch.ones(2, 3))
    names = [operation.name for operation in counter.operations]
    assert names == ["ones", "clone", "mul", "ones", "ones", "mm"]
    assert counter.operations[1].num_bytes == 16


@pytest.mark.parametrize(
    ("triton", "numpy", "can"), [("3.6.0", "2.5.2", False), ("3.6.0", "2.2.6", True), ("3.10.1", "2.4.6", True)]
)
def test_why_the_kernel_is_not_interpreted(monkeypatch, triton: str, numpy: str, can: bool) -> None:
    monkeypatch.setattr(in_place, "version", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setattr(in_place.importlib.util, "find_spec", lambda name: name)
    assert (in_place.why_not_interpreted() is None) == can
    monkeypatch.setattr(in_place.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in in_place.why_not_interpreted()
