"""GPTQ on single weights: it is the textbook's, without a Hessian it is rounding, and it survives odd inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folovllm.model import gptq
from folovllm.model.gptq import (
    compute_hessian,
    factor_inverse,
    find_scales,
    output_error,
    quantize_weight,
)


def make(
    num_out: int, num_in: int, seed: int, num_dead: int = 0, rank: int | None = None, num_tokens: int = 64
) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that are mixed from ``rank`` sources, some columns of which are always 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64)
    sources = torch.randn(num_tokens, rank or num_in, generator=generator, dtype=torch.float64)
    x = sources @ torch.randn(rank or num_in, num_in, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(num_in, generator=generator)[:num_dead]] = 0
    return weight, x


def textbook(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """The values by the slow formula: after each column the inverse is made smaller by that column, in full."""
    weight, hessian, zero = weight.clone(), hessian.clone(), 2 ** (bits - 1)
    importance = hessian.diagonal().clone()
    is_dead = importance == 0
    mean = 1.0 if is_dead.all() else float(hessian.diagonal()[~is_dead].mean())
    hessian.diagonal()[is_dead] = mean
    weight[:, is_dead] = 0
    inverse = torch.linalg.inv(hessian + 0.01 * mean * torch.eye(len(hessian), dtype=torch.float64))
    values = torch.zeros_like(weight)
    for q in range(weight.shape[1]):
        if q % group_size == 0:
            group = slice(q, q + group_size)
            scales = find_scales(weight[:, group], bits, importance[group]).double()
        steps = (weight[:, q] / scales).round().clamp(-zero, zero - 1)
        values[:, q] = steps + zero
        error = (weight[:, q] - steps * scales) / inverse[q, q]
        weight[:, q + 1 :] -= torch.outer(error, inverse[q, q + 1 :])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return values


@settings(max_examples=25)
@given(
    num_out=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (4, 1), (8, 5), (24, 8), (32, 6), (96, 2), (136, 1), (192, 1)]),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
    share_dead=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    rank=st.sampled_from([None, 1, 3]),
)
def test_it_is_the_textbooks(
    num_out: int, groups: tuple[int, int], bits: int, seed: int, share_dead: float, rank: int | None
) -> None:
    group_size, num_groups = groups
    num_in = group_size * num_groups
    weight, x = make(num_out, num_in, seed, int(share_dead * num_in), rank)
    before, hessian = weight.clone(), compute_hessian(x)
    found = quantize_weight(weight, hessian, bits, group_size)
    assert torch.equal(weight, before), "the caller's weight was changed"
    wanted = textbook(weight, hessian, bits, group_size)
    # A number half-way between two values may be rounded to either, for the two sum up in another order.
    assert (found.values != wanted).double().mean() < 0.01
    assert found.scales.dtype is torch.float16 and found.scales.shape == (num_out, num_groups)
    assert int(found.values.max()) < 2**bits
    assert found.dequantize(torch.float64).isfinite().all()


@pytest.mark.parametrize("group_size", [96, 192])
def test_groups_that_do_not_fill_blocks_of_128_columns_are_not_cut(group_size: int) -> None:
    weight, x = make(64, 2 * group_size, 0, num_tokens=1024)
    hessian = compute_hessian(x + 3 * x.roll(1, 1))
    found, wanted = quantize_weight(weight, hessian, 4, group_size), textbook(weight, hessian, 4, group_size)
    assert (found.values != wanted).double().mean() < 0.001


@settings(max_examples=25)
@given(num_out=st.integers(1, 5), num_groups=st.integers(1, 4), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_without_a_hessian_each_number_goes_to_the_nearest(num_out: int, num_groups: int, bits: int, seed: int) -> None:
    weight, _ = make(num_out, 16 * num_groups, seed)
    found = quantize_weight(weight, None, bits, 16)
    scale = found.scales.double().repeat_interleave(16, dim=1)
    # The largest number of a group, half a step beyond the last value on the positive side, may stay that far away; the
    # scale's own rounding to float16 adds a two-thousandth of the whole grid.
    error = (found.dequantize(torch.float64) - weight).abs() / scale
    assert (error <= 0.5 + 2**bits / 2**12).all()


def test_the_largest_number_of_a_group_makes_its_scale() -> None:
    scales = find_scales(torch.tensor([[1.5, -3.0], [0.0, 0.0], [7.5, 7.4]]), 4)
    assert scales.tolist() == [pytest.approx(0.4, rel=1e-3), 2**-24, 1.0]


def test_a_scale_may_be_smaller_where_the_largest_number_hardly_counts() -> None:
    group = torch.tensor([[7.5, 1.4, -1.4, 0.45, -0.45]])
    assert find_scales(group, 4, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])).item() == 1.0
    assert find_scales(group, 4, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])).item() < 1.0


def test_columns_that_do_not_go_together_hand_nothing_on() -> None:
    weight, _ = make(4, 32, 0)
    importance = torch.rand(32, dtype=torch.float64) + 0.1
    found = quantize_weight(weight, torch.diag(importance), 4, 16).dequantize(torch.float64)
    for group in (slice(0, 16), slice(16, 32)):
        scale = find_scales(weight[:, group], 4, importance[group]).double().unsqueeze(1)
        torch.testing.assert_close(found[:, group], (weight[:, group] / scale).round().clamp(-8, 7) * scale)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_it_beats_rounding_where_inputs_go_together(group_size: int) -> None:
    for seed in range(3):
        weight, x = make(32, 256, seed, rank=40, num_tokens=600)
        hessian = compute_hessian(x)
        carried, rounded = (
            output_error(weight, quantize_weight(weight, h, 4, group_size), hessian) for h in (hessian, None)
        )
        assert carried < 0.3 * rounded


def test_the_factor_is_of_the_inverse() -> None:
    _, x = make(1, 24, 0)
    hessian = compute_hessian(x)
    factor = factor_inverse(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))


def test_damping_is_raised_until_the_hessian_can_be_inverted() -> None:
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)  # one of its eigenvalues is -0.05
    factor = factor_inverse(hessian)
    torch.testing.assert_close(torch.linalg.inv(factor.T @ factor), hessian + 0.1 * torch.eye(2, dtype=torch.float64))


def test_a_dead_column_costs_nothing_and_is_zero() -> None:
    weight, x = make(4, 32, 0, num_dead=5)
    weight[:, x[0] == 0] = 1000.0  # would make all others of its group vanish
    found = quantize_weight(weight, compute_hessian(x), 4, 32).dequantize(torch.float64)
    assert (found[:, x[0] == 0] == 0).all() and found.abs().max() < 100


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-6, 60_000.0])
def test_weights_of_any_size(value: float) -> None:
    found = quantize_weight(torch.full((2, 8), value), None, 4, 8).dequantize(torch.float32)
    assert found.isfinite().all() and (found - value).abs().max() <= max(0.07 * value, 5 * 2**-24)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 24}, "group_size must be -1 or divide the 64 input columns of each weight, got 24"),
        ({"group_size": 0}, "got 0"),
        ({"group_size": 128}, "got 128"),
        ({"bits": 1}, "bits must be from 2 to 8, got 1"),
        ({"bits": 9}, "got 9"),
        ({"weight": torch.full((2, 64), math.nan)}, "the weight has a number that is not finite"),
        ({"weight": torch.full((2, 64), 1e30)}, "too large for a scale in float16"),
        ({"hessian": torch.full((64, 64), math.inf)}, "the inputs of a weight have a number that is not finite"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, message: str) -> None:
    arguments = {"weight": torch.ones(2, 64), "hessian": None, "bits": 4, "group_size": 32} | change
    with pytest.raises(ValueError, match=message):
        quantize_weight(**arguments)


def test_methods_by_name() -> None:
    weight, x = make(4, 32, 0)
    hessian = compute_hessian(x)
    for method, given_hessian in (("gptq", hessian), ("rtn", None)):
        found = gptq.choose_method(method, 3, 16)(weight, hessian)
        assert torch.equal(found.values, quantize_weight(weight, given_hessian, 3, 16).values)
    with pytest.raises(ValueError, match="method must be gptq or rtn, got 'awq'"):
        gptq.choose_method("awq")
