"""The fused operations beside the plain ones, on whatever device runs Triton's kernels."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.attention import KernelBackend
from folovllm.model import fused

ROUNDING = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""What a result may be off by, as a share of itself or of 1: one unit in the last place, and in float32 some more, for
a GPU's roots, exponentials and quotients are approximations."""
EPS = 1e-5


class Numbers:
    """Random shapes and numbers, the same on each device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rng, self.dtype, self.device = random.Random(seed), dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


def check_add_rms_norm(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    make = Numbers(seed, dtype, device)
    num_tokens, size = make.rng.randint(1, 4), make.rng.choice([1, 32, 100, 576, 3000])
    stream, x, weight = make.normal(num_tokens, size), make.normal(num_tokens, size), make.normal(size)
    for added in (x, None):
        found_stream, stream = stream.clone(), stream if added is None else stream + added
        found = fused.add_rms_norm(found_stream, added, weight, EPS)
        assert torch.equal(found_stream, stream)
        check_close(found, F.rms_norm(stream.double(), (size,), weight.double(), EPS), dtype)


def check_silu_and_mul(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    make = Numbers(seed, dtype, device)
    gate_up = 4 * make.normal(make.rng.randint(1, 4), 2 * make.rng.choice([1, 96, fused.GATE_TILE, 1536]))
    gate_up[0, 0] = -1000.0  # whose exponential is infinite
    gate, up = gate_up.double().chunk(2, dim=1)
    check_close(fused.silu_and_mul(gate_up), F.silu(gate) * up, dtype)


def check_rotate_and_write(
    seed: int, dtype: torch.dtype, device: torch.device, backend_cls: type[KernelBackend]
) -> None:
    make = Numbers(seed, dtype, device)
    num_tokens, num_heads, num_kv_heads = make.rng.randint(1, 4), make.rng.randint(1, 5), make.rng.randint(1, 3)
    head_dim, num_blocks, block_size = make.rng.choice([2, 32, 96, 128]), 3, 4
    qkv = make.normal(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    qkv[0, -1, -1] = torch.inf  # of a value, which is not rotated, so that its neighbours stay numbers
    weight = make.normal(num_heads + num_kv_heads, head_dim) if make.rng.random() < 0.5 else None
    angles = torch.outer(torch.arange(50.0), torch.rand(head_dim // 2))
    cos = angles.cos().repeat(1, 2).unsqueeze(1).to(device, dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).unsqueeze(1).to(device, dtype)
    positions = torch.tensor([make.rng.randrange(50) for _ in range(num_tokens)], device=device)
    slot_mapping = torch.tensor(make.rng.sample(range(num_blocks * block_size), num_tokens), device=device)

    qk, values = qkv.double().split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if weight is not None:
        qk = F.rms_norm(qk, (head_dim,), None, EPS) * weight.double()
    qk = qk * cos[positions].double() + qk.roll(head_dim // 2, dims=-1) * sin[positions].double()
    shape = backend_cls.kv_cache_shape(2, num_kv_heads, num_blocks, block_size, head_dim)
    found, expected = (backend_cls(torch.full(shape, 7.0, dtype=d, device=device)) for d in (dtype, torch.float64))
    expected.write(1, torch.cat([qk[:, num_heads:], values], dim=1), slot_mapping)
    q = fused.rotate_and_write(qkv, weight, EPS, cos, sin, positions, found.slots(1), slot_mapping)
    check_close(q, qk[:, :num_heads], dtype)
    check_close(found.kv_cache, expected.kv_cache, dtype)
