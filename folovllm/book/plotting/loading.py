"""Figures of chapter 4: weights and the cache, by their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from folovllm.book.plotting.configs import GIB
from folovllm.book.plotting.style import BLUE, DARK_RED, GREEN, GREY, ORANGE, PURPLE, new_figure

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
    with new_figure(3.6) as ax:
        bottom = np.zeros(len(layers))
        for kind, color in KINDS.items():
            heights = np.array([kinds[kind] for kinds in layers.values()]) / 2**10
            ax.bar(range(len(layers)), heights, bottom=bottom, color=color, label=kind)
            bottom += heights
        ax.set(xlabel="layer", ylabel="KiB", xticks=range(len(layers)), xticklabels=list(layers))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, fontsize=10.5, handlelength=1.2)
        totals = ", ".join(f"{height:,.0f} in {name}" for name, height in zip(layers, bottom))
        inside = [kinds for name, kinds in layers.items() if name != "outside"]
        mlp = sum(kinds["MLP"] for kinds in inside) / max(sum(sum(kinds.values()) for kinds in inside), 1)
        ax.figure.alt = (
            f"Stacked bars of a model's weights in KiB, outside the layers and by layer: {totals}. "
            f"Of the layers {mlp:.0%} are MLP."
        )
    return ax


def plot_weights_by_dtype(models: Mapping[str, Any], bits: Mapping[str, float]) -> np.ndarray:
    """GiB of each model's weights by kind, one panel per model, in formats of so many bits per weight.

    Only the matrices inside the layers are stored in fewer than 16 bits; embeddings and norms keep 16, as quantized
    checkpoints have it.
    """
    formats = np.array(list(bits.values()))
    with new_figure(0.7 + 1.15 * len(models), rows=len(models)) as axes:
        axes, told = np.atleast_1d(axes), []
        for ax, (name, model) in zip(axes, models.items()):
            counts = dict.fromkeys(KINDS, 0)
            for weight_name, weight in model.named_parameters():
                counts[kind_of_weight(weight_name)] += weight.numel()
            left = np.zeros(len(bits))
            for kind, color in KINDS.items():
                stored = formats if kind in ("attention", "MLP") else np.maximum(formats, 16)
                widths = counts[kind] * stored / 8 / GIB
                ax.barh(range(len(bits)), widths, left=left, color=color, label=kind)
                left += widths
            totals = [f"{total:.1f}" if total >= 1 else f"{total:.2f}" for total in left]
            for row, (total, written) in enumerate(zip(left, totals)):
                ax.text(total, row, f" {written}", va="center", fontsize=10.5)
            ax.set(yticks=range(len(bits)), yticklabels=list(bits), xlim=(0, max(left) * 1.12))
            ax.set_title(f"{name}: {sum(counts.values()) / 1e9:.2f} billion weights", fontsize=12)
            ax.invert_yaxis()
            told.append(f"{name} takes {', '.join(totals)} GiB")
        axes[-1].set_xlabel("GiB")
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.45, 1.3), ncols=4, fontsize=10.5, handlelength=1.2)
        figure = axes[0].figure
        figure.alt = f"A panel of bars for each model, its weights by kind in {', '.join(bits)}: {'; '.join(told)}."
    return axes


def plot_measured_against_predicted(predicted: Sequence[float], measured: Mapping[str, Sequence[float]]) -> Axes:
    """Measured memory of loaded checkpoints, one series a moment, against the prediction, in MiB."""
    with new_figure(3.8) as ax:
        top = max([*predicted, *(value for values in measured.values() for value in values)]) * 1.1
        ax.plot([0, top], [0, top], color=GREY, ls="--", label="measured = predicted")
        for (moment, values), color, marker in zip(measured.items(), (ORANGE, BLUE), "so"):
            ax.plot(predicted, values, marker, ms=9, color=color, label=moment)
        ax.set(
            xlabel="predicted from the header (MiB)", ylabel="measured (MiB)", xlim=(0, top), ylim=(-0.03 * top, top)
        )
        ax.legend(loc="upper left")
        told = "; ".join(f"{name} {', '.join(f'{v:.0f}' for v in values)}" for name, values in measured.items())
        ax.figure.alt = (
            "Dots of measured memory against predicted memory, with the diagonal on which both are equal. Predicted: "
            f"{', '.join(f'{value:.0f}' for value in predicted)} MiB. Measured, {told}."
        )
    return ax


def plot_kv_capacity(
    bytes_per_token: Mapping[str, int],
    ungrouped: Mapping[str, int],
    weights: Mapping[str, int],
    gpu_gib: float,
    length: int,
) -> Axes:
    """KV bytes per token of each model, and the texts of ``length`` tokens that a GPU holds beside the weights.

    Args:
        ungrouped: bytes per token if each query head had a KV head of its own: the hollow bars.
        gpu_gib: memory of the GPU in GiB, of which nine tenths are used.
    """
    names = list(bytes_per_token)
    room = {name: 0.9 * gpu_gib * GIB - weights[name] for name in names}
    with new_figure(1.5 + 0.55 * len(names)) as ax:
        longest = max([*ungrouped.values(), *bytes_per_token.values()]) / 2**10
        told = []
        for row, name in enumerate(names):
            bars = [size[name] / 2**10 for size in (bytes_per_token, ungrouped)]
            fit, without = (max(int(room[name] // (size[name] * length)), 0) for size in (bytes_per_token, ungrouped))
            says = f"{fit:,} texts fit, not {without:,}" if fit else "weights do not fit"
            if room[name] >= 0 and not fit:
                says = "no text fits"
            ax.barh(row, bars[1], color="white", edgecolor=GREY, label="" if row else "without grouped heads")
            ax.barh(row, bars[0], color=BLUE, label="" if row else "as it is")
            color = "#333333" if fit else DARK_RED
            ax.text(max(bars) + 0.01 * longest, row, says, va="center", fontsize=10.5, color=color)
            told.append(f"{name} {bars[0]:,.0f} and {bars[1]:,.0f} ({says})")
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel="KV cache, KiB per token", xlim=(0, longest * 1.45))
        ax.invert_yaxis()
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2, fontsize=10.5, handlelength=1.2)
        ax.figure.alt = (
            "Bars of KiB of KV cache per token, as it is and without grouped heads, with the texts of "
            f"{length:,} tokens that fit beside the weights: {'; '.join(told)}."
        )
    return ax
