"""What the tests of the book share: the notebooks as data, and the code in their cells as Python."""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import signal
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))

MODULES = {
    "01_configs": ("folovllm.config",),
    "02_sampling": ("folovllm.sampling_params", "folovllm.sample.sampler"),
    "03_requests_and_sequences": ("folovllm.request", "folovllm.outputs"),
    "04_loading": ("folovllm.model_loader", "folovllm.model.checkpoint", "folovllm.utils.common"),
    "06_inside_a_pass": ("folovllm.model.decoder",),
    "07_how_long_is_a_step": ("folovllm.simulator.cost", "folovllm.simulator.presets", "folovllm.model.layers"),
    "08_the_engine": (
        "folovllm.llm",
        "folovllm.engine.llm_engine",
        "folovllm.engine.output_processor",
        "folovllm.engine.detokenizer",
        "folovllm.core.scheduler",
    ),
    "09_continuous_batching": ("folovllm.core.scheduler",),
    "10_paged_cache": ("folovllm.core.kv_cache", "folovllm.worker.model_runner"),
    "11_out_of_memory": ("folovllm.core.scheduler", "folovllm.core.kv_cache"),
    "12_chunked_prefill": ("folovllm.core.scheduler",),
    "13_prefix_caching": ("folovllm.core.kv_cache",),
    "14_attention_backends": (
        "folovllm.attention",
        "folovllm.attention.sdpa",
        "folovllm.attention.triton",
        "folovllm.worker.step_graph",
    ),
    "15_fewer_bits": ("folovllm.model.gptq", "folovllm.model.packing", "folovllm.model.quantized_files"),
    "16_guess_and_check": ("folovllm.sample.speculative", "folovllm.core.guesses", "folovllm.worker.draft_model"),
    "17_searching": ("folovllm.engine.beam_search",),
    "18_only_what_fits": ("folovllm.sample.structured_output",),
}
"""The modules that a chapter is about: it links their pages and sources, and lists all of their public code."""


@dataclass
class Cell:
    """One cell of a notebook."""

    index: int
    data: dict[str, Any]

    @property
    def is_code(self) -> bool:
        return self.data["cell_type"] == "code"

    @property
    def source(self) -> str:
        return joined(self.data["source"])

    @property
    def metadata(self) -> dict[str, Any]:
        return self.data["metadata"]

    @property
    def tags(self) -> list[str]:
        return self.metadata.get("tags", [])

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return self.data.get("outputs", [])

    @property
    def was_run(self) -> bool:
        return self.data["execution_count"] is not None

    @property
    def tree(self) -> ast.Module:
        """The code as Python's parser sees it; empty where it is none, which a rule of its own reports."""
        try:
            return ast.parse(self.source)
        except SyntaxError:
            return ast.Module([], [])

    def __str__(self) -> str:
        return f"cell {self.index} ({self.data.get('id')})"

    def images(self) -> list[str]:
        """The PNGs among the outputs, in base64."""
        return [joined(o["data"]["image/png"]) for o in self.outputs if "image/png" in o.get("data", {})]

    def stored(self, mime: str) -> str | None:
        """What the cell's last line gave, in one format."""
        for output in self.outputs:
            if output["output_type"] == "execute_result" and mime in output["data"]:
                return joined(output["data"][mime])
        return None

    def last_expression(self) -> ast.expr | None:
        """What a notebook would show of this cell: its last statement, if that is an expression."""
        body = self.tree.body
        return body[-1].value if body and isinstance(body[-1], ast.Expr) else None


@dataclass
class Chapter:
    """A notebook, and where the pages that it links to are."""

    path: Path
    data: dict[str, Any]
    root: Path = ROOT
    modules: tuple[str, ...] = ()
    next_name: str | None = None
    """File name of the chapter after this one."""
    cells: list[Cell] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = [Cell(i, cell) for i, cell in enumerate(self.data["cells"])]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> int:
        return int(self.name.split("_")[0])

    @property
    def has_exercises(self) -> bool:
        """Whether it is a chapter as all are; the first look at an engine has nothing to build, list or compare."""
        return self.number > 0

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_code]

    @property
    def prose(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.data["cell_type"] == "markdown"]

    @property
    def text(self) -> str:
        """All the prose, without the code between."""
        return "\n\n".join(cell.source for cell in self.prose)

    def tagged(self, tag: str) -> list[Cell]:
        return [cell for cell in self.cells if tag in cell.tags]


@functools.cache
def read(path: Path) -> Chapter:
    """The chapter in a file, as it is stored."""
    later = [other.name for other in PATHS if other.name > path.name]
    data = json.loads(path.read_text(encoding="utf-8"))
    return Chapter(path, data, modules=MODULES.get(path.stem, ()), next_name=later[0] if later else None)


@functools.cache
def text_of(name: str) -> str:
    """A chapter's prose and captions, in one line."""
    chapter = read(NOTEBOOKS / f"{name}.ipynb")
    captions = [cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") for cell in chapter.code]
    return re.sub(r"\s+", " ", f"{chapter.text} {' '.join(captions)}")


def assert_says(name: str, sentence: str) -> None:
    """A sentence whose number a test computes stands in a chapter."""
    assert sentence in text_of(name), f"{name} does not say {sentence!r} any more: mend it here or there"


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """For whoever runs a notebook: nbclient leaves Python's own handlers, whatever there was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def joined(text: str | list[str]) -> str:
    """A notebook's text, which may be stored as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def ends_with_semicolon(source: str) -> bool:
    """Whether the value of the last line is kept back, as a notebook does it for a trailing semicolon."""
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    return bool(tokens) and tokens[-1].string == ";"


def calls_that_run(tree: ast.AST, branches: bool = True) -> Iterator[str]:
    """Names of the functions that a cell calls when it is run, those inside of its own functions left out.

    Args:
        branches: whether calls in an ``if`` or ``else`` count, too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.Call):
            yield called(node)
        if isinstance(node, ast.If) and not branches:
            continue
        yield from calls_that_run(node, branches)


def called(expression: ast.expr | None) -> str:
    """The last part of the name of the function whose value an expression is; "" for any other expression."""
    function = getattr(expression, "func", None)
    return getattr(function, "attr", None) or getattr(function, "id", "")


def names_in(source: str) -> set[str]:
    """Every name that some code uses."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def import_names(cells: Iterable[Cell], names: set[str]) -> dict[str, Any]:
    """A namespace with those of ``names`` that the cells import, made by the cells' own import statements."""
    namespace: dict[str, Any] = {}
    for cell in cells:
        for statement in cell.tree.body if cell.is_code else []:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            bound = [a for a in statement.names if (a.asname or a.name.split(".")[0]) in names]
            for alias in bound:
                only = (
                    ast.Import([alias])
                    if isinstance(statement, ast.Import)
                    else ast.ImportFrom(statement.module, [alias], statement.level)
                )
                module = ast.fix_missing_locations(ast.Module([only], []))
                exec(compile(module, str(cell), "exec"), namespace)
    return namespace


def slug(heading: str) -> str:
    """The anchor of a heading, as Sphinx and GitHub make it."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return re.sub(r"\s", "-", words)


def words(markdown: str) -> int:
    """Words that a reader reads: no HTML tags, no addresses of links, no code blocks."""
    text = re.sub(r"```.*?```", " ", markdown, flags=re.DOTALL)
    text = re.sub(r"</?[a-zA-Z][^>]*>", " ", text)
    text = re.sub(r"\]\([^)]*\)", "] ", text)
    return len(re.findall(r"\w+(?:['’.-]\w+)*", text))
