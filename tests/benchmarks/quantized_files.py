"""Small weights of 4 bits as others write them, for `tests/unit/test_foreign_layouts.py`.

``python tests/benchmarks/quantized_files.py FOLDER``, in an environment of its own that has compressed-tensors or
gptqmodel (its source on ``PYTHONPATH`` is enough). For each of them that is there it writes
``FOLDER/LIBRARY.safetensors``: the tensors of some weights as ``CASE.NAME``, and as ``CASE.expected`` the floats that
the library itself unpacks them to. The config that it would write beside them is in the file's metadata.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_OUT, NUM_IN = 16, 128
Case = tuple[dict[str, Tensor], Tensor, dict]
"""A weight's tensors, the floats that they mean, and the ``quantization_config``."""


def make_weight(group_size: int, symmetric: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and the scales and zeros (0 to 15) of its groups: ``[NUM_OUT, num_groups]``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(NUM_OUT, NUM_IN, generator=generator)
    groups = weight.view(NUM_OUT, -1, NUM_IN if group_size == -1 else group_size)
    if symmetric:
        return weight, groups.abs().amax(-1) / 7.5, torch.full(groups.shape[:2], 8)
    weight[:3] = weight[:3].abs()  # so that some zeros are 0, and some others 15
    weight[3:6] = -weight[3:6].abs()
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / 15
    return weight, scales, (-low / scales).round().clamp(0, 15)


def shuffle(g_idx: Tensor) -> Tensor:
    """The groups of columns in another order, as int32."""
    return g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(1))].int()


def compressed_tensors() -> Iterator[tuple[str, Case]]:
    """By the library's compressor; before 0.20 its files could have a ``weight_g_idx`` as well."""
    from compressed_tensors import __version__
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    cases = [(32, True, False), (64, False, False), (-1, True, False), (-1, False, False)]
    for group_size, symmetric, has_order in [(32, False, True)] if __version__ < "0.20" else cases:
        weight, scales, zeros = make_weight(group_size, symmetric, seed=group_size)
        args = QuantizationArgs(
            num_bits=4,
            type="int",
            symmetric=symmetric,
            strategy="channel" if group_size == -1 else "group",
            group_size=None if group_size == -1 else group_size,
            actorder="group" if has_order else None,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {
            "weight": weight.half(),
            "weight_scale": scales.half(),
            "weight_zero_point": (zeros - 8).to(torch.int8),
        }
        if has_order:
            state["weight_g_idx"] = shuffle(torch.arange(NUM_IN) // group_size)
        packed = PackedQuantizationCompressor.compress(state, scheme)
        expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format="pack-quantized",
            quantization_status="compressed",
            ignore=["lm_head"],
        )
        name = f"group {group_size}, {'symmetric' if symmetric else 'asymmetric'}{', g_idx' if has_order else ''}"
        yield name, (packed, expected, config.model_dump(mode="json"))


def gptqmodel() -> Iterator[tuple[str, Case]]:
    """By the library's layer, in both versions of its format."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for group_size, symmetric, desc_act in [
        (32, True, False),
        (64, False, True),
        (-1, True, False),
        (128, False, False),
    ]:
        for form in ("gptq", "gptq_v2"):
            weight, scales, zeros = make_weight(group_size, symmetric, seed=group_size)
            g_idx = (torch.arange(NUM_IN) // (NUM_IN if group_size == -1 else group_size)).int()
            if desc_act:
                g_idx = shuffle(g_idx)
            linear = torch.nn.Linear(NUM_IN, NUM_OUT, bias=False)
            linear.weight.data = weight
            layer = TorchLinear(
                bits=4,
                group_size=group_size,
                sym=symmetric,
                desc_act=desc_act,
                in_features=NUM_IN,
                out_features=NUM_OUT,
                bias=False,
            )
            layer.pack_original(linear, scales, zeros, g_idx)
            layer.post_init()
            layer.qzero_format(2)
            expected = layer.dequantize_weight().T.contiguous()
            config = QuantizeConfig(bits=4, group_size=group_size, sym=symmetric, desc_act=desc_act, format=form)
            if form == "gptq":
                convert_gptq_v2_to_v1_format_module(layer, config)
            tensors = {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales", "g_idx")}
            kind = f"{'symmetric' if symmetric else 'asymmetric'}{', desc_act' if desc_act else ''}"
            yield f"{form}, group {group_size}, {kind}", (tensors, expected, config.to_dict())


def main() -> None:
    """Writes the files of the libraries that are there."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for library, cases in (("compressed_tensors", compressed_tensors), ("gptqmodel", gptqmodel)):
        if find_spec(library) is None:
            print(f"{library} is not installed")
            continue
        tensors, metadata = {}, {"library": f"{library}-{import_module(library).__version__}"}
        for name, (packed, expected, config) in cases():
            tensors |= {
                f"{name}.{key}": tensor.contiguous() for key, tensor in {**packed, "expected": expected}.items()
            }
            metadata[name] = json.dumps(config)
        save_file(tensors, folder / f"{metadata['library']}.safetensors", metadata)
        print(f"{metadata['library']}: {len(metadata) - 1} weights")


if __name__ == "__main__":
    main()
