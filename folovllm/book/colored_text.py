"""A text whose tokens are coloured by their probability, for the notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = (
    (0.02, "#d7301f", "#ffffff"),
    (0.1, "#fc8d59", "#111111"),
    (0.3, "#fdcc8a", "#111111"),
    (0.9, "#fef0d9", "#111111"),
)
"""Below this probability: this background, this colour of the letters. Above the last: white, for what was certain."""


@dataclass(frozen=True)
class ColoredText:
    """Tokens and their probabilities, shown by a notebook as text on a coloured ground."""

    tokens: list[str]
    probs: list[float]

    def __repr__(self) -> str:
        return "".join(self.tokens)

    def _repr_html_(self) -> str:
        legend = ["p below 0.02", "0.1", "0.3", "0.9", "certain"]
        spans = [_span(text, p, f"p = {p:.2f}") for text, p in zip(self.tokens, self.probs)]
        key = " ".join(_span(name, p, name) for name, p in zip(legend, (0.01, 0.05, 0.2, 0.5, 1.0)))
        return f'<p class="tokens">{"".join(spans)}</p><p class="tokens-key">{key}</p>'


def _span(text: str, p: float, title: str) -> str:
    background, color = next(((b, c) for limit, b, c in LEVELS if p < limit), ("#ffffff", "#111111"))
    style = f"background:{background};color:{color};padding:1px 2px;border-radius:3px"
    return f'<span class="tok" style="{style}" title="{title}">{html.escape(text)}</span>'


def color_tokens(tokenizer: Any, token_ids: Sequence[int], probs: Sequence[float]) -> ColoredText:
    """The text of ``token_ids``, each token coloured by its probability."""
    return ColoredText([tokenizer.decode([token_id]) for token_id in token_ids], [float(p) for p in probs])
