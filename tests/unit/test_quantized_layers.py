"""Products of 8 and 4 bits beside products with the same weights in floats, and which kernel computes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from folovllm.model import quantized_layers
from folovllm.model.int4_kernels import CpuKernel, CudaKernel, has_int4_kernel
from folovllm.model.int8_kernels import STEPS, ZERO, OneDnnInt8, int8_max, round_to_bytes
from folovllm.model.layers import LinearMethod
from folovllm.model.packing import QuantizedWeight, column_groups
from folovllm.model.quantized_layers import (
    Int8Linear,
    Int8Rows,
    PackedInt4,
    PlainInt4,
    kernel_group_size,
    rotate,
)

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(not has_int4_kernel(torch.bfloat16, CPU), reason="torch has no kernel for 4 bits here")
needs_onednn = pytest.mark.skipif(not OneDnnInt8.is_available(), reason="torch has no product of bytes by oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """The dtypes of the activations that torch's kernels were called with, by the kernel's name."""
    found: dict[str, list[torch.dtype]] = {}

    def watch(owner, attribute, name):
        kernel = getattr(owner, attribute)

        def call(x, *args):
            found.setdefault(name, []).append(x.dtype)
            return kernel(x, *args)

        monkeypatch.setattr(owner, attribute, call)

    watch(torch.ops.aten, "_weight_int4pack_mm_for_cpu", "_weight_int4pack_mm_for_cpu")
    watch(torch.ops.quantized.linear_dynamic.default, "_op", "linear_dynamic")
    watch(torch.ops.onednn.qlinear_pointwise.default, "_op", "qlinear_pointwise")
    return found


def make_weight(num_out=48, num_in=128, group_size=32, symmetric=True, desc_act=False, seed=0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    g_idx = column_groups(num_in, num_in // group_size)
    zeros = torch.randint(16, (num_out, num_in // group_size), dtype=torch.uint8, generator=generator)
    return QuantizedWeight(
        torch.randint(16, (num_out, num_in), dtype=torch.uint8, generator=generator),
        (torch.rand(num_out, num_in // group_size, generator=generator) / 8).half(),
        torch.full_like(zeros, 8) if symmetric else zeros,
        g_idx[torch.randperm(num_in, generator=generator)] if desc_act else g_idx,
    )


WEIGHTS = st.builds(
    make_weight,
    num_out=st.sampled_from([16, 48, 64, 112]),
    num_in=st.sampled_from([128, 256]),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    desc_act=st.booleans(),
    seed=st.integers(0, 2**32),
)


class TestInt4:
    @given(weight=WEIGHTS, num_rows=st.sampled_from([1, 5, 40]))
    def test_plain_is_a_product_with_the_same_floats(self, weight, num_rows):
        x = torch.randn(num_rows, weight.values.shape[1], generator=torch.Generator().manual_seed(1))
        plain = PlainInt4(weight)
        assert torch.allclose(plain(x), x @ weight.dequantize(torch.float32).T, atol=1e-4)
        assert plain.num_bytes < weight.values.numel()  # half a byte each, and the scales

    def test_the_order_of_its_columns_is_counted(self):
        ordered, shuffled = (PlainInt4(make_weight(desc_act=desc_act)) for desc_act in (False, True))
        assert shuffled.num_bytes - ordered.num_bytes == shuffled.g_idx.nbytes > 0

    @needs_int4
    @given(weight=WEIGHTS, num_rows=st.sampled_from([1, 5, 40, 300]))
    def test_packed_is_plain_within_the_rounding_of_bfloat16(self, weight, num_rows):
        x = torch.randn(num_rows, weight.values.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = x.double() @ weight.dequantize(torch.float64).T
        # Scales and zeros are rounded, and so are the result and what of a weight is above its zero: 2**-9 each.
        bound = 2**-7 * (x.double().abs() @ (15 * weight.scales.double()[:, weight.g_idx]).T)
        packed = PackedInt4(weight)(x)
        assert packed.dtype is torch.bfloat16 and bool(((packed.double() - exact).abs() <= bound).all())
        typical = (packed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert typical < 0.01

    @needs_int4
    @pytest.mark.parametrize("num_out", [16, 48, 64, 112, 128, 176])
    def test_many_rows_are_multiplied_by_the_same_weight_in_floats(self, num_out, monkeypatch):
        assert CpuKernel.knows_order()
        packed = PackedInt4(make_weight(num_out, 256, 64, symmetric=False, desc_act=True))
        x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        by_kernel = packed(x).float()
        monkeypatch.setattr(CpuKernel, "rows_for_floats", 20)
        in_floats = packed(x).float()
        assert torch.allclose(by_kernel, in_floats, rtol=2**-6, atol=2**-6 * float(by_kernel.abs().max()))
        assert (by_kernel - in_floats).abs().mean() < 0.003 * by_kernel.abs().mean()

    @needs_int4
    def test_an_order_that_is_not_known_is_left_to_the_kernel(self, calls, monkeypatch):
        monkeypatch.setattr(CpuKernel, "knows_order", lambda: False)
        PackedInt4(make_weight())(torch.randn(300, 128, dtype=torch.bfloat16))
        assert len(calls["_weight_int4pack_mm_for_cpu"]) == 1

    @needs_int4
    def test_it_is_torchs_kernel_and_its_activations_are_bfloat16(self, calls):
        PackedInt4(make_weight(desc_act=True))(torch.randn(3, 128, dtype=torch.bfloat16))
        assert calls == {"_weight_int4pack_mm_for_cpu": [torch.bfloat16]}

    @pytest.mark.parametrize("num_columns", [32, 64, 128])
    def test_an_order_that_torch_does_not_tell_is_found_out(self, num_columns):
        scrambled = torch.randperm(8 * num_columns, generator=torch.Generator().manual_seed(0))

        class Scrambles(CudaKernel):
            @staticmethod
            def pack(values):
                tiles = values.to(torch.uint8).view(-1, 8, values.shape[1] // num_columns, num_columns).transpose(1, 2)
                halves = tiles.flatten(2)[..., scrambled].unflatten(-1, (-1, 2))
                packed = (halves[..., 0] | halves[..., 1] << 4).view(torch.int32)
                return packed.unflatten(-1, (32, num_columns // 32))

        values = torch.randint(16, (48, 3 * num_columns))
        assert torch.equal(Scrambles.unpack(Scrambles.pack(values)), values.T)

    def test_the_scalar_loop_is_never_called(self, calls):
        assert not has_int4_kernel(torch.float32, CPU) and not has_int4_kernel(torch.float16, CPU)
        for dtype in (torch.float32, torch.bfloat16):
            PlainInt4(make_weight())(torch.randn(3, 128, dtype=dtype))
        assert calls == {}

    def test_a_processor_without_vectors_has_no_kernel(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert not has_int4_kernel(torch.bfloat16, CPU)

    @pytest.mark.parametrize(
        "num_out, num_in, group_size, expected",
        [
            (16, 128, 32, 32),
            (16, 128, 128, 128),
            (16, 512, 512, 256),
            (16, 576, 576, 64),
            (24, 128, 32, 0),
            (16, 96, 48, 0),
        ],
    )
    def test_which_weights_the_kernel_can_have(self, num_out, num_in, group_size, expected):
        assert kernel_group_size(make_weight(num_out, num_in, group_size)) == expected

    def test_groups_of_unequal_size_are_none_for_the_kernel(self):
        weight = make_weight(16, 128, 64)
        weight.g_idx[0] = 1
        assert kernel_group_size(weight) == 0
        x = torch.randn(2, 128)
        assert torch.allclose(PlainInt4(weight)(x), x @ weight.dequantize(torch.float32).T, atol=1e-4)


def make_int8(weight, bias=None, dtype=torch.float32, **kwargs) -> Int8Linear:
    method = LinearMethod(dtype, CPU, has_compiled_steps=True)  # `int8_kernel` tells which kernel it gets
    linear = Int8Linear(method, {"m": len(weight)}, weight.shape[1], bias is not None, **kwargs)
    for name, place in linear.places().items():
        place.copy_(bias if name == "m.bias" else weight)
    return linear


class TestInt8:
    @given(scale=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 2**32))
    def test_each_row_is_rounded_by_a_scale_of_its_own(self, scale, seed):
        weight = scale * torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
        weight[3], weight[4] = 0, weight[4] * 1e-3
        rows = Int8Rows(torch.empty(7, 33, dtype=torch.int8), torch.empty(7))
        rows.copy_(weight)
        assert rows.shape == weight.shape
        error = rows.values * rows.scales[:, None] - rotate(weight)
        assert bool((error.abs() <= 0.5001 * rows.scales[:, None]).all())
        assert rows.values[0].abs().max() == int8_max() and not rows.values[3].any()

    def test_a_large_weight_is_rounded_in_parts(self, monkeypatch):
        weight, whole, parts = (
            torch.randn(50, 8),
            *(Int8Rows(torch.empty(50, 8, dtype=torch.int8), torch.empty(50)) for _ in "ab"),
        )
        whole.copy_(weight)
        monkeypatch.setattr(quantized_layers, "ROWS_AT_ONCE", 7)
        parts.copy_(weight)
        assert torch.equal(whole.values, parts.values) and torch.equal(whole.scales, parts.scales)

    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.usefixtures("int8_kernel")
    def test_it_is_a_product_within_the_rounding(self, has_bias, dtype):
        torch.manual_seed(0)
        weight, bias = torch.randn(48, 80), torch.randn(48) if has_bias else None
        linear = make_int8(weight, bias, dtype)
        linear.process_weights_after_loading()
        x = torch.randn(9, 80)
        error = linear(x.to(dtype)).float() - F.linear(x, weight, bias)
        assert linear(x.to(dtype)).dtype is dtype
        assert error.abs().mean() < 0.15  # of about 7; 7 bits of activation are 1 % of the largest

    def test_float16_has_room_for_the_sums_of_the_plain_path(self, monkeypatch):
        monkeypatch.setattr(quantized_layers, "has_int8_kernel", lambda device: False)
        weight = 1e-3 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
        linear = make_int8(weight, dtype=torch.float16)
        linear.process_weights_after_loading()
        x = 500 * torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
        assert (linear(x.half()).float() - x @ weight.T).abs().mean() < 0.3  # of about 11

    def test_float16_has_room_for_what_is_rotated(self, monkeypatch):
        monkeypatch.setattr(quantized_layers, "has_int8_kernel", lambda device: False)
        linear = make_int8(torch.full((16, 64), 0.01), dtype=torch.float16)
        linear.process_weights_after_loading()
        out = linear(torch.full((2, 64), 8_200.0, dtype=torch.float16)).float()
        torch.testing.assert_close(out, torch.full((2, 16), 64 * 82.0), rtol=0.02, atol=0)

    @pytest.mark.usefixtures("int8_kernel")
    @pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e-3, 1.0, 1e4])
    def test_a_row_may_be_small_or_large(self, scale):
        weight, x = torch.randn(17, 512, generator=torch.Generator().manual_seed(0)).split([16, 1])
        linear = make_int8(weight)
        linear.process_weights_after_loading()
        error = linear(scale * x) / scale - F.linear(x, weight)
        assert error.norm() < 0.03 * F.linear(x, weight).norm()

    @pytest.mark.usefixtures("int8_kernel")
    def test_sums_do_not_saturate(self):
        """The largest of all numbers, everywhere: on x86 before VNNI two products of 8 bits are more than 16."""
        linear = make_int8(torch.ones(16, 64))
        linear.process_weights_after_loading()
        x = torch.ones(3, 64)
        assert torch.allclose(linear(x), torch.full((3, 16), 64.0), rtol=0.02)

    @pytest.mark.usefixtures("int8_kernel")
    def test_a_row_does_not_feel_the_others(self):
        """One with large numbers, one of zeros and one that is not a number among others."""
        linear = make_int8(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
        linear.process_weights_after_loading()
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
        x[1], x[2, 5], x[4] = 0, torch.nan, 1000 * x[4]
        alone, together = torch.cat([linear(row[None]) for row in x]), linear(x)
        assert not together[1].any() and together[2].isnan().all()
        for row in (0, 3, 5):
            assert (together[row] - alone[row]).abs().max() < 0.4 < together[row].abs().mean()

    @pytest.mark.usefixtures("int8_kernel")
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_weight_that_is_not_a_number_does_not_vanish(self, bad):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        weight[3, 5] = bad
        linear = make_int8(weight)
        linear.process_weights_after_loading()
        assert linear(torch.randn(2, 64)).isnan().any(0).nonzero().tolist() == [[3]]

    @pytest.mark.usefixtures("int8_kernel")
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("places", [slice(None), slice(5, 6), slice(64, None)])
    @pytest.mark.parametrize("num_rows", [1, 3])
    @pytest.mark.parametrize("is_head", [False, True])
    def test_what_is_not_a_number_does_not_become_one(self, bad, places, num_rows, is_head):
        generator = torch.Generator().manual_seed(0)
        linear = make_int8(torch.randn(16, 128, generator=generator), is_head=is_head)
        linear.process_weights_after_loading()
        x = torch.randn(num_rows, 128, generator=generator)
        x[0, places] = bad
        assert not linear(x)[0].isfinite().any() and linear(x)[1:].isfinite().all()

    @pytest.mark.usefixtures("int8_kernel")
    @pytest.mark.parametrize("int8_kernel", ["dynamic", "oneDNN"], indirect=True)  # which round activations
    def test_one_large_number_costs_its_neighbours_little(self, monkeypatch):
        weight, x = torch.randn(65, 512, generator=torch.Generator().manual_seed(0)).split([64, 1])
        x[0, 7], x[0, 100] = 30.0, -30.0
        errors = []
        for size in (1, quantized_layers.MAX_ROTATED):
            monkeypatch.setattr(quantized_layers, "MAX_ROTATED", size)
            linear = make_int8(weight)
            linear.process_weights_after_loading()
            errors.append(float((linear(x) - F.linear(x, weight)).square().mean()))
        assert errors[1] < errors[0] / 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_kernel_is_the_one_that_it_should_be(self, int8_kernel, calls, dtype):
        linear = make_int8(torch.randn(16, 64), dtype=dtype)
        linear.process_weights_after_loading()
        linear(torch.randn(3, 64, dtype=dtype))
        called, kernel = {
            "plain": ({}, "8 bits, plain"),
            "dynamic": ({"linear_dynamic": [torch.float32]}, "8 bits, dynamic"),
            "oneDNN": ({"qlinear_pointwise": [torch.uint8]}, "8 bits, dynamic"),
        }[int8_kernel]
        assert calls == called and linear.kernel == kernel

    @needs_onednn
    def test_eager_steps_have_the_kernel_that_rounds_by_itself(self):
        linear = Int8Linear(LinearMethod(torch.float32, CPU), {"m": 8}, 8)
        linear.process_weights_after_loading()
        assert not linear.takes_bytes

    @needs_onednn
    @given(num_rows=st.integers(1, 300), num_out=st.integers(1, 200), num_in=st.integers(1, 300), seed=st.integers(0))
    def test_onednn_adds_up_whole_numbers_exactly(self, num_rows, num_out, num_in, seed):
        generator = torch.Generator().manual_seed(seed % 2**63)
        weight = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, generator=generator)
        rows = 2 * torch.rand(num_rows, num_in, generator=generator) - 1
        scales = torch.rand(num_out, generator=generator)
        largest = rows.abs().amax(-1, keepdim=True)
        steps = round_to_bytes(rows, largest)
        assert ((steps.float() - ZERO) / STEPS - rows / largest).abs().max() <= 0.5001 / STEPS
        exact = ((steps.double() - ZERO) @ weight.double().T) * scales / STEPS
        torch.testing.assert_close(OneDnnInt8(weight, scales)(steps).double(), exact, rtol=1e-6, atol=1e-6)

    @needs_onednn
    def test_onednn_is_not_taken_where_it_loses_something(self):
        """Told to do without VNNI, it adds up two products in 16 bits, whatever the CPU has."""
        ask = "from folovllm.model.int8_kernels import OneDnnInt8; print(OneDnnInt8.is_available())"
        env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
        ran = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
        assert ran.stdout == "False\n"

    def test_a_tied_head_is_rounded_when_all_is_loaded(self):
        weight = torch.zeros(48, 80)
        linear = Int8Linear(LinearMethod(torch.float32, CPU), {"lm_head": 48}, 80, tied=weight)
        assert linear.places() == {}
        weight.normal_()
        linear.process_weights_after_loading()
        x = torch.randn(2, 80)
        assert (linear(x) - x @ weight.T).abs().mean() < 0.2

    def test_logits_of_a_16_bit_model_are_float32(self):
        linear = make_int8(torch.randn(16, 64), dtype=torch.bfloat16, is_head=True)
        linear.process_weights_after_loading()
        assert linear(torch.randn(1, 64, dtype=torch.bfloat16)).dtype is torch.float32

    def test_its_bytes_are_counted(self):
        linear = make_int8(torch.randn(16, 64), torch.randn(16))
        linear.process_weights_after_loading()
        assert linear.num_bytes == 16 * 64 + 4 * 16 + 4 * 16

    def test_torchs_warning_stays_inside(self, recwarn):
        make_int8(torch.randn(16, 64)).process_weights_after_loading()
        assert not recwarn.list


class TestRotate:
    @given(
        num_in=st.integers(1, 300) | st.integers(1, 80).map(lambda n: 64 * n),
        num_rows=st.integers(1, 4),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 2**32),
    )
    def test_products_are_the_same(self, num_in, num_rows, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(n, num_in, generator=generator).to(dtype) for n in (num_rows, 7))
        assert rotate(x).dtype is torch.float32 and rotate(x).shape == x.shape
        torch.testing.assert_close(rotate(x) @ rotate(weight).T, x.float() @ weight.float().T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(rotate(rotate(x)), x.float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("num_in, size", [(64, 64), (576, 64), (96, 32), (12, 4), (33, 1), (1024, 64), (100, 4)])
    def test_one_number_is_shared_out_among_its_block(self, num_in, size):
        x = torch.zeros(num_in)
        x[num_in - 1] = 8.0
        expected = torch.zeros(num_in)
        expected[-size:] = 8 / size**0.5
        torch.testing.assert_close(rotate(x).abs(), expected)
