"""Figures of chapter 10: where the tokens of a text lie, what a pass is made of, and what a block size costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.book.palette import REQUEST_COLORS
from folovllm.book.plotting.style import BLUE, GREEN, GREY, LIGHT, ORANGE, new_figure, token_label
from folovllm.book.recording import name_of
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.request import Sequence as SequenceState


@dataclass(frozen=True)
class Pages:
    """Where an engine keeps its sequences' tokens at one moment."""

    words: dict[str, list[str]]
    """The tokens of each sequence that have a key and a value, as readers see them."""
    tables: dict[str, list[int]]
    """The block table of each sequence."""
    block_size: int
    num_blocks: int

    def owners(self, block_id: int) -> list[str]:
        """The sequences that have the block in their tables."""
        return [name for name, table in self.tables.items() if block_id in table]


def pages_of(engine: LLMEngine) -> Pages:
    """What the cache of an engine holds after its last step."""
    seqs = engine.scheduler.running
    return Pages(
        {
            name_of(seq): [token_label(engine.tokenizer, i) for i in seq.get_token_ids()[: seq.num_computed_tokens]]
            for seq in seqs
        },
        {name_of(seq): list(seq.block_ids) for seq in seqs},
        engine.cache.block_size,
        engine.cache.pool.num_blocks,
    )


def plot_pages(moments: Mapping[str, Pages]) -> np.ndarray:
    """Each sequence's blocks in its own order, and where the table says that they lie: one panel for each moment.

    Args:
        moments: title of the panel -> what the cache held.
    """
    heights = [max(sum(map(len, p.tables.values())) + len(p.tables), p.num_blocks) for p in moments.values()]
    with new_figure(
        0.3 * sum(heights) + 0.75 * len(moments), len(moments), squeeze=False, height_ratios=heights
    ) as axes:
        for ax, height, (title, pages) in zip(axes.flat, heights, moments.items()):
            _draw_pages(ax, pages)
            ax.set(xlim=(-1.0, 2 * pages.block_size + 3.2), ylim=(height - 0.3, -1.7))
            ax.set_title(title)
            ax.axis("off")
        axes[0, 0].figure.alt = " ".join(_tell(title, pages) for title, pages in moments.items())
    return axes


def _tell(title: str, pages: Pages) -> str:
    tables = "; ".join(f"{name}: {table}" for name, table in pages.tables.items())
    shared = [b for b in range(pages.num_blocks) if len(pages.owners(b)) > 1]
    return (
        f"{title.capitalize()}: arrows from the blocks of {len(pages.tables)} texts to {pages.num_blocks} blocks of "
        f"{pages.block_size} slots. Tables {tables}; in several tables: {shared or 'none'}."
    )


def _draw_pages(ax: Axes, pages: Pages) -> None:
    """Sequences on the left, the cache on the right, an arrow for each entry of a table."""
    size, right = pages.block_size, pages.block_size + 2.6
    colors = dict(zip(pages.tables, REQUEST_COLORS))
    contents: dict[int, list[str]] = {}
    ax.text(0, -0.85, "in the text's order", fontsize=10)
    ax.text(right, -0.85, "in the cache", fontsize=10)
    row = 0.0
    for name, table in pages.tables.items():
        for index, block_id in enumerate(table):
            words = pages.words[name][index * size : (index + 1) * size]
            if len(words) >= len(contents.get(block_id, [])):
                contents[block_id] = words
            _draw_block(ax, 0, row, size, words, colors[name], name if index == 0 else "")
            ax.annotate(
                "",
                (right - 0.65, block_id),
                (size + 0.1, row),
                arrowprops={"arrowstyle": "->", "color": colors[name], "shrinkA": 0, "shrinkB": 0, "lw": 1.3},
            )
            row += 1
        row += 0.6
    for block_id in range(pages.num_blocks):
        owners = pages.owners(block_id)
        color = "white" if not owners else colors[owners[0]] if len(owners) == 1 else GREY
        _draw_block(ax, right, block_id, size, contents.get(block_id, []), color, str(block_id))


def _draw_block(ax: Axes, x: float, y: float, size: int, words: Sequence[str], color: str, label: str) -> None:
    """A block of ``size`` slots with words in the first of them, and a label to its left."""
    for slot in range(size):
        filled = slot < len(words)
        box = Rectangle((x + slot, y - 0.42), 1, 0.84, lw=0.8, facecolor=color if filled else "white", edgecolor=GREY)
        ax.add_patch(box)
        if filled:
            letters = "white" if color == BLUE else "#111111"
            ax.text(x + slot + 0.5, y, _short(words[slot]), ha="center", va="center", color=letters, fontsize=9)
    ax.text(x - 0.12, y, label, ha="right", va="center", fontsize=9.5)


def _short(word: str, most: int = 7) -> str:
    return word if len(word) <= most else word[: most - 1] + "…"


@dataclass(frozen=True)
class FlatPass:
    """The tokens of one forward pass, in one row."""

    words: list[str]
    owners: list[str]
    """The sequence of each token."""
    positions: list[int]
    slots: list[int]
    kinds: dict[str, str]
    """What the pass does for each sequence: "decode", "prefill", or which part of a prompt it reads."""
    tables: dict[str, list[int]]


def flat_pass_of(engine: LLMEngine, scheduled: SchedulerOutput) -> FlatPass:
    """What the model is given in a step that has been scheduled; the step is not computed."""
    input_ids, positions, metadata = engine.runner.prepare(scheduled)  # type: ignore[attr-defined]
    pairs = list(zip(scheduled.seqs, scheduled.num_new_tokens))
    return FlatPass(
        words=[token_label(engine.tokenizer, token_id) for token_id in input_ids.tolist()],
        owners=[name_of(seq) for seq, num_new in pairs for _ in range(num_new)],
        positions=positions.tolist(),
        slots=metadata.slot_mapping.tolist(),
        kinds={name_of(seq): _kind(seq, num_new) for seq, num_new in pairs},
        tables={name_of(seq): list(seq.block_ids) for seq in scheduled.seqs},
    )


def _kind(seq: SequenceState, num_new: int) -> str:
    if seq.num_computed_tokens >= seq.get_prompt_len():
        return "decode"
    return "prefill" if num_new == seq.get_len() else "a chunk"


def plot_flat_pass(flat: FlatPass) -> Axes:
    """A pass as the model gets it: tokens in their sequences' colours, positions above them, slots below."""
    names = list(flat.kinds)
    colors = dict(zip(names, REQUEST_COLORS))
    with new_figure(3.3) as ax:
        for i, (word, name) in enumerate(zip(flat.words, flat.owners)):
            ax.add_patch(Rectangle((i, 0), 1, 1.5, facecolor=colors[name], edgecolor="white", lw=1.5))
            letters = "white" if colors[name] == BLUE else "#111111"
            turn = 90 if len(word) > 3 else 0
            ax.text(i + 0.5, 0.75, _short(word, 9), ha="center", va="center", rotation=turn, color=letters, fontsize=10)
            ax.text(i + 0.5, 1.85, str(flat.positions[i]), ha="center", va="center", fontsize=9.5)
            ax.text(i + 0.5, -0.35, str(flat.slots[i]), ha="center", va="center", fontsize=9.5)
        for y, label in ((1.85, "position"), (0.75, "token"), (-0.35, "slot")):
            ax.text(-0.3, y, label, ha="right", va="center", fontsize=10)
        for name in names:
            places = [i for i, owner in enumerate(flat.owners) if owner == name]
            middle = (places[0] + places[-1] + 1) / 2
            table = ", ".join(map(str, flat.tables[name]))
            ax.plot((places[0] + 0.1, places[-1] + 0.9), (2.3, 2.3), color=colors[name], lw=3)
            ax.text(middle, 2.75, f"{name}: {flat.kinds[name]}", ha="center", va="center", fontsize=10)
            ax.text(middle, -1.0, f"blocks\n{table}", ha="center", va="center", fontsize=9.5)
        ax.set(xlim=(-2.4, len(flat.words) + 0.6), ylim=(-1.6, 3.1))
        ax.axis("off")
        parts = "; ".join(
            f"{name}, {flat.kinds[name]}, {flat.owners.count(name)} tokens in blocks {flat.tables[name]}"
            for name in names
        )
        ax.figure.alt = (
            f"A row of {len(flat.words)} tokens with their positions above and their slots below: {parts}. "
            f"The slots are {flat.slots}."
        )
    return ax


def plot_texts_at_once(most: Mapping[int, int], passes: Mapping[int, int]) -> np.ndarray:
    """Texts that run at once, and passes for all of them, against the block size; the memory is always the same.

    Args:
        most: block size in tokens -> most texts in one pass.
        passes: block size in tokens -> passes until the last text has ended.
    """
    places = np.arange(len(most))
    with new_figure(4.6, rows=2, sharex=True) as axes:
        for ax, counts, color, label in zip(axes, (most, passes), (BLUE, GREEN), ("texts at once", "passes")):
            ax.bar(places, list(counts.values()), 0.7, color=color)
            for place, count in zip(places, counts.values()):
                ax.text(place, count, str(count), ha="center", va="bottom", fontsize=10.5)
            ax.set(ylabel=label, ylim=(0, max(counts.values()) * 1.2))
        axes[1].set_xticks(places, [str(size) for size in most])
        axes[1].set_xlabel("tokens per block, in the same memory")
        told = "; ".join(f"{size} tokens per block: {most[size]} texts, {passes[size]} passes" for size in most)
        axes[0].figure.alt = f"Bars of texts at once and of passes against the block size. {told}."
    return axes


def plot_block_size_costs(samples: Mapping[int, Sequence[tuple[int, int, int]]]) -> np.ndarray:
    """What large blocks waste and what small ones cost, on average over texts and steps, against the block size.

    Args:
        samples: block size in tokens -> for each step the texts, their table entries, and their empty slots.
    """
    totals = {size: [sum(column) for column in zip(*steps)] for size, steps in samples.items()}
    entries = {size: total[1] / total[0] for size, total in totals.items()}
    empty = {size: total[2] / total[0] for size, total in totals.items()}
    sizes = list(samples)
    with new_figure(4.8, rows=2, sharex=True) as axes:
        for ax, counts, color, label in zip(
            axes, (empty, entries), (ORANGE, BLUE), ("empty slots\nper text", "table entries\nper text")
        ):
            ax.plot(sizes, list(counts.values()), color=color, lw=2, marker="o")
            ax.set(ylabel=label, ylim=(0, None))
            ax.axvline(16, color=LIGHT, lw=6, zorder=0)
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks(sizes, [str(size) for size in sizes])
        axes[1].minorticks_off()
        axes[1].set_xlabel("tokens per block")
        ends = [f"{size}: {empty[size]:.3g} empty slots, {entries[size]:.3g} table entries" for size in sizes]
        axes[0].figure.alt = f"Two lines against the tokens per block, on average for each text. {'; '.join(ends)}."
    return axes
