"""The numbers that chapters 3 to 5 quote in their text, and that no cell prints: each is computed here again."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from book_helpers import NOTEBOOKS, Cell, assert_says, joined, read

from folovllm.book import plotting
from folovllm.book.shapes import REAL_MODELS, build_empty, weight_bytes
from folovllm.model.checkpoint import read_safetensors_header
from folovllm.model_loader import kv_cache_bytes_per_token
from folovllm.tales import EMBEDDED_MODEL

GIB = 2**30


def printed_by(cell: Cell) -> str:
    return "".join(joined(output.get("text", "")) for output in cell.outputs)


@functools.cache
def empty(name: str) -> Any:
    return build_empty(name)


def shares(name: str, bits: float) -> dict[str, float]:
    """Of a model's bytes, with the layers' matrices in so many bits: the share of each kind."""
    (ax,) = plotting.plot_weights_by_dtype({name: empty(name)}, {"": bits})
    widths = {group.get_label(): group.patches[0].get_width() for group in ax.containers}
    return {kind: width / sum(widths.values()) for kind, width in widths.items()}


def test_chapter_3() -> None:
    name = "03_requests_and_sequences"
    ax = plotting.plot_fork_blocks(1000, 100, 16, [1, 8])
    one, eight = (ax.containers[1].patches[i].get_height() for i in (0, 1))
    assert_says(name, "Eight answers take less than twice the memory of one")
    assert eight < 2 * one
    assert_says(name, "A quarter: 16 × 200 of 16 × 800 places")
    assert 16 * 200 / (16 * 800) == 0.25
    assert_says(name, "The most that four answers can save is three quarters")
    saved = 1 - (10**9 + 4) / (4 * (10**9 + 1))  # a prompt of 10**9 blocks, and a block for each answer
    assert saved == pytest.approx(0.75, abs=1e-6)


def test_chapter_4_counts_weights() -> None:
    name = "04_loading"
    header = read_safetensors_header(EMBEDDED_MODEL / "model.safetensors")
    sizes = {key: torch.Size(entry["shape"]).numel() for key, entry in header.items() if ".layers." in key}
    mlp = sum(size for key, size in sizes.items() if plotting.loading.kind_of_weight(key) == "MLP")
    assert_says(name, "The MLP is three quarters of a layer")
    assert mlp / sum(sizes.values()) == pytest.approx(0.75, abs=0.01)
    shapes = {key: list(weight.shape) for key, weight in empty("Llama 3 70B").named_parameters()}
    long = {key: {"dtype": "BF16", "shape": shape, "data_offsets": [10**11] * 2} for key, shape in shapes.items()}
    assert_says(name, "for a checkpoint of 140 gigabytes it would be less than a hundred")
    assert weight_bytes(empty("Llama 3 70B")) == pytest.approx(140e9, rel=0.01) and len(json.dumps(long)) < 100_000
    qwen, llama = (weight_bytes(empty(model)) // 2 for model in ("Qwen3 8B", "Llama 3 8B"))
    saved = 2 * (qwen - llama)
    assert_says(name, '"8B" is 8.19 billion in one family and 8.03 in the other, a difference of 320 MB')
    assert (round(qwen / 1e9, 2), round(llama / 1e9, 2)) == (8.19, 8.03)
    assert saved == pytest.approx(320e6, rel=0.01)
    assert_says(name, "which would hold more than two thousand tokens of cache")
    assert all(
        saved > 2000 * kv_cache_bytes_per_token(REAL_MODELS[m], torch.bfloat16) for m in ("Qwen3 8B", "Llama 3 8B")
    )


def test_chapter_4_stores_weights_in_few_bits() -> None:
    name, bits = "04_loading", 4 + (16 + 4) / 128
    assert_says(name, "4.16 bits per weight")
    assert round(bits, 2) == 4.16
    totals = []
    for model in ("Qwen3 0.6B", "Qwen3 8B", "Llama 3 70B"):
        (ax,) = plotting.plot_weights_by_dtype({model: empty(model)}, {"16": 16, "4": bits})
        totals.append([text.get_text().strip() for text in ax.texts])
    assert totals == [["1.1", "0.50"], ["15.3", "5.7"], ["131.4", "37.0"]]
    assert_says(name, "the vocabulary is a quarter of everything, and more than half of what is left in 4 bits")
    assert shares("Qwen3 0.6B", 16)["embedding"] == pytest.approx(0.25, abs=0.02)
    assert shares("Qwen3 0.6B", bits)["embedding"] > 0.5
    assert_says(name, "the small model shrinks to less than half, since its embedding stays as it is, the large one")
    assert 0.4 < 0.503 / 1.11 < 0.5 and 37.0 / 131.4 < 0.3


def test_chapter_4_holds_texts() -> None:
    name = "04_loading"
    kib = {model: kv_cache_bytes_per_token(config, torch.bfloat16) / 1024 for model, config in REAL_MODELS.items()}
    small, large = weight_bytes(empty("Qwen3 0.6B")), weight_bytes(empty("Qwen3 8B"))
    assert_says(name, "a fourteenth of the weights of the 8B one, and its tokens take more than three quarters as much")
    assert round(large / small) == 14
    assert kib["Qwen3 0.6B"] / kib["Qwen3 8B"] == pytest.approx(0.775, abs=0.024)
    assert_says(name, "8.2 billion × 2 bytes, 15.3 GiB")
    assert round(large / GIB, 1) == 15.3 and round(large / 2e9, 1) == 8.2
    assert_says(name, "128 to 144 KiB per token: 200 texts of 2,048 tokens are another 50 to 56 GiB")
    assert (kib["Llama 3 8B"], kib["Qwen3 8B"]) == (128, 144)
    assert [round(200 * 2048 * each / 2**20) for each in (128, 144)] == [50, 56]


def test_chapter_5() -> None:
    name = "05_one_request_by_hand"
    # NVIDIA's data sheet of the H100 SXM: 989 TFLOPS in bfloat16 (without sparsity), 3.35 TB/s. Two operations and two
    # bytes for each weight, so the ridge is their ratio.
    assert_says(name, "An H100 reads 3.35 TB in a second and computes 989 trillion operations in bfloat16")
    assert_says(name, "at 989 / 3.35, about 295 tokens in a pass")
    assert round(989 / 3.35) == 295
    assert_says(name, "Less than a tenth of a nat over a hundred tokens")
    stored = {cell.data["id"]: printed_by(cell) for cell in read(NOTEBOOKS / f"{name}.ipynb").code}
    assert float(re.search(r"divergence is (\S+) nats", stored["c05-033"]).group(1)) < 0.1
    assert_says(name, "That is more than fifty tokens of work for every token of text")
    generated, computed = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens", stored["c05-015"])[:2])
    assert generated == 100 and computed / generated > 50
