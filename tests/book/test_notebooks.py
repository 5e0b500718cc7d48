"""What nbval cannot see in the notebooks, and the shape that every chapter has.

A rule takes a chapter and yields a sentence for each place that breaks it. Every rule is tried on every notebook, and
on a small good chapter that is spoilt in one place after another (`SPOILT`), so that each is known to bite.
"""

from __future__ import annotations

import ast
import base64
import copy
import io
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dark_pictures
import nbformat
import pytest
import yaml
from book_helpers import (
    MODULES,
    NOTEBOOKS,
    PATHS,
    ROOT,
    Cell,
    Chapter,
    called,
    calls_that_run,
    ends_with_semicolon,
    joined,
    names_in,
    read,
    slug,
    words,
)
from PIL import Image

VLLM = "0.33.0"
"""The version of vLLM that the boxes "How vLLM does it" are about."""

TAGS = {
    "raises-exception",
    "nbval-ignore-output",
    "listing",
    "exercise",
    "check",
    "solution",
    "hide-cell",
    "hide-output",
}
"""The tags that mean something; another one is a slip, and would silently mean nothing."""

RULES: dict[str, Callable[[Chapter], Iterator[str]]] = {}


def rule(check: Callable[[Chapter], Iterator[str]]) -> Callable[[Chapter], Iterator[str]]:
    """Adds a rule to those that every notebook is tried on."""
    RULES[check.__name__.replace("_", " ")] = check
    return check


# What is stored


@rule
def the_file_is_neutral(chapter: Chapter) -> Iterator[str]:
    """No trace of the machine or the editor that wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nbformat.warnings.DuplicateCellId)  # found below
        try:
            nbformat.validate(nbformat.from_dict(chapter.data))
        except nbformat.ValidationError as error:
            yield f"not a valid notebook: {error.message}"
    wanted = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if chapter.data["metadata"] != wanted:
        yield f"its metadata should be {wanted}, not {chapter.data['metadata']}: run tests/book/refresh.py"
    ids = [cell.data.get("id") for cell in chapter.cells]
    for cell in chapter.cells:
        if ids.count(cell.data.get("id")) > 1:
            yield f"{cell} shares its id with another cell: give it one of its own"
        for key in set(cell.metadata) - {"tags", "mystnb", "jupyter"}:
            yield f"{cell} has metadata {key!r}, which an editor left behind: remove it"
        for tag in set(cell.tags) - TAGS:
            yield f"{cell} has the tag {tag!r}, which means nothing here; known are {', '.join(sorted(TAGS))}"


@rule
def every_cell_was_run_in_order(chapter: Chapter) -> Iterator[str]:
    """As a reader gets it who restarts the kernel and runs everything."""
    for place, cell in enumerate(chapter.code, 1):
        count = cell.data["execution_count"]
        if count != place:
            was = "was not run" if count is None else f"was run as number {count} instead of {place}"
            yield f"{cell} {was}: run tests/book/refresh.py notebooks/{chapter.path.name}"
        for output in cell.outputs:
            if output.get("execution_count", count) != count:
                yield f"{cell} has the output of another run: run tests/book/refresh.py"


@rule
def cells_are_plain_python(chapter: Chapter) -> Iterator[str]:
    """Magics and shell lines work in a notebook only, and these tests could not read them."""
    for cell in chapter.code:
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"{cell} is not plain Python in line {error.lineno}: write it without magics and shell commands"


GIVE_NOTHING = {"append", "clear", "extend", "insert", "remove", "reverse", "sort", "update", "print"}
"""Functions that give None: a cell that ends with a call of one shows no value."""


def is_plot(function: str) -> bool:
    return function.startswith("plot_")


@rule
def outputs_are_there(chapter: Chapter) -> Iterator[str]:
    """nbval passes a cell that was stripped of its outputs."""
    for cell in chapter.code:
        again = f"run tests/book/refresh.py notebooks/{chapter.path.name}"
        kinds = {output["output_type"] for output in cell.outputs}
        streams = {output["name"] for output in cell.outputs if output["output_type"] == "stream"}
        if "raises-exception" in cell.tags or not cell.was_run:
            continue  # other rules look at these
        last = cell.last_expression()
        function = called(last)
        if last is not None and not ends_with_semicolon(cell.source) and function not in GIVE_NOTHING and not kinds:
            yield f"{cell} ends with an expression and shows nothing: {again}, or end the line with a semicolon"
        if "print" in calls_that_run(cell.tree, branches=False) and "stdout" not in streams:
            yield f"{cell} prints, and nothing printed is stored: {again}"
        num_plots = sum(is_plot(name) for name in calls_that_run(cell.tree, branches=False))
        if len(cell.images()) < num_plots:
            yield f"{cell} plots, and no image is stored: {again}"
        if num_plots and "Axes" in (cell.stored("text/plain") or ""):
            yield f"{cell} shows the Axes of its plot as text: end the line with a semicolon"


@rule
def nothing_on_stderr(chapter: Chapter) -> Iterator[str]:
    """A warning on the page is a question that the page does not answer."""
    for cell in chapter.code:
        for output in cell.outputs:
            if output.get("name") == "stderr":
                yield f"{cell} warns ({joined(output['text']).strip()[:80]!r}): remove the cause"


@rule
def errors_are_expected_ones(chapter: Chapter) -> Iterator[str]:
    """Jupyter Book publishes a traceback that nobody wanted without a word."""
    for cell in chapter.code:
        errors = [output for output in cell.outputs if output["output_type"] == "error"]
        if errors and "raises-exception" not in cell.tags:
            yield f"{cell} holds a {errors[0]['ename']}: mend it, or tag it raises-exception if it is the lesson"
        if "raises-exception" in cell.tags and cell.was_run and not errors:
            yield f"{cell} is tagged raises-exception and holds no error: run it again, or remove the tag"
        for error in errors:
            end = plain("\n".join(error["traceback"])).rstrip()
            if not end.endswith(f"{error['ename']}: {error['evalue']}".rstrip()):
                yield f"{cell} has a traceback that does not end with its error: run tests/book/refresh.py"


def plain(text: str) -> str:
    """Text without the codes that colour it in a terminal."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def texts_of(cell: Cell) -> Iterator[str]:
    """Every text among the outputs, those of tracebacks without their colours."""
    for output in cell.outputs:
        yield joined(output.get("text", ""))
        yield plain("\n".join(output.get("traceback", [])))
        yield output.get("evalue", "")
        for mime, data in output.get("data", {}).items():
            if not mime.startswith("image/") or mime == "image/svg+xml":
                yield data if isinstance(data, str) else str(data) if isinstance(data, dict) else joined(data)


MACHINE_PATH = re.compile(
    r"(?<![\w/.~-])/(?:home|root|tmp|work|Users|opt|usr|var|mnt|private)\b[^\s'\",;:)]*"
    r"|site-packages|dist-packages|file://|\b[A-Z]:\\\\?(?=\w)|ipykernel_\d+|~/\S+"
)


@rule
def no_path_of_a_machine(chapter: Chapter) -> Iterator[str]:
    """A reader's machine has other folders, and nbval does not look at tracebacks."""
    for cell in chapter.cells:
        for where, texts in (("source", [cell.source]), ("output", texts_of(cell))):
            found = sorted({match.group() for text in texts for match in MACHINE_PATH.finditer(text)})
            if found:
                yield f"{cell} names {', '.join(found)} in its {where}: show a path from the repository's root, or none"


@rule
def no_memory_address(chapter: Chapter) -> Iterator[str]:
    """An address is another one in every run."""
    for cell in chapter.code:
        for text in texts_of(cell):
            if match := re.search(r"\b0x[0-9a-fA-F]{5,}", text):
                yield f"{cell} shows the address {match.group()}: show what the object is, not where"


@rule
def no_terminal_codes(chapter: Chapter) -> Iterator[str]:
    """Colours and progress bars are for a terminal; only a traceback may be coloured."""
    for cell in chapter.code:
        for output in cell.outputs:
            text = joined(output.get("text", "")) + str(output.get("data", ""))
            if re.search(r"\x1b|\\x1b|[\r\b]|\\r|\u2588", text.replace("\r\n", "\n")):
                yield f"{cell} stores terminal codes or a progress bar: print plain text, switch the bar off"


def is_player(cell: Cell, html: str) -> bool:
    """Whether an output is one of the book's players, which tests/book/test_players.py looks at."""
    return called(cell.last_expression()).startswith("play_") and html.startswith('<div class="folo-player"')


@rule
def no_widgets_and_no_scripts(chapter: Chapter) -> Iterator[str]:
    """A stored widget makes the page ask another host for require.js; of scripts only the players' own are known."""
    for cell in chapter.code:
        for output in cell.outputs:
            mimes = set(output.get("data", {}))
            known = {"text/plain", "text/markdown", "text/html", "image/png"}
            for mime in sorted(mimes - known):
                yield f"{cell} stores {mime}: show it as one of {', '.join(sorted(known))}"
            if mimes and "text/plain" not in mimes:
                yield f"{cell} stores no text/plain beside {', '.join(mimes)}, so nbval has nothing to compare"
            html = joined(output.get("data", {}).get("text/html", ""))
            if "<script" in html and not is_player(cell, html):
                yield f"{cell} stores a script: show it without"


WIDTH = 832
"""Pixels across a figure: 6.4 inches of 130."""


@rule
def images_can_be_seen(chapter: Chapter) -> Iterator[str]:
    """nbval does not look at images at all."""
    for cell in chapter.code:
        for stored in cell.images():
            try:
                with Image.open(io.BytesIO(base64.b64decode(stored, validate=True))) as image:
                    size, pixels = image.size, image.convert("RGB").resize((200, 100)).getcolors(20_000)
            except Exception as error:
                yield f"{cell} stores an image that cannot be read ({error}): run tests/book/refresh.py"
                continue
            if max(count for count, _ in pixels) > 0.995 * 20_000:
                yield f"{cell} stores a blank image: plot something, or show it before it is cleared"
            if abs(size[0] - WIDTH) > 0.1 * WIDTH:
                yield (
                    f"{cell} stores an image that is {size[0]} pixels wide where a figure has {WIDTH}: it is not one "
                    "of the book's figures, or something in it stands outside of the frame"
                )


REASON = re.compile(r"^# not compared: (.+)", re.MULTILINE)


@rule
def nine_cells_in_ten_are_compared(chapter: Chapter) -> Iterator[str]:
    """And each of the others says why it isn't."""
    exempt = chapter.tagged("nbval-ignore-output")
    if len(exempt) > 0.1 * len(chapter.code):
        yield f"{len(exempt)} of {len(chapter.code)} code cells are not compared, more than one in ten"
    for cell in chapter.code:
        reason = REASON.search(cell.source)
        if cell in exempt and (reason is None or words(reason.group(1)) < 3):
            yield f"{cell} is not compared and does not say why: begin it with a comment '# not compared: …'"
        if cell not in exempt and reason:
            yield f"{cell} says that it is not compared, but it is: remove the comment, or tag it nbval-ignore-output"
        if re.search(r"^\s*#\s*(?:NBVAL_|PYTEST_VALIDATE)", cell.source, re.MULTILINE):
            yield f"{cell} steers nbval by a comment: use a tag, these tests read tags only"


# The shape of a chapter


def heading_line(title: str) -> re.Pattern[str]:
    return re.compile(rf"^## {re.escape(title)}\s*$", re.MULTILINE)


GOALS, WHERE, TURN, INTERVIEW, DONE = (
    heading_line(title)
    for title in ("You will learn to", "Where are we?", "Your turn", "In an interview", "What you can do now")
)


def box(name: str, text: str) -> str | None:
    """What stands in a ``<div class="…">`` of the prose."""
    found = re.search(rf'<div class="{name}">\n\n(.*?)\n\n</div>', text, re.DOTALL)
    return found.group(1) if found else None


def section(heading: re.Pattern[str], text: str) -> str:
    """The prose from a heading to the next one of its level."""
    found = heading.search(text)
    return re.split(r"^## ", text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0] if found else ""


def linear(chapter: Chapter) -> str:
    """The whole chapter as one text, in which a plot and a listing are a line of their own."""
    parts = []
    for cell in chapter.cells:
        if not cell.is_code:
            parts.append(cell.source)
        elif "listing" in cell.tags:
            parts.append("@listing@")
        elif any(is_plot(name) for name in calls_that_run(cell.tree)):
            parts.append("@plot@")
    return "\n\n".join(parts)


@rule
def nine_parts_in_order(chapter: Chapter) -> Iterator[str]:
    """Title and strip, goals, the whole, sections, listings, vLLM, your turn, interview, what you can do now."""
    text = linear(chapter)
    parts = {
        "a title '# N. …' in the first line": re.compile(rf"\A# {chapter.number}\. \S"),
        'a strip (<div class="strip">)': re.compile(r'^<div class="strip">$', re.MULTILINE),
        "'## You will learn to'": GOALS,
        "'## Where are we?'": WHERE,
        "a picture of the whole": re.compile("@plot@"),
        "a listing": re.compile("@listing@"),
        'a box (<div class="vllm">)': re.compile(r'^<div class="vllm">$', re.MULTILINE),
        "'## Your turn'": TURN,
        "'## In an interview'": INTERVIEW,
        "'## What you can do now'": DONE,
        '<div class="next">': re.compile(r'^<div class="next">$', re.MULTILINE),
    }
    if not chapter.has_exercises:
        for name in ("a listing", 'a box (<div class="vllm">)', "'## Your turn'", "'## In an interview'"):
            del parts[name]
    found = {name: pattern.search(text) for name, pattern in parts.items()}
    for name, match in found.items():
        if match is None:
            yield f"it lacks {name}; the parts of a chapter are, in this order: {', '.join(parts)}"
    places = [match.start() for match in found.values() if match]
    for (name, match), before in zip([(n, m) for n, m in found.items() if m][1:], places):
        if match.start() < before:
            yield f"{name} comes too early: the parts are {', '.join(parts)}"
    before_detail = text.find("\n## ", text.find("## Where are we?") + 1)
    if "@plot@" not in text[:before_detail]:
        yield "there is no picture of the whole under '## Where are we?': plot_path(…) draws it"


@rule
def sections_ask_questions(chapter: Chapter) -> Iterator[str]:
    """At least three sections between the picture of the whole and the exercises, each with a short heading."""
    text = chapter.text
    start, end = WHERE.search(text), (TURN if chapter.has_exercises else DONE).search(text)
    headings = re.findall(r"^## (.+)$", text[start.end() : end.start()] if start and end else "", re.MULTILINE)
    if len(headings) < 3:
        yield f"it has {len(headings)} sections between '## Where are we?' and the exercises: a chapter has at least 3"
    for heading in headings:
        if len(heading) > 60:
            yield f"the heading {heading!r} is too long to be a question that a beginner asks"


@rule
def the_strip_tells_what_it_takes(chapter: Chapter) -> Iterator[str]:
    """Milestone, modules with page and source, run time and memory."""
    strip = box("strip", chapter.text) or ""
    if "**Milestone" not in strip:
        yield "its strip names no milestone"
    pages, sources = re.findall(r"\.\./book/api/(\w+)\.md", strip), re.findall(r"\.\./(folovllm/[\w/]+)\.py", strip)
    sources = [source.removesuffix("/__init__") for source in sources]
    if not pages or not sources:
        yield f"its strip links {len(pages)} module pages and {len(sources)} sources: at least one of each"
    for module in chapter.modules:
        if module.split(".")[1] not in pages:
            yield f"its strip does not link ../book/api/{module.split('.')[1]}.md"
        if module.replace(".", "/") not in sources:
            yield f"its strip does not link ../{module.replace('.', '/')}.py"
    if not re.search(r"runs in .*\d.* with .*\d.*B on two CPU cores", strip):
        yield "its strip does not say 'runs in … s with … MB on two CPU cores', with measured figures"


@rule
def nothing_is_left_to_fill_in(chapter: Chapter) -> Iterator[str]:
    """No placeholders on a page."""
    for cell in chapter.cells:
        for found in re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b|\bXXX\b|\bFIXME\b|lorem ipsum", cell.source):
            yield f"{cell} still holds the placeholder {found}: fill it in"


NO_VERB = re.compile(r"(?:tion|sion|ness|ity|ing|ance|ence|ism)$")


@rule
def goals_are_verbs(chapter: Chapter) -> Iterator[str]:
    """Three to five things that the reader will be able to do."""
    goals = re.findall(r"^- (.+)$", section(GOALS, chapter.text), re.MULTILINE)
    if not 3 <= len(goals) <= 5:
        yield f"it has {len(goals)} goals under '## You will learn to': name 3 to 5"
    for goal in goals:
        verb = re.match(r"\*\*([a-z]+(?: [a-z]+)?)\*\* ", goal)
        if verb is None or NO_VERB.search(verb.group(1)):
            yield f"the goal {goal[:50]!r} should begin with a verb in bold, as in '- **predict** …'"


@rule
def the_vllm_box_is_pinned(chapter: Chapter) -> Iterator[str]:
    """A comparison says with which version, and where to look."""
    text = box("vllm", chapter.text) or ""
    if not text and not chapter.has_exercises:
        return
    if "**How vLLM does it**" not in text:
        yield 'its <div class="vllm"> has no "**How vLLM does it**"'
    if VLLM not in text:
        yield f"its box about vLLM does not name the version {VLLM} that it is about"
    if not re.search(r"`vllm/[\w/]+(?:\.py|/)`", text):
        yield "its box about vLLM names no file of vLLM, as in `vllm/config/model.py`"
    if not re.search(r"^- \S", text, re.MULTILINE):
        yield "its box about vLLM compares nothing: a list of what is the same and what is not"


def defined(cell: Cell) -> set[str]:
    """The functions and classes that a cell defines."""
    return {node.name for node in cell.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@rule
def exercises_are_whole(chapter: Chapter) -> Iterator[str]:
    """Two to four, each a stub, a check and a folded solution, one after the other."""
    stubs = chapter.tagged("exercise")
    if chapter.has_exercises and not 2 <= len(stubs) <= 4:
        yield f"it has {len(stubs)} exercises: a chapter has 2 to 4"
    if stubs and not chapter.has_exercises:
        yield f"it has {len(stubs)} exercises, and a first look has nothing to build"
    numbers = re.findall(r"^\*\*Exercise (\d+)\.\*\* \S", section(TURN, chapter.text), re.MULTILINE)
    if numbers != [str(i) for i in range(1, len(stubs) + 1)]:
        yield f"its {len(stubs)} exercises are announced as {numbers}: write '**Exercise 1.** …' and so on before each"
    triples = [chapter.cells[stub.index : stub.index + 3] for stub in stubs]
    for kind in ("check", "solution"):
        for cell in chapter.tagged(kind):
            if not any(cell in triple for triple in triples):
                yield f"{cell} is tagged {kind} and belongs to no exercise"
    for stub, triple in zip(stubs, triples):
        kinds = [cell.tags[:1] for cell in triple]
        if kinds != [["exercise"], ["check"], ["solution"]]:
            yield f"{stub} is an exercise; after it come a cell tagged check and one tagged solution, not {kinds[1:]}"
            continue
        _, check, solution = triple
        call = check.last_expression()
        if not (isinstance(call, ast.Call) and called(call).startswith("check_")):
            yield f"{check} should end with exercises.check_…(name)"
            continue
        name = call.args[0].id if call.args and isinstance(call.args[0], ast.Name) else None
        if name not in defined(stub) or name not in defined(solution):
            yield f"{stub} and {solution} should both define {name}, which {check} looks at"
        again = solution.last_expression()
        if again is None or ast.dump(again) != ast.dump(call):
            yield f"{solution} should end with the same check as {check}"
        if "hide-cell" not in solution.tags or not solution.metadata.get("jupyter", {}).get("source_hidden"):
            yield f"{solution} is a solution: fold it, with the tag hide-cell and jupyter.source_hidden"
        if "your code here" not in stub.source:
            yield f"{stub} should say where to write, with a comment '# your code here'"


@rule
def exercises_are_announced(chapter: Chapter) -> Iterator[str]:
    """How hard, how long, what to do, and two hints that are folded."""
    for stub in chapter.tagged("exercise"):
        text = chapter.cells[stub.index - 1].source
        if not re.search(r"^\*\*Exercise \d+\.\*\* ●[●○]{2} · \d+ minutes?\. \S", text, re.MULTILINE):
            yield f"the text before {stub} should begin like '**Exercise 1.** ●●○ · 10 minutes. What to do'"
        hints = re.findall(r"<details><summary>(First|Second) hint</summary>\n\n\S", text)
        if hints[-2:] != ["First", "Second"]:
            yield f"before {stub} there should be two folded hints, <details><summary>First hint</summary> and Second"
        if "meant to fail: your code here" not in stub.source:
            yield f"{stub} should say that it fails as it stands: '# meant to fail: your code here'"


@rule
def a_first_look_names_who_explains_it(chapter: Chapter) -> Iterator[str]:
    """Each picture of chapter 0 is followed by a link to the chapter that explains it."""
    for cell in figures(chapter) if not chapter.has_exercises else []:
        after = next((c.source for c in chapter.cells[cell.index + 1 :] if not c.is_code), "")
        if not re.search(r"\]\(\d\d_\w+\.ipynb", after):
            yield f"{cell} draws a picture, and the text after it links no chapter that explains it"


@rule
def interview_answers_are_folded(chapter: Chapter) -> Iterator[str]:
    """Three to five questions that people are really asked."""
    if not chapter.has_exercises:
        return
    text = section(INTERVIEW, chapter.text)
    folded = re.findall(r"<details><summary>(.+?)</summary>\n\n(.+?)\n\n</details>", text, re.DOTALL)
    if not 3 <= len(folded) <= 5:
        yield f"it has {len(folded)} interview questions with folded answers: ask 3 to 5"
    for question, answer in folded:
        if "?" not in question:
            yield f"the interview question {question[:50]!r} asks nothing"
        if words(answer) < 15:
            yield f"the answer to {question[:50]!r} is too short to be one"
    outside = re.sub(r'<details>.*?</details>|<div class="next">.*', "", text, flags=re.DOTALL)
    if outside.strip():
        yield f"under '## In an interview' something is not folded: {outside.strip()[:60]!r}"


@rule
def html_is_closed(chapter: Chapter) -> Iterator[str]:
    """A box that is not closed swallows the rest of the page; one without blank lines keeps its Markdown as text."""
    for cell in chapter.prose:
        for tag in ("div", "details", "summary"):
            opened, closed = (len(re.findall(rf"<{slash}{tag}\b", cell.source)) for slash in ("", "/"))
            if opened != closed:
                yield f"{cell} opens {opened} <{tag}> and closes {closed}"
        for line in re.findall(r"^(?:<div[^>]*>|.*</summary>)\n(?!\n)", cell.source, re.MULTILINE):
            yield f"{cell} needs a blank line after {line.strip()[-40:]!r}, else what follows is not read as Markdown"


@rule
def it_leads_on(chapter: Chapter) -> Iterator[str]:
    """To the next chapter, or after the last one to a page of the book."""
    target = chapter.next_name or "../book/"
    if f"]({target}" not in (box("next", chapter.text) or ""):
        yield f'its <div class="next"> should link {target}'


def figures(chapter: Chapter) -> list[Cell]:
    return [c for c in chapter.code if c.images() or any(is_plot(name) for name in calls_that_run(c.tree))]


@rule
def figures_can_be_read_by_all(chapter: Chapter) -> Iterator[str]:
    """At least three, each with a text that says what it shows, a caption, a name to link to, and a dark picture."""
    if len(figures(chapter)) < 3:
        yield f"it has {len(figures(chapter))} figures: a chapter has at least 3"
    for cell in chapter.code:
        shown = cell.metadata.get("mystnb", {})
        if cell not in figures(chapter):
            if shown.keys() & {"figure", "image"}:
                yield f"{cell} draws no figure and describes one"
            continue
        alt = " ".join(
            joined(o["data"].get("text/plain", "")) for o in cell.outputs if "image/png" in o.get("data", {})
        )
        caption, name = (shown.get("figure", {}).get(key, "") for key in ("caption", "name"))
        if len(alt) < 40 or alt.startswith("<Figure"):
            yield f"{cell} draws a figure that only says {alt!r}: the function that draws it sets ax.figure.alt"
        if "image" in shown:
            yield f"{cell} has a typed alt text: remove it, for the site takes the text that the figure makes"
        if len(caption) < 20:
            yield f"{cell} needs a caption that says what to notice"
        if alt == caption:
            yield f"{cell} has its caption as alt text: alt says what is seen, the caption what to notice in it"
        if not re.fullmatch(rf"fig-{chapter.number:02}-[a-z0-9-]+", name):
            yield f"{cell} needs a figure.name like fig-{chapter.number:02}-memory, not {name!r}"
        if [c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in chapter.code].count(name) > 1:
            yield f"{cell} shares its figure.name {name!r} with another figure"


@rule
def a_hidden_answer_says_so(chapter: Chapter) -> Iterator[str]:
    """What is to be guessed first is folded under "Show the answer"; the site's own words there are of solutions."""
    for cell in chapter.tagged("hide-output"):
        for what in ("show", "hide"):
            words = f"{what.capitalize()} the answer"
            if cell.metadata.get("mystnb", {}).get(f"code_prompt_{what}") != words:
                yield f"{cell} hides its output: say so with mystnb.code_prompt_{what}, {words!r}"


@rule
def figures_are_images(chapter: Chapter) -> Iterator[str]:
    """PNGs that a cell made: what is drawn in HTML or pasted into the text has no numbers that a test can read."""
    for cell in chapter.code:
        htmls = [joined(output.get("data", {}).get("text/html", "")) for output in cell.outputs]
        html = " ".join(html for html in htmls if not is_player(cell, html))
        if found := re.search(r"<(svg|img|canvas|object|iframe)\b", html):
            yield f"{cell} draws in HTML (<{found.group(1)}>): a figure is made by a plot_… function"
    for cell in chapter.prose:
        if re.search(r"!\[|<(?:svg|img)\b", cell.source) or "attachments" in cell.data:
            yield f"{cell} holds an image: let a cell make it"


@rule
def players_are_introduced_and_discussed(chapter: Chapter) -> Iterator[str]:
    """Before a picture that moves: what to look for. After it: what there was to notice."""
    for cell in chapter.code:
        if not called(cell.last_expression()).startswith("play_"):
            continue
        before = [other for other in chapter.cells[max(cell.index - 2, 0) : cell.index] if not other.is_code]
        after = chapter.cells[cell.index + 1 : cell.index + 2]
        if not before or not after or after[0].is_code:
            yield f"{cell} plays something: say before it what to look for, and right after it what to notice"
        if not any(is_player(cell, joined(o.get("data", {}).get("text/html", ""))) for o in cell.outputs):
            yield f"{cell} shows no player: run tests/book/refresh.py notebooks/{chapter.path.name}"


@rule
def a_quarter_are_listings(chapter: Chapter) -> Iterator[str]:
    """A wall of listings is not reading; the API pages show all of the code."""
    listings = chapter.tagged("listing")
    if 4 * len(listings) > len(chapter.code):
        yield f"{len(listings)} of its {len(chapter.code)} code cells are listings: at most a quarter"


@rule
def listings_are_tagged(chapter: Chapter) -> Iterator[str]:
    """So that they are found, and compared with the code."""
    for cell in chapter.code:
        shows = called(cell.last_expression()) == "show_source"
        if shows != ("listing" in cell.tags):
            yield f"{cell} should {'have' if shows else 'not have'} the tag listing, by its last line"
        if shows and cell.was_run and cell.stored("text/markdown") is None:
            yield f"{cell} shows no listing: run tests/book/refresh.py notebooks/{chapter.path.name}"


@rule
def at_most_four_code_cells_in_a_row(chapter: Chapter) -> Iterator[str]:
    """Code without a word between is a program, not a lesson."""
    in_a_row = 0
    for cell in chapter.cells:
        in_a_row = in_a_row + 1 if cell.is_code else 0
        if in_a_row == 5:
            yield f"{cell} is the fifth code cell in a row: say something in between"


@rule
def code_cells_are_short(chapter: Chapter) -> Iterator[str]:
    """A cell is read on a phone."""
    lengths = {cell.index: len(cell.source.splitlines()) for cell in chapter.code}
    if lengths and statistics.median(lengths.values()) > 6:
        yield f"half of its code cells have more than {statistics.median(lengths.values())} lines: at most 6"
    for cell in chapter.code:
        if lengths[cell.index] > 25:
            yield f"{cell} has {lengths[cell.index]} lines: at most 25"


@rule
def forty_words_to_a_code_cell(chapter: Chapter) -> Iterator[str]:
    """A book, not a script with remarks."""
    num_words, num_cells = sum(words(cell.source) for cell in chapter.prose), len(chapter.code)
    if num_words < 40 * num_cells:
        share = num_words / num_cells
        yield f"it has {num_words:,} words for {num_cells} code cells, {share:.1f} each: at least 40 on average"


@rule
def the_book_begins_with_a_picture(chapter: Chapter) -> Iterator[str]:
    """The first chapters have a plot on the screen within their first ten cells."""
    if chapter.number <= 1 and not any(cell.images() for cell in chapter.cells[:10]):
        yield "there is no figure among its first ten cells"


# Links


def links(markdown: str) -> Iterator[str]:
    """Where the links, images and references of a text lead."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    yield from re.findall(r"\{(?:py:\w+|doc|ref|numref)\}`(?:[^`<]*<)?([^`>]+)>?`", text)
    text = re.sub(r"`[^`\n]*`", "", text)
    yield from re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    yield from re.findall(r"(?:href|src)=[\"']([^\"']+)", text)


def anchors(path: Path, levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6)) -> set[str]:
    """The anchors that a page's headings and labels make."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(joined(c["source"]) for c in nbformat.reads(text, 4).cells if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^(#+) (.+)$", text, re.MULTILINE)
    return {slug(title) for marks, title in headings if len(marks) in levels} | set(
        re.findall(r"^\((\S+)\)=", text, re.M)
    )


def why_dead(link: str, chapter: Chapter) -> str | None:
    """What is wrong with a link, if anything is."""
    address, _, anchor = link.partition("#")
    if re.match(r"https?://|mailto:", link):
        return None
    if re.fullmatch(r"folovllm(?:\.\w+)+", link):
        return "JupyterLab cannot open it; link its page in ../book/api, or its file in ../folovllm"
    if not address:
        own = {c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in chapter.code}
        own |= {slug(title) for title in re.findall(r"^#+ (.+)$", chapter.text, re.MULTILINE)}
        return None if anchor in own else "there is no such heading or figure in this chapter"
    target = (chapter.path.parent / address).resolve()
    if not target.is_relative_to(chapter.root) or not target.is_file():
        return "there is no such file"
    levels = (2,) if target.name == "glossary.md" else (1, 2, 3, 4, 5, 6)
    if anchor and anchor not in anchors(target, levels):
        return f"{target.name} has no such {'term (## heading)' if levels == (2,) else 'heading'}"
    return None


@rule
def links_lead_somewhere(chapter: Chapter) -> Iterator[str]:
    """Pages, anchors, glossary terms and sources: files of the tree, which JupyterLab can open too."""
    for cell in chapter.prose:
        for link in links(cell.source):
            if why := why_dead(link, chapter):
                yield f"{cell} links {link}: {why}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RULES)
def test_rule_holds(name: str, path: Path) -> None:
    if complaints := list(RULES[name](read(path))):
        pytest.fail("\n  ".join([f"notebooks/{path.name}, where not {name!r}:", *complaints]), pytrace=False)


# The chapters together


def test_there_are_notebooks() -> None:
    assert set(MODULES) <= {path.stem for path in PATHS}, f"look at {NOTEBOOKS}: is a chapter missing?"


def test_figure_names_are_unique_in_the_book() -> None:
    names = [
        cell.metadata["mystnb"]["figure"]["name"]
        for path in PATHS
        for cell in read(path).code
        if "figure" in cell.metadata.get("mystnb", {})
    ]
    assert not {name for name in names if names.count(name) > 1}, "give each figure a figure.name of its own"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_dark_pictures_are_those_of_the_figures(path: Path) -> None:
    stale = [
        cell.metadata["mystnb"]["figure"]["name"]
        for cell in figures(read(path))
        for light in cell.images()
        if dark_pictures.read_stamp(cell.metadata["mystnb"]["figure"]["name"]) != dark_pictures.stamp_for(light)
    ]
    assert not stale, f"the dark pictures of {stale} are not those of the stored figures: run tests/book/refresh.py"


def test_no_dark_picture_is_left_over() -> None:
    names = {cell.metadata["mystnb"]["figure"]["name"] for path in PATHS for cell in figures(read(path))}
    left = sorted(path.name for path in dark_pictures.FOLDER.iterdir() if path.stem not in names)
    assert not left, f"no figure has the name of {left}: delete them from book/dark"


def test_cell_ids_are_unique_in_the_book() -> None:
    ids = [cell.data["id"] for path in PATHS for cell in read(path).cells]
    assert not {i for i in ids if ids.count(i) > 1}, "give each cell an id of its own"


def files_of(toc: Any) -> Iterator[str]:
    """The files that a table of contents lists, from top to bottom."""
    if isinstance(toc, dict):
        for key, value in toc.items():
            if key in ("root", "file"):
                yield value
            else:
                yield from files_of(value)
    elif isinstance(toc, list):
        for item in toc:
            yield from files_of(item)


def test_the_table_of_contents_lists_every_notebook_once_and_in_order() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [Path(name).stem for name in files_of(toc) if name.startswith("notebooks/")]
    assert listed == [path.stem for path in PATHS], "list every notebook of notebooks/ once in _toc.yml, in order"


# The rules bite: a small good chapter breaks none of them, and each way to spoil it is seen by the rule it breaks.


ALT = "A rectangle in dark blue on a white ground, wider than high."


def png(color: str = "navy", width: int = WIDTH) -> str:
    image = Image.new("RGB", (width, 40), "white")
    image.paste(color, (10, 10, 60, 30))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def prose(id: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": text}


def code(id: str, source: str, *outputs: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": id,
        "metadata": metadata,
        "source": source,
        "outputs": list(outputs),
        "execution_count": None,
    }


def printed(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def result(text: str, **more: str) -> dict[str, Any]:
    data = {"text/plain": text} | {key.replace("_", "/"): value for key, value in more.items()}
    return {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": None}


def image() -> dict[str, Any]:
    return {"output_type": "display_data", "data": {"image/png": png(), "text/plain": ALT}, "metadata": {}}


def figure(name: str) -> dict[str, Any]:
    return {"figure": {"caption": f"What to notice in {name}.", "name": f"fig-01-{name}"}}


def good_notebook() -> dict[str, Any]:
    filler = "These are words that a reader reads before the next cell is run. " * 12
    hint = "\n\n<details><summary>{} hint</summary>\n\nLook.\n\n</details>"
    hints = hint.format("First") + hint.format("Second")
    question = "<details><summary>Question {}?</summary>\n\n" + "An answer. " * 10 + "\n\n</details>\n\n"
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["\x1b[31mValueError: no"]}
    folded = {"tags": ["solution", "hide-cell"], "jupyter": {"source_hidden": True}}
    cells = [
        prose(
            "a0",
            '# 1. Sample\n\n<div class="strip">\n\n**Milestone 0** · [page](../book/api/sample.md) · '
            "[source](../folovllm/sample.py) · runs in 3 s with 99 MB on two CPU cores\n\n</div>"
            "\n\nA [token](../book/glossary.md#token).\n\n## You will learn to\n\n- **see** one;\n- **find** two;\n"
            "- **count** three.\n\n## Where are we?\n\nHere.",
        ),
        code("a1", "plot_path();", image(), mystnb=figure("path")),
        prose("a2", "## What is first?\n\n" + filler),
        code("a3", "print('one')", printed("one\n")),
        code("a4", "x = 1\nx", result("1")),
        prose("a5", "## What is second?\n\n" + filler),
        code("a6", "plot_two();", image(), mystnb=figure("two")),
        code("a7", "f(0)", error, tags=["raises-exception"]),
        prose("a8", "## What is third?\n\n" + filler),
        code("a9", "plot_three();", image(), mystnb=figure("three")),
        code("b0", "show_source(f)", result("f (1 lines)", text_markdown="`f`"), tags=["listing"]),
        prose(
            "b1",
            '<div class="vllm">\n\n**How vLLM does it** (0.33.0, `vllm/config/model.py`)\n\n- The same.\n\n</div>\n\n'
            "## Your turn\n\n**Exercise 1.** ●○○ · 2 minutes. Do it." + hints,
        ),
        code("b2", "def one(x):\n    return x  # meant to fail: your code here", tags=["exercise"]),
        code("b3", "exercises.check_one(one)", result("Not yet: no."), tags=["check"]),
        code("b4", "def one(x):\n    return 1\n\n\nexercises.check_one(one)", result("Right: yes."), **folded),
        prose("b5", "**Exercise 2.** ●●○ · 9 minutes. Do it again." + hints),
        code("b6", "def two(x):\n    return x  # meant to fail: your code here", tags=["exercise"]),
        code("b7", "exercises.check_two(two)", result("Not yet: no."), tags=["check"]),
        code("b8", "def two(x):\n    return 2\n\n\nexercises.check_two(two)", result("Right: yes."), **folded),
        prose(
            "b9",
            "## In an interview\n\n"
            + "".join(question.format(i) for i in range(3))
            + '## What you can do now\n\n<div class="next">\n\nAll. [On](../book/glossary.md).\n\n</div>',
        ),
    ]
    count = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": spec, "language_info": {"name": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., Chapter]:
    for name, text in {
        "book/glossary.md": "# Glossary\n\n## Token\n\nA piece.\n",
        "book/api/sample.md": "# Sample\n",
        "folovllm/sample.py": "",
        "notebooks/01_sample.ipynb": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def make(spoil: Callable[[dict[str, Any]], object] = lambda notebook: None) -> Chapter:
        notebook = copy.deepcopy(good_notebook())
        spoil(notebook)
        path = tmp_path / "notebooks" / "01_sample.ipynb"
        return Chapter(path, notebook, root=tmp_path.resolve(), modules=("folovllm.sample",))

    return make


def cell_of(notebook: dict[str, Any], id: str) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if cell["id"] == id)


def put(id: str, /, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces parts of a cell."""
    return lambda notebook: cell_of(notebook, id).update(fields)


def replaced(id: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Replaces some text in a cell's source."""

    def spoil(notebook: dict[str, Any]) -> None:
        cell = cell_of(notebook, id)
        assert old in cell["source"], old
        cell["source"] = cell["source"].replace(old, new)

    return spoil


def shown(id: str, text: str) -> Callable[[dict[str, Any]], None]:
    """Replaces what a cell shows."""
    return lambda notebook: cell_of(notebook, id)["outputs"][0]["data"].update({"text/plain": text})


def described(id: str, part: str, **values: str) -> Callable[[dict[str, Any]], None]:
    """Replaces a figure's alt text, caption or name."""
    return lambda notebook: cell_of(notebook, id)["metadata"]["mystnb"].setdefault(part, {}).update(values)


def moved(id: str, where: int) -> Callable[[dict[str, Any]], None]:
    def spoil(notebook: dict[str, Any]) -> None:
        cell = cell_of(notebook, id)
        notebook["cells"].remove(cell)
        notebook["cells"].insert(where, cell)

    return spoil


def removed(id: str) -> Callable[[dict[str, Any]], None]:
    return lambda notebook: notebook["cells"].remove(cell_of(notebook, id))


def many(id: str, text: str, times: int, between: str = "") -> Callable[[dict[str, Any]], None]:
    """Puts cells behind another one, with prose between them or none."""

    def spoil(notebook: dict[str, Any]) -> None:
        place = notebook["cells"].index(cell_of(notebook, id)) + 1
        for i in range(times):
            new = [prose(f"m{i}", between)] if between else []
            notebook["cells"][place:place] = [*new, code(f"n{i}", text)]

    return spoil


BLANK = {"image/png": png("white"), "text/plain": ALT}

PLAYED = result("1", text_html='<div class="folo-player"><script>x</script></div>')

SPOILT: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
    ("the file is neutral", "another kernel", lambda nb: nb["metadata"]["kernelspec"].update(name="my-venv")),
    ("the file is neutral", "an exact version", lambda nb: nb["metadata"]["language_info"].update(version="3.11.7")),
    ("the file is neutral", "stored widgets", lambda nb: nb["metadata"].update(widgets={})),
    ("the file is neutral", "an id twice", put("a3", id="a4")),
    ("the file is neutral", "a time stamp", put("a3", metadata={"execution": {"iopub.execute_input": "2025"}})),
    ("the file is neutral", "a misspelt tag", put("a7", metadata={"tags": ["raise-exception"]})),
    ("the file is neutral", "no notebook", put("a3", cell_type="raw")),
    ("every cell was run in order", "a cell not run", put("a3", execution_count=None)),
    ("every cell was run in order", "two cells in another order", put("a3", execution_count=3)),
    (
        "every cell was run in order",
        "an old result",
        lambda nb: cell_of(nb, "a4")["outputs"][0].update(execution_count=9),
    ),
    ("cells are plain python", "a magic", put("a3", source="%time print(1)")),
    ("outputs are there", "a value without output", put("a4", outputs=[])),
    ("outputs are there", "print without output", put("a3", outputs=[])),
    ("outputs are there", "print in a loop without output", put("a3", source="for i in x:\n    print(i)", outputs=[])),
    ("outputs are there", "a plot without image", put("a6", outputs=[])),
    ("outputs are there", "a check without output", put("b3", outputs=[])),
    ("outputs are there", "Axes as text", put("a6", outputs=[image(), result("<Axes: xlabel='x'>")])),
    ("nothing on stderr", "a warning", put("a3", outputs=[printed("one\n"), printed("Warning", "stderr")])),
    ("errors are expected ones", "an untagged error", put("a7", metadata={})),
    ("errors are expected ones", "a tag without error", put("a7", outputs=[])),
    (
        "errors are expected ones",
        "another traceback",
        lambda nb: cell_of(nb, "a7")["outputs"][0].update(traceback=["x"]),
    ),
    ("no path of a machine", "a home in an output", shown("a4", "PosixPath('/home/me/x')")),
    ("no path of a machine", "a root in the source", replaced("a4", "x = 1", "x = open('/root/x')")),
    ("no path of a machine", "a temporary folder", shown("a4", "in /tmp/tmp123")),
    ("no path of a machine", "a drive", shown("a4", "C:\\Users\\me")),
    ("no path of a machine", "an environment", shown("a4", "lib/python3.11/site-packages/torch")),
    ("no path of a machine", "a link to a file", replaced("a2", "words", "[words](file:///x)")),
    (
        "no path of a machine",
        "a coloured traceback",
        lambda nb: cell_of(nb, "a7")["outputs"][0]["traceback"].insert(0, "\x1b[36mFile \x1b[32m/work/a.py:3\x1b[39m"),
    ),
    ("no memory address", "a function", shown("a4", "<function f at 0x7f3a5c0d1e50>")),
    ("no terminal codes", "colours", put("a3", outputs=[printed("\x1b[31mone\x1b[0m")])),
    ("no terminal codes", "a progress bar", put("a3", outputs=[printed("10%|█ \r100%")])),
    ("no widgets and no scripts", "a widget", put("a4", outputs=[result("1", **{"application_vnd.jupyter": "{}"})])),
    ("no widgets and no scripts", "a player that nothing played", put("a4", outputs=[PLAYED])),
    ("no widgets and no scripts", "a script", put("a4", outputs=[result("1", text_html="<script>x</script>")])),
    (
        "no widgets and no scripts",
        "an image alone",
        put("a6", outputs=[{"output_type": "display_data", "data": {"image/png": png()}, "metadata": {}}]),
    ),
    (
        "images can be seen",
        "half an image",
        lambda nb: cell_of(nb, "a6")["outputs"][0]["data"].update({"image/png": png()[:80]}),
    ),
    (
        "images can be seen",
        "another image",
        lambda nb: cell_of(nb, "a6")["outputs"][0]["data"].update({"image/png": png(width=600)}),
    ),
    ("images can be seen", "nothing on it", lambda nb: cell_of(nb, "a6")["outputs"][0].update(data=BLANK)),
    ("nine cells in ten are compared", "no reason", put("a3", metadata={"tags": ["nbval-ignore-output"]})),
    (
        "nine cells in ten are compared",
        "no real reason",
        put("a3", metadata={"tags": ["nbval-ignore-output"]}, source="# not compared: because\nprint(1)"),
    ),
    (
        "nine cells in ten are compared",
        "a reason without tag",
        put("a3", source="# not compared: it is a time\nprint(1)"),
    ),
    ("nine cells in ten are compared", "a comment for nbval", put("a3", source="# NBVAL_SKIP\nprint(1)")),
    (
        "nine cells in ten are compared",
        "too many",
        lambda nb: [
            put(id, metadata={"tags": ["nbval-ignore-output"]}, source="# not compared: it is a time\nprint(1)")(nb)
            for id in ("a3", "a4")
        ],
    ),
    ("nine parts in order", "no title", replaced("a0", "# 1. Sample", "# Sample")),
    ("nine parts in order", "another chapter's number", replaced("a0", "# 1. Sample", "# 2. Sample")),
    ("nine parts in order", "no goals", replaced("a0", "## You will learn to", "## Goals")),
    ("nine parts in order", "no picture of the whole", removed("a1")),
    ("nine parts in order", "no listing", removed("b0")),
    ("nine parts in order", "no box", replaced("b1", '<div class="vllm">', "<div>")),
    ("nine parts in order", "the interview first", moved("b9", 2)),
    ("nine parts in order", "no end", replaced("b9", "## What you can do now", "## The end")),
    ("sections ask questions", "two sections", replaced("a8", "## What is third?", "")),
    ("sections ask questions", "an endless heading", replaced("a8", "third?", "third " + "and then " * 10 + "?")),
    ("the strip tells what it takes", "no page", replaced("a0", "../book/api/sample.md", "../book/glossary.md")),
    ("the strip tells what it takes", "no source", replaced("a0", "../folovllm/", "../modules/")),
    ("the strip tells what it takes", "no time", replaced("a0", "3 s with 99 MB", "no time")),
    ("the strip tells what it takes", "no milestone", replaced("a0", "**Milestone 0**", "M0")),
    ("nothing is left to fill in", "a placeholder", replaced("a0", "3 s", "@TIME@")),
    ("nothing is left to fill in", "a note to oneself", replaced("a2", "words", "TODO")),
    ("goals are verbs", "two goals", replaced("a0", "- **count** three.", "")),
    ("goals are verbs", "a noun", replaced("a0", "**see**", "**definition** of")),
    ("goals are verbs", "not in bold", replaced("a0", "**see**", "see")),
    ("the vllm box is pinned", "another version", replaced("b1", "0.33.0", "0.9.1")),
    ("the vllm box is pinned", "no file", replaced("b1", "`vllm/config/model.py`", "configs")),
    ("the vllm box is pinned", "no title", replaced("b1", "**How vLLM does it**", "vLLM")),
    ("the vllm box is pinned", "no comparison", replaced("b1", "- The same.", "The same.")),
    ("exercises are whole", "one exercise", lambda nb: [removed(id)(nb) for id in ("b5", "b6", "b7", "b8")]),
    ("exercises are whole", "no check", removed("b7")),
    ("exercises are whole", "the solution first", moved("b8", 16)),
    ("exercises are whole", "not announced", replaced("b5", "**Exercise 2.**", "**Exercise 3.**")),
    ("exercises are whole", "another name", replaced("b8", "def two", "def too")),
    ("exercises are whole", "another check at the end", replaced("b8", "check_two", "check_one")),
    ("exercises are whole", "an open solution", put("b8", metadata={"tags": ["solution"]})),
    ("exercises are whole", "a stray check", put("a4", metadata={"tags": ["check"]})),
    ("exercises are whole", "no place to write", replaced("b6", "  # meant to fail: your code here", "")),
    ("exercises are announced", "no minutes", replaced("b5", " · 9 minutes", "")),
    ("exercises are announced", "four dots", replaced("b5", "●●○", "●●○○")),
    ("exercises are announced", "one hint", replaced("b1", "Second hint", "A hint")),
    ("exercises are announced", "a stub that looks right", replaced("b6", "meant to fail: ", "")),
    ("interview answers are folded", "two questions", replaced("b9", "<details><summary>Question 2?", "Question 2?")),
    ("interview answers are folded", "no question", replaced("b9", "Question 1?", "Tell me.")),
    ("interview answers are folded", "no answer", replaced("b9", "An answer. " * 10, "Yes.")),
    ("html is closed", "a box left open", replaced("b9", "\n\n</div>", "")),
    ("html is closed", "no blank line", replaced("b1", '<div class="vllm">\n\n', '<div class="vllm">\n')),
    ("it leads on", "nowhere", replaced("b9", "[On](../book/glossary.md)", "On")),
    ("figures can be read by all", "two figures", removed("a9")),
    ("figures can be read by all", "no text", shown("a6", "<Figure size 832x400 with 1 Axes, and so on>")),
    ("figures can be read by all", "a typed text", described("a6", "image", alt=ALT)),
    ("figures can be read by all", "no caption", described("a6", "figure", caption="")),
    ("figures can be read by all", "the caption twice", described("a6", "figure", caption=ALT)),
    ("figures can be read by all", "another chapter's name", described("a6", "figure", name="fig-02-two")),
    ("figures can be read by all", "a name twice", described("a6", "figure", name="fig-01-three")),
    ("figures can be read by all", "nothing at all", put("a6", metadata={})),
    ("figures can be read by all", "a figure described and not drawn", put("a4", metadata={"mystnb": figure("four")})),
    ("a hidden answer says so", "a solution's words", put("a4", metadata={"tags": ["hide-output"]})),
    (
        "a hidden answer says so",
        "a solution's word when it is open",
        put("a4", metadata={"tags": ["hide-output"], "mystnb": {"code_prompt_show": "Show the answer"}}),
    ),
    ("figures are images", "one in HTML", put("a4", outputs=[result("1", text_html="<svg></svg>")])),
    ("figures are images", "one in the text", replaced("a2", "words", "![words](../book/glossary.md)")),
    ("players are introduced and discussed", "nothing is shown", put("a4", source="play_trace(trace)")),
    (
        "players are introduced and discussed",
        "no word after it",
        lambda nb: [put("a4", source="play_trace(x)", outputs=[PLAYED])(nb), removed("a5")(nb)],
    ),
    (
        "a quarter are listings",
        "four of thirteen",
        lambda nb: [cell_of(nb, id)["metadata"].update(tags=["listing"]) for id in ("a3", "a4", "a7")],
    ),
    ("listings are tagged", "no tag", put("b0", metadata={})),
    ("listings are tagged", "a tag and no listing", put("a4", metadata={"tags": ["listing"]})),
    ("listings are tagged", "no Markdown", put("b0", outputs=[result("f (1 lines)")])),
    ("at most four code cells in a row", "five", many("a4", "x = 1", 3)),
    ("code cells are short", "a long cell", put("a4", source="x = 1\n" * 25 + "x")),
    ("code cells are short", "long cells", many("a4", "x = 1\n" * 7, 20, "words " * 50)),
    ("forty words to a code cell", "more code than words", many("a4", "x = 1", 12, "A word.")),
    (
        "the book begins with a picture",
        "it comes late",
        lambda nb: [put(id, outputs=[])(nb) for id in ("a1", "a6", "a9")],
    ),
    ("links lead somewhere", "no such page", replaced("a2", "words", "[words](../book/none.md)")),
    ("links lead somewhere", "no such term", replaced("a0", "#token", "#tokens")),
    ("links lead somewhere", "no such chapter", replaced("a2", "words", "[words](02_none.ipynb)")),
    ("links lead somewhere", "only the site knows it", replaced("a2", "words", "[words](folovllm.config.ModelConfig)")),
    ("links lead somewhere", "only the site knows roles", replaced("a2", "words", "{py:func}`folovllm.config.x`")),
    ("links lead somewhere", "no such heading", replaced("a2", "words", "[words](#what-is-nowhere)")),
    ("links lead somewhere", "no such source", replaced("a0", "folovllm/sample.py", "folovllm/none.py")),
    ("links lead somewhere", "out of the repository", replaced("a2", "words", "[words](../../x.md)")),
]


def test_a_good_chapter_breaks_no_rule(sample: Callable[..., Chapter]) -> None:
    chapter = sample()
    assert {name: found for name, check in RULES.items() if (found := list(check(chapter)))} == {}


@pytest.mark.parametrize("name, how, spoil", SPOILT, ids=[f"{name}: {how}" for name, how, _ in SPOILT])
def test_a_spoilt_chapter_breaks_the_rule(
    name: str, how: str, spoil: Callable[[dict[str, Any]], object], sample: Callable[..., Chapter]
) -> None:
    complaints = list(RULES[name](sample(spoil)))
    assert complaints, f"the rule does not see this: {how}"
    assert all(len(complaint) > 20 for complaint in complaints), "a complaint says where, and what to do"


def first_look(sample: Callable[..., Chapter], spoil: Callable[[dict[str, Any]], object]) -> Chapter:
    """The good chapter as chapter 0: no listing, no box, nothing to build, and a link after each picture."""

    def make(notebook: dict[str, Any]) -> None:
        for id in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8"):
            removed(id)(notebook)
        replaced("a0", "# 1.", "# 0.")(notebook)
        replaced("b9", "## In an interview", "## And?")(notebook)
        for id in ("a2", "a8", "b9"):
            cell_of(notebook, id)["source"] += " [It](01_sample.ipynb) explains it."
        for id, name in (("a1", "path"), ("a6", "two"), ("a9", "three")):
            described(id, "figure", name=f"fig-00-{name}")(notebook)
        spoil(notebook)

    chapter = sample(make)
    chapter.path = chapter.path.with_name("00_sample.ipynb")
    return chapter


SPOILT_FIRST_LOOK: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
    ("a first look names who explains it", "no link", replaced("a8", "](01_sample.ipynb)", "]")),
    ("exercises are whole", "something to build", put("a3", metadata={"tags": ["exercise"]})),
    ("nine parts in order", "no goals", replaced("a0", "## You will learn to", "## Goals")),
]


def test_a_good_first_look_breaks_no_rule(sample: Callable[..., Chapter]) -> None:
    chapter = first_look(sample, lambda notebook: None)
    assert {name: found for name, check in RULES.items() if (found := list(check(chapter)))} == {}


@pytest.mark.parametrize("name, how, spoil", SPOILT_FIRST_LOOK, ids=[how for _, how, _ in SPOILT_FIRST_LOOK])
def test_a_spoilt_first_look_breaks_the_rule(
    name: str, how: str, spoil: Callable[[dict[str, Any]], object], sample: Callable[..., Chapter]
) -> None:
    assert list(RULES[name](first_look(sample, spoil))), f"the rule does not see this: {how}"


def test_every_rule_is_known_to_bite() -> None:
    spoilt = {name for name, _, _ in (*SPOILT, *SPOILT_FIRST_LOOK)}
    assert spoilt == set(RULES), "add a line to SPOILT for each new rule"


def test_names_of_a_cell_are_found() -> None:
    assert names_in("a = b.c(d)") == {"a", "b", "d"}
