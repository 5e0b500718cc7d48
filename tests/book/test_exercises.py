"""The exercises: every stub is found wanting, every solution passes, and no attempt at all breaks a check."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from book_helpers import PATHS, Cell, Chapter, called, import_names, names_in, read

from folovllm.book import exercises
from folovllm.book.exercises import Verdict, verdict
from folovllm.book.exercises.verdict import exercise
from folovllm.request import SequenceStatus

TRIPLES = [
    (chapter, *chapter.cells[stub.index : stub.index + 3])
    for chapter in map(read, PATHS)
    for stub in chapter.tagged("exercise")
]
"""Stub, check and solution of each exercise, with its chapter."""
IDS = [f"{chapter.name}-{called(check.last_expression())}" for chapter, _, check, _ in TRIPLES]


def verdict_of(chapter: Chapter, attempt: Cell, check: Cell) -> Verdict:
    """What the check says about an attempt, run with no more of the chapter than its imports."""
    names = names_in(attempt.source) | names_in(check.source)
    namespace = import_names(chapter.cells[: attempt.index + 1], names | {"exercises"})
    *definitions, call = [*attempt.tree.body, check.tree.body[-1]]
    exec(compile(ast.Module(definitions, []), str(attempt), "exec"), namespace)
    namespace.setdefault("exercises", exercises)
    return eval(compile(ast.Expression(call.value), str(check), "eval"), namespace)


def assert_one_sentence(message: str) -> None:
    assert message.strip() == message != "", "the message is empty, or has spaces around it"
    assert "\n" not in message, f"more than one line: {message!r}"
    assert "Traceback" not in message
    assert len(message) <= 300, f"too long for a phone ({len(message)} characters): {message}"
    assert not message.endswith((":", ": ")), f"it ends in the middle: {message!r}"
    assert not re.search(r"[\w)\]][.!?] [A-Z]", message), f"more than one sentence: {message!r}"


def test_there_are_exercises() -> None:
    assert len(TRIPLES) >= 2 * len([path for path in PATHS if read(path).has_exercises])


@pytest.mark.parametrize("chapter, stub, check, solution", TRIPLES, ids=IDS)
class TestExercise:
    def test_the_stub_is_found_wanting(self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell) -> None:
        verdict = verdict_of(chapter, stub, check)
        assert not verdict.passed, f"{stub} of {chapter.name} passes its check as it stands: nothing is left to do"
        assert_one_sentence(verdict.message)
        assert not verdict.message.startswith("your code raised"), f"{stub}: a stub should run, and give a wrong answer"

    def test_the_solution_passes(self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell) -> None:
        verdict = verdict_of(chapter, solution, check)
        assert verdict.passed, f"{solution} of {chapter.name} does not pass: {verdict.message}"
        assert_one_sentence(verdict.message)

    def test_the_page_shows_what_the_check_says(
        self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell
    ) -> None:
        for cell, begins in ((check, "Not yet: "), (solution, "Right: ")):
            says, shows = (
                repr(verdict_of(chapter, stub if cell is check else solution, check)),
                cell.stored("text/plain"),
            )
            again = f"run tests/book/refresh.py notebooks/{chapter.path.name}"
            assert says.startswith(begins)
            assert shows == says, f"{cell} of {chapter.name} does not show what its check says now: {again}"


# Each cell alone, as after a restart


def run_alone(*cells: Cell) -> dict[str, Any]:
    """What is defined when nothing but these cells was run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell.source, str(cell), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("chapter, stub, check, solution", TRIPLES, ids=IDS)
class TestAlone:
    def test_the_stub_and_its_check(self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell) -> None:
        namespace = run_alone(stub, check)
        verdict = eval(compile(ast.Expression(check.last_expression()), str(check), "eval"), namespace)
        assert "not defined" not in verdict.message, "the stub should import all that it and its solution need"

    def test_the_check_asks_for_the_cells_above(
        self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell
    ) -> None:
        name = check.last_expression().args[0].id
        with pytest.raises(NameError, match=f"name '{name}' is not defined"):
            run_alone(check)

    def test_the_solution(self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell) -> None:
        run_alone(solution)

    def test_the_stub_imports_what_the_solution_does(
        self, chapter: Chapter, stub: Cell, check: Cell, solution: Cell
    ) -> None:
        missing = imported(solution) - imported(stub) - {"exercises"}
        assert not missing, f"{solution} imports {missing}, and {stub} does not: a reader would have to guess them"


def imported(cell: Cell) -> set[str]:
    """The names that a cell imports."""
    return {
        alias.asname or alias.name
        for node in ast.walk(cell.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


CELLS_WITHOUT_NAMES = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
for cell in ("import folovllm.book", "no_such_name", "(lambda: other)()", "def f():\\n  x = x", "f()", "1 / 0"):
    shell.run_cell(cell)
"""


def test_a_name_that_is_missing_asks_for_the_cells_above() -> None:
    done = subprocess.run([sys.executable, "-c", CELLS_WITHOUT_NAMES], capture_output=True, text=True, check=True)
    assert "NameError: name 'no_such_name' is not defined: run the cells above first" in done.stdout
    assert "NameError: name 'other' is not defined: run the cells above first" in done.stdout
    assert "UnboundLocalError" in done.stdout and "ZeroDivisionError" in done.stdout
    assert done.stdout.count("run the cells above") == 2


def test_a_changed_sentence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = called(TRIPLES[0][2].last_expression())
    monkeypatch.setattr(exercises, name, lambda attempt: Verdict(False, "another sentence."))
    with pytest.raises(AssertionError, match=r"refresh\.py"):
        TestExercise().test_the_page_shows_what_the_check_says(*TRIPLES[0])


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    name: check for name, check in inspect.getmembers(exercises, inspect.isfunction) if name.startswith("check_")
}


def test_every_check_is_used_in_a_chapter() -> None:
    used = {name for _, _, check, _ in TRIPLES for name in re.findall(r"exercises\.(check_\w+)", check.source)}
    assert used == set(CHECKS), "a check without its exercise, or an exercise without its check"


# Attempts that cannot be right at any exercise


def raises(error: Exception) -> Callable[..., Any]:
    def attempt(*_: Any) -> Any:
        raise error

    return attempt


def not_one_argument() -> int:
    return 1


HOPELESS: dict[str, Any] = {
    "not written": None,
    "a number": 3,
    "a text": "def f(): pass",
    "a class": object,
    "no arguments": not_one_argument,
    "gives None": lambda *_: None,
    "gives a text": lambda *_: "x",
    "gives nan": lambda *_: math.nan,
    "gives -1": lambda *_: -1,
    "gives True": lambda *_: True,
    "gives an empty list": lambda *_: [],
    "gives a list of None": lambda *_: [None],
    "gives a deep list": lambda *_: [[[]]],
    "gives a dict": lambda *_: {},
    "gives a pair": lambda *_: (1, 2),
    "gives a tensor": lambda *_: torch.zeros(3),
    "gives an empty tensor": lambda *_: torch.zeros(0),
    "gives its first argument": lambda *args: args[0],
    "gives a generator": lambda *_: (i for i in ()),
    "raises an error": raises(ValueError("no")),
    "raises an error without a word": raises(NotImplementedError()),
    "raises an error of two lines": raises(RuntimeError("first line\nsecond line")),
    "raises an endless error": raises(RuntimeError("much too long " * 100)),
    "fails an assertion": raises(AssertionError()),
    "calls itself": lambda *args: HOPELESS["calls itself"](*args),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("how", HOPELESS)
def test_a_hopeless_attempt_gets_a_sentence(name: str, how: str) -> None:
    try:
        verdict = CHECKS[name](HOPELESS[how])
    except Exception as error:
        pytest.fail(f"{name} lets a {type(error).__name__} through instead of saying what is wrong", pytrace=False)
    assert not verdict.passed
    assert_one_sentence(verdict.message)


@pytest.mark.parametrize("name", sorted(set(CHECKS) - {"check_budget"}))
def test_a_forgotten_return_is_not_called_an_error_of_the_reader(name: str) -> None:
    message = CHECKS[name](lambda *_: None).message
    assert "raised" not in message, f"nothing was raised, None was given back: {message}"


def never_ends(*_: Any) -> Any:
    while True:
        pass


def interrupted() -> None:
    raise KeyboardInterrupt


@exercise("so it is.")
def check_calls(attempt: Callable[[], Any]) -> None:
    """Only calls the attempt."""
    attempt()


def test_an_attempt_that_never_ends_is_ended_and_shown_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "MAX_LINES", 1000)
    message = check_calls(never_ends).message
    assert "does not come to an end" in message and "in never_ends)" in message
    assert_one_sentence(message)


def test_a_reader_who_interrupts_a_check_is_obeyed() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_calls(interrupted)


class WithoutSelf:
    small = 16

    def __call__(self) -> int:
        return small  # type: ignore[name-defined]  # noqa: F821


def test_a_name_that_is_an_attribute_is_told_so() -> None:
    assert check_calls(WithoutSelf()).message.endswith("in __call__): write self.small.")


# Attempts that are nearly right


RUNNING, STOPPED, CAPPED = (
    SequenceStatus.RUNNING,
    SequenceStatus.FINISHED_STOPPED,
    SequenceStatus.FINISHED_LENGTH_CAPPED,
)


def finish(
    ends: Callable[[Any, int], bool] = lambda seq, eos: (
        seq.get_last_token_id() in {eos, *seq.sampling_params.stop_token_ids}
    ),
    early: Callable[[int, int], bool] = lambda length, least: length < least,
    late: Callable[[int, int], bool] = lambda length, most: length >= most,
    limit_first: bool = False,
) -> Callable[[Any, int], SequenceStatus]:
    """Says how a sequence stands; each part may be got wrong."""

    def attempt(seq: Any, eos: int) -> SequenceStatus:
        params, length = seq.sampling_params, seq.get_output_len()
        if limit_first and late(length, params.max_tokens):
            return CAPPED
        if not early(length, params.min_tokens) and ends(seq, eos):
            return STOPPED
        return CAPPED if late(length, params.max_tokens) else RUNNING

    return attempt


def stop_tokens_ignore_min_tokens(seq: Any, eos: int) -> SequenceStatus:
    if seq.get_last_token_id() in seq.sampling_params.stop_token_ids:
        return STOPPED
    return finish()(seq, eos)


def blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def forks(shared: Callable[[int, int, int], int]) -> Callable[[int, int, int, int], int]:
    """Blocks of n forks of which ``shared(prompt_len, output_len, block_size)`` are counted once."""

    def attempt(prompt_len: int, output_len: int, block_size: int, n: int) -> int:
        once = shared(prompt_len, output_len, block_size)
        return once + n * (blocks(prompt_len + output_len, block_size) - once)

    return attempt


def prompt_and_outputs_apart(prompt_len: int, output_len: int, block_size: int, n: int) -> int:
    if output_len == 0:
        return blocks(prompt_len, block_size)
    return prompt_len // block_size + n * blocks(output_len, block_size)


def header_of(path: str, order: str = "little", skip: int = 0, num_bytes: int = 8) -> dict[str, Any]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8)[:num_bytes], order)
        file.read(skip)
        return json.loads(file.read(length))


def tensors_of(path: str, num_bytes: int = 8) -> list[dict[str, Any]]:
    return [entry for name, entry in header_of(path, num_bytes=num_bytes).items() if name != "__metadata__"]


def pad(left: bool = True, mask: Callable = lambda row, gap: [0] * gap + [1] * (len(row) - gap), pad_with: Any = None):
    """Pads prompts; each part may be got wrong."""

    def attempt(prompts: list[list[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        filler = [pad_id if pad_with is None else pad_with]
        rows = [filler * gap + prompt if left else prompt + filler * gap for gap, prompt in zip(gaps, prompts)]
        return rows, [mask(row, gap) for row, gap in zip(rows, gaps)]

    return attempt


def pad_in_place(prompts: list[list[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    rows, mask = pad()(prompts, pad_id)
    for prompt, row in zip(prompts, rows):
        prompt[:] = row
    return rows, mask


def generate(
    feed: Callable[[list[int], list[int]], list[int]],
    keep: bool = True,
    give: Callable = lambda prompt, output: output,
    choose: Callable[[torch.Tensor], Any] = torch.argmax,
) -> Callable[[Any, list[int], int], Any]:
    """Generates with ``choose``; after the first pass the model is fed ``feed(prompt, output)``."""

    def attempt(model: Any, prompt: list[int], max_tokens: int) -> Any:
        output: list[int] = []
        cache, unread = None, prompt
        for _ in range(max_tokens):
            result = model(torch.tensor([unread]), past_key_values=cache)
            output.append(int(choose(result.logits[0, -1])))
            unread, cache = feed(prompt, output), result.past_key_values if keep else None
        return give(prompt, output)

    return attempt


def newest(prompt: list[int], output: list[int]) -> list[int]:
    return output[-1:]


def read_token_by_token(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    cache, output = None, []
    for i in range(len(prompt) + max_tokens - 1):
        result = model(torch.tensor([[(prompt + output)[i]]]), past_key_values=cache)
        cache = result.past_key_values
        if i >= len(prompt) - 1:
            output.append(int(result.logits[0, -1].argmax()))
    return output


def one_pass_too_many(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    return generate(newest)(model, prompt, max_tokens + 1)[:-1]


def append_to_the_prompt(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    output = generate(newest)(model, prompt, max_tokens)
    prompt += output
    return output


WRONG: dict[str, dict[str, Any]] = {
    "check_finish_status": {
        "end token only": finish(ends=lambda seq, eos: seq.get_last_token_id() == eos),
        "stop tokens only": finish(ends=lambda seq, eos: seq.get_last_token_id() in seq.sampling_params.stop_token_ids),
        "an end anywhere in the text": finish(
            ends=lambda seq, eos: bool({eos, *seq.sampling_params.stop_token_ids} & set(seq.get_token_ids()))
        ),
        "an end anywhere in the output": finish(
            ends=lambda seq, eos: bool({eos, *seq.sampling_params.stop_token_ids} & set(seq.data.output_token_ids))
        ),
        "no limit": finish(late=lambda length, most: False),
        "one token more": finish(late=lambda length, most: length > most),
        "one token less": finish(late=lambda length, most: length >= most - 1),
        "limit first": finish(limit_first=True),
        "no min_tokens": finish(early=lambda length, least: False),
        "min_tokens one more": finish(early=lambda length, least: length <= least),
        "min_tokens one less": finish(early=lambda length, least: length < least - 1),
        "min_tokens for the end token alone": stop_tokens_ignore_min_tokens,
        "length with the prompt": lambda seq, eos: CAPPED if seq.get_len() >= 4 else finish()(seq, eos),
        "the first stop token only": finish(
            ends=lambda seq, eos: seq.get_last_token_id() in {eos, *seq.sampling_params.stop_token_ids[:1]}
        ),
        "a limit of 4": finish(late=lambda length, most: length >= 4),
        "stops at 7": finish(ends=lambda seq, eos: seq.get_last_token_id() in {eos, 7}),
        "ends at 2": finish(ends=lambda seq, eos: seq.get_last_token_id() in {2, *seq.sampling_params.stop_token_ids}),
        "as a text": lambda seq, eos: finish()(seq, eos).value,
    },
    "check_blocks_of_forks": {
        "nothing shared": forks(lambda prompt, output, size: 0),
        "half a block shared": forks(lambda prompt, output, size: blocks(prompt, size)),
        "nobody writes": forks(lambda prompt, output, size: prompt // size),
        "all shared": lambda prompt, output, size, n: blocks(prompt + output, size),
        "prompt and outputs apart": prompt_and_outputs_apart,
        "one sequence": lambda prompt, output, size, n: blocks(prompt + n * output, size),
        "one more when nobody writes": lambda prompt, output, size, n: (
            forks(lambda prompt, output, size: prompt // size)(prompt, output, size, n)
            if output
            else prompt // size + 1
        ),
        "blocks of 16": lambda prompt, output, size, n: (
            forks(lambda prompt, output, size: prompt // size)(prompt, output, 16, n) if output else blocks(prompt, 16)
        ),
    },
    "check_count_weights": {
        "the file's size": lambda path: Path(path).stat().st_size // 4,
        "all entries": lambda path: sum(math.prod(entry["shape"]) for entry in header_of(path).values()),
        "adds the dimensions": lambda path: sum(sum(entry["shape"]) for entry in tensors_of(path)),
        "bytes": lambda path: sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors_of(path)),
        "four bytes each": lambda path: max(entry["data_offsets"][1] for entry in tensors_of(path)) // 4,
        "tensors": lambda path: len(tensors_of(path)),
        "no single numbers": lambda path: sum(math.prod(e["shape"]) if e["shape"] else 0 for e in tensors_of(path)),
        "big end first": lambda path: len(header_of(path, "big")),
        "too far in": lambda path: len(header_of(path, skip=8)),
        "the first tensor": lambda path: math.prod(tensors_of(path)[0]["shape"]),
        "one byte of the length": lambda path: sum(math.prod(e["shape"]) for e in tensors_of(path, num_bytes=1)),
        "two bytes of the length": lambda path: sum(math.prod(e["shape"]) for e in tensors_of(path, num_bytes=2)),
    },
    "check_kv_bytes": {
        "keys only": lambda layers, heads, kv_heads, dim, size: layers * kv_heads * dim * size,
        "query heads": lambda layers, heads, kv_heads, dim, size: 2 * layers * heads * dim * size,
        "keys only, query heads": lambda layers, heads, kv_heads, dim, size: layers * heads * dim * size,
        "three vectors": lambda layers, heads, kv_heads, dim, size: 3 * layers * kv_heads * dim * size,
        "one layer": lambda layers, heads, kv_heads, dim, size: 2 * kv_heads * dim * size,
        "bits": lambda layers, heads, kv_heads, dim, size: 2 * layers * kv_heads * dim * size * 8,
        "numbers, no bytes": lambda layers, heads, kv_heads, dim, size: 2 * layers * kv_heads * dim,
        "two bytes always": lambda layers, heads, kv_heads, dim, size: 4 * layers * kv_heads * dim,
        "queries as well": lambda layers, heads, kv_heads, dim, size: layers * (heads + 2 * kv_heads) * dim * size,
    },
    "check_pad_batch": {
        "on the right": pad(left=False, mask=lambda row, gap: [1] * (len(row) - gap) + [0] * gap),
        "no mask": pad(mask=lambda row, gap: [1] * len(row)),
        "mask the other way round": pad(mask=lambda row, gap: [1] * gap + [0] * (len(row) - gap)),
        "mask from the pad token": pad(mask=lambda row, gap: [int(token != 0) for token in row]),
        "one too long": lambda prompts, pad_id: pad()([*prompts, [9] * 4], pad_id),
        "cut to the shortest": lambda prompts, pad_id: pad()([p[-1:] for p in prompts], pad_id),
        "another pad token": pad(pad_with=0),
        "rows only": lambda prompts, pad_id: pad()(prompts, pad_id)[0],
        "as they were": lambda prompts, pad_id: (prompts, [[1] * len(p) for p in prompts]),
        "two rows only": lambda prompts, pad_id: pad()(prompts[:2], pad_id),
        "changes what it was given": pad_in_place,
    },
    "check_tokens_computed": {
        "counts the last token": lambda prompt, output, cached: (
            prompt + output if cached else sum(prompt + i + 1 for i in range(output))
        ),
        "output only": lambda prompt, output, cached: output,
        "without a cache always": lambda prompt, output, cached: sum(prompt + i for i in range(output)),
        "with a cache always": lambda prompt, output, cached: prompt + output - 1,
        "whole length each time": lambda prompt, output, cached: (
            prompt + output - 1 if cached else output * (prompt + output)
        ),
        "one pass less": lambda prompt, output, cached: (
            prompt + output - 1 if cached else sum(prompt + i for i in range(output - 1))
        ),
        "the other way round": lambda prompt, output, cached: (
            sum(prompt + i for i in range(output)) if cached else prompt + output - 1
        ),
    },
    "check_generate": {
        "no cache": generate(lambda prompt, output: prompt + output, keep=False),
        "cache not handed on": generate(newest, keep=False),
        "feeds everything to the cache": generate(lambda prompt, output: prompt + output),
        "feeds two tokens": generate(lambda prompt, output: (prompt + output)[-2:]),
        "feeds the prompt again": generate(lambda prompt, output: prompt),
        "prompt and output": generate(newest, give=lambda prompt, output: prompt + output),
        "one token less": generate(newest, give=lambda prompt, output: output[:-1]),
        "one token more": lambda model, prompt, n: generate(newest)(model, prompt, n + 1),
        "the last token only": generate(newest, give=lambda prompt, output: output[-1]),
        "samples": generate(newest, choose=lambda logits: torch.multinomial(logits.softmax(0), 1)),
        "the unlikeliest": generate(newest, choose=torch.argmin),
        "token by token": read_token_by_token,
        "one pass too many": one_pass_too_many,
        "appends to the prompt": append_to_the_prompt,
        "calls generate": lambda model, prompt, n: model.generate(torch.tensor([prompt]), max_new_tokens=n),
    },
}
"""For each check attempts that somebody might make, none of them right."""

RIGHT: dict[str, dict[str, Any]] = {
    "check_finish_status": {"any order": finish()},
    "check_blocks_of_forks": {
        "in one line": lambda prompt, output, size, n: (
            blocks(prompt, size)
            if not output
            else forks(lambda prompt, output, size: prompt // size)(prompt, output, size, n)
        )
    },
    "check_pad_batch": {
        "tensors": lambda prompts, pad_id: tuple(torch.tensor(part) for part in pad()(prompts, pad_id)),
        "tuples": lambda prompts, pad_id: tuple(tuple(map(tuple, part)) for part in pad()(prompts, pad_id)),
    },
    "check_tokens_computed": {"a formula": lambda p, n, cached: p + n - 1 if cached else p * n + n * (n - 1) // 2},
    "check_generate": {
        "tensors": generate(newest, give=lambda prompt, output: torch.tensor(output)),
    },
}
"""Attempts that are right, and not written as the solution is."""


SAYS: dict[str, dict[str, str]] = {
    "check_kv_bytes": {"three vectors": "a query is used once", "one layer": "that is one layer"},
    "check_finish_status": {
        "one token more": "FINISHED_LENGTH_CAPPED is expected",
        "end token only": "stop_token_ids [7], min_tokens 0, max_tokens 4: FINISHED_STOPPED is expected",
        "limit first": "yours gives FINISHED_LENGTH_CAPPED",
    },
}
"""What is wrong with some of these attempts, in words that the sentence must have."""

LATER = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("attempts_*.py"))]
"""A file for each later subject, with ``WRONG`` and ``RIGHT`` as here, and perhaps ``SAYS``."""
for module in LATER:
    for known, more in ((WRONG, module.WRONG), (RIGHT, module.RIGHT), (SAYS, getattr(module, "SAYS", {}))):
        for name, ways in more.items():
            known[name] = known.get(name, {}) | ways


@pytest.mark.parametrize("name, how", [(name, how) for name, ways in WRONG.items() for how in ways])
def test_a_wrong_attempt_gets_a_sentence_about_what_is_wrong(name: str, how: str) -> None:
    verdict = CHECKS[name](WRONG[name][how])
    assert not verdict.passed, f"{name} takes this for right: {how}"
    assert_one_sentence(verdict.message)
    assert SAYS.get(name, {}).get(how, "") in verdict.message


@pytest.mark.parametrize("name, how", [(name, how) for name, ways in RIGHT.items() for how in ways])
def test_a_right_attempt_passes_however_it_is_written(name: str, how: str) -> None:
    verdict = CHECKS[name](RIGHT[name][how])
    assert verdict.passed, f"{name} does not take this: {how} ({verdict.message})"


def test_wrong_attempts_are_known_for_every_check() -> None:
    assert set(WRONG) == set(CHECKS), "add some wrong attempts for each new check"


def test_what_a_sentence_says_is_known_of_attempts_that_there_are() -> None:
    assert {(name, how) for name, said in SAYS.items() for how in said} <= {(n, how) for n in WRONG for how in WRONG[n]}


def test_a_loop_without_end_is_ended() -> None:
    traced = sys.gettrace()
    for name in ("check_top_p", "check_draw"):
        assert "does not come to an end" in CHECKS[name](never_ends).message
    round_and_round = type(
        "RoundAndRound", (WRONG["check_whole_characters"]["shows halves"],), {"text": property(never_ends)}
    )
    assert "does not come to an end" in CHECKS["check_whole_characters"](round_and_round).message
    assert sys.gettrace() is traced, "the trace function was not put back"


def test_a_verdict_reads_as_a_sentence() -> None:
    assert repr(Verdict(True, "so it is.")) == "Right: so it is."
    assert repr(Verdict(False, "no.")) == "Not yet: no."
