"""Weights of 4 bits in the layouts of files: there and back, and bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from folovllm.model.packing import (
    QuantizedWeight,
    column_groups,
    is_mislabelled,
    pack_compressed,
    pack_gptq,
    pack_int4,
    unpack_compressed,
    unpack_gptq,
    unpack_int4,
)


def make_weight(num_out, num_in, group_size, symmetric=True, desc_act=False, seed=0, dtype=torch.float16):
    """A weight of random numbers; ``group_size`` None: one group for the whole column."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = num_in // (group_size or num_in)
    g_idx = column_groups(num_in, num_groups)
    if desc_act:
        g_idx = g_idx[torch.randperm(num_in, generator=generator)]
    return QuantizedWeight(
        torch.randint(16, (num_out, num_in), dtype=torch.uint8, generator=generator),
        torch.rand(num_out, num_groups, generator=generator).to(dtype) / 8,
        torch.full((num_out, num_groups), 8, dtype=torch.uint8)
        if symmetric
        else torch.randint(16, (num_out, num_groups), dtype=torch.uint8, generator=generator),
        g_idx,
    )


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return all(
        getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name))
        for name in ("values", "scales", "zeros", "g_idx")
    )


WEIGHTS = st.builds(
    make_weight,
    num_out=st.sampled_from([8, 16, 40]),
    num_in=st.sampled_from([128, 256]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)


class TestThereAndBack:
    @given(weight=WEIGHTS, version=st.sampled_from([1, 2]))
    def test_gptq(self, weight, version):
        """Zeros of 0, which version 1 stores as -1, included."""
        tensors = pack_gptq(weight, version)
        assert same(unpack_gptq(tensors, version), weight)
        assert all(tensor.is_contiguous() for tensor in tensors.values())  # or safetensors would not store it

    @given(weight=WEIGHTS)
    def test_compressed(self, weight):
        tensors = pack_compressed(weight)
        assert same(unpack_compressed(tensors), weight)
        assert ("weight_zero_point" in tensors) == bool((weight.zeros != 8).any())
        assert all(tensor.is_contiguous() for tensor in tensors.values())

    @pytest.mark.parametrize("num_out, num_in", [(3, 5), (9, 20), (1, 1)])
    def test_compressed_rounds_sizes_up(self, num_out, num_in):
        weight = make_weight(num_out, num_in, None, symmetric=False)
        assert same(unpack_compressed(pack_compressed(weight)), weight)

    @given(values=st.lists(st.integers(0, 15), min_size=1, max_size=40))
    def test_any_number_of_values(self, values):
        packed = pack_int4(torch.tensor([values], dtype=torch.uint8))
        assert unpack_int4(packed, len(values)).tolist() == [values]

    def test_groups_of_unequal_size(self):
        """AutoGPTQ's last group is smaller where the group size does not divide the inputs."""
        weight = make_weight(8, 40, 20)
        uneven = QuantizedWeight(weight.values, weight.scales, weight.zeros, torch.arange(40, dtype=torch.int32) // 32)
        assert same(unpack_gptq(pack_gptq(uneven), 1), uneven) and same(
            unpack_compressed(pack_compressed(uneven)), uneven
        )


class TestBits:
    def test_the_first_value_is_in_the_lowest_bits(self):
        packed = pack_int4(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8))
        assert packed.item() % 2**32 == 0x87654321 and packed.dtype == torch.int32

    def test_gptq_is_transposed(self):
        weight = make_weight(16, 128, 32, symmetric=False)
        tensors = pack_gptq(weight, 2)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == {"qweight": [16, 16], "qzeros": [4, 2], "scales": [4, 16], "g_idx": [128]}
        assert (tensors["qweight"][3, 5].item() >> 8) & 15 == weight.values[5, 26]
        assert (tensors["qzeros"][2, 1].item() >> 12) & 15 == weight.zeros[11, 2]

    @pytest.mark.parametrize("version, stored", [(1, 0x77777777), (2, 0x88888888)])
    def test_versions_store_other_zeros(self, version, stored):
        qzeros = pack_gptq(make_weight(16, 128, 32), version)["qzeros"]
        assert set((qzeros.long() % 2**32).flatten().tolist()) == {stored}
        assert [is_mislabelled(qzeros, said) for said in (1, 2)] == [version == 2, version == 1]

    def test_a_single_column_comes_out_of_a_file(self, tmp_path):
        for pack, unpack in (
            (pack_gptq, lambda tensors: unpack_gptq(tensors, 1)),
            (pack_compressed, unpack_compressed),
        ):
            weight = make_weight(8, 8, 8, symmetric=False)
            save_file(pack(weight), tmp_path / "one")
            assert same(unpack(load_file(tmp_path / "one")), weight)

    def test_the_outputs_must_be_those_of_the_shape(self):
        tensors = pack_compressed(make_weight(16, 128, 32)) | {"weight_shape": torch.tensor([1, 128])}
        with pytest.raises(ValueError, match="weight_shape says 1 outputs, and weight_packed has 16"):
            unpack_compressed(tensors)

    def test_compressed_is_not(self):
        weight = make_weight(16, 128, 32, symmetric=False, desc_act=True)
        tensors = pack_compressed(weight)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == {
            "weight_packed": [16, 16],
            "weight_scale": [16, 4],
            "weight_shape": [2],
            "weight_zero_point": [2, 4],
            "weight_g_idx": [128],
        }
        assert (tensors["weight_packed"][3, 5].item() >> 8) & 15 == weight.values[3, 42]

    def test_a_missing_order_is_the_plain_one(self):
        weight = make_weight(8, 64, 32)
        tensors = pack_gptq(weight)
        del tensors["g_idx"]
        assert same(unpack_gptq(tensors, 1), weight)
        unset = pack_compressed(weight) | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
        assert same(unpack_compressed(unset), weight)


def test_a_weight_is_its_distance_from_zero_times_its_scale():
    weight = make_weight(8, 64, 32, symmetric=False, desc_act=True)
    floats = weight.dequantize(torch.float32)
    for row, column in ((0, 0), (7, 63), (3, 40)):
        group = weight.g_idx[column]
        steps = weight.values[row, column].int() - weight.zeros[row, group].int()
        assert floats[row, column] == steps * weight.scales[row, group].float()
    assert weight.dequantize(torch.float16).dtype == torch.float16


class TestRefused:
    @pytest.mark.parametrize(
        "change, part",
        [
            ({"scales": torch.ones(7, 2)}, "scales must have shape [8, 2], got [7, 2]"),
            ({"scales": torch.ones(8, 3)}, "zeros must have shape [8, 3]"),
            ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx must have shape [64], got [63]"),
            ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx must name groups from 0 to 1, got 2"),
            ({"g_idx": torch.arange(-1, 63, dtype=torch.int32)}, "got -1"),
            ({"g_idx": torch.arange(-1, 63, dtype=torch.int32).clamp(max=1)}, "groups from 0 to 1, got -1"),
        ],
    )
    def test_what_does_not_belong_together(self, change, part):
        weight = make_weight(8, 64, 32)
        with pytest.raises(ValueError) as error:
            QuantizedWeight(**{**vars(weight), **change})
        assert part in str(error.value)

    def test_packed_numbers_that_are_too_few(self):
        tensors = pack_compressed(make_weight(8, 64, 32))
        with pytest.raises(ValueError, match="64 values of 4 bits are 8 numbers of int32, got 7 of int32"):
            unpack_compressed(tensors | {"weight_packed": tensors["weight_packed"][:, :7]})
        with pytest.raises(ValueError, match="got 8 of int64"):
            unpack_compressed(tensors | {"weight_packed": tensors["weight_packed"].long()})

    @pytest.mark.parametrize("shape, part", [((12, 64), "outputs, got 12"), ((8, 60), "inputs, got 60")])
    def test_sizes_that_gptq_cannot_pack(self, shape, part):
        with pytest.raises(ValueError, match=part):
            pack_gptq(make_weight(*shape, None))

    @pytest.mark.parametrize("num_groups", [0, 3])
    def test_columns_that_cannot_be_shared_out(self, num_groups):
        with pytest.raises(ValueError, match="64 input columns"):
            column_groups(64, num_groups)
