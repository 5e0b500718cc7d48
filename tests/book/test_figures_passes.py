"""The numbers behind the figures of chapter 6, and what a traced pass holds."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from figure_helpers import line, texts, ticks
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Circle, Rectangle

from folovllm import LLM
from folovllm.book import plotting
from folovllm.book.plotting.style import BLUE, ORANGE, RED
from folovllm.book.tracing import look_back, trace_pass
from folovllm.tales import EMBEDDED_MODEL

SHAPE = types.SimpleNamespace(
    num_heads=4, num_kv_heads=2, head_dim=32, hidden_size=128, intermediate_size=384, num_layers=3
)
PROBS = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.9, 0.06, 0.04]])
WORDS = ["␣a", "b", "c"]
LENS = [["x", "y", "z"], ["x", "y", "w"]]

FIGURES: dict[str, Callable[[], Axes]] = {
    "plot_layer": lambda: plotting.plot_layer(SHAPE),
    "plot_attention_map": lambda: plotting.plot_attention_map(PROBS, WORDS, (2, 0)),
    "plot_dials": lambda: plotting.plot_dials([1.0, 0.5, 0.1], [0, 2], [0, 3]),
    "plot_score_by_distance": lambda: plotting.plot_score_by_distance(
        {"all": [1.0, 0.5, -0.1], "one": [1.0, 0.2, 0.3]}
    ),
    "plot_shared_heads": lambda: plotting.plot_shared_heads({"each": (4, 4), "some": (4, 2), "all": (4, 1)}),
    "plot_masks": lambda: plotting.plot_masks({"two": np.tri(2), "one": np.ones((1, 3))}),
    "plot_logit_lens": lambda: plotting.plot_logit_lens(LENS, [[0.1, 0.2, 0.3], [0.5, 0.6, 0.9]], WORDS),
}


def squares(ax: Axes) -> list[tuple[str, float, float]]:
    """Colour, left and top of each rectangle."""
    return [(to_hex(p.get_facecolor()), *p.get_xy()) for p in ax.patches if isinstance(p, Rectangle)]


def test_numbers_of_layer() -> None:
    ax = plotting.plot_layer(SHAPE)
    assert "q, k, v 128 → 256" in texts(ax) and "gate, up 128 → 768" in texts(ax)
    assert "to the next of 3 layers" in texts(ax)
    filled = [patch for patch in ax.patches if to_hex(patch.get_facecolor()) == BLUE.lower()]
    assert len(filled) == 1, "only attention looks at other tokens"


def test_numbers_of_attention_map() -> None:
    ax = plotting.plot_attention_map(PROBS, WORDS, (2, 0))
    assert np.allclose(ax.images[0].get_array(), PROBS)
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == WORDS
    (frame,) = (patch for patch in ax.patches if to_hex(patch.get_edgecolor()) == RED.lower())
    assert frame.get_xy() == (-0.5, 1.5)
    assert "takes 0.90 from token 0 (␣a)" in ax.figure.alt


def test_numbers_of_dials() -> None:
    ax = plotting.plot_dials([1.0, 0.5, 0.1], [0, 2], [0, 3])
    assert sum(isinstance(patch, Circle) for patch in ax.patches) == 4
    hands = [(x[1] - x[0], y[1] - y[0]) for x, y in (found.get_data() for found in ax.lines)]
    angles = [math.atan2(x, -y) for x, y in hands]  # the axis of rows points down
    assert angles == pytest.approx([0, 0, 3.0, 0.3])
    assert ticks(ax.xaxis) == ["pair 0", "pair 2"]


def test_numbers_of_score_by_distance() -> None:
    ax = plotting.plot_score_by_distance({"all": [1.0, 0.5, -0.1], "one": [1.0, 0.2, 0.3]})
    assert line(ax, "one") == ([0, 1, 2], [1.0, 0.2, 0.3])
    assert "all: -0.10 at its lowest" in ax.figure.alt


def test_numbers_of_shared_heads() -> None:
    ax = plotting.plot_shared_heads({"each": (4, 4), "some": (4, 2), "all": (4, 1)})
    colors = [color for color, *_ in squares(ax)]
    assert (colors.count(BLUE.lower()), colors.count(ORANGE.lower())) == (12, 7)
    ends = [tuple(found.get_xdata()) for found in ax.lines]
    assert ends[4:8] == [(0, 0.5), (1, 0.5), (2, 2.5), (3, 2.5)], "heads 0 and 1 share one, 2 and 3 the other"


def test_numbers_of_masks() -> None:
    ax = plotting.plot_masks({"two": np.tri(2), "one": np.ones((1, 3))})
    found = squares(ax)
    assert [color == BLUE.lower() for color, *_ in found] == [True, False, True, True, True, True, True]
    assert found[1][1:] == (1, 0), "row 0, column 1: a key to the right of its query"
    assert "two: 3 of 4 squares" in ax.figure.alt


def test_numbers_of_logit_lens() -> None:
    ax = plotting.plot_logit_lens(LENS, [[0.1, 0.2, 0.3], [0.5, 0.6, 0.9]], WORDS)
    assert texts(ax) == [*LENS[0], *LENS[1]]
    assert ticks(ax.yaxis) == ["embedding", "layer 0"] and ticks(ax.xaxis) == WORDS


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(EMBEDDED_MODEL), dtype="float32", max_model_len=64, max_num_seqs=2)


def test_a_traced_pass_is_the_engines_own(llm: LLM) -> None:
    token_ids = llm.engine.tokenizer.encode("Once upon a time, in the valley, there lived a quiet fox named Oskar.")
    decoder = llm.engine.decoder
    traced = trace_pass(decoder, token_ids)
    assert traced.probs.shape == (4, 4, len(token_ids), len(token_ids))
    assert torch.allclose(traced.probs.sum(-1), torch.ones(4, 4, len(token_ids)), atol=1e-5)
    logits = decoder.compute_logits(decoder.norm(traced.stream[-1]))
    (output,) = llm.generate([token_ids], use_tqdm=False, sampling_params=greedy())
    assert int(logits[-1].argmax()) == output.outputs[0].token_ids[0]
    cached = llm.engine.runner.kv_cache[:, 0, :, 0, : len(token_ids)].transpose(1, 2)
    assert torch.allclose(traced.keys[:, :16], cached[:, :16], atol=1e-4), "the keys are those of the engine's cache"


def greedy() -> object:
    from folovllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1)


def test_looking_back_by_hand() -> None:
    q, k = torch.tensor([[[2.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    out, probs = look_back(q, k, torch.tensor([[[10.0]], [[20.0]]]))
    share = math.exp(2) / (1 + math.exp(2))
    assert probs.flatten().tolist() == pytest.approx([1 - share, share])
    assert out.item() == pytest.approx(10 + 10 * share)
