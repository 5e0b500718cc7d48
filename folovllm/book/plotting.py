"""The figures of the book: each is one call in a notebook, and returns its Axes so that tests can read it.

They share one style: a white card that stays white on a dark page, type that is legible at the width of a phone,
and the colours of Okabe and Ito (2008), which readers with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

# A notebook's backend is set up at its first use, and turns interactive mode on. Inside `_figure`'s context that would
# be undone at the end, and no figure after the first would be shown; so it is set up here.
plt.switch_backend(plt.get_backend())

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW)
LIGHT = "#D9D9D9"
DARK_RED = "#B55000"
"""`RED` for letters: on white it has a contrast of 5.1, where `RED` has 3.9."""

STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "legend.frameon": False,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def _figure(height: float = 3.6, rows: int = 1, **kwargs: Any) -> Iterator[Any]:
    """New Axes in the book's style: one, or an array of ``rows``."""
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(rows, 1, figsize=(6.4, height), **kwargs)
        yield axes


def _label(tokenizer: Any, token_id: int) -> str:
    """A token as readers see it: spaces as ``␣``, new lines as ``⏎``; its id where the font may lack the letters."""
    text = tokenizer.decode([token_id])
    shown = text.replace(" ", "␣").replace("\n", "⏎")
    if not text.isascii() or not text.strip() or not shown.isprintable():
        return f"#{token_id}"
    # Dollars would begin a formula.
    return shown.replace("$", r"\$")


def _values(values: Any) -> np.ndarray:
    """Numbers from a tensor on any device, or from a list."""
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)


PATH = ("text", "tokenizer", "Request", "scheduler", "model", "sampler", "detokenizer", "RequestOutput")
"""The way from a prompt to its answer."""


def plot_path(*here: str, told_by: str | None = None) -> Axes:
    """The way from prompt to answer, with the stations of a chapter filled in.

    Args:
        here: stations out of `PATH`.
        told_by: text above the path, for what governs all of it.
    """
    dark = "#333333"
    arrow = {"arrowstyle": "->", "color": dark, "shrinkA": 0, "shrinkB": 0}
    # Two rows, there and back: eight stations in one row are too small for a phone.
    places = [(i, 0.0) if i < 4 else (7 - i, -1.0) for i in range(len(PATH))]
    with _figure(2.6) as ax:
        for i, (station, (x, y)) in enumerate(zip(PATH, places)):
            inside = station in here
            box = FancyBboxPatch((x - 0.4, y - 0.22), 0.8, 0.44, boxstyle="round,pad=0.02", lw=1.5)
            box.set(facecolor=BLUE if inside else "white", edgecolor=BLUE if inside else GREY)
            ax.add_patch(box)
            weight = "bold" if inside else "normal"
            ax.text(x, y, station, ha="center", va="center", color="white" if inside else dark, size=11, weight=weight)
            if i in (0, 1, 2):
                ax.annotate("", (x + 0.57, y), (x + 0.43, y), arrowprops=arrow)
            if i in (4, 5, 6):
                ax.annotate("", (x - 0.57, y), (x - 0.43, y), arrowprops=arrow)
        ax.annotate("", (3.15, -0.75), (3.15, -0.25), arrowprops=arrow)
        ax.annotate("", (2.75, -0.25), (2.1, -0.75), arrowprops={**arrow, "color": RED})
        ax.text(2.3, -0.5, "each new token goes back in", ha="right", va="center", color=DARK_RED, size=11)
        ax.set(xlim=(-0.5, 3.5), ylim=(-1.3, 0.95 if told_by else 0.35))
        if told_by:
            banner = {"facecolor": BLUE, "edgecolor": BLUE, "boxstyle": "round,pad=0.4"}
            ax.text(1.5, 0.65, told_by, ha="center", va="center", color="white", weight="bold", bbox=banner)
        ax.axis("off")
    return ax


def plot_token_bars(series: Mapping[str, Tensor], tokenizer: Any, top: int = 10) -> Axes:
    """Probabilities ``[vocab_size]`` of the likeliest tokens, one bar per series; the first decides the order."""
    first = next(iter(series.values()))
    token_ids = first.topk(top).indices.tolist()
    with _figure(0.9 + 0.33 * top) as ax:
        width = 0.8 / len(series)
        for i, (name, probs) in enumerate(series.items()):
            places = np.arange(top) + (i - (len(series) - 1) / 2) * width
            ax.barh(places, _values(probs[token_ids]), width, label=name, color=PALETTE[i])
        ax.set(yticks=range(top), yticklabels=[_label(tokenizer, t) for t in token_ids], xlabel="probability")
        ax.invert_yaxis()
        if len(series) > 1:
            ax.legend(loc="lower right")
    return ax


def plot_temperatures(probs: Mapping[float, Tensor], tokenizer: Any, top: int = 6) -> Axes:
    """How each temperature shares out the probability ``[vocab_size]``: one bar each, cut into the likeliest tokens."""
    token_ids = next(iter(probs.values())).topk(top).indices.tolist()
    names = [_label(tokenizer, t) for t in token_ids]
    with _figure(1.6 + 0.5 * len(probs)) as ax:
        left = np.zeros(len(probs))
        shares = np.stack([_values(p[token_ids]) for p in probs.values()])  # [num_temperatures, top]
        for name, color, share in zip(names, PALETTE, shares.T):
            ax.barh(range(len(probs)), share, left=left, color=color, label=name, edgecolor="white")
            left += share
        ax.barh(range(len(probs)), 1 - left, left=left, color=LIGHT, label="all others", edgecolor="white")
        ax.set(yticks=range(len(probs)), yticklabels=[f"T = {t:g}" for t in probs], xlim=(0, 1), xlabel="probability")
        ax.invert_yaxis()
        # Passed explicitly, since matplotlib leaves out labels that begin with an underscore.
        ax.legend(
            ax.containers,
            [*names, "all others"],
            loc="lower center",
            bbox_to_anchor=(0.45, 1),
            ncols=4,
            fontsize=10.5,
            columnspacing=1,
            handlelength=1,
        )
    return ax


def plot_entropy(temperatures: Sequence[float], entropies: Sequence[float], limit: float) -> Axes:
    """Entropy in nats against temperature, and the ``limit`` that equal probabilities would have."""
    with _figure() as ax:
        ax.plot(temperatures, entropies, marker="o")
        ax.axhline(limit, color=GREY, ls="--")
        ax.text(temperatures[0], limit, "every token equally likely", va="bottom", color="#555555")
        ax.set(xlabel="temperature", ylabel="entropy (nats)", ylim=(0, limit * 1.15))
    return ax


def plot_kept(probs: Tensor, kept: Mapping[str, Tensor], tokenizer: Any, top: int = 14) -> np.ndarray:
    """What each filter keeps of a distribution ``[vocab_size]``: one panel each, kept tokens filled, others hollow."""
    token_ids = probs.topk(top).indices
    heights = _values(probs[token_ids])
    with _figure(0.9 + 1.45 * len(kept), rows=len(kept), sharex=True, sharey=True) as axes:
        for ax, (name, mask), color in zip(np.atleast_1d(axes), kept.items(), PALETTE):
            stays = mask[token_ids].cpu().numpy()
            ax.bar(range(top), heights, color=[color if s else "white" for s in stays], edgecolor=color, lw=1.2)
            ax.set_title(f"{name}: keeps {int(mask.sum())} of {len(mask):,}", fontsize=12)
        labels = [_label(tokenizer, t) for t in token_ids.tolist()]
        np.atleast_1d(axes)[-1].set_xticks(range(top), labels, rotation=60, ha="right", rotation_mode="anchor")
    return axes


def plot_inverse_cdf(probs: Tensor, uniform: float, tokenizer: Any) -> Axes:
    """The cumulative distribution of ``[vocab_size]`` over its possible tokens, the number drawn, the token it hits."""
    token_ids = probs.nonzero().flatten()
    own = _values(probs[token_ids])
    cumulative = np.cumsum(own)
    hit = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    labels = [_label(tokenizer, t) for t in token_ids.tolist()]
    with _figure(3.8) as ax:
        places = range(len(labels))
        ax.bar(places, cumulative - own, color=LIGHT, width=0.96, label="all tokens before it")
        colors = [ORANGE if place == hit else BLUE for place in places]
        ax.bar(places, own, bottom=cumulative - own, color=colors, width=0.96, label="its own probability")
        ax.annotate("", (hit, uniform), (-0.6, uniform), arrowprops={"arrowstyle": "->", "color": RED, "lw": 2})
        ax.text(-0.55, uniform + 0.02, f"u = {uniform:.3f}", color=DARK_RED, weight="bold")
        ax.set(ylabel="cumulative probability", xlim=(-0.6, len(labels) - 0.4))
        ax.set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor")
        ax.get_xticklabels()[hit].set(color=DARK_RED, weight="bold")
    return ax


def plot_draws(probs: Tensor, token_ids: Sequence[int], tokenizer: Any, top: int = 10) -> Axes:
    """How often each token was drawn, beside how often it should have been on average."""
    likeliest = probs.topk(top).indices.tolist()
    counts = [list(token_ids).count(t) for t in likeliest]
    expected = _values(probs[likeliest]) * len(token_ids)
    with _figure(3.4) as ax:
        ax.bar(range(top), counts, color=SKY, label=f"drawn, of {len(token_ids):,}")
        # Two standard deviations of a count: about 19 of 20 bars should end inside.
        spread = 2 * np.sqrt(expected * (1 - _values(probs[likeliest])))
        ax.errorbar(
            range(top), expected, spread, fmt="o", color=RED, capsize=4, label="expected, ±2 standard deviations"
        )
        ax.set(ylabel="times drawn")
        ax.set_xticks(
            range(top), [_label(tokenizer, t) for t in likeliest], rotation=60, ha="right", rotation_mode="anchor"
        )
        ax.legend()
    return ax


GIB = 2**30


def plot_memory_split(
    total_gib: float, utilizations: Sequence[float], weight_bytes: int, bytes_per_token: int, block_size: int
) -> Axes:
    """A GPU's memory by part at each ``gpu_memory_utilization``, and the tokens that the KV cache has room for."""
    weights = weight_bytes / GIB
    usable = np.array(utilizations) * total_gib
    # Weights that do not fit leave no cache; the bar shows by how much they exceed the memory.
    cache = np.maximum(usable - weights, 0)
    block_bytes = bytes_per_token * block_size
    tokens = (cache * GIB // block_bytes).astype(int) * block_size
    with _figure(4.2) as ax:
        places = range(len(utilizations))
        ax.bar(places, [weights] * len(utilizations), color=GREY, label="weights")
        ax.bar(places, cache, bottom=weights, color=BLUE, label="KV cache")
        rest = total_gib - weights - cache
        ax.bar(places, rest, bottom=weights + cache, color="white", edgecolor=GREY, hatch="//", label="left to others")
        for place, count in enumerate(tokens):
            says = f"{count:,}\ntokens" if count else "does\nnot fit"
            ax.text(
                place,
                total_gib * 1.02,
                says,
                ha="center",
                va="bottom",
                fontsize=10.5,
                color=BLUE if count else DARK_RED,
            )
        ax.set(xlabel="gpu_memory_utilization", ylabel="GiB", ylim=(0, total_gib * 1.2))
        ax.set_xticks(places, [f"{u:g}" for u in utilizations])
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, fontsize=10.5, handlelength=1.2)
    return ax


def plot_block_waste(lengths: Sequence[int], block_sizes: Sequence[int]) -> Axes:
    """Of the slots reserved for sequences of ``lengths`` tokens, the share that holds a token, at each block size."""
    reserved = np.array([sum(-(-length // size) * size for length in lengths) for size in block_sizes])
    used = sum(lengths) / reserved
    with _figure(3.4) as ax:
        places = range(len(block_sizes))
        ax.bar(places, used, color=BLUE, label="hold a token")
        ax.bar(places, 1 - used, bottom=used, color=ORANGE, label="reserved and empty")
        for place, share in enumerate(used):
            ax.text(place, 1.01, f"{1 - share:.0%}", ha="center", va="bottom", fontsize=11)
        ax.set(xlabel="block_size (tokens)", ylabel="share of the slots")
        ax.set_xticks(places, [f"{size:,}" for size in block_sizes])
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2)
    return ax


def plot_dtype_errors(errors: Mapping[str, Tensor]) -> Axes:
    """How far the probabilities of a text's tokens move in each dtype: ``{name: |p - p in float32|  [num_tokens]}``."""
    with _figure(3.4) as ax:
        for i, (name, error) in enumerate(errors.items()):
            ax.plot(range(1, len(error) + 1), _values(error), "o", ms=4.5, color=PALETTE[i], label=name)
        ax.set(yscale="log", xlabel="token of the text", ylabel="error of its probability")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=len(errors))
    return ax


STATUS_COLORS = {
    "waiting": YELLOW,
    "running": BLUE,
    "swapped": PURPLE,
    "finished_stopped": GREEN,
    "finished_length_capped": ORANGE,
    "finished_aborted": RED,
    "finished_ignored": LIGHT,
}
"""One colour per `SequenceStatus`, the same in every figure."""


def plot_state_machine() -> Axes:
    """The states of a sequence, and what moves it from one to the next."""
    places = {"waiting": (0, 0), "running": (1.5, 0), "swapped": (1.5, -1.15)}
    ends = ("finished_stopped", "finished_length_capped", "finished_aborted", "finished_ignored")
    reasons = ("end token or stop text", "max_tokens reached", "user gone, or an error", "not among the n best")
    dark = "#333333"

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str, at: tuple[float, float]) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": dark, "shrinkA": 0, "shrinkB": 0})
        ax.text(*at, text, ha="center", va="center", fontsize=9.5, color=dark)

    with _figure(3.7) as ax:
        for i, (end, reason) in enumerate(zip(ends, reasons)):
            places[end] = (3.35, 0.55 - 0.62 * i)
            ax.text(3.35, places[end][1] - 0.25, reason, ha="center", va="center", fontsize=9, color="#555555")
        for name, (x, y) in places.items():
            width = 1.1 if name in ends else 0.76
            box = FancyBboxPatch((x - width / 2, y - 0.12), width, 0.24, boxstyle="round,pad=0.03", lw=1.5)
            box.set(facecolor="white", edgecolor=STATUS_COLORS[name] if name != "finished_ignored" else GREY)
            ax.add_patch(box)
            ax.text(
                x, y, name.replace("finished_", "").replace("_", " ").upper(), ha="center", va="center", fontsize=9.5
            )
        arrow((0.43, 0.05), (1.07, 0.05), "scheduled", (0.75, 0.2))
        arrow((1.07, -0.05), (0.43, -0.05), "preempted", (0.75, -0.22))
        arrow((1.4, -0.17), (1.4, -0.98), "swapped\nout", (1.0, -0.58))
        arrow((1.6, -0.98), (1.6, -0.17), "swapped\nin", (2.0, -0.58))
        arrow((1.93, 0.05), (2.72, 0.4), "finished", (2.2, 0.4))
        ax.add_patch(FancyBboxPatch((2.76, -1.62), 1.18, 2.37, boxstyle="round,pad=0.02", fill=False, ls="--", ec=GREY))
        ax.set(xlim=(-0.5, 4.05), ylim=(-1.75, 0.85))
        ax.axis("off")
    return ax


def plot_timeline(statuses: Mapping[str, Sequence[str]]) -> Axes:
    """The status of each sequence at each step, as coloured bars along time: ``{seq_id: [status, …]}``."""
    with _figure(1.5 + 0.42 * len(statuses)) as ax:
        for row, history in enumerate(statuses.values()):
            start = 0
            for status, stretch in itertools.groupby(history):
                length = len(list(stretch))
                ax.barh(row, length, left=start, color=STATUS_COLORS[status], edgecolor="white", height=0.7)
                start += length
        present = [s for s in STATUS_COLORS if any(s in history for history in statuses.values())]
        for status in present:
            ax.barh(0, 0, color=STATUS_COLORS[status], label=status.replace("finished_", "").replace("_", " "))
        ax.set(yticks=range(len(statuses)), yticklabels=list(statuses), xlabel="step")
        ax.invert_yaxis()
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=len(present), fontsize=10.5, handlelength=1)
    return ax


def plot_cumulative_logprobs(logprobs: Mapping[str, Sequence[float]]) -> Axes:
    """The sum of each sequence's log probabilities, token by token."""
    with _figure(3.6) as ax:
        for (name, values), color in zip(logprobs.items(), PALETTE):
            ax.step(range(1, len(values) + 1), np.cumsum(values), where="post", label=name, color=color, lw=2)
        ax.set(xlabel="tokens generated", ylabel="cumulative log probability")
        ax.legend(loc="lower left", fontsize=10.5)
    return ax


def plot_fork_blocks(prompt_len: int, output_len: int, block_size: int, num_seqs: Sequence[int]) -> Axes:
    """Blocks that ``n`` answers to one prompt take: each with a copy of the prompt, and sharing it."""
    total = -(-(prompt_len + output_len) // block_size)
    shared = prompt_len // block_size  # full blocks of the prompt; the one that is partly full is written to, so copied
    copied = [n * total for n in num_seqs]
    forked = [shared + n * (total - shared) for n in num_seqs]
    with _figure(3.4) as ax:
        places = np.arange(len(num_seqs))
        ax.bar(places - 0.2, copied, 0.4, color=ORANGE, label="a copy each")
        ax.bar(places + 0.2, forked, 0.4, color=BLUE, label="prompt's full blocks shared")
        for place, a, b in zip(places, copied, forked):
            ax.text(place - 0.2, a, str(a), ha="center", va="bottom", fontsize=10.5)
            ax.text(place + 0.2, b, str(b), ha="center", va="bottom", fontsize=10.5)
        ax.set(xlabel="answers (n)", ylabel=f"blocks of {block_size}", ylim=(0, max(copied) * 1.12))
        ax.set_xticks(places, [str(n) for n in num_seqs])
        ax.legend(loc="upper left")
    return ax


KINDS = {"embedding": PURPLE, "attention": BLUE, "MLP": ORANGE, "norms": GREEN}
"""Kinds of weight, and their colours."""


def kind_of_weight(name: str) -> str:
    """Which of `KINDS` a weight is, by its name in the checkpoint."""
    if "embed" in name or "lm_head" in name:
        return "embedding"
    if "norm" in name:
        return "norms"
    return "attention" if "attn" in name else "MLP"


def plot_weights_by_layer(model: Any) -> Axes:
    """Bytes of a model's weights, layer by layer and by kind."""
    layers: dict[str, dict[str, int]] = {}
    for name, weight in model.named_parameters():
        digits = [part for part in name.split(".") if part.isdigit()]
        layer = digits[0] if digits else "outside"
        kinds = layers.setdefault(layer, dict.fromkeys(KINDS, 0))
        kinds[kind_of_weight(name)] += weight.nbytes
    with _figure(3.6) as ax:
        bottom = np.zeros(len(layers))
        for kind, color in KINDS.items():
            heights = np.array([kinds[kind] for kinds in layers.values()]) / 2**10
            ax.bar(range(len(layers)), heights, bottom=bottom, color=color, label=kind)
            bottom += heights
        ax.set(xlabel="layer", ylabel="KiB", xticks=range(len(layers)), xticklabels=list(layers))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, fontsize=10.5, handlelength=1.2)
    return ax


def plot_weights_by_dtype(models: Mapping[str, Any], bits: Mapping[str, float]) -> np.ndarray:
    """GiB of each model's weights by kind, one panel per model, in formats of so many bits per weight."""
    with _figure(0.7 + 1.15 * len(models), rows=len(models)) as axes:
        for ax, (name, model) in zip(np.atleast_1d(axes), models.items()):
            counts = dict.fromkeys(KINDS, 0)
            for weight_name, weight in model.named_parameters():
                counts[kind_of_weight(weight_name)] += weight.numel()
            left = np.zeros(len(bits))
            for kind, color in KINDS.items():
                widths = counts[kind] * np.array(list(bits.values())) / 8 / GIB
                ax.barh(range(len(bits)), widths, left=left, color=color, label=kind)
                left += widths
            for row, total in enumerate(left):
                ax.text(total, row, f" {total:.1f}", va="center", fontsize=10.5)
            ax.set(yticks=range(len(bits)), yticklabels=list(bits), xlim=(0, max(left) * 1.12))
            ax.set_title(f"{name}: {sum(counts.values()) / 1e9:.2f} billion weights", fontsize=12)
            ax.invert_yaxis()
        axes = np.atleast_1d(axes)
        axes[-1].set_xlabel("GiB")
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.45, 1.3), ncols=4, fontsize=10.5, handlelength=1.2)
    return axes


def plot_measured_against_predicted(predicted: Sequence[float], measured: Mapping[str, Sequence[float]]) -> Axes:
    """Measured memory of loaded checkpoints, one series a moment, against the prediction, in MiB."""
    with _figure(3.8) as ax:
        top = max([*predicted, *(value for values in measured.values() for value in values)]) * 1.1
        ax.plot([0, top], [0, top], color=GREY, ls="--", label="measured = predicted")
        for (moment, values), color, marker in zip(measured.items(), (ORANGE, BLUE), "so"):
            ax.plot(predicted, values, marker, ms=9, color=color, label=moment)
        ax.set(
            xlabel="predicted from the header (MiB)", ylabel="measured (MiB)", xlim=(0, top), ylim=(-0.03 * top, top)
        )
        ax.legend(loc="upper left")
    return ax


def plot_kv_capacity(
    bytes_per_token: Mapping[str, int], weights: Mapping[str, int], gpu_gib: float, length: int
) -> Axes:
    """KV bytes per token of each model, and the sequences of ``length`` tokens that a GPU holds beside the weights."""
    names = list(bytes_per_token)
    fit = {
        name: max(int((0.9 * gpu_gib * GIB - weights[name]) // (bytes_per_token[name] * length)), 0) for name in names
    }
    with _figure(1.2 + 0.5 * len(names)) as ax:
        values = [bytes_per_token[name] / 2**10 for name in names]
        ax.barh(range(len(names)), values, color=BLUE)
        for row, name in enumerate(names):
            loaded = weights[name] <= 0.9 * gpu_gib * GIB
            says = (
                f" {fit[name]:,} sequences fit"
                if fit[name]
                else f" {'no sequence fits' if loaded else 'weights do not fit'}"
            )
            ax.text(
                values[row],
                row,
                says,
                va="center",
                fontsize=11,
                color="#333333" if says.endswith("sequences fit") else DARK_RED,
            )
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel="KV cache, KiB a token", xlim=(0, max(values) * 1.6))
        ax.invert_yaxis()
    return ax


def plot_tokens_computed(without_cache: Sequence[int], with_cache: Sequence[int]) -> Axes:
    """Tokens computed by each forward pass, added up: without a KV cache and with one."""
    with _figure(3.6) as ax:
        for name, counts, color in (("without a cache", without_cache, RED), ("with a cache", with_cache, BLUE)):
            totals = np.cumsum(counts)
            ax.plot(range(1, len(counts) + 1), totals, color=color, lw=2.5)
            ax.text(
                len(counts),
                totals[-1],
                f" {name}:\n {totals[-1]:,}",
                color=DARK_RED if color == RED else color,
                va="center",
                fontsize=11,
            )
        ax.set(xlabel="tokens generated", ylabel="tokens computed, added up", xlim=(0, len(without_cache) * 1.4))
    return ax


def plot_step_times(without_cache: Sequence[float], with_cache: Sequence[float]) -> Axes:
    """Time of each forward pass as a multiple of the median cached one; the first reads the whole prompt (prefill)."""
    unit = float(np.median(with_cache[1:]))
    with _figure(3.6) as ax:
        for name, times, color in (("without a cache", without_cache, RED), ("with a cache", with_cache, BLUE)):
            ax.plot(range(1, len(times) + 1), np.array(times) / unit, ".", color=color, label=name, ms=5)
        ax.plot(1, with_cache[0] / unit, "o", ms=10, mfc="none", mec=BLUE, mew=2, label="prefill")
        ax.set(xlabel="forward pass", ylabel="time (median decode step = 1)", ylim=(0, None))
        ax.legend(loc="upper left")
    return ax


def plot_product_times(rows: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Axes:
    """Time of a product with a weight against the rows of the other side, one line for each way to compute it."""
    with _figure(3.6) as ax:
        for (name, times), color in zip(seconds.items(), PALETTE):
            ax.plot(rows, 1000 * np.array(times), "o-", color=color, label=name)
        ax.set(xlabel="rows", ylabel="time (ms)", ylim=(0, None))
        ax.set_xscale("log", base=2)
        ax.set_xticks(rows, [str(n) for n in rows])
        ax.legend(loc="upper left")
    return ax


def plot_along_text(values: Mapping[str, Sequence[float]], ylabel: str, choices: Sequence[int] = ()) -> Axes:
    """Numbers along a text, one per token; ``choices`` marks the tokens at which the grammar had a choice."""
    with _figure(3.2) as ax:
        for place in choices:
            ax.axvspan(place - 0.5, place + 0.5, color=YELLOW, alpha=0.45, lw=0)
        for (name, series), color in zip(values.items(), PALETTE):
            ax.plot(range(len(series)), series, "o-", color=color, ms=3.5, lw=1, label=name)
        ax.set(xlabel="token of the text", ylabel=ylabel)
        if len(values) > 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(values))
    return ax


def plot_steps(steps: Sequence[Any]) -> Axes:
    """Tokens that each step computed, prefill and decode one on the other: ``LLMEngine.stats()``."""
    with _figure(3.2) as ax:
        decodes = np.array([step.num_decode_tokens for step in steps])
        prefills = np.array([step.num_prefill_tokens for step in steps])
        ax.bar(range(len(steps)), decodes, width=1, color=BLUE, label="decode")
        ax.bar(range(len(steps)), prefills, bottom=decodes, width=1, color=ORANGE, label="prefill")
        ax.set(xlabel="step", ylabel="tokens computed", xlim=(-0.5, len(steps) - 0.5))
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def plot_running(runs: Mapping[str, Sequence[Any]]) -> Axes:
    """How many sequences each step of each run computed: ``{name: LLMEngine.stats()}``."""
    with _figure(3.2) as ax:
        for color, (name, steps) in zip(PALETTE, runs.items()):
            ax.step(
                range(len(steps) + 1), [*(s.num_seqs for s in steps), 0], where="post", color=color, label=name, lw=2
            )
        ax.set(xlabel="step", ylabel="sequences in the step", ylim=(0, None))
        ax.legend(ncols=len(runs), loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def plot_block_tables(tables: Sequence[Mapping[str, Sequence[int]]], num_blocks: int) -> Axes:
    """The cache after each step, one row per step and one square per block, with its owner's name and colour."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    with _figure(1.1 + 0.42 * len(tables)) as ax:
        for row, table in enumerate(tables):
            owners: dict[int, list[str]] = {block_id: [] for block_id in range(num_blocks)}
            for name, block_ids in table.items():
                for block_id in block_ids:
                    owners[block_id].append(name)
            for block_id, who in owners.items():
                color = PALETTE[names.index(who[0]) % len(PALETTE)] if who else "white"
                ax.barh(row, 0.92, left=block_id + 0.04, height=0.86, color=color, edgecolor=GREY, linewidth=0.8)
                ax.text(
                    block_id + 0.5,
                    row,
                    "+".join(who),
                    ha="center",
                    va="center",
                    fontsize=10,
                    color="white" if color in (BLUE, GREEN, RED) else "black",
                )
        ax.set(
            xlim=(0, num_blocks),
            xticks=[i + 0.5 for i in range(num_blocks)],
            xticklabels=range(num_blocks),
            xlabel="block",
            yticks=range(len(tables)),
            ylabel="step",
        )
        ax.invert_yaxis()
    return ax


def plot_reserved(seq_lens: Sequence[Sequence[int]], block_sizes: Mapping[str, int]) -> Axes:
    """Slots reserved after each step for each block size, and slots that hold a token: ``seq_lens[step]`` in tokens."""
    with _figure(3.4) as ax:
        for color, (name, size) in zip((RED, BLUE, *PALETTE[2:]), block_sizes.items()):
            reserved = [sum(-(-length // size) * size for length in lens) for lens in seq_lens]
            ax.plot(reserved, color=color, lw=2, label=name)
        ax.fill_between(range(len(seq_lens)), [sum(lens) for lens in seq_lens], color=LIGHT, label="hold a token")
        ax.set(xlabel="step", ylabel="slots of the cache", ylim=(0, None), xlim=(0, len(seq_lens) - 1))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
    return ax
