"""Figures of chapter 18: a state machine, how many tokens fit at each place, who is valid, and what a mask distorts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle

from folovllm.book.plotting.style import (
    BLUE,
    GREY,
    LIGHT,
    ON_LIGHT_FILL,
    ORANGE,
    PALETTE,
    RED,
    SKY,
    YELLOW,
    course,
    listed,
    new_figure,
)

if TYPE_CHECKING:
    from folovllm.book.state_machine import StateMachine

MARKERS = "osD^"
LINE_CHARS = 62
"""Characters in a line of `plot_allowed`."""
DECADES = {1: SKY, 10: YELLOW, 100: ORANGE, None: RED}
"""The colour of a place where at most so many tokens are allowed."""
DARK = "#333333"


def plot_token_path(machine: StateMachine, tokens: Sequence[str] = ()) -> Axes:
    """The states of a machine, the characters between them, and the jumps that some tokens make.

    Args:
        machine: one of few states, of ASCII characters.
        tokens: what is written, token by token; it must fit.
    """
    places = _places_of(machine)
    with new_figure(0.8 + 1.3 * (1 + max(y for _, y in places.values()))) as ax:
        circles = {state: Circle((x, -y), 0.17, facecolor="white", edgecolor=DARK, lw=1.5, zorder=3)
                   for state, (x, y) in places.items()}  # fmt: skip
        for state, (x, y) in places.items():
            ax.add_patch(circles[state])
            if machine.accepts(state):
                ax.add_patch(Circle((x, -y), 0.12, facecolor="none", edgecolor=DARK, lw=1.2, zorder=3))
            for label, target in _edges(machine, state):
                _arrow(ax, circles[state], circles[target], label)
        state, color_of = machine.start, dict(zip(dict.fromkeys(tokens), PALETTE))
        for token in tokens:
            after = machine.step(state, token.encode())
            _jump(ax, places[state], places[after], token, color_of[token])
            state = after
        ends = [state for state in places if machine.accepts(state)]
        ax.set_aspect("equal")
        ax.set(
            xlim=(-0.3, max(x for x, _ in places.values()) + 0.5),
            ylim=(-max(y for _, y in places.values()) - 0.5, 0.8),
        )
        ax.axis("off")
        path = f" The tokens {listed(repr(token) for token in tokens)} jump along it." if tokens else ""
        ax.figure.alt = (
            f"State machine of {len(places)} states, {len(ends)} of them drawn as double circles, in which a text may "
            f"end. Arrows carry the characters {listed(_characters(machine, places))}.{path}"
        )
    return ax


def _places_of(machine: StateMachine) -> dict[frozenset[int], tuple[int, int]]:
    """Where each state is drawn: how many characters from the start, and in which line."""
    places, found, lines = {machine.start: (0, 0)}, [machine.start], {0: 1}
    for state in found:
        x, y = places[state]
        for _, target in _edges(machine, state):
            if target not in places:
                line = max(y, lines.get(x + 1, 0))
                places[target], lines[x + 1] = (x + 1, line), line + 1
                found.append(target)
    return places


def _edges(machine: StateMachine, state: frozenset[int]) -> list[tuple[str, frozenset[int]]]:
    """The states that follow, each with the characters that lead there, as few letters as can be."""
    bytes_to: dict[frozenset[int], list[int]] = {}
    for byte, target in machine.next_bytes(state).items():
        bytes_to.setdefault(target, []).append(byte)
    return [
        (f"{chr(found[0])}–{chr(found[-1])}" if len(found) > 2 else " ".join(map(chr, found)), target)
        for target, found in bytes_to.items()
    ]


def _characters(machine: StateMachine, places: Mapping[frozenset[int], tuple[int, int]]) -> list[str]:
    return list(dict.fromkeys(label for state in places for label, _ in _edges(machine, state)))


def _arrow(ax: Axes, before: Circle, after: Circle, label: str) -> None:
    """One character: from a state to another, or back to itself."""
    look: dict[str, Any] = {"arrowstyle": "->", "color": DARK, "shrinkA": 0, "shrinkB": 0}
    (x0, y0), (x1, y1) = start, end = before.center, after.center
    if before is after:
        look |= {"connectionstyle": "arc3,rad=2.2"}
        start, end, middle = (x0 - 0.1, y0 - 0.14), (x0 + 0.1, y0 - 0.14), (x0, y0 - 0.5)
    elif x1 > x0:
        look |= {"patchA": before, "patchB": after}
        middle = ((x0 + x1) / 2 - (0.12 if y1 != y0 else 0), (y0 + y1) / 2 - 0.16)
    else:  # back, or to another line
        look |= {"connectionstyle": "arc3,rad=0.4", "patchA": before, "patchB": after}
        middle = ((x0 + x1) / 2 + (0.36 if x0 == x1 else 0), (y0 + y1) / 2 - (0 if x0 == x1 else 0.3))
    ax.annotate("", end, start, arrowprops=look)
    ax.text(*middle, label, ha="center", va="center", fontsize=11, color=DARK, family="monospace")


def _jump(ax: Axes, start: tuple[int, int], end: tuple[int, int], token: str, color: str) -> None:
    """One token: a bow above the characters that it is made of."""
    (x0, y0), (x1, y1) = start, end
    bow = {"arrowstyle": "-|>", "color": color, "lw": 2.5, "connectionstyle": "arc3,rad=-0.3"}
    ax.annotate("", (x1, -y1 + 0.17), (x0, -y0 + 0.17), arrowprops={**bow, "shrinkA": 1, "shrinkB": 1})
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": color}
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 11, "family": "monospace"}
    height = 0.18 + 0.15 * abs(x1 - x0)
    ax.text((x0 + x1) / 2, -(y0 + y1) / 2 + 0.17 + height, token.replace(" ", "␣"), bbox=box, color=DARK, **look)


def plot_allowed(tokens: Sequence[str], counts: Sequence[int]) -> Axes:
    """An answer token by token, each coloured by how many tokens could have stood in its place.

    Args:
        tokens: the answer.
        counts: for each of them, the tokens that were allowed there, itself included.
    """
    lines = _wrap([token.replace(" ", "␣").replace("\n", "⏎") for token in tokens])
    with new_figure(1.0 + 0.62 * len(lines)) as ax:
        place = 0
        for row, line in enumerate(lines):
            left, alike = 0.0, 0.0
            for i, token in enumerate(line):
                color = next(color for most, color in DECADES.items() if most is None or counts[place] <= most)
                ax.add_patch(Rectangle((left, -row - 0.2), len(token) + 0.7, 0.46, facecolor=color, edgecolor="white"))
                middle = left + (len(token) + 0.7) / 2
                look = {"ha": "center", "va": "center"}
                ax.text(middle, -row + 0.02, token.replace("$", r"\$"), color=ON_LIGHT_FILL, fontsize=10,
                        family="monospace", **look)  # fmt: skip
                if counts[place : place + 1] != counts[place + 1 : place + 2] or i == len(line) - 1:
                    label = str(counts[place]) if counts[place] > 1 else ""
                    ax.text((alike + left + len(token) + 0.7) / 2, -row - 0.34, label, fontsize=9, color=DARK, **look)
                    alike = left + len(token) + 0.8
                left, place = left + len(token) + 0.8, place + 1
        names = dict(zip(DECADES.values(), ("1 token fits", "2 to 10", "11 to 100", "more")))
        handles = [Rectangle((0, 0), 1, 1, color=color, label=name) for color, name in names.items()]
        ax.legend(handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1), fontsize=10, handlelength=1)
        ax.set(xlim=(0, LINE_CHARS + 8), ylim=(-len(lines) + 0.5, 0.4))
        ax.axis("off")
        shares = [sum(count == 1 for count in counts), sum(count > 100 for count in counts)]
        ax.figure.alt = (
            f"The answer {''.join(tokens)} in {len(tokens)} boxes, coloured by how many tokens were allowed in each "
            f"place: a single one in {shares[0]}, more than a hundred in {shares[1]}, at most {max(counts)}."
        )
    return ax


def _wrap(tokens: Sequence[str]) -> list[list[str]]:
    """The tokens in lines."""
    lines: list[list[str]] = [[]]
    for token in tokens:
        if lines[-1] and sum(len(other) + 0.8 for other in lines[-1]) + len(token) > LINE_CHARS + 6:
            lines.append([])
        lines[-1].append(token)
    return lines


def plot_valid(temperatures: Sequence[float], valid: Mapping[str, Sequence[float]]) -> Axes:
    """How many answers are valid, in percent, against the temperature.

    Args:
        temperatures: along the axis.
        valid: way to answer -> its percentage at each temperature.
    """
    with new_figure(3.5) as ax:
        for (name, shares), color, marker in zip(valid.items(), (BLUE, ORANGE, *PALETTE[2:]), MARKERS):
            ax.plot(temperatures, shares, color=color, lw=2, marker=marker, ms=6, label=name, clip_on=False)
        ax.axhline(100, color=LIGHT, lw=1, zorder=0)
        ax.set(xlabel="temperature", ylabel="valid answers (%)", ylim=(0, 105), xticks=temperatures)
        ax.legend(loc="lower left")
        told = "; ".join(f"{name}: {course(shares, temperatures)}" for name, shares in valid.items())
        ax.figure.alt = f"Lines of the percentage of valid answers against the temperature. {told}."
    return ax


def plot_distortion(series: Mapping[str, Mapping[str, float]]) -> Axes:
    """How likely a few texts are, a bar for each way to tell.

    Args:
        series: way to tell -> text -> probability; the first one's texts are shown.
    """
    names = list(next(iter(series.values())))
    with new_figure(1.2 + 0.3 * len(names) * len(series)) as ax:
        height = 0.8 / len(series)
        for i, (way, probs) in enumerate(series.items()):
            places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * height
            bars = ax.barh(places, [probs[name] for name in names], height, color=(GREY, *PALETTE)[i], label=way)
            ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=10)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set(xlabel="probability", xlim=(0, 1.12))
        ax.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=len(series), fontsize=10, handlelength=1)
        told = "; ".join(
            f"{way}: {', '.join(f'{name} {probs[name]:.3f}' for name in names)}" for way, probs in series.items()
        )
        ax.figure.alt = f"Bars of the probabilities of {len(names)} texts, by how they are told. {told.capitalize()}."
    return ax
