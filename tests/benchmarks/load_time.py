"""`ModelLoader.load_model` beside a plain ``from_pretrained``: ``python tests/benchmarks/load_time.py``.

The same checkpoint, dtype and device on both sides, and no progress bar on either. Time: in one process, in turn, once
of the load alone and once until every weight has been read. Memory: how far the peak of a fresh process rises from
before the load until every weight has been read.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import alternate, peak_memory, print_table, ratio, verdict

TIME_ROUNDS = 21
MEMORY_ROUNDS = 5
TARGET = 1.05  # times the plain load


def load_with_folovllm(folder: str) -> Any:
    """Our side."""
    from folovllm import ModelConfig, ModelLoader

    return ModelLoader(ModelConfig(folder, dtype="float32")).load_model("cpu")


def load_plainly(folder: str) -> Any:
    """The other side."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


SIDES = {"folovllm": load_with_folovllm, "plain": load_plainly}


def load_and_read(side: str, folder: str) -> Any:
    """Loads, and touches all the weights, one number in every 4 KiB.

    safetensors maps the file into memory: on a CPU a weight that nothing has used takes no memory yet.
    """
    model = SIDES[side](folder)
    for parameter in model.parameters():
        parameter.detach().flatten()[::1024].sum()
    return model


def make_large_checkpoint(folder: Path) -> None:
    """A random Qwen3 of about 400 MB in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=5,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def print_memory(side: str, folder: str) -> None:
    """What the fresh process does: prints by how many MiB its peak rises through one load."""
    import torch
    import transformers.models.qwen3.modeling_qwen3

    import folovllm.model_loader  # noqa: F401  what is imported beforehand counts for neither side

    torch.ones(1).sum()
    transformers.logging.disable_progress_bar()
    before = peak_memory()
    model = load_and_read(side, folder)  # kept until the peak has been taken
    print(peak_memory() - before)
    del model


def measure_memory(folder: str) -> dict[str, list[float]]:
    """MiB of each side in every round, each in a process of its own, in turn."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(MEMORY_ROUNDS):
        for side, values in found.items():
            command = [sys.executable, __file__, side, folder]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def compare(name: str, folder: Path) -> list[list[str]]:
    """The rows of one checkpoint."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    loaded = {side: partial(load, str(folder)) for side, load in SIDES.items()}
    read = {side: partial(load_and_read, side, str(folder)) for side in SIDES}
    rows = []
    for what, unit, values in (
        ("load", "ms", alternate(loaded, TIME_ROUNDS)),
        ("load and read", "ms", alternate(read, TIME_ROUNDS)),
        ("peak memory", "MiB", measure_memory(str(folder))),
    ):
        scale = 1000 if unit == "ms" else 1
        times = ratio(values["folovllm"], values["plain"])
        medians = [f"{statistics.median(values[side]) * scale:.1f} {unit}" for side in SIDES]
        label = f"{name}, {size:,.0f} MB: {what}"
        rows.append([label, *medians, f"{times:.3f}", f"<= {TARGET}", verdict(times <= TARGET)])
    return rows


def main() -> None:
    """Measures, and prints the table."""
    from transformers import logging

    from folovllm.tales import EMBEDDED_MODEL

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temp:
        make_large_checkpoint(Path(temp))
        rows = [*compare("embedded", EMBEDDED_MODEL), *compare("large", Path(temp))]
    print(f"Medians of {TIME_ROUNDS} rounds for times, {MEMORY_ROUNDS} for memory:\n")
    print_table(["", "folovllm", "plain", "ratio", "target", ""], rows)


if __name__ == "__main__":
    print_memory(*sys.argv[1:]) if len(sys.argv) == 3 else main()
