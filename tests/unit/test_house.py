"""The house: which room may import which, and how large its furniture may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import folovllm

ROOT = Path(folovllm.__file__).parent
FILES = {
    ".".join(("folovllm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
NOUNS = ("config", "sampling_params", "request", "outputs", "logprobs")

# Each room, and what it may import beside itself. Whoever needs more is in the wrong room.
DOORS = {
    "utils": (),
    "validation": (),
    **{noun: ("validation", "utils", *NOUNS) for noun in NOUNS},
    "core": ("validation", "utils", *NOUNS),
    "attention": ("validation", "utils", *NOUNS),
    "sample": ("validation", "utils", *NOUNS),
    "model": ("validation", "utils", "attention", *NOUNS),
    "model_loader": ("validation", "utils", "model", *NOUNS),
    "worker": ("validation", "utils", "core", "model", "attention", "sample", *NOUNS),
    "engine": ("validation", "utils", "core", "worker", "model", "model_loader", "sample", *NOUNS),
    "chat": ("validation",),
    "llm": ("validation", "utils", "engine", "chat", *NOUNS),
    "simulator": ("validation", "utils", "core", "model", "worker", "engine", "llm", *NOUNS),
    "book": None,
    "tales": None,
    "__main__": None,
    "": None,  # folovllm/__init__.py, the front hall
}


def room_of(module: str) -> str:
    return module.removeprefix("folovllm").lstrip(".").split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """The package's modules that a file imports anywhere, those for types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "folovllm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "folovllm":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


@pytest.mark.parametrize("module", FILES)
def test_a_room_has_the_doors_that_it_should(module: str) -> None:
    allowed = DOORS[room_of(module)]
    if allowed is None:
        return
    used = {room_of(name) for name in imports(FILES[module])} - {room_of(module)}
    assert used <= set(allowed), f"{module} imports {sorted(used - set(allowed))}, for which there is no door"


def test_of_core_the_worker_knows_the_work_alone() -> None:
    for module, path in FILES.items():
        if room_of(module) == "worker":
            known = [
                (node.module, alias.name)
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("folovllm.core")
                for alias in node.names
            ]
            assert set(known) <= {("folovllm.core.scheduler", "SchedulerOutput")}


def test_no_two_modules_import_each_other() -> None:
    """Not even by a third one, and not even for types."""
    graph = {module: {name for name in imports(path) if name != module} for module, path in FILES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        # The front hall imports everything, and others import names of it.
        if module not in ("folovllm",):
            visit(module, ())


def pieces(kind: type | tuple[type, ...]) -> Iterator[tuple[str, int]]:
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def test_no_function_is_longer_than_45_lines() -> None:
    assert [piece for piece in pieces((ast.FunctionDef, ast.AsyncFunctionDef)) if piece[1] > 45] == []


def test_no_class_is_much_longer_than_200_lines() -> None:
    assert [piece for piece in pieces(ast.ClassDef) if piece[1] > 220] == []
    assert dict(pieces(ast.ClassDef))["folovllm.engine.llm_engine.LLMEngine"] <= 200


def test_there_is_no_empty_module() -> None:
    assert [module for module, path in FILES.items() if not ast.parse(path.read_text(encoding="utf-8")).body] == []
