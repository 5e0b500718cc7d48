"""A player of the sampler: its settings as sliders, over rows of logits that a model gave."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from folovllm.book.few_bits import open_default_model
from folovllm.book.players.player import Player
from folovllm.book.players.trace import label_of, text_of
from folovllm.model.decoder import load_decoder
from folovllm.model.gptq import attend_within
from folovllm.sample.sampler import Sampler, SamplingMetadata, make_generator
from folovllm.sampling_params import SamplingParams

NUM_SEEDS = 32
"""Seeds whose first random number is in the data: no generator is written anew in another language."""
MOST_TOKENS = 1500
"""Tokens in the data; of a larger vocabulary the likeliest ones of each row."""
RESOLUTION = 1024
"""Logits are rounded to multiples of 1 / 1024 before anything is computed of them; float32 holds these exactly."""
NUM_STILL_BARS = 8


@torch.inference_mode()
def exact_logits(texts: Iterable[str], tokenizer: Any) -> dict[str, Tensor]:
    """The logits after each text, ``[vocab_size]``, as the notebooks' model gives them in float64.

    In float32 the last digits depend on the order in which a processor adds, and of the thousands of logits of a page
    a few lie so near the middle between two steps of `RESOLUTION` that one machine rounds them up and another down.

    Args:
        texts: what stands before the token.
        tokenizer: of that model.
    """
    decoder, rows = load_decoder(replace(open_default_model(), dtype=torch.float64)), {}
    for text in texts:
        input_ids = torch.tensor(tokenizer.encode(text))
        positions = torch.arange(len(input_ids))
        hidden = decoder(input_ids, positions, attend_within([len(input_ids)]))
        rows[text] = decoder.compute_logits(hidden[-1:]).squeeze(0)
    return rows


def play_sampling(rows: Mapping[str, Tensor], tokenizer: Any) -> Player:
    """A player of what temperature, top-k, top-p and min-p make of logits, and of the token that a seed hits.

    Args:
        rows: the text before the token -> its logits, ``[vocab_size]`` or ``[1, vocab_size]``; -inf: not allowed.
        tokenizer: turns token ids into texts.

    Raises:
        ValueError: if there is no row, if two have different vocabularies, or if one leaves no token to draw.
    """
    if not rows:
        raise ValueError("rows is empty: give the logits after at least one text")
    logits = {text: row.detach().reshape(-1).double().cpu() for text, row in rows.items()}
    sizes = sorted({len(row) for row in logits.values()})
    if len(sizes) > 1:
        raise ValueError(f"all rows must be of one vocabulary, got {sizes[0]} and {sizes[-1]} logits")
    for text, row in logits.items():
        if not row.max().isfinite():  # NaN is the largest of all
            raise ValueError(f"the logits after {text!r} leave no token to draw: their largest is {row.max():g}")
    ids = _tokens_to_keep(list(logits.values()))
    rounded = {text: (row[ids] * RESOLUTION).round().float() for text, row in logits.items()}
    labels = [text_of(tokenizer, token_id) for token_id in ids.tolist()]
    data = {
        "resolution": RESOLUTION,
        "vocabSize": sizes[0],
        "texts": labels,
        "uniforms": [make_generator(SamplingParams(seed=seed)).random() for seed in range(NUM_SEEDS)],
        "rows": [
            {"text": text, "logits": [int(x) if math.isfinite(x) else None for x in row.tolist()]}
            for text, row in rounded.items()
        ],
    }
    text, row = next(iter(rounded.items()))
    description = _describe(text, row / RESOLUTION, labels)
    still = (
        f'<div class="fp-runs"><div class="fp-run">{_still(row / RESOLUTION, labels, description)}</div></div>\n'
        '<p class="fp-hint">Where scripts run, sliders here change the settings.</p>\n<div class="fp-live"></div>'
    )
    return Player("sampling", description, still, data)


def _tokens_to_keep(rows: list[Tensor]) -> Tensor:
    """Token ids, ascending: all, or of a large vocabulary the likeliest ones of each row."""
    if len(rows[0]) <= MOST_TOKENS:
        return torch.arange(len(rows[0]))
    return torch.cat([row.topk(MOST_TOKENS // len(rows)).indices for row in rows]).unique()


def _describe(text: str, logits: Tensor, labels: list[str]) -> str:
    """The still picture in words, and the token of seed 0."""
    params = SamplingParams(seed=0)
    (drawn,) = Sampler()(logits.unsqueeze(0), SamplingMetadata([params])).token_ids
    u = make_generator(params).random()
    first = ", ".join(f"{label_of(labels[i])} {p:.3f}" for i, p in _likeliest(logits)[:3])
    return (
        f"Bars of the likeliest tokens for “{text}”: {first} and so on. At temperature 1 the number {u:.3f} of "
        f"seed 0 hits {label_of(labels[drawn])}."
    )


def _likeliest(logits: Tensor) -> list[tuple[int, float]]:
    """The likeliest tokens, likeliest first, with their probabilities."""
    probs = logits.softmax(dim=-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    return [(i, probs[i]) for i in ranked[:NUM_STILL_BARS]]


def _still(logits: Tensor, labels: list[str], description: str) -> str:
    """Bars at temperature 1."""
    bars = _likeliest(logits)
    drawn = []
    for row, (i, p) in enumerate(bars):
        top, width = 20 * row, 60 * p / bars[0][1]
        drawn.append(
            f'<text class="fp-end" x="26%" y="{top + 14}">{html.escape(label_of(labels[i]))}</text>'
            f'<rect class="fp-first" x="28%" y="{top + 3}" width="{width:.2f}%" height="14"/>'
            f'<text x="{29 + width:.2f}%" y="{top + 14}">{p:.3f}</text>'
        )
    return (
        f'<svg class="fp-still" role="img" aria-label="{html.escape(description)}" width="100%" '
        f'height="{20 * len(bars)}">{"".join(drawn)}</svg>'
    )
