"""A checkpoint in, the same with weights of 4 bits out: what ``python -m folovllm quantize`` does. Chapter 15.

The products of the layers are quantized; embedding, head, norms and biases are copied as they are, and so are the files
of the tokenizer. The folder appears when all of it has been written, so what was interrupted leaves nothing behind
that could be loaded. It is in one of two formats that other engines read as well (vLLM's
``vllm/model_executor/layers/quantization/``, 0.33.0): GPTQ's, or compressed-tensors' ``pack-quantized``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from folovllm.model.checkpoint import Checkpoint, iterate_weights
from folovllm.model.decoder import make_empty_decoder
from folovllm.model.gptq import Calibration, QuantizedLayer, check_group_size, choose_method, quantize_layers
from folovllm.model.hf_config import read_json
from folovllm.model.packing import PACK_FACTOR, QuantizedWeight, pack_compressed, pack_gptq
from folovllm.validation import check_int, require

MAX_SHARD_BYTES = 2**30
"""Bytes of tensors from which on a new weight file is begun."""
COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "LICENSE*")
"""Files of a checkpoint that are copied, but for its config and the index of its weights."""
FORMATS: dict[str, Callable[[QuantizedWeight], dict[str, Tensor]]] = {
    "gptq": pack_gptq,
    "compressed-tensors": pack_compressed,
}
"""The formats that can be written, and what makes a weight's tensors."""


@dataclass(frozen=True)
class QuantizationReport:
    """What quantizing a checkpoint has cost and given."""

    layers: list[dict[str, float]]
    """For each layer the squared error of each product's outputs over their square, and under "stream" that of the
    residual stream after the layer."""
    kl: float
    """KL(before || after) of the next token in nats, the mean over the calibration."""
    num_tokens: int
    """Tokens of the calibration."""
    bytes_before: int
    """Bytes of the weight files that were read."""
    bytes_after: int
    """Bytes of those that were written."""

    def __str__(self) -> str:
        names = list(self.layers[0])
        rows = ["error in %  " + "".join(f"{name:>14}" for name in names)]
        for index, errors in enumerate(self.layers):
            rows.append(f"layer {index:<6}" + "".join(f"{100 * errors[name]:14.3f}" for name in names))
        rows.append(f"KL to the unquantized model  {self.kl:.4f} nats per token, over {self.num_tokens:,} tokens")
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        rows.append(f"size of the weight files     {before:.1f} MiB before, {after:.1f} MiB after")
        return "\n".join(rows)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    sequences: Sequence[Sequence[int]],
    bits: int = 4,
    group_size: int = 128,
    method: str = "gptq",
    file_format: str = "gptq",
    use_tqdm: bool = True,
) -> QuantizationReport:
    """Writes a checkpoint's quantized version into a new folder.

    Args:
        checkpoint: the model, not quantized.
        out: the folder to be made.
        sequences: the calibration, token ids of each text.
        bits: of a weight; 4 is all that the formats are written with.
        group_size: input columns that share a scale; -1: all of them.
        method: "gptq" or "rtn" (round to nearest).
        file_format: a name of `FORMATS`.
        use_tqdm: whether a progress bar is shown, by layers.

    Raises:
        ValueError: if an argument cannot be served; nothing has been written then.
        ModelLoadError: if the engine has no such architecture.
        OSError: if the folder cannot be written.
    """
    require(check_int("bits", bits) == 4, f"bits must be 4, the width that both formats are written in, got {bits}")
    require(file_format in FORMATS, f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    quantize, names = choose_method(method, bits, group_size), _check_shapes(checkpoint, group_size)
    _check_folder(out, _estimate_bytes(checkpoint, names, group_size))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as unfinished:
        (folder := Path(unfinished) / "checkpoint").mkdir()
        calibration = Calibration(checkpoint, sequences)
        shards, layers, total = _Shards(folder), [], calibration.config.num_layers
        for layer in tqdm(quantize_layers(calibration, quantize), total=total, unit="layer", disable=not use_tqdm):
            layers.append(layer.output_errors | {"stream": layer.error})
            shards.add(_tensors_of(layer, file_format))
        for name in sorted(checkpoint.headers.keys() - names):
            shards.add(_read_finite(checkpoint, name))
        bytes_after = shards.finish()
        _copy_others(checkpoint, folder, _describe(bits, group_size, method, file_format))
        kl = calibration.compute_kl()
        folder.rename(out)
    return QuantizationReport(layers, kl, len(calibration.hidden), _file_bytes(checkpoint.weight_files), bytes_after)


def _read_finite(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, which stay as they are."""
    found = dict(iterate_weights(checkpoint, prefix))
    for name, tensor in found.items():
        require(bool(tensor.isfinite().all()), f"{name} of {checkpoint.folder} has a number that is not finite")
    return found


def _file_bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _check_shapes(checkpoint: Checkpoint, group_size: int) -> set[str]:
    """The names of the weights to be quantized; refuses those whose columns do not divide."""
    require(
        checkpoint.quantization is None,
        f"{checkpoint.folder} is quantized already; give the checkpoint in float32, bfloat16 or float16 from which it "
        "was made",
    )
    decoder = make_empty_decoder(checkpoint)
    known = decoder.weight_shapes()
    others = {name: entry for name, entry in checkpoint.headers.items() if name not in known}
    for name, tensor in iterate_weights(replace(checkpoint, headers=others)):
        decoder.leave_out(name, tensor)  # or the engine would refuse the new folder
    names = {f"{part}.weight" for layer in decoder.layers for linear in layer.linears for part in linear.shards}
    for name in sorted(names):
        num_out, num_in = checkpoint.headers[name]["shape"]
        try:
            check_group_size(num_in, group_size)
        except ValueError as error:
            raise ValueError(f"{error} ({name} has {num_in})") from None
        require(
            num_out % PACK_FACTOR == num_in % PACK_FACTOR == 0,
            f"{name} has shape {[num_out, num_in]}, and eight numbers of 4 bits are packed into one: both must be "
            "multiples of 8",
        )
    return names


def _estimate_bytes(checkpoint: Checkpoint, names: set[str], group_size: int) -> int:
    """About how many bytes of weights will be written."""
    total = 2**20
    for name, entry in checkpoint.headers.items():
        first, last = entry["data_offsets"]
        if name not in names:
            total += last - first
            continue
        size, num_in = math.prod(entry["shape"]), entry["shape"][1]
        total += size // 2 + 3 * size // check_group_size(num_in, group_size) + 4 * num_in
    return total


def _check_folder(out: Path, num_bytes: int) -> None:
    """Refuses a folder that is there, or that there is no room for."""
    require(not os.path.lexists(out), f"{out} exists already; name a folder that does not, and it will be made")
    require(out.parent.is_dir(), f"there is no folder {out.parent} to make {out.name} in")
    free = shutil.disk_usage(out.parent).free
    require(
        num_bytes <= free,
        f"the quantized weights take {num_bytes / 2**20:,.0f} MiB, and {out.parent} has {free / 2**20:,.0f} MiB free",
    )


def _tensors_of(layer: QuantizedLayer, file_format: str) -> dict[str, Tensor]:
    """The tensors that a layer becomes in a file."""
    pack = FORMATS[file_format]
    return {f"{name}.{part}": t for name, weight in layer.weights.items() for part, t in pack(weight).items()}


class _Shards:
    """Weight files, each begun when the one before it is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.num_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        # Parts of one fused weight share memory, which safetensors refuses.
        self.tensors |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.tensors.values()) >= MAX_SHARD_BYTES:
            self._save()

    def finish(self) -> int:
        """Writes what is left, and the index of several files; returns the bytes of all of them."""
        if self.tensors:
            self._save()
        files = sorted(set(self.weight_map.values()))
        if len(files) == 1:
            (self.folder / files[0]).rename(self.folder / "model.safetensors")
        else:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self.weight_map}
            _write_json(self.folder / "model.safetensors.index.json", index)
        return _file_bytes(self.folder.glob("*.safetensors"))

    def _save(self) -> None:
        name = f"model-{len(set(self.weight_map.values())) + 1:05}.safetensors"
        (path := self.folder / name).touch()
        mode = path.stat().st_mode  # safetensors makes a file that only its owner may read
        try:
            save_file(self.tensors, path, metadata={"format": "pt"})
            path.chmod(mode)
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(f"{name} could not be written ({error})") from None
        self.weight_map |= dict.fromkeys(self.tensors, name)
        self.num_bytes += sum(tensor.nbytes for tensor in self.tensors.values())
        self.tensors = {}


def _copy_others(checkpoint: Checkpoint, folder: Path, quantization_config: dict[str, Any]) -> None:
    """The config with its new part, and the files of the tokenizer."""
    left = {"config.json", "model.safetensors.index.json"}
    for path in (path for pattern in COPIED for path in checkpoint.folder.glob(pattern)):
        if path.name not in left and path.is_file():
            copy = folder / path.relative_to(checkpoint.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    config = read_json(checkpoint.folder / "config.json")
    _write_json(folder / "config.json", config | {"quantization_config": quantization_config})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(bits: int, group_size: int, method: str, file_format: str) -> dict[str, Any]:
    """What a config says about its quantized weights."""
    if file_format == "gptq":
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",  # version 1, which stores each zero less one
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "meta": {"quantizer": ["folovllm"], "method": method},
        }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
