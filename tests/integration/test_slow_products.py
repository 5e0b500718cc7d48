"""Where a CPU has no product of 16 bits, matrices are multiplied in float32: what torch does instead takes ages."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm import LLM, SamplingParams
from folovllm.attention.gather import GatherAttention
from folovllm.attention.prompts import attend_to_prompts
from folovllm.model import layers
from folovllm.model.layers import ROWS_FOR_FLOATS, Linear
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils import onednn

OPERATIONS = {
    **dict.fromkeys((torch.ops.aten.linear, torch.ops.aten.mm, torch.ops.aten.bmm), 0),
    **dict.fromkeys((torch.ops.aten.addmm, torch.ops.aten.baddbmm), 1),
}
"""Products of matrices, and which argument is the first factor."""


class Products(TorchDispatchMode):
    """Notes the dtype of each product of matrices, and how many rows it has."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in OPERATIONS:
            x = args[OPERATIONS[func.overloadpacket]]
            self.found.add((func.overloadpacket.__name__.split(".")[-1], x.dtype, x.shape[-2]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request, monkeypatch):
    """One that this CPU has no products for, or that it is told it has none for."""
    for module in (onednn, layers):
        monkeypatch.setattr(module, "has_onednn", lambda x: x.dtype is torch.float32)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, ROWS_FOR_FLOATS - 1, ROWS_FOR_FLOATS, 100])
def test_a_weight_becomes_floats_for_many_rows(dtype, num_rows, bias, monkeypatch):
    monkeypatch.setattr(layers, "OUTPUTS_AT_ONCE", 40)
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(num_rows, 64).to(dtype)
    linear = Linear(weight, torch.randn(96).to(dtype) if bias else None)
    linear.process_weights_after_loading()
    with Products() as products:
        out = linear(x)
    expected = F.linear(x.double(), weight.double(), None if linear.bias is None else linear.bias.double())
    assert out.dtype is dtype
    assert torch.allclose(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0.05)
    is_wide = num_rows >= ROWS_FOR_FLOATS
    assert {found[1] for found in products.found} == {torch.float32 if is_wide else dtype}


def test_prompts_attend_in_floats(dtype):
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, heads, 100, 32).to(dtype) for heads in (4, 2, 2))
    with Products() as products:
        found = attend_to_prompts(queries, keys, values)
    assert {product[:2] for product in products.found} == {("bmm", torch.float32)}
    expected = F.scaled_dot_product_attention(
        *(x.double() for x in (queries, keys, values)), is_causal=True, enable_gqa=True
    )
    assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def test_no_slow_product_is_left_in_an_answer(dtype, monkeypatch):
    """Prompts, one with a past, decoding of many values, and after a prefix that all share."""
    monkeypatch.setattr("folovllm.attention.gather.FEW_NUMBERS", 0)
    monkeypatch.setattr("folovllm.attention.gather.SHARED_TOKENS", 1)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 100, "enable_prefix_caching": True}
    llm = LLM(str(EMBEDDED_MODEL), device="cpu", dtype=dtype, **settings)
    params, shares = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), []
    begin = GatherAttention._begin_decodes

    def note(self, lens):
        begin(self, lens)
        shares.append(self._num_shared_tokens > 0)

    monkeypatch.setattr(GatherAttention, "_begin_decodes", note)
    with Products() as products:
        llm.generate([list(range(3, 3 + n)) for n in (150, 80, 40, 5)], params)
        llm.generate([[*range(3, 35), last] for last in (40, 41, 42)], params)
    assert {*shares} == {False, True}
    assert {name for name, _, _ in products.found} >= {"linear", "bmm", "baddbmm"}
    slow = {found for found in products.found if found[1] is dtype}
    assert all(name in ("linear", "mm") and num_rows < ROWS_FOR_FLOATS for name, _, num_rows in slow), slow
