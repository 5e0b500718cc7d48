"""The checks are strong: every small change of a solution is refused, or is known to mean the same."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from book_helpers import PATHS, called, read
from small_changes import Endless, accepted_changes, attempt_from, definitions_of, small_changes

from folovllm.book import exercises
from folovllm.book.exercises.verdict import exercise, expect

SAME: dict[str, dict[str, str]] = {}
"""For each check the changes that mean the same, and why; from the ``SAME`` of each ``attempts_*.py``."""
for path in sorted(Path(__file__).parent.glob("attempts_*.py")):
    SAME |= getattr(importlib.import_module(path.stem), "SAME", {})

SOLUTIONS = [
    pytest.param(
        called(solution.last_expression()),
        solution,
        id=f"{chapter.name}-{called(solution.last_expression())}",
    )
    for chapter in map(read, PATHS)
    for solution in chapter.tagged("solution")
]


@pytest.mark.parametrize("check_name, solution", SOLUTIONS)
def test_every_small_change_of_a_solution_is_refused(check_name: str, solution: Any) -> None:
    name = solution.last_expression().args[0].id
    accepted = accepted_changes(getattr(exercises, check_name), definitions_of(solution.tree), name)
    same = SAME.get(check_name, {})
    wrong = [what for what in accepted if what not in same]
    if wrong:
        pytest.fail("\n  ".join([f"{check_name} takes for right what is not:", *wrong]), pytrace=False)
    unused = set(same) - set(accepted)
    assert not unused, f"these are refused now, or are no change of {solution}: take them off SAME: {unused}"


def test_a_change_that_means_the_same_says_why() -> None:
    assert set(SAME) <= {param.values[0] for param in SOLUTIONS}
    assert all(len(why.split()) >= 4 for changes in SAME.values() for why in changes.values())


# The changes themselves


def changes_of(source: str) -> set[str]:
    return {change.what for change in small_changes(ast.parse(source))}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("a < b", {"a < b → a <= b", "a < b → a >= b"}),
        ("a + b", {"a + b → a - b"}),
        ("a and b", {"a and b → a or b", "a and b → True and b", "a and b → a and True"}),
        ("7", {"7 → 8", "7 → 6"}),
        ("True", {"True → False"}),
        ("x[a:]", {"x[a:] → x[:]", "x[a:] → x[a + 1:]", "x[a:] → x[a - 1:]"}),
        ("min(a)", {"min(a) → max(a)"}),
        ("f(a, b=c)", {"f(a, b=c) → f(a)"}),
        ("-a", {"-a → +a"}),
        ("{a, *b}", {"{a, *b} → {*b}", "{a, *b} → {a}"}),
        ("[i for i in x if i]", {"[i for i in x if i] → [i for i in x]"}),
        ("range(n)", {"range(n) → range(n + 1)", "range(n) → range(n - 1)"}),
        ("def f(x):\n    return g(x)", {"return g(x) → pass", "f: x as in the first call"}),
        ("if x:\n    f()", {"if x: → if True:", "if x: → if False:", "f() → pass"}),
        ("import math", set()),
    ],
)
def test_changes(source: str, expected: set[str]) -> None:
    assert changes_of(source) == expected


GREATEST = """
def greatest(numbers, limit):
    best = 0
    while numbers:
        best = max(best, numbers[-1])
        numbers = numbers[:-1]
    return min(best, limit)
"""


def judge(*cases: tuple[tuple[Any, ...], Any]) -> Callable[[Any], Any]:
    """A check that looks at these cases only."""

    @exercise("so it is.", gives="a number")
    def check(attempt: Callable[..., Any]) -> None:
        for args, right in cases:
            expect(attempt(*args) == right, "no.")

    return check


def test_a_weak_check_is_noticed_and_endless_loops_are_left() -> None:
    accepted = accepted_changes(judge((([3, 5], 9), 5)), ast.parse(GREATEST), "greatest")
    assert "greatest: limit as in the first call" in accepted
    assert "return min(best, limit) → return max(best, limit)" not in accepted
    assert not any("pass" in what for what in accepted), "the loop that never ends was taken for right"


def test_a_strong_check_refuses_all_but_what_means_the_same() -> None:
    check = judge(
        (([3, 5], 9), 5), (([8, 2, 7], 9), 8), (([2, 8, 7], 4), 4), (([1, 6, 2], 9), 6), (([1], 9), 1), (([], 9), 0)
    )
    assert accepted_changes(check, ast.parse(GREATEST), "greatest") == []


def test_a_loop_without_end_is_ended() -> None:
    attempt, _ = attempt_from(ast.parse("def f():\n    while True:\n        pass"), "f", max_rounds=50)
    with pytest.raises(Endless):
        attempt()
