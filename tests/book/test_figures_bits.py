"""The numbers behind the figures of chapter 15, and of what they are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from figure_helpers import heights, legend, line, texts, ticks
from matplotlib.axes import Axes

from folovllm.book import plotting
from folovllm.book.few_bits import TruthMeter, make_decoder, open_default_model, quantize_model
from folovllm.config import ModelConfig
from folovllm.model.decoder import load_decoder
from folovllm.model_loader import ModelLoader
from folovllm.tales import default_model
from folovllm.tales.evaluate import calibration
from folovllm.tales.grammar import IM_END

WEIGHTS = torch.tensor([0.26, -0.8, 0.1, 0.74])
DIVERGENCES = {"rounded": [0.1, 0.3, 20.0], "GPTQ": [0.1, 0.2, 3.0]}
SECONDS = {"16 bits": [0.004, 0.004, 0.016], "4 bits": [0.001, 0.004, 0.016]}

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_grid": lambda: plotting.plot_grid(WEIGHTS, 0.1),
    "plot_packed": lambda: plotting.plot_packed([3, 14, 1, 5, 9, 2, 6, 13]),
    "plot_group_sizes": lambda: plotting.plot_group_sizes([16, 128], [5.0, 4.125], [0.004, 0.008]),
    "plot_moved_error": lambda: plotting.plot_moved_error(1, [0.1, 1.0, -0.5, 0.9], [0.0, 0.4, 0.1, -0.3]),
    "plot_rotated": lambda: plotting.plot_rotated([0.5, 100.0, -1.0, 0.0], [50.0, -50.5, -49.0, 50.1]),
    "plot_kl_by_bits": lambda: plotting.plot_kl_by_bits([4, 3, 2], DIVERGENCES, 0.08),
    "plot_error_by_layer": lambda: plotting.plot_error_by_layer({"rounded": [0.01, 0.02], "GPTQ": [0.005, 0.01]}),
    "plot_time_by_rows": lambda: plotting.plot_time_by_rows([1, 64, 256], SECONDS, {"16 bits": 256, "4 bits": 64}),
}

GAINS = {"a GPU's kernel": {1: 3.0, 64: 1.5, 256: 0.75}, "a CPU": {1: 2.5, 64: 0.4}}
FIGURES["plot_gain_by_rows"] = lambda: plotting.plot_gain_by_rows([1, 64, 256], [2.6, 2.6, 1.0], GAINS)


def test_numbers_of_gain_by_rows() -> None:
    ax = plotting.plot_gain_by_rows([1, 64, 256], [2.6, 2.6, 1.0], GAINS)
    assert line(ax, "computed") == ([1, 64, 256], [2.6, 2.6, 1.0]) and line(ax, "a CPU") == ([1, 64], [2.5, 0.4])
    assert "a GPU's kernel falls from 3 at 1 to 0.75 at 256" in ax.figure.alt


def test_numbers_of_grid() -> None:
    ax = plotting.plot_grid(WEIGHTS, 0.1)
    assert line(ax, "weight") == (WEIGHTS.tolist(), [0, 1, 2, 3])
    assert line(ax, "value on the grid") == ([0.3, -0.8, 0.1, 0.7], [0, 1, 2, 3])
    assert "16 values from -0.8 to 0.7" in ax.figure.alt and "weight 0: 0.26 becomes 0.3" in ax.figure.alt


def test_numbers_of_packed() -> None:
    ax = plotting.plot_packed([3, 14, 1, 5, 9, 2, 6, 13])
    assert texts(ax)[:4] == ["0011", "3", "1110", "14"] and len(ax.patches) == 8
    assert ax.patches[0].get_x() == 28 and ax.patches[7].get_x() == 0  # the first value has the lowest bits
    assert ticks(ax.xaxis) == [str(bit) for bit in range(0, 32, 4)]


def test_numbers_of_group_sizes() -> None:
    ax = plotting.plot_group_sizes([16, 128], [5.0, 4.125], [0.004, 0.008])
    assert line(ax) == ([5.0, 4.125], [0.4, 0.8]) and texts(ax) == ["16", "128 share a scale"]
    assert "16 weights: 5 bits, 0.4 %" in ax.figure.alt


def test_numbers_of_moved_error() -> None:
    together, moved = plotting.plot_moved_error(1, [0.1, 1.0, -0.5, 0.9], [0.0, 0.4, 0.1, -0.3])
    assert heights(together) == [0.1, 1.0, -0.5, 0.9, 1.0] and heights(moved) == [0.0, 0.4, 0.1, -0.3, 0.4]
    assert "the largest change after it is -0.30, in column 3, whose input goes together with it by 0.90" in (
        together.figure.alt
    )


def test_numbers_of_rotated() -> None:
    ax = plotting.plot_rotated([0.5, 100.0, -1.0, 0.0], [50.0, -50.5, -49.0, 50.1])
    steps = ["as they are: steps of 0.79", "rotated: steps of 0.40"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == steps
    assert line(ax, steps[0])[1] == [0.5, 100.0, -1.0, 0.0] and line(ax, steps[1])[1] == [50.0, -50.5, -49.0, 50.1]
    assert "the largest is 100 in size, and steps are 0.79 wide" in ax.figure.alt
    assert "none is larger than 50.5, and steps are 0.40 wide" in ax.figure.alt


def test_numbers_of_kl_by_bits() -> None:
    ax = plotting.plot_kl_by_bits([4, 3, 2], DIVERGENCES, 0.08)
    assert line(ax, "rounded") == ([4, 3, 2], [0.1, 0.3, 20.0]) and line(ax, "GPTQ") == ([4, 3, 2], [0.1, 0.2, 3.0])
    assert ax.get_xlim()[0] > ax.get_xlim()[1], "fewer bits stand on the right"
    assert legend(ax) == ["not quantized", "rounded", "GPTQ"] and "0.08 nats" in ax.figure.alt


def test_numbers_of_error_by_layer() -> None:
    ax = plotting.plot_error_by_layer({"rounded": [0.01, 0.02], "GPTQ": [0.005, 0.01]})
    assert heights(ax, "rounded") == [1, 2] and heights(ax, "GPTQ") == [0.5, 1]
    assert "GPTQ: 0.5 % and 1 %" in ax.figure.alt


def test_numbers_of_time_by_rows() -> None:
    ax = plotting.plot_time_by_rows([1, 64, 256], SECONDS, {"16 bits": 256, "4 bits": 64})
    assert line(ax, "16 bits") == ([1, 64, 256], [4, 4, 16]) and texts(ax) == ["256", "64"]
    assert "4 bits: 1 ms for 1, the ridge at 64 tokens, 16 ms for 256" in ax.figure.alt


# What the figures are made of


@pytest.fixture(scope="module")
def meter() -> TruthMeter:
    return TruthMeter(ModelLoader(ModelConfig(default_model())).load_tokenizer(), 4)


def test_the_unquantized_model_is_near_the_truth_and_answers(meter: TruthMeter) -> None:
    checkpoint = open_default_model()
    ours, engines = meter.measure(make_decoder(checkpoint)), meter.measure(load_decoder(checkpoint))
    assert ours == engines and 0 < ours.kl < 1 and ours.num_right == 4


def test_the_places_of_an_answer(meter: TruthMeter) -> None:
    tokenizer = ModelLoader(ModelConfig(default_model())).load_tokenizer()
    flat = [token_id for sequence in meter.sequences for token_id in sequence]
    for text, places in zip(meter.documents, meter._answers, strict=True):
        answer = tokenizer.decode([flat[place + 1] for place in places])
        assert answer.endswith(IM_END) and f"assistant\n{answer}" in text and answer.count("<|") == 1


def test_the_truth_is_a_distribution_at_every_place(meter: TruthMeter) -> None:
    sums = torch.zeros(sum(map(len, meter.sequences)))
    sums.index_add_(0, meter._rows, meter._probs)
    ends = torch.tensor([len(sequence) for sequence in meter.sequences]).cumsum(0) - 1
    assert (sums[ends] == 0).all()  # nothing follows a document
    torch.testing.assert_close(sums.sum(), torch.tensor(float(len(sums) - len(ends))))


def test_fewer_bits_are_worse_and_gptq_is_better(meter: TruthMeter) -> None:
    checkpoint, tokenizer = open_default_model(), ModelLoader(ModelConfig(default_model())).load_tokenizer()
    sequences = [tokenizer(document.text)["input_ids"] for document in calibration(6)]
    truths = {
        (method, bits): meter.measure(make_decoder(checkpoint, quantize_model(checkpoint, sequences, method, bits)))
        for method in ("rtn", "gptq")
        for bits in (4, 3)
    }
    for method in ("rtn", "gptq"):
        assert truths[method, 4].kl < truths[method, 3].kl
    for bits in (4, 3):
        assert truths["gptq", bits].kl < truths["rtn", bits].kl
