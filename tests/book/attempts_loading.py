"""Attempts at the newer exercises of chapter 4, for test_exercises.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from folovllm.model.checkpoint import read_safetensors_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def count(which: Callable[[dict[str, Any]], Any]) -> Callable[[Path], int]:
    """Counts the weights of those entries of a header that ``which`` gives."""

    def attempt(path: Path) -> int:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(entry["shape"]) for entry in which(header))

    return attempt


def tensors(header: dict[str, Any]) -> list[Any]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def without_metadata(header: dict[str, Any]) -> Any:
    del header["__metadata__"]
    return header.values()


def pad(
    mask: Callable[[int, int], list[Any]] = lambda gap, num: [0] * gap + [1] * num,
    filler: Callable[[int, int], list[Any]] = lambda gap, pad_id: [pad_id] * gap,
    order: Callable[[list[Any]], list[Any]] = list,
    give: Callable[[Any, Any], Any] = lambda rows, mask: (rows, mask),
) -> Callable[[list[list[int]], int], Any]:
    """Pads prompts on the left; each part may be got wrong."""

    def attempt(prompts: list[list[int]], pad_id: int) -> Any:
        longest, prompts = max(map(len, prompts)), order(prompts)
        gaps = [longest - len(prompt) for prompt in prompts]
        rows = [filler(gap, pad_id) + prompt for gap, prompt in zip(gaps, prompts)]
        return give(rows, [mask(gap, len(prompt)) for gap, prompt in zip(gaps, prompts)])

    return attempt


def read(
    path: Path,
    name: str,
    *,
    skip: int = 8,
    with_length: bool = True,
    start: int | None = None,
    until: int | None = None,
    dtype: torch.dtype | None = None,
    reshape: bool = True,
) -> Tensor:
    """Reads a tensor; each part may be got wrong."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        first, end = entry["data_offsets"]
        first = first if start is None else start
        file.seek(skip + with_length * length + first)
        data = bytearray(file.read((end if until is None else until) - first))
    flat = torch.frombuffer(data, dtype=dtype or DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"]) if reshape else flat


def with_library(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


WRONG: dict[str, dict[str, Any]] = {
    "check_count_weights": {
        "without the first entry": count(lambda header: list(header.values())[1:]),
        "a file without metadata": count(without_metadata),
        "the last tensor": count(lambda header: list(header.values())[-1:]),
        "names that end in b": count(lambda header: [entry for name, entry in header.items() if name == "b"]),
        "as a text": lambda path: f"{count(tensors)(path)} weights",
    },
    "check_kv_bytes": {"as a text": lambda layers, heads, kv_heads, dim, size: f"{2 * layers * kv_heads * dim * size}"},
    "check_pad_batch": {
        "a mask for the other side": pad(mask=lambda gap, num: [1] * num + [0] * gap),
        "a list in the row": pad(filler=lambda gap, pad_id: [[pad_id] * gap]),
        "one pad token at most": pad(filler=lambda gap, pad_id: [pad_id] * min(gap, 1)),
        "sorted by length": pad(order=lambda prompts: sorted(prompts, key=len)),
        "mask and rows": pad(give=lambda rows, mask: (mask, rows)),
        "a dict": pad(give=lambda rows, mask: {"input_ids": rows, "attention_mask": mask}),
        "pairs": pad(give=lambda rows, mask: list(zip(rows, mask))),
    },
    "check_read_tensor": {
        "from the start of the file": lambda path, name: read(path, name, skip=0, with_length=False),
        "without the eight bytes": lambda path, name: read(path, name, skip=0),
        "without the header": lambda path, name: read(path, name, with_length=False),
        "the first tensor": lambda path, name: read(path, name, start=0),
        "one number": lambda path, name: read(path, name, until=4, start=0),
        "float32 always": lambda path, name: read(path, name, dtype=torch.float32),
        "float16 for bfloat16": lambda path, name: read(
            path, name, dtype=torch.float16 if "half" in name else torch.float32
        ),
        "flat": lambda path, name: read(path, name, reshape=False),
        "transposed": lambda path, name: read(path, name).mT if name in ("matrix", "half") else read(path, name),
        "converted": lambda path, name: read(path, name).float(),
        "a list": lambda path, name: read(path, name).tolist(),
        "the name": lambda path, name: name,
        "another tensor": lambda path, name: read(path, "first"),
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_count_weights": {
        "whatever has a shape": count(lambda header: [entry for entry in header.values() if "shape" in entry]),
        "the engine's reader": lambda path: sum(math.prod(e["shape"]) for e in read_safetensors_header(path).values()),
        "in floats": lambda path: float(count(tensors)(path)),
    },
    "check_pad_batch": {"booleans": pad(mask=lambda gap, num: [False] * gap + [True] * num)},
    "check_read_tensor": {"the library": with_library, "by hand": read},
}

SAME = {
    "check_kv_bytes": {
        "kv_bytes: num_heads as in the first call": "query heads keep nothing, so the right answer never looks at them",
    }
}
