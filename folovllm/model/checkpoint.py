"""A checkpoint as files: where it is, what its config says, and its tensors one by one. Chapter 4 is about this module.

A checkpoint is a folder: ``config.json`` says what to build, ``*.safetensors`` hold the numbers. A name that is no
folder is fetched from the hub, and is a folder from then on. Everything that can be wrong with the folder is looked for
before the weights are read, so that it is said in one sentence.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from folovllm.model.quantization import INTEGER_TENSORS, PACK_FACTOR, TENSORS, QuantizationConfig

_PICKLE = "a pickle, which is refused because reading one can run any code"
_OTHER_KINDS = (
    ("adapter_config.json", "a LoRA adapter", "merge it into its base model (peft's merge_and_unload) and save that"),
    ("*.gguf", "weights in llama.cpp's format GGUF", "take a safetensors version of the checkpoint"),
    *(
        (pattern, _PICKLE, "take a safetensors version of the checkpoint, or convert it where you trust it")
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
    ),
    ("*.h5", "weights for TensorFlow", "take a safetensors version of the checkpoint"),
    ("*.msgpack", "weights for Flax", "take a safetensors version of the checkpoint"),
    ("*.onnx", "a graph for ONNX", "take a safetensors version of the checkpoint"),
)
"""What else a folder may hold: a pattern of file names, what such a file is, and what to do."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the dtypes that a weight may be stored in."""
_BUFFER = re.compile(r"(\brotary_emb\.(inv_freq|cos_cached|sin_cached)|\b(self_)?attn\.(masked_)?bias)$")
"""Names of tensors that old checkpoints hold and that follow from the config: rotary tables, masks."""
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_state\.\w+)$"
)
"""Names of tensors that only quantized checkpoints hold (GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes)."""


class ModelLoadError(RuntimeError):
    """A checkpoint could not be loaded; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole, and none of whose weights has been read."""

    folder: Path
    hf_config: Any
    """transformers' config of the model."""
    weight_files: list[Path]
    headers: dict[str, dict[str, Any]]
    """Name of each tensor in them -> its ``dtype`` and ``shape``."""
    num_elements: int
    """Numbers that its tensors stand for."""
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Longest sequence in tokens that will be served."""
    model_max_len: int
    """Longest sequence in tokens that it was made for."""
    quantization: QuantizationConfig | None = None
    """How its weights are quantized; None: they are floats."""
    has_compiled_steps: bool = False
    """Whether the steps that compute with them are to be compiled on a CPU."""


def find_folder(name: str) -> Path:
    """The checkpoint's folder, fetched from the hub if ``name`` is not one already."""
    try:
        folder = Path(name).expanduser()
        is_dir, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{name!r} is no name of a folder or model ({one_line(error)})") from None
    if is_dir:
        return folder
    if exists:
        kind = " in llama.cpp's format GGUF, which is not read here" if folder.suffix == ".gguf" else ""
        raise ModelLoadError(f"{name} is a file{kind}; give the folder of a checkpoint, which holds its config.json")
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
            f"{name!r} is no folder here and could not be fetched from the hub ({one_line(error)}); "
            "check the name and the network, or give the folder of a checkpoint"
        ) from None


def describe_other_kind(folder: Path) -> str | None:
    """The rest of an error's sentence: what the folder holds instead of a checkpoint for this engine."""
    for pattern, what, advice in _OTHER_KINDS:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f"; it holds {found[0]}, {what}: {advice}"
    return None


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there. A whole file goes before an index, as in transformers.

    Raises:
        ModelLoadError: if there are none, one is missing, or the index names one outside the folder.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelLoadError(f"{folder} is no whole model{describe_other_kind(folder)}")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        return _read_index(index)
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"{folder} has {found[0]}, but nothing says whether that is all of its weights; name a single file "
            "model.safetensors, or copy or download the model.safetensors.index.json of several"
        )
    others = describe_other_kind(folder) or (
        "; copy or download the weights (a pickle checkpoint, *.bin, is refused, because reading one can run any code)"
    )
    raise ModelLoadError(f"{folder} has no model.safetensors (or model.safetensors.index.json){others}")


def _read_index(index: Path) -> list[Path]:
    """The files that an index names."""
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map must give the name of a file for each weight")
        strays = [name for name in names if not _is_inside(folder, name)]
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, OSError) as error:
        raise ModelLoadError(
            f"{index} is not a checkpoint's index ({one_line(error)}); copy or download it again"
        ) from None
    if strays:
        raise ModelLoadError(
            f"{index} names the file {strays[0]!r} in its weight_map, which is outside the checkpoint's folder; "
            "copy or download the checkpoint again"
        )
    if missing:
        raise ModelLoadError(
            f"{folder} lacks {len(missing)} of its {len(names)} weight files ({', '.join(missing[:3])}); "
            "copy or download them"
        )
    return [folder / name for name in names]


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file lies in the checkpoint's folder, or where the hub's cache keeps the files of such a folder."""
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    is_plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    return is_plain and any((folder / name).resolve().is_relative_to(root) for root in allowed)


def read_safetensors_header(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, without reading its weights: name -> ``dtype``, ``shape``, ``data_offsets``.

    The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes.

    Raises:
        ModelLoadError: if the file is shorter than its header says, or is no safetensors file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it has {size:,} bytes and says that its header alone has {length:,}")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            _check_size(header, size, 8 + length)
            with safe_open(path, framework="pt"):  # checks every dtype, shape and offset
                pass
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({one_line(error)}); see who may read it") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} is not a whole safetensors file ({one_line(error)}); copy or download it again"
        ) from None
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _check_size(header: Any, size: int, first: int) -> None:
    """Refuses a truncated file, by its number of bytes; ``first`` is where the tensors begin."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = first + max(ends, default=0)
    except (AttributeError, IndexError, KeyError, TypeError):
        return  # a broken header, of which safetensors says what is wrong with it
    if promised > size:
        raise ValueError(f"it has {size:,} bytes where its header promises {promised:,}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses a key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of {', '.join(name for name, _ in pairs[:3])} occurs twice")
    return found


def read_headers(files: Sequence[Path], quantization: QuantizationConfig | None = None) -> dict[str, dict[str, Any]]:
    """The headers of all weight files in one; buffers that are no weights are left out.

    Raises:
        ModelLoadError: if a file is damaged, if two have the same tensor, or if a tensor says that the checkpoint is
            quantized in another way, or none that it is quantized at all.
    """
    headers: dict[str, dict[str, Any]] = {}
    method = None if quantization is None else quantization.method
    known = () if method is None else TENSORS[method]
    for path in files:
        for name, entry in read_safetensors_header(path).items():
            if _QUANTIZED.search(name) and name.rpartition(".")[2] not in known:
                missing = "" if method else ", and the config does not say how in a quantization_config"
                raise quantized(path, f"it has a tensor {name}{missing}")
            if name in headers:
                raise ModelLoadError(
                    f"{path} has a tensor {name} that an earlier file has as well; download them again"
                )
            if not is_buffer(name):
                headers[name] = entry
    if known and not any(name.rpartition(".")[2] in known for name in headers):
        raise ModelLoadError(
            f"the config of {files[0].parent} (config.json, or a quantize_config.json beside it) says that the weights "
            f"are quantized by {method!r}, but the files hold none that is; take config and weights from the same "
            "checkpoint"
        )
    return headers


def count_numbers(name: str, entry: Mapping[str, Any]) -> int:
    """How many numbers a tensor of a file stands for: an int32 of a quantized weight for several."""
    is_packed = name.rpartition(".")[2] in INTEGER_TENSORS and entry["dtype"] == "I32"
    return math.prod(entry["shape"]) * (PACK_FACTOR if is_packed else 1)


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is no weight, but follows from the config."""
    return _BUFFER.search(name) is not None


def quantized(path: Path, why: str) -> ModelLoadError:
    """The error for a checkpoint whose weights are quantized in a way that the engine does not have."""
    return ModelLoadError(
        f"{path} belongs to a quantized checkpoint ({why}), which cannot be run: only GPTQ and compressed-tensors' "
        "pack-quantized can, with 4 bits; take such a checkpoint, or the one in float32, bfloat16 or float16 from "
        "which this one was made, with quantization='int8' if it is to be smaller"
    )


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, Sequence[int]], num_elements: int) -> None:
    """Compares what a model will have with what the files hold, before memory is taken for either.

    Args:
        checkpoint: the files.
        expected: name in the files -> shape, for all weights of the model whose name there is known.
        num_elements: of all the model's weights.

    Raises:
        ModelLoadError: if a shape differs, a weight is quantized, or the model is far larger than its files.
    """
    path = checkpoint.folder / "config.json"
    for name, shape in sorted(expected.items()):
        entry = checkpoint.headers.get(name)
        if entry is None:
            continue
        if entry["shape"] != list(shape):
            raise ModelLoadError(
                f"{name} has shape {entry['shape']}, but its config says {list(shape)} "
                f"({_name_fields(name, checkpoint.hf_config, entry['shape'], shape)}{path}); "
                "take config and weights from the same checkpoint"
            )
        if entry["dtype"] not in INTEGER_TENSORS.get(name.rpartition(".")[2], _FLOATS):
            raise quantized(checkpoint.folder, f"{name} is stored as {entry['dtype']}")
    # Missing weights are reported later, with their names; this check protects the memory.
    if num_elements > 2 * checkpoint.num_elements:
        raise ModelLoadError(
            f"{path} describes a model of {num_elements:,} numbers, but the weight files hold "
            f"{checkpoint.num_elements:,}; take config and weights from the same checkpoint"
        )


def _name_fields(name: str, hf_config: Any, found: Sequence[int], wanted: Sequence[int]) -> str:
    """The fields of a config that may give the sizes in which the shapes of a tensor differ."""
    if name.rpartition(".")[2] in chain(*TENSORS.values()):
        return "quantization_config in "
    sizes = set(wanted) - set(found)
    fields = hf_config.get_text_config().to_dict().items()
    names = [f"{field}={value}" for field, value in fields if type(value) is int and value in sizes]
    return f"{', '.join(names)} in " if names else ""


def missing_weights(folder: Path, names: Sequence[str]) -> ModelLoadError:
    """The error for weights that a model has and its checkpoint lacks."""
    return ModelLoadError(
        f"{len(names)} of the model's weights ({', '.join(sorted(names)[:3])}) are missing in {folder}; "
        "take config and weights from the same checkpoint"
    )


def check_room(what: str, num_bytes: int, device: torch.device, advice: str) -> None:
    """Refuses what is larger than the memory that a device has free, before any of it is taken."""
    is_cpu = device.type == "cpu"
    free = psutil.virtual_memory().available if is_cpu else torch.cuda.mem_get_info(device)[0]
    if num_bytes > free:
        raise ModelLoadError(
            f"{what} take {num_bytes / 2**30:.2f} GiB and {device} has {free / 2**30:.2f} GiB free; "
            f"end what else runs there, {advice}" + ("" if is_cpu else ", or device='cpu'")
        )


def iterate_weights(checkpoint: Checkpoint, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The name and tensor of every weight whose name begins so, one file after the other, on the CPU."""
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name in checkpoint.headers and name.startswith(prefix):  # no buffer that follows from the config
                    yield name, file.get_tensor(name)


def one_line(error: BaseException) -> str:
    """A library's error in one line: its type and its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
