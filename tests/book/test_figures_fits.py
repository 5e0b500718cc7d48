"""The numbers behind the figures of chapter 18, and the state machine that one of them draws."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from figure_helpers import legend, line, texts, ticks, widths
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Circle, Rectangle

from folovllm.book import plotting
from folovllm.book.plotting.fits import DECADES
from folovllm.book.state_machine import StateMachine

MACHINE = StateMachine("(fox|frog)s?")
CARD = ['{"', "name", '":', ' "', "fox", '"}']
COUNTS = [2, 1, 3, 40, 1144, 1144]

FIGURES: dict[str, Callable[[], Axes]] = {
    "plot_token_path": lambda: plotting.plot_token_path(MACHINE, ["fo", "x", "s"]),
    "plot_allowed": lambda: plotting.plot_allowed(CARD, COUNTS),
    "plot_valid": lambda: plotting.plot_valid([1, 2, 3], {"off": [100, 50, 0], "on": [100, 100, 100]}),
    "plot_distortion": lambda: plotting.plot_distortion(
        {"wanted": {"a": 0.9, "b": 0.1}, "drawn": {"a": 0.4, "b": 0.6}}
    ),
}


def test_numbers_of_token_path() -> None:
    ax = plotting.plot_token_path(MACHINE, ["fo", "x", "s"])
    centers = [patch.center for patch in ax.patches if isinstance(patch, Circle)]
    assert len(set(centers)) == 8 and len(centers) == 8 + 3  # a second circle where a text may end
    assert sorted(texts(ax)) == sorted(["f", "o", "r", "x", "o", "g", "s", "s", "fo", "x", "s"])
    assert "8 states, 3 of them" in ax.figure.alt and "'fo', 'x' and 's'" in ax.figure.alt


def test_a_machine_with_a_loop_and_no_tokens() -> None:
    ax = plotting.plot_token_path(StateMachine("a[0-9]*"))
    assert sorted(texts(ax)) == ["0–9", "0–9", "a"] and "tokens" not in ax.figure.alt


def test_numbers_of_allowed() -> None:
    ax = plotting.plot_allowed(CARD, COUNTS)
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    colors = [DECADES[10], DECADES[1], DECADES[10], DECADES[100], DECADES[None], DECADES[None]]
    assert [to_hex(box.get_facecolor()).upper() for box in boxes] == [color.upper() for color in colors]
    assert texts(ax) == ['{"', "2", "name", '":', "3", '␣"', "40", "fox", '"}', "1144"]  # a count once for neighbours
    assert "a single one in 1, more than a hundred in 2, at most 1144" in ax.figure.alt


def test_a_long_answer_goes_on_in_the_next_line() -> None:
    boxes = plotting.plot_allowed(["a" * 30] * 5, [1] * 5).patches
    assert len({box.get_y() for box in boxes}) == 3


def test_numbers_of_valid() -> None:
    ax = plotting.plot_valid([1, 2, 3], {"off": [100, 50, 0], "on": [100, 100, 100]})
    assert line(ax, "off") == ([1, 2, 3], [100, 50, 0]) and line(ax, "on") == ([1, 2, 3], [100, 100, 100])
    assert "off: falls from 100 at 1 to 0 at 3; on: begins and ends at 100" in ax.figure.alt


def test_numbers_of_distortion() -> None:
    ax = plotting.plot_distortion({"wanted": {"a": 0.9, "b": 0.1}, "drawn": {"b": 0.6, "a": 0.4}})
    assert widths(ax, "wanted") == [0.9, 0.1] and widths(ax, "drawn") == [0.4, 0.6]
    assert ticks(ax.yaxis) == ["a", "b"] and legend(ax) == ["wanted", "drawn"]
    assert "drawn: a 0.400, b 0.600" in ax.figure.alt


PART = st.sampled_from(["a", "b", "ab", "[a-c]", "[^b]", r"\.", ".", "狐", "(a|狐b)", "(?:ab|c|)"])
REPEATED = st.tuples(PART, st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}", "{0,1}", "{0}", "{2,}"])).map(
    "".join
)
PATTERN = st.lists(st.lists(REPEATED, max_size=3).map("".join), min_size=1, max_size=2).map("|".join)


@given(pattern=PATTERN, texts=st.lists(st.text("abc.狐\n", max_size=6), min_size=5, max_size=20))
def test_a_state_machine_is_what_pythons_expression_is(pattern: str, texts: list[str]) -> None:
    machine = StateMachine(pattern)
    for text in texts:
        if "狐" in text and re.search(r"\[\^|(?<!\\)\.", pattern):
            continue  # classes are of ASCII here
        assert machine.matches(text) == bool(re.fullmatch(pattern, text)), text


def test_bytes_one_by_one_and_together() -> None:
    state = MACHINE.start
    for byte in b"frogs":
        state = MACHINE.next_bytes(state)[byte]
    assert state == MACHINE.step(MACHINE.start, b"frogs") and MACHINE.accepts(state)
    assert MACHINE.next_bytes(state) == {} and not MACHINE.step(state, b"s")


@pytest.mark.parametrize("pattern", ["(a", "a)", "[a", "*", "a{x}", "a{1", "a{99}", "[狐]", "()*)"])
def test_what_it_does_not_know_is_one_sentence(pattern: str) -> None:
    with pytest.raises(ValueError, match="got") as caught:
        StateMachine(pattern)
    assert "\n" not in str(caught.value)
