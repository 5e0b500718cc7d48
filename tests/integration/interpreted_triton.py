"""Our Triton kernels under Triton's interpreter. `test_triton.py` runs this file, in a process of its own."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attention_helpers import ROUNDING, Step, make_step
from fused_helpers import check_add_rms_norm, check_rotate_and_write, check_silu_and_mul

from folovllm import LLM, SamplingParams
from folovllm.attention import triton
from folovllm.attention.flash import FlashAttention
from folovllm.attention.triton import TritonAttention, choose_num_parts
from folovllm.model import fused
from folovllm.tales import EMBEDDED_MODEL

CPU = torch.device("cpu")
DTYPES, BLOCK_SIZES, HEAD_DIMS = (torch.float32, torch.float16), (1, 3, 16, 256), (32, 64, 96, 128)


def check(step: Step, rounding: float | None = None) -> None:
    dtype, head_dim, num_heads = step.q.dtype, step.q.shape[2], step.q.shape[1]
    assert TritonAttention.unsupported(CPU, dtype, head_dim, step.block_size) is None
    # As in the decoder, where queries, keys and values of a token are one row.
    step.q, step.kv = torch.cat([step.q, step.kv], dim=1).split([num_heads, 2 * step.num_kv_heads], dim=1)
    found = step.run(TritonAttention)
    assert found.dtype == dtype
    error = (found.double() - step.expected()).abs().max().item()
    assert error <= (rounding or ROUNDING[dtype]), f"{error:.1e}"


@pytest.mark.parametrize("seed", range(32))
def test_numbers(seed: int) -> None:
    """Decodes, chunks and whole prompts together, of lengths to 256, for each dtype, block size and head size."""
    rng = random.Random(seed)
    dtype, block_size, head_dim = list(itertools.product(DTYPES, BLOCK_SIZES, HEAD_DIMS))[seed]
    lens = []
    for kind in rng.choices(("decode", "chunk", "prompt"), k=rng.randint(1, 4)):
        num_tokens = rng.randint(1, 256 if kind == "decode" else rng.choice([20, 60, 200]))
        num_new = {"decode": 1, "chunk": rng.randint(1, num_tokens), "prompt": num_tokens}[kind]
        lens.append((num_tokens - num_new, num_new))
    shape = {"num_kv_heads": rng.randint(1, 2), "group": 1 + seed * 3 % 8, "head_dim": head_dim}
    check(make_step(seed, lens, **shape, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("group", range(1, 9))
def test_rows_of_a_tile(group: int) -> None:
    """Tiles that end within a token, at the end of one, and with one."""
    for num_new in (16 // group, 16 // group + 1, 64 // group + 1):
        check(make_step(group, [(5, num_new), (0, 2)], num_kv_heads=1, group=group, head_dim=16, block_size=4))


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_ends_of_a_tile_of_keys(num_tokens: int) -> None:
    for head_dim in (32, 128):
        lens = [(num_tokens - 1, 1), (0, min(num_tokens, 3))]
        check(make_step(num_tokens, lens, num_kv_heads=1, head_dim=head_dim, block_size=3))


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 500, 1025])
@pytest.mark.parametrize(("num_parts", "group", "block_size"), [(2, 20, 3), (4, 3, 1), (16, 3, 16)])
def test_parts(num_tokens: int, num_parts: int, group: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the keys of few sequences that decode; most are empty where there are few keys, and what they have not written
    is not a number."""
    monkeypatch.setattr(triton, "choose_num_parts", lambda *args: num_parts)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, float("nan"), **kwargs))
    lens, shape = [(num_tokens - 1, 1), (0, 1), (39, 1)], {"num_kv_heads": 2, "group": group, "head_dim": 96}
    check(make_step(num_tokens, lens, **shape, block_size=block_size, dtype=torch.float16))


def test_few_sequences_that_decode_have_parts() -> None:
    assert choose_num_parts(6, torch.float16, 1) == 16


@pytest.mark.parametrize(
    ("dtype", "lens", "block_size"),
    [(torch.float32, [(1999, 1), (3, 1)], 16), (torch.float16, [(1990, 10)], 256)],
)
def test_long(dtype: torch.dtype, lens: list[tuple[int, int]], block_size: int) -> None:
    check(make_step(0, lens, num_kv_heads=1, group=4, head_dim=64, block_size=block_size, dtype=dtype))


def test_large_scores() -> None:
    """Softmax must not overflow, and a token that wins by far must win alone."""
    step = make_step(1, [(200, 1), (0, 40)], group=3, head_dim=64)
    step.q *= 200
    check(step, rounding=1e-4)


def test_bfloat16_is_refused() -> None:
    assert "bfloat16" in TritonAttention.unsupported(CPU, torch.bfloat16, 64, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_operations(dtype: torch.dtype) -> None:
    """Beside the plain ones, over random shapes; the slots in the layout of either backend."""
    for seed in range(6):
        check_add_rms_norm(seed, dtype, CPU)
        check_silu_and_mul(seed, dtype, CPU)
        for backend_cls in (TritonAttention, FlashAttention):
            check_rotate_and_write(seed, dtype, CPU, backend_cls)


STORIES = ["Once upon a time there was a little", "The", "Once upon a time there was a little dog"]
GREEDY = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 0.9, "seed": 7}


@pytest.mark.parametrize(
    ("settings", "params", "is_fused"),
    [
        ({}, GREEDY, True),
        ({"enable_chunked_prefill": True, "max_num_batched_tokens": 5}, GREEDY, False),
        ({"enable_prefix_caching": True, "block_size": 3, "max_num_seqs": 2}, GREEDY, True),
        ({"block_size": 3, "num_blocks": 10}, GREEDY, True),
        ({"block_size": 256}, SEEDED, False),
        ({"block_size": 1}, {**SEEDED, "n": 3, "max_tokens": 3}, False),
    ],
    ids=["as it comes", "chunks", "prefixes", "preempted", "one block", "three answers"],
)
def test_tokens(settings: dict, params: dict, is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From end to end they give the tokens of the plain reference, with fused operations and without."""
    monkeypatch.setattr(fused, "is_available", lambda device: is_fused)
    tokens = {}
    for name in ("sdpa", "triton"):
        llm = LLM(str(EMBEDDED_MODEL), device="cpu", attention_backend=name, max_model_len=64, **settings)
        assert isinstance(llm.engine.runner.attention, TritonAttention) == (name == "triton")
        outputs = llm.generate(STORIES, SamplingParams(**params), use_tqdm=False)
        tokens[name] = [[answer.token_ids for answer in output.outputs] for output in outputs]
    assert tokens["triton"] == tokens["sdpa"]
    steps = llm.engine.stats()
    assert bool(sum(step.num_preempted for step in steps)) == ("num_blocks" in settings)
    assert bool(sum(step.num_cached_tokens for step in steps)) == ("enable_prefix_caching" in settings)
