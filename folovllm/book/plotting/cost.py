"""Figures of chapter 7: how long a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.book.plotting.style import BLUE, GREY, LIGHT, ORANGE, PALETTE, RED, new_figure
from folovllm.simulator.cost import Roofline

DARK = "#333333"


def plot_machine(roofline: Roofline, num_cached_tokens: int) -> Axes:
    """What a step reads and where: memory with weights and keys and values, the way from it, and the arithmetic.

    Args:
        roofline: a model on a card.
        num_cached_tokens: whose keys and values lie in memory, as an example.
    """
    gpu, shape = roofline.gpu, roofline.shape
    weights, kv = shape.num_bytes, roofline.kv_bytes(num_cached_tokens)
    parts = (("weights", weights, BLUE, "white"), ("keys, values", kv, ORANGE, "#111111"))
    with new_figure(3.4) as ax:
        ax.add_patch(Rectangle((0, 0), 2, 1, facecolor="white", edgecolor=DARK, lw=1.5))
        bottom = 0.0
        for name, size, color, letters in parts:
            height = size / gpu.memory
            ax.add_patch(Rectangle((0, bottom), 2, height, facecolor=color, edgecolor="none"))
            ax.text(1, bottom + height / 2, f"{name}: {size / 1e9:.1f} GB", ha="center", va="center", color=letters)
            bottom += height
        ax.text(1, 1.03, f"memory: {gpu.memory / 2**30:.0f} GiB = {gpu.memory / 1e9:.0f} GB", ha="center", va="bottom")
        arrow = {"arrowstyle": "-|>", "color": DARK, "lw": 3, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (4.4, 0.5), (2.1, 0.5), arrowprops=arrow)
        ax.text(3.2, 0.55, f"{gpu.bandwidth / 1e12:.2f} TB/s", ha="center", va="bottom")
        ax.text(3.2, 0.45, "every step,\nall over again", ha="center", va="top", size=10, color=DARK)
        ax.add_patch(Rectangle((4.5, 0.28), 1.7, 0.44, facecolor="white", edgecolor=DARK, lw=1.5))
        ax.text(5.35, 0.5, f"arithmetic\n{gpu.flops / 1e12:.0f} TFLOP/s", ha="center", va="center")
        ax.set(xlim=(-0.1, 6.3), ylim=(-0.05, 1.2))
        ax.axis("off")
        ax.figure.alt = (
            f"Diagram of a card: memory of {gpu.memory / 1e9:.0f} GB with {weights / 1e9:.1f} GB of weights and "
            f"{kv / 1e9:.1f} GB of keys and values, an arrow of {gpu.bandwidth / 1e12:.2f} TB/s to the arithmetic, "
            f"which does {gpu.flops / 1e12:.0f} TFLOP/s."
        )
    return ax


def plot_cost_ratio(
    xs: Sequence[int], costs: Mapping[str, Sequence[float]], xlabel: str, mark: tuple[str, float] | None = None
) -> Axes:
    """How many times as long each takes as its first, measured and predicted, along a logarithmic axis.

    Args:
        xs: tokens, say.
        costs: name -> seconds at each of ``xs``; a name that begins with "predicted" becomes a line, others dots.
        xlabel: what ``xs`` are.
        mark: a name and a place for a dashed line.
    """
    ratios = {name: np.array(values) / values[0] for name, values in costs.items()}
    with new_figure(3.8) as ax:
        line_styles = iter(("-", "--", ":"))
        for (name, values), color in zip(ratios.items(), PALETTE):
            if name.startswith("predicted"):
                ax.plot(xs, values, next(line_styles), color=GREY, lw=2, label=name)
            else:
                ax.plot(xs, values, "o", color=color, ms=7, label=name)
        if mark:
            ax.axvline(mark[1], color=RED, ls="--", lw=1.2, label=mark[0])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=10)
        top = max(values.max() for values in ratios.values())
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= 1.5 * top]
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel=f"time (at {xs[0]:,} = 1)")
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5)
        ends = "; ".join(f"{name} {values[-1]:.3g} times" for name, values in ratios.items())
        ax.figure.alt = f"Time against {xlabel}, from {xs[0]:,} to {xs[-1]:,}, each as a multiple of its first: {ends}."
    return ax


def plot_roofline(flops: float, bandwidth: float, dots: Mapping[str, tuple[float, float]]) -> Axes:
    """The roof, FLOPs per second against FLOPs per byte, and below it what different kinds of work reach.

    Args:
        flops: peak of the card, per second.
        bandwidth: of its memory, bytes per second.
        dots: name -> FLOPs per byte, and FLOPs per second reached.
    """
    ridge = flops / bandwidth
    xs = np.geomspace(0.5, 8 * ridge, 200)
    with new_figure(4.2) as ax:
        ax.plot(xs, np.minimum(flops, xs * bandwidth) / 1e12, color=DARK, lw=2)
        ax.axvline(ridge, color=RED, ls="--", lw=1.2)
        ax.text(ridge * 0.9, 0.7, f"ridge: {ridge:.0f}", ha="right", va="bottom", color=DARK, size=11)
        for (name, (intensity, reached)), color in zip(dots.items(), PALETTE):
            ax.plot(intensity, reached / 1e12, "o", ms=10, color=color, label=name)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        ax.minorticks_off()
        ax.set(xlabel="FLOPs per byte read", ylabel="TFLOP/s", ylim=(0.6, 2.5 * flops / 1e12))
        ax.legend(loc="upper left", fontsize=10.5, handlelength=1)
        ax.figure.alt = (
            f"Roof of {flops / 1e12:.0f} TFLOP/s that is reached from {ridge:.0f} FLOPs per byte on, and dots: "
            + "; ".join(f"{name}: {x:,.0f} FLOPs per byte, {y / 1e12:.3g} TFLOP/s" for name, (x, y) in dots.items())
            + "."
        )
    return ax


def plot_step_parts(contexts: Sequence[int], parts: Mapping[str, Sequence[float]]) -> Axes:
    """What a step is made of, stacked, against the tokens that each sequence has in the cache: seconds of each part."""
    colors = (BLUE, ORANGE, LIGHT)
    with new_figure(3.6) as ax:
        stacked = [1000 * np.array(values) for values in parts.values()]
        ax.stackplot(contexts, stacked, labels=list(parts), colors=colors[: len(parts)])
        ax.set(xlabel="tokens in the cache of each sequence", ylabel="time of a step (ms)")
        ax.set(xlim=(contexts[0], contexts[-1]), ylim=(0, None))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        first, second = stacked[:2]
        if first[0] > second[0] and first[-1] < second[-1]:
            equal = float(np.interp(0, second - first, contexts))
            ax.axvline(equal, color=DARK, ls="--", lw=1.2)
            ax.text(equal, 0.4, f"equal at {equal:,.0f} ", ha="right", va="bottom", color="white", size=11)
        ax.legend(ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1), fontsize=10.5, handlelength=1.2)
        shown = "; ".join(f"{name} {v[0]:.3g} and {v[-1]:.3g} ms" for name, v in zip(parts, stacked))
        ax.figure.alt = f"Stacked areas of a step's parts, at {contexts[0]:,} and at {contexts[-1]:,} tokens: {shown}."
    return ax


def plot_throughput(batches: Mapping[str, Sequence[int]], tokens_per_second: Mapping[str, Sequence[float]]) -> Axes:
    """Tokens per second against the sequences in a step.

    Args:
        batches: name -> numbers of sequences.
        tokens_per_second: name -> tokens of all of them together, per second.
    """
    with new_figure(3.8) as ax:
        for (name, xs), color in zip(batches.items(), PALETTE):
            ax.plot(xs, tokens_per_second[name], "o-", color=color, ms=4, lw=2, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        longest = max(batches.values(), key=lambda xs: xs[-1])
        marked = [x for x in longest if x & (x - 1) == 0 and x.bit_length() % 2]
        ax.set_xticks(marked, [f"{x:,}" for x in marked])
        ax.set_yticks([100, 1000, 10_000, 100_000], ["100", "1,000", "10,000", "100,000"])
        ax.minorticks_off()
        ax.set(xlabel="sequences in a step", ylabel="tokens per second")
        ax.legend(loc="upper left", fontsize=10.5)
        ends = "; ".join(f"{name}: {tokens_per_second[name][-1]:,.0f} with {xs[-1]:,}" for name, xs in batches.items())
        ax.figure.alt = f"Lines of tokens per second against sequences in a step. At their ends: {ends}."
    return ax
