"""A checkpoint as files: where it is, what its config says, and its tensors one by one. Chapter 4 is about this module.

A checkpoint is a folder: ``config.json`` says what to build, ``*.safetensors`` hold the numbers. A name that is no
folder is fetched from the hub, and is a folder from then on. Everything that can be wrong with the folder is looked for
before the weights are read, so that it is said in one sentence.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig

_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelLoadError(RuntimeError):
    """A checkpoint could not be loaded; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole and fits its device, and none of whose weights has been read."""

    folder: Path
    hf_config: Any
    """transformers' config of the model."""
    weight_files: list[Path]
    num_bytes: int
    """Bytes of all its tensors in ``dtype``."""
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Longest sequence in tokens that will be served."""
    model_max_len: int
    """Longest sequence in tokens that it was made for."""


def find_folder(name: str) -> Path:
    """The checkpoint's folder, fetched from the hub if ``name`` is not one already."""
    try:
        folder = Path(name).expanduser()
        is_dir, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{name!r} is no name of a folder or model ({first_line(error)})") from None
    if is_dir:
        return folder
    if exists:
        raise ModelLoadError(f"{name} is a file; give the folder of a checkpoint, which holds its config.json")
    if folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2:
        raise ModelLoadError(
            f"there is no folder {name}; give the folder of a checkpoint or a hub name like 'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} is no folder here and could not be fetched from the hub ({first_line(error)}); "
            "check the name and the network, or give the folder of a checkpoint"
        ) from None


def load_hf_config(folder: Path, trust_remote_code: bool) -> Any:
    """``config.json`` as an object of transformers, once it is clear that it names a model to build."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no config.json, so it is no checkpoint; give the folder that holds one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({first_line(error)}); copy or download it again") from None
    if not isinstance(raw, dict) or not raw.get("architectures"):
        raise ModelLoadError(
            f'{path} names no architecture; add its model class, as in "architectures": ["Qwen3ForCausalLM"]'
        )
    try:
        if raw.get("model_type") in CONFIG_MAPPING and "auto_map" not in raw:
            return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)  # AutoConfig would look for and read the file again
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelLoadError(
            f"transformers cannot build the architecture {raw['architectures']} of {folder} "
            f"({first_line(error)}); a newer transformers may know it, "
            "and a checkpoint with code of its own needs trust_remote_code=True"
        ) from None


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a file name is no string")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{index} is not a checkpoint's index ({first_line(error)}); copy or download it again"
            ) from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelLoadError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files ({', '.join(missing[:3])}); "
                "copy or download them"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which is refused because reading one can run any "
            "code; take a safetensors version of the checkpoint, or convert it where you trust it"
        )
    raise ModelLoadError(
        f"{folder} has no model.safetensors (or model.safetensors.index.json); copy or download the weights "
        "(a pickle checkpoint, *.bin, is refused, because reading one can run any code)"
    )


def read_safetensors_header(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, without reading its weights: name -> ``dtype``, ``shape``, ``data_offsets``.

    The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes.

    Raises:
        ModelLoadError: if the file is shorter than its header says, or is no safetensors file.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"it has {size:,} bytes and says that its header alone has {length:,}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
            [math.prod(map(int, entry["shape"])) for entry in tensors.values()]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise _damaged(path, "its header is none") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _damaged(path, f"it has {size:,} bytes where its header promises {expected:,}")
    return tensors


def _damaged(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(f"{path} is not a whole safetensors file: {why}; copy or download it again")


def check_room(folder: Path, num_bytes: int, device: torch.device) -> None:
    """Refuses weights larger than what the GPU has free, before any of them is read."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise ModelLoadError(
            f"the weights of {folder} take {num_bytes / 2**30:.2f} GiB and {device} has {free / 2**30:.2f} GiB free; "
            "end what else runs there, choose a 16-bit dtype, a smaller model, or device='cpu'"
        )


def iterate_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and tensor of every weight, one file after the other, on the CPU."""
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def first_line(error: BaseException) -> str:
    """An error of somebody else's in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
