"""How objects show themselves in a notebook: texts whose tokens are tinted by their probability, settings as tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

LEVELS = (
    (0.02, "#d7301f", "#ffffff"),
    (0.1, "#fc8d59", "#111111"),
    (0.3, "#fdcc8a", "#111111"),
    (0.9, "#fef0d9", "#111111"),
)
"""Below this probability: this background, this colour of the letters. Above the last: white, for what was certain."""


def tinted_token(text: str, prob: float, title: str | None = None) -> str:
    """One token on a background that tells its probability; ``title`` is shown when the mouse is over it."""
    background, color = next(((b, c) for limit, b, c in LEVELS if prob < limit), ("#ffffff", "#111111"))
    style = f"background:{background};color:{color};padding:1px 2px;border-radius:3px"
    title = f"p = {prob:.2f}" if title is None else title
    return f'<span class="tok" style="{style}" title="{html.escape(title)}">{html.escape(text)}</span>'


def tinted_text(tokens: Sequence[str], probs: Sequence[float]) -> str:
    """Tokens one after the other, each tinted by its probability, and the key to the colours."""
    legend = ["p below 0.02", "0.1", "0.3", "0.9", "certain"]
    spans = [tinted_token(text, p) for text, p in zip(tokens, probs)]
    key = " ".join(tinted_token(name, p, name) for name, p in zip(legend, (0.01, 0.05, 0.2, 0.5, 1.0)))
    return f'<p class="tokens">{"".join(spans)}</p><p class="tokens-key">{key}</p>'


def table(caption: str, rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, the names as headings of their rows."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>' for name, value in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption><tbody>{body}</tbody></table>"
