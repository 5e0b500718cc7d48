"""Every small change of a solution: what somebody might have written instead, one thing at a time."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult, ast.Div, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
OPPOSITES = {"min": "max", "any": "all", "argmin": "argmax", "floor": "ceil", "append": "extend"}
OPPOSITES |= {new: old for old, new in OPPOSITES.items()}
KEPT = (ast.Pass, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)
"""Statements that are not dropped: nothing would change, or it would be no attempt at all."""

Edit = Callable[[Any], None]


@dataclass(frozen=True)
class Change:
    """One changed solution."""

    what: str
    """The changed line, before and after, as ``ast.unparse`` writes them: ``"a < b → a <= b"``."""
    tree: ast.Module


def small_changes(tree: ast.Module) -> Iterator[Change]:
    """Every small change of some code, the check that it ends with left out."""
    for place, node in enumerate(ast.walk(tree)):
        for what, edit in edits(node):
            changed = copy.deepcopy(tree)
            edit(list(ast.walk(changed))[place])
            ast.fix_missing_locations(changed)
            yield Change(what or difference(ast.unparse(tree), ast.unparse(changed)), changed)


def difference(before: str, after: str) -> str:
    """The first line that is another one."""
    old, new = before.splitlines(), after.splitlines()
    first = next(i for i, (a, b) in enumerate(zip([*old, ""], [*new, ""])) if a != b)
    return f"{old[first].strip()} → {new[first].strip()}"


def edits(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    """What can be changed in one node: a description, or "" where the line says it, and how to do it to a copy."""
    for find in FINDERS:
        for edit in find(node):
            yield "", edit
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for name in [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]:
            if name not in ("self", "cls"):
                yield f"{node.name}: {name} as in the first call", fix_parameter(node.name, name)


def fix_parameter(function: str, name: str) -> Edit:
    line = f"{name} = _first({f'{function}.{name}'!r}, {name})"
    return lambda node: node.body.insert(num_docstrings(node), ast.parse(line).body[0])


def num_docstrings(node: Any) -> int:
    """0 or 1: where the first statement of a body stands that does something."""
    return int(ast.get_docstring(node) is not None) if hasattr(node, "name") else 0


def setter(**fields: Any) -> Edit:
    def edit(node: Any) -> None:
        for name, value in fields.items():
            setattr(node, name, value)

    return edit


def item(name: str, place: int, value: Any) -> Edit:
    """Puts ``value`` into a list of a node; None removes the item."""

    def edit(node: Any) -> None:
        getattr(node, name)[place : place + 1] = [] if value is None else [value]

    return edit


def operators(node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                yield item("ops", i, other())
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        for new in ARITHMETIC.get(type(node.op), ()):
            yield setter(op=new())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield setter(op=ast.UAdd())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield setter(operand=ast.UnaryOp(ast.Not(), node.operand))


def conditions(node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BoolOp):
        is_and = isinstance(node.op, ast.And)
        yield setter(op=ast.Or() if is_and else ast.And())
        for i in range(len(node.values)):
            yield item("values", i, ast.Constant(is_and))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        for value in (True, False):
            yield setter(test=ast.Constant(value))
    if isinstance(node, ast.comprehension):
        for i in range(len(node.ifs)):
            yield item("ifs", i, None)


def constants(node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.JoinedStr):
        for i, part in enumerate(node.values):
            if isinstance(part, ast.FormattedValue):
                yield item("values", i, ast.Constant("x"))
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield setter(value=not node.value)
    elif isinstance(node.value, (int, float)):
        yield setter(value=node.value + 1)
        yield setter(value=node.value - 1)


def is_number(node: ast.expr) -> bool:
    """Whether it is a constant, also a negative one: these are changed as constants."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def bounds(node: ast.AST) -> Iterator[Edit]:
    """Slices and ranges: an end left out, or one too far."""
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None:
                yield setter(**{name: None})
            if bound is not None and not is_number(bound):
                yield setter(**{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
                yield setter(**{name: ast.BinOp(bound, ast.Sub(), ast.Constant(1))})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        for i, bound in enumerate(node.args):
            if not is_number(bound):
                yield item("args", i, ast.BinOp(bound, ast.Add(), ast.Constant(1)))
                yield item("args", i, ast.BinOp(bound, ast.Sub(), ast.Constant(1)))


def calls(node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Name) and node.id in OPPOSITES:
        yield setter(id=OPPOSITES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in OPPOSITES:
        yield setter(attr=OPPOSITES[node.attr])
    if isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield item("keywords", i, None)


def members(node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, (ast.Set, ast.List)) or (isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load)):
        for i in range(len(node.elts)):
            yield item("elts", i, None)


def statements(node: ast.AST) -> Iterator[Edit]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(node, ast.Module) or not isinstance(block, list):
            continue
        start = num_docstrings(node) if name == "body" else 0
        for i, statement in enumerate(block[start:], start):
            if not isinstance(statement, KEPT):
                yield item(name, i, ast.Pass())


FINDERS = (operators, conditions, constants, bounds, calls, members, statements)


# Running what came of it


class Endless(BaseException):
    """A changed solution goes round more often than any right one does; no ``except Exception`` may stop this."""


def definitions_of(tree: ast.Module) -> ast.Module:
    """A solution's cell without the check at its end."""
    return ast.Module(tree.body[:-1], [])


def attempt_from(tree: ast.Module, name: str, max_rounds: float = float("inf")) -> tuple[Any, list[int]]:
    """The attempt that some code defines, and a list whose only number counts its loops' rounds and its calls."""
    rounds, first_values = [0], {}

    def tick() -> None:
        rounds[0] += 1
        if rounds[0] > max_rounds:
            raise Endless

    def first(key: str, value: Any) -> Any:
        if key not in first_values:
            try:
                first_values[key] = copy.deepcopy(value)
            except Exception:  # a model, a lock: there is one of it
                return first_values.setdefault(key, value)
        try:
            return copy.deepcopy(first_values[key])
        except Exception:
            return first_values[key]

    counted = copy.deepcopy(tree)
    for node in ast.walk(counted):
        if isinstance(node, (ast.For, ast.While, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body.insert(num_docstrings(node), ast.parse("_tick()").body[0])
    namespace: dict[str, Any] = {"__name__": "__main__", "_tick": tick, "_first": first}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        exec(compile(ast.fix_missing_locations(counted), "attempt", "exec"), namespace)
    return namespace[name], rounds


def is_refused(check: Callable[[Any], Any], change: Change, name: str, max_rounds: float) -> bool:
    """Whether a check does not take a changed solution for right."""
    try:
        attempt, _ = attempt_from(change.tree, name, max_rounds)
    except Exception:  # such a cell shows a traceback, and no check is asked
        return True
    try:
        return not check(attempt).passed
    except Endless:
        return True


def accepted_changes(check: Callable[[Any], Any], tree: ast.Module, name: str) -> list[str]:
    """The small changes of a solution that its check takes for right."""
    attempt, rounds = attempt_from(tree, name)
    verdict = check(attempt)
    assert verdict.passed, f"the solution itself is refused: {verdict.message}"
    max_rounds = 10 * rounds[0] + 1000
    return [change.what for change in small_changes(tree) if not is_refused(check, change, name, max_rounds)]
