"""A player of traces: what each step of a run did, or of two runs side by side."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from folovllm.book.palette import REQUEST_COLORS
from folovllm.book.players.player import Player
from folovllm.book.players.trace import Trace, TracedSequence, TracedStep, text_of

ROW = 18
"""Pixels of a line of the still picture."""

_BOX = '<svg width="12" height="12" aria-hidden="true"><rect class="fp-{}" width="12" height="12"/></svg>'
KEY = (
    f'<p class="fp-key">A line for each request: {_BOX.format("wait")} it waits, {_BOX.format("read")} its prompt is '
    "read, and then, in its own colour, it gets a token in each step. × it had to leave.</p>\n"
)
HINT = (
    '<p class="fp-hint">Where scripts run, one can go through the steps of this picture.</p>\n'
    '<div class="fp-controls"></div>'
)


def play_trace(trace: Trace, other: Trace | None = None, labels: tuple[str, str] = ("", "")) -> Player:
    """A player of a run, or of two runs step by step side by side, such as one with a switch off and one with it on.

    Args:
        trace: what `folovllm.book.players.trace.record` wrote down.
        other: a second run; a request with the same name has the same colour in both.
        labels: what the two runs are called.

    Raises:
        ValueError: if a trace has no step.
    """
    traces = [trace] if other is None else [trace, other]
    for each in traces:
        if not each.steps:
            raise ValueError("the trace has no step: run something inside of the with block")
    if other is not None and not any(labels):
        labels = ("first run", "second run")
    names = list(dict.fromkeys(seq.name for each in traces for seq in each.seqs))
    colors = {name: i % len(REQUEST_COLORS) for i, name in enumerate(names)}
    texts: dict[str, int] = {}  # each text is in the data once, and a number elsewhere
    # In percent, so that a phone's picture has letters of the same size; there a letter is two percent of the width.
    left = 3 + 2.1 * max(map(len, names))
    width = (100 - left) / max(len(each.steps) for each in traces)  # the same in both, so that the shorter ends earlier
    runs, stills, told = [], [], []
    for each, label in zip(traces, labels):
        runs.append({"label": label, **_data_of(each, colors, texts)})
        told.append(describe(each, label))
        stills.append(_still(each, label, colors, told[-1], left, width))
    still = f'{KEY}<div class="fp-runs">{"".join(stills)}</div>\n{HINT}'
    data = {"texts": list(texts), "runs": runs}
    return Player("trace", " ".join(told), still, data, min(len(names), len(REQUEST_COLORS)))


def describe(trace: Trace, label: str = "") -> str:
    """A run in words, made from its trace."""
    num_tokens = sum(sum(step.num_new_tokens.values()) for step in trace.steps)
    num_computed = sum(num_new for step in trace.steps for _, _, num_new in step.work)
    waited = {
        number: count
        for number in range(len(trace.seqs))
        if (count := sum(number in (*step.waiting, *step.swapped) for step in trace.steps))
    }
    most_blocks = max(len(_blocks_in_use(step)) for step in trace.steps)
    told = [
        f"{_counted(len(trace.seqs), 'request')} along {_counted(len(trace.steps), 'step')}: "
        f"{num_computed:,} tokens computed, {_counted(num_tokens, 'token')} written, "
        f"at most {most_blocks} of {_counted(trace.num_blocks, 'block')} in use"
    ]
    if waited:
        longest = max(waited, key=lambda number: waited[number])
        told.append(
            f"{len(waited)} of them wait, {trace.seqs[longest].name} the longest, for "
            f"{_counted(waited[longest], 'step')}"
        )
    if num_preempted := sum(len(step.preempted) for step in trace.steps):
        told.append(f"{_counted(num_preempted, 'preemption')}")
    begin = f"{label[0].upper()}{label[1:]}: " if label else ""
    return f"{begin}{'; '.join(told)}."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _blocks_in_use(step: TracedStep) -> set[int]:
    return {block_id for table in step.tables.values() for block_id in table}


def _data_of(trace: Trace, colors: dict[str, int], texts: dict[str, int]) -> dict[str, Any]:
    """A run as its script takes it: numbers of sequences, blocks and texts, and only what a step changes."""
    known = {i: texts.setdefault(text_of(trace.tokenizer, i), len(texts)) for i in _token_ids(trace)}
    computed = [0] * len(trace.seqs)
    tables: dict[int, list[int]] = {}
    return {
        "blockSize": trace.block_size,
        "numBlocks": trace.num_blocks,
        "numPlaces": trace.max_num_seqs,
        "seqs": [_data_of_seq(seq, colors, known) for seq in trace.seqs],
        "steps": [_data_of_step(step, computed, tables, known) for step in trace.steps],
    }


def _token_ids(trace: Trace) -> Iterable[int]:
    """Every token that is shown, in a fixed order."""
    found = {token_id for seq in trace.seqs for token_id in seq.token_ids}
    for step in trace.steps:
        found |= {token_id for guesses in step.guesses.values() for token_id in guesses}
        found |= {token_id for bars in step.bars.values() for bar in bars for token_id, _ in bar}
    return sorted(found)


def _data_of_seq(seq: TracedSequence, colors: dict[str, int], known: dict[int, int]) -> dict[str, Any]:
    tokens = [known[token_id] for token_id in seq.token_ids]
    data = {"name": seq.name, "color": colors[seq.name], "prompt": seq.num_prompt_tokens, "tokens": tokens}
    begun = seq.num_first_tokens > seq.num_prompt_tokens
    return {**data, "first": seq.num_first_tokens} if begun else data


def _data_of_step(
    step: TracedStep, computed: list[int], tables: dict[int, list[int]], known: dict[int, int]
) -> dict[str, Any]:
    """One step. What can be told from the steps before is left out, and what is empty, too."""
    work: list[Any] = []
    for number, first, num_new in step.work:
        entry = [number, num_new, first] if first != computed[number] else [number, num_new]
        work.append(number if entry == [number, 1] else entry)
        computed[number] = first + num_new
    changed = [[number, table] for number, table in step.tables.items() if tables.get(number) != table]
    tables.clear()
    tables |= step.tables
    places = [-1] * (max(step.places.values(), default=-1) + 1)
    for number, place in step.places.items():
        places[place] = number
    data: dict[str, Any] = {
        "work": work,
        "places": places,
        "tables": changed,
        "waiting": step.waiting,
        "swapped": step.swapped,
        "preempted": step.preempted,
        "admitted": [[number, num_cached] for number, num_cached in step.admitted.items()],
        "guesses": [[number, [known[token_id] for token_id in guesses]] for number, guesses in step.guesses.items()],
        "got": [number if count == 1 else [number, count] for number, count in step.num_new_tokens.items()],
        "bars": [
            [number, [[[known[token_id], p] for token_id, p in bar] for bar in bars]]
            for number, bars in step.bars.items()
        ],
        "finished": step.finished,
    }
    return {name: value for name, value in data.items() if value}


def _still(trace: Trace, label: str, colors: dict[str, int], description: str, left: float, width: float) -> str:
    """All steps at once: a line for each request, grey while it waits, orange while it reads, then in its colour.

    The first step begins at ``left``, and each is as wide as ``width``, in percent.
    """
    drawn = []
    for row, seq in enumerate(trace.seqs):
        top = row * ROW
        name = html.escape(seq.name)
        drawn.append(f'<text x="0" y="{top + 13}">{name}</text>')
        for kind, first, length in _stretches(trace, row, seq.num_prompt_tokens):
            x, w = left + first * width, length * width
            style = f"r{colors[seq.name]} fp-own" if kind == "own" else f"fp-{kind}"
            drawn.append(f'<rect class="{style}" x="{x:.2f}%" y="{top + 2}" width="{w:.2f}%" height="{ROW - 4}"/>')
        drawn += [
            f'<text class="fp-cross" x="{left + (i + 0.5) * width:.2f}%" y="{top + 14}">×</text>'
            for i, step in enumerate(trace.steps)
            if row in step.preempted
        ]
    height = len(trace.seqs) * ROW
    drawn.append(f'<text class="fp-axis" x="{left:.2f}%" y="{height + 14}">step 1</text>')
    end = left + len(trace.steps) * width
    drawn.append(f'<text class="fp-axis fp-end" x="{end:.2f}%" y="{height + 14}">{len(trace.steps)}</text>')
    title = f'<p class="fp-label">{html.escape(label)}</p>' if label else ""
    svg = (
        f'<svg class="fp-still" role="img" aria-label="{html.escape(description)}" data-left="{left:.2f}" '
        f'data-width="{width:.4f}" width="100%" height="{height + 20}">'
        f"{''.join(drawn)}</svg>"
    )
    return f'<div class="fp-run">{title}{svg}<div class="fp-panels"></div></div>'


def _stretches(trace: Trace, number: int, num_prompt_tokens: int) -> list[tuple[str, int, int]]:
    """Kind, first step and length of each stretch of a sequence's line."""
    found: list[tuple[str, int, int]] = []
    for i, step in enumerate(trace.steps):
        kind = _kind_of(step, number, num_prompt_tokens)
        if found and found[-1][0] == kind and found[-1][1] + found[-1][2] == i:
            found[-1] = (kind, found[-1][1], found[-1][2] + 1)
        elif kind:
            found.append((kind, i, 1))
    return found


def _kind_of(step: TracedStep, number: int, num_prompt_tokens: int) -> str:
    """What a sequence does in a step: it waits, reads (its prompt, or again what it lost), writes, or is not there."""
    first = next((first for other, first, _ in step.work if other == number), None)
    if first is not None:
        return "own" if first >= num_prompt_tokens and number not in step.admitted else "read"
    return "wait" if number in (*step.waiting, *step.swapped, *step.places) else ""
