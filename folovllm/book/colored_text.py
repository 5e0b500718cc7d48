"""A text whose tokens are coloured by their probability, for the notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from folovllm.utils.html import tinted_text


@dataclass(frozen=True)
class ColoredText:
    """Tokens and their probabilities, shown by a notebook as text on a coloured ground."""

    tokens: list[str]
    probs: list[float]

    def __repr__(self) -> str:
        return "".join(self.tokens)

    def _repr_html_(self) -> str:
        return tinted_text(self.tokens, self.probs)


def color_tokens(tokenizer: Any, token_ids: Sequence[int], probs: Sequence[float]) -> ColoredText:
    """The text of ``token_ids``, each token coloured by its probability."""
    return ColoredText([tokenizer.decode([token_id]) for token_id in token_ids], [float(p) for p in probs])
