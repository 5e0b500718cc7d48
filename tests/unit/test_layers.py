"""Products and norms: the same numbers packed and not, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from folovllm.model.layers import Linear, RMSNorm
from folovllm.utils.onednn import has_onednn

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def close(ours, theirs):
    """Equal up to the rounding of the dtype, whatever the size of the numbers."""
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    tolerance = TOLERANCES[theirs.dtype]
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 17, 100])
def test_a_packed_weight_multiplies_like_any_other(dtype, bias, num_rows):
    torch.manual_seed(0)
    weight = torch.randn(48, 80, dtype=dtype)
    linear = Linear(weight.clone(), torch.randn(48, dtype=dtype) if bias else None)
    x = torch.randn(num_rows, 160, dtype=dtype)[:, ::2]
    expected = F.linear(x, weight, linear.bias)
    assert close(linear(x), expected)
    linear.process_weights_after_loading()
    assert close(linear(x), expected)


def test_only_dtypes_that_onednn_has_are_packed():
    assert has_onednn(torch.empty(2, 2)) == torch.backends.mkldnn.is_available()
    assert not has_onednn(torch.empty(2, 2, dtype=torch.float64))
    assert not has_onednn(torch.empty(2, 2, device="meta"))
    double = Linear(torch.empty(2, 2, dtype=torch.float64))
    double.process_weights_after_loading()
    assert not double.weight.is_mkldnn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_packing_is_another_order_of_the_same_bytes():
    linear = Linear(torch.randn(48, 80))
    linear.process_weights_after_loading()
    assert linear.weight.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-5, 1, 1e5])
def test_the_norm_is_torchs(dtype, scale):
    torch.manual_seed(0)
    x, weight = scale * torch.randn(5, 3, 16), torch.randn(3, 16)
    x, weight = x.to(dtype), weight.to(dtype)
    norm = RMSNorm(weight, eps=1e-6)
    expected = F.rms_norm(x, (16,), None, 1e-6) * weight
    assert close(norm(x), expected)
    norm.process_weights_after_loading()
    assert close(norm(x), expected)


def test_a_row_of_zeros_stays_zero():
    norm = RMSNorm(torch.ones(8), eps=1e-6)
    norm.process_weights_after_loading()
    assert norm(torch.zeros(2, 8)).tolist() == [[0.0] * 8] * 2
