"""What all players share: the output of a cell that moves where scripts run and is a still picture elsewhere."""

from __future__ import annotations

import hashlib
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.book.palette import DARK_PAPER, DARK_REQUEST_COLORS, GREY, ORANGE, REQUEST_COLORS, mix

LIGHT_PAGE = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "muted": "#4d5968",
    "line": "#c4cad2",
    "soft": "#f3f5f7",
    "accent": "#0b6380",
    "wait": "#d9d9d9",
    "read": ORANGE,
    "read-tint": mix(ORANGE, "#ffffff", 0.72),
    "shared": GREY,
    "shared-tint": mix(GREY, "#ffffff", 0.6),
}
"""What the style sheet calls the colours that stand for no request."""
DARK_PAGE = {
    "paper": DARK_PAPER,
    "ink": "#e6e9ed",
    "muted": "#a5aeba",
    "line": "#50575f",
    "soft": "#1f252d",
    "accent": "#6cc0d8",
    "wait": "#454c55",
    "read": ORANGE,
    "read-tint": mix(ORANGE, DARK_PAPER, 0.65),
    "shared": GREY,
    "shared-tint": mix(GREY, DARK_PAPER, 0.55),
}

IS_DARK = 'html[data-theme="dark"]', 'body[data-jp-theme-light="false"]', "body.vscode-dark"
"""How the site, JupyterLab and VS Code say that their page is dark."""
MAY_BE_DARK = 'html:not([data-theme="light"]) body:not([data-jp-theme-light="true"]):not(.vscode-light)'
"""A page that does not say that it is light has the colours that the reader's system asks for."""


@dataclass(frozen=True)
class Player:
    """A picture that moves. A notebook shows it; elsewhere its text says what there is to see."""

    kind: str
    """The name of its script, ``folovllm/book/players/<kind>.js``."""
    description: str
    """What it shows, in words, made from the data."""
    still: str
    """What there is where no script runs: HTML with drawings that are described."""
    data: dict[str, Any]
    """What the script is given."""
    num_colors: int = 1
    """How many requests have a colour."""

    def __repr__(self) -> str:
        return self.description

    def _repr_html_(self) -> str:
        # "<" may not stand in a script's text, or "</script>" would end it.
        data = json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        name = hashlib.blake2b(f"{self.kind}{self.still}{data}".encode(), digest_size=4).hexdigest()
        return "\n".join(
            (
                f'<div class="folo-player" data-player="{self.kind}-{name}">',
                f"<style>\n{read_part('player.css')}{theme(self.num_colors)}</style>",
                self.still,
                f'<script type="application/json">{data}</script>',
                f"<script>\n{read_part(f'{self.kind}.js').replace('PLAYER', f'{self.kind}-{name}')}</script>",
                "</div>",
            )
        )

    def to_page(self, title: str) -> str:
        """A page of its own, as HTML, which needs nothing but a browser."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n</head>\n"
            f'<body class="folo-page">\n<main>\n<h1>{html.escape(title)}</h1>\n{self._repr_html_()}\n</main>\n'
            "</body>\n</html>\n"
        )


def read_part(name: str) -> str:
    """A script or style sheet of this package by its file's name, without indents and lines that are comments."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith(("//", "/*")))


def theme(num_colors: int) -> str:
    """The colours as style rules, those of ``num_colors`` requests among them; on paper every page is light."""
    light, dark = dict(LIGHT_PAGE), dict(DARK_PAGE)
    for i, (on_light, on_dark) in enumerate(zip(REQUEST_COLORS[:num_colors], DARK_REQUEST_COLORS)):
        light |= {f"c{i}": on_light, f"t{i}": mix(on_light, "#ffffff", 0.72)}
        dark |= {f"c{i}": on_dark, f"t{i}": mix(on_dark, DARK_PAPER, 0.6)}
    light_rule, dark_rule = (
        "{" + "".join(f"--{name}:{color};" for name, color in colors.items()) + "}" for colors in (light, dark)
    )
    is_dark = ",".join(f"{page} .folo-player" for page in IS_DARK)
    rules = [
        f".folo-player{light_rule}",
        f"@media screen{{{is_dark}{dark_rule}}}",
        f"@media screen and (prefers-color-scheme:dark){{{MAY_BE_DARK} .folo-player{dark_rule}}}",
        *(f".folo-player .r{i}{{--c:var(--c{i});--t:var(--t{i})}}" for i in range(num_colors)),
    ]
    return "".join(f"{rule}\n" for rule in rules)
