"""Checkpoints in 4 bits, made of others by plain rounding, for the tests."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from folovllm.model.packing import QuantizedWeight, column_groups, pack_compressed, pack_gptq

IS_PRODUCT = re.compile(r"model\.layers\..*_proj\.weight")


def round_weight(
    weight: Tensor,
    group_size: int = 32,
    symmetric: bool = True,
    desc_act: bool = False,
    dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Plain rounding; with ``desc_act`` the columns are shared out among the groups at random, alike for one width."""
    num_in = weight.shape[1]
    g_idx = column_groups(num_in, 1 if group_size == -1 else num_in // group_size)
    if desc_act:
        g_idx = g_idx[torch.randperm(num_in, generator=torch.Generator().manual_seed(num_in))]
    groups = [weight[:, g_idx == group].float() for group in range(int(g_idx.max()) + 1)]
    if symmetric:
        scales = torch.stack([group.abs().amax(1) / 7.5 for group in groups], 1)
        zeros = torch.full(scales.shape, 8)
    else:
        low = torch.stack([group.amin(1).clamp(max=0) for group in groups], 1)
        high = torch.stack([group.amax(1).clamp(min=0) for group in groups], 1)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
    scales = scales.clamp(min=1e-4).to(dtype)
    values = (weight.float() / scales.float()[:, g_idx] + zeros[:, g_idx]).round().clamp(0, 15)
    return QuantizedWeight(values.to(torch.uint8), scales, zeros.to(torch.uint8), g_idx)


def config_of(method: str, group_size=32, symmetric=True, desc_act=False, version=1, **changes) -> dict:
    """What a config says of a checkpoint that `quantize` makes."""
    if method == "gptq":
        form = "gptq" if version == 1 else "gptq_v2"
        found = {"bits": 4, "group_size": group_size, "sym": symmetric, "desc_act": desc_act, "checkpoint_format": form}
        return {"quant_method": "gptq", **found, **changes}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": "group" if desc_act else None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **changes,
    }


def quantize(
    source: Path,
    folder: Path,
    method: str,
    version: int = 1,
    which: Callable[[str], object] = IS_PRODUCT.match,
    config: dict | None = None,
    **scheme,
) -> Path:
    """A copy of a checkpoint, with the weights that ``which`` names in 4 bits."""
    shutil.copytree(source, folder)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for name in [name for name in tensors if which(name)]:
        weight = round_weight(tensors.pop(name), **scheme)
        packed = pack_gptq(weight, version) if method == "gptq" else pack_compressed(weight)
        if method != "gptq" and not scheme.get("symmetric", True) and "weight_zero_point" not in packed:
            raise AssertionError("zeros that are all 8 by chance")
        tensors |= {f"{name.removesuffix('.weight')}.{key}": tensor for key, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = config or config_of(method, version=version, **scheme)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
