"""Weights of 4 bits as compressed-tensors and GPTQModel write them are unpacked as those libraries unpack them.

The files were made by ``tests/benchmarks/quantized_files.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from folovllm.model.packing import pack_compressed, pack_gptq, unpack_compressed, unpack_gptq
from folovllm.model.quantization import QuantizationConfig, read_quantization

FILES = sorted((Path(__file__).parent / "foreign_layouts").glob("*.safetensors"))


def read() -> dict[str, tuple[dict[str, torch.Tensor], dict]]:
    """The tensors of each weight, and its config."""
    cases = {}
    for path in FILES:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for case in sorted(metadata.keys() - {"library", "format"}):
                names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118 (it is no dict)
                tensors = {name[len(case) + 1 :]: file.get_tensor(name) for name in names}
                cases[f"{metadata['library']}: {case}"] = tensors, json.loads(metadata[case])
    return cases


CASES = read()


def parse(case: str) -> QuantizationConfig:
    return read_quantization({"quantization_config": CASES[case][1]})


def test_all_libraries_and_kinds_are_there():
    assert [path.stem for path in FILES] == [
        "compressed_tensors-0.17.0",
        "compressed_tensors-0.20.0",
        "gptqmodel-7.7.0",
    ]
    assert len(CASES) == 13
    assert {scheme.group_size for config in map(parse, CASES) if (scheme := config.scheme("m"))} == {-1, 32, 64, 128}


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_the_librarys_own(case):
    tensors, config = CASES[case][0], parse(case)
    expected = tensors["expected"]
    weight = unpack_gptq(tensors, config.version) if config.method == "gptq" else unpack_compressed(tensors)
    assert torch.equal(weight.dequantize(expected.dtype), expected)
    scheme = config.scheme("model.layers.0.mlp.up_proj")
    assert weight.scales.shape[1] == scheme.num_groups(weight.values.shape[1])
    assert bool((weight.zeros == 8).all()) == scheme.symmetric


@pytest.mark.parametrize("case", CASES)
def test_packed_again_it_is_the_same_file(case):
    tensors, config = dict(CASES[case][0]), parse(case)
    del tensors["expected"]
    if config.method == "gptq":
        packed = pack_gptq(unpack_gptq(tensors, config.version), config.version)
    else:
        packed = pack_compressed(unpack_compressed(tensors))
    assert packed.keys() == tensors.keys()
    for name, tensor in packed.items():
        assert tensor.dtype is tensors[name].dtype and torch.equal(tensor, tensors[name]), name
