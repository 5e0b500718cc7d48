"""Figures of chapter 1: memory by part, blocks, dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from folovllm.book.plotting.style import BLUE, DARK_RED, GREY, ORANGE, PALETTE, listed, new_figure, to_array
from folovllm.utils import cdiv

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
    with new_figure(4.2) as ax:
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
    fits = [f"{count:,} tokens" if count else "nothing, for the weights do not fit" for count in tokens]
    ax.figure.alt = (
        f"Stacked bars of a GPU's {total_gib:g} GiB by gpu_memory_utilization: the weights take {weights:.1f} GiB in "
        f"each, and the KV cache has room for {listed(f'{room} at {u:g}' for room, u in zip(fits, utilizations))}."
    )
    return ax


def plot_block_waste(lengths: Sequence[int], block_sizes: Sequence[int]) -> Axes:
    """Of the slots reserved for sequences of ``lengths`` tokens, the share that holds a token, at each block size."""
    reserved = np.array([sum(cdiv(length, size) * size for length in lengths) for size in block_sizes])
    used = sum(lengths) / reserved
    with new_figure(3.4) as ax:
        places = range(len(block_sizes))
        ax.bar(places, used, color=BLUE, label="hold a token")
        ax.bar(places, 1 - used, bottom=used, color=ORANGE, label="reserved and empty")
        for place, share in enumerate(used):
            ax.text(place, 1.01, f"{1 - share:.0%}", ha="center", va="bottom", fontsize=11)
        ax.set(xlabel="block_size (tokens)", ylabel="share of the slots")
        ax.set_xticks(places, [f"{size:,}" for size in block_sizes])
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)
    ax.figure.alt = (
        f"Stacked bars of the slots reserved for {len(lengths):,} sequences, by block size. The share that is "
        f"reserved and empty is {listed(f'{1 - share:.0%} at {size:,}' for share, size in zip(used, block_sizes))}."
    )
    return ax


def plot_dtype_errors(errors: Mapping[str, Tensor]) -> Axes:
    """How far the probabilities of a text's tokens move in each dtype: ``{name: |p - p in float32|  [num_tokens]}``."""
    with new_figure(3.4) as ax:
        for i, (name, error) in enumerate(errors.items()):
            ax.plot(range(1, len(error) + 1), to_array(error), "o", ms=4.5, color=PALETTE[i], label=name)
        ax.set(yscale="log", xlabel="token of the text", ylabel="error of its probability")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=len(errors))
    # Not the median: most errors are a float32's last digit or two, which differ from one processor to the next.
    largest = {name: float(to_array(error).max()) for name, error in errors.items()}
    ax.figure.alt = (
        "Dots of the error of each token's probability along a text, on a logarithmic scale. The largest error is "
        f"{listed(f'{error:.1g} with {name}' for name, error in largest.items())}."
    )
    return ax
