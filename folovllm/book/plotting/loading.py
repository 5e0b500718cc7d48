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
    return ax


def plot_weights_by_dtype(models: Mapping[str, Any], bits: Mapping[str, float]) -> np.ndarray:
    """GiB of each model's weights by kind, one panel per model, in formats of so many bits per weight."""
    with new_figure(0.7 + 1.15 * len(models), rows=len(models)) as axes:
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
    with new_figure(3.8) as ax:
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
    with new_figure(1.2 + 0.5 * len(names)) as ax:
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
