"""Attempts at the newer exercises of chapter 4, for test_exercises.py."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(
    path: str,
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


def with_library(path: str, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


WRONG: dict[str, dict[str, Any]] = {
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
    }
}

RIGHT: dict[str, dict[str, Any]] = {"check_read_tensor": {"the library": with_library, "by hand": read}}

SAME = {
    "check_kv_bytes": {
        "kv_bytes: num_heads as in the first call": "query heads keep nothing, so the right answer never looks at them",
    }
}
