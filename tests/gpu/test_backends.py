"""Attention backends compiled for real: each within rounding of float64, and the same tokens from end to end."""

from __future__ import annotations

import random

import pytest
import torch
from attention_helpers import ROUNDING, Step, make_step

from folovllm import LLM, SamplingParams
from folovllm.attention import BACKENDS, load_backend
from folovllm.tales import EMBEDDED_MODEL

CUDA = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)
SERVED = {name: HALVES if name == "flash" else tuple(ROUNDING) for name in BACKENDS}
"""What each must be able to compute in."""
PAGES = (256, 512)
"""Block sizes that every backend can read."""
ALLOWED = {dtype: 2 * rounding for dtype, rounding in ROUNDING.items()}
"""What an output may be off by, as a share of itself or of 1: a GPU's exponentials and quotients are approximations."""
NUM_STEPS = 30
NEAR_TIE = {torch.float16: 0.1, torch.bfloat16: 0.5}
"""Two log probabilities are a near tie if they are no further apart: a few units in the last place of a logit of 16."""
PROMPTS = ("Once upon a time", "Long ago, in the swamp", "从前", "In the forest 🦊", "Once upon a time, " * 20)


def cases(*dtypes: torch.dtype) -> list:
    return [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, served in SERVED.items()
        for dtype in served
        if dtype in dtypes
    ]


def skip_without_flash(name: str) -> None:
    """torch reads block tables since 2.13, and a GPU may be too old; whatever else a backend lacks is a failure."""
    why_not = load_backend(name).unsupported(CUDA, torch.float16, 64, PAGES[0]) if name == "flash" else None
    if why_not is not None:
        pytest.skip(why_not)


def random_step(seed: int, dtype: torch.dtype, block_sizes: tuple[int, ...]) -> Step:
    """Up to eight sequences of up to 2,000 tokens, half of them decoding; in every third step all."""
    rng = random.Random(seed)
    longest, lens = rng.choice([8, 100, 2000]), []
    for _ in range(rng.randint(1, 8)):
        past = rng.choice([0, rng.randrange(longest)])
        lens.append((past, 1 if seed % 3 == 0 or rng.random() < 0.5 else rng.randint(1, longest - past)))
    return make_step(
        seed,
        lens,
        num_kv_heads=rng.randint(1, 4),
        group=rng.randint(1, 8),
        head_dim=rng.choice([32, 64, 96, 128]),
        block_size=rng.choice(block_sizes),
        dtype=dtype,
        device=CUDA,
    )


@pytest.mark.parametrize(("name", "dtype"), cases(*ROUNDING))
def test_within_rounding_of_float64(name, dtype, record_property):
    skip_without_flash(name)
    backend, largest = load_backend(name), 0.0
    for seed in range(NUM_STEPS):
        step = random_step(seed, dtype, PAGES if name == "flash" else (1, 3, 16, *PAGES))
        assert backend.unsupported(CUDA, dtype, step.q.shape[2], step.block_size) is None
        found, expected = step.run(backend).double(), step.expected()
        error = float(((found - expected) / expected.abs().clamp(min=1)).abs().max())
        assert error <= ALLOWED[dtype], f"seed {seed}: off by {error:.1e}"
        largest = max(largest, error)
    kind = str(dtype).removeprefix("torch.")
    record_property(f"{name}, {kind}: largest error in {NUM_STEPS} steps", f"{largest:.1e} of {ALLOWED[dtype]:.1e}")


def tell(name: str, device: str, dtype: torch.dtype) -> list[tuple[list[int], list[float]]]:
    """The tokens of each prompt, and how far ahead of the second each was in log probability."""
    llm = LLM(
        str(EMBEDDED_MODEL), device=device, dtype=dtype, attention_backend=name, block_size=PAGES[0], num_blocks=32,
        max_model_len=512, enable_chunked_prefill=True, max_num_batched_tokens=64,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=100, logprobs=2, ignore_eos=True)
    answers = [output.outputs[0] for output in llm.generate(list(PROMPTS), greedy, use_tqdm=False)]
    told = []
    for answer in answers:
        values = [sorted((each.logprob for each in found.values()), reverse=True) for found in answer.logprobs]
        told.append((answer.token_ids, [first - second for first, second, *_ in values]))
    return told


@pytest.fixture(scope="module")
def told_by_the_cpu():
    return tell("sdpa", "cpu", torch.float32)


@pytest.mark.parametrize(("name", "dtype"), cases(torch.float32))
def test_the_tokens_are_those_of_the_cpu(name, dtype, told_by_the_cpu):
    assert [tokens for tokens, _ in tell(name, "cuda", dtype)] == [tokens for tokens, _ in told_by_the_cpu]


@pytest.mark.parametrize(("name", "dtype"), cases(*HALVES))
def test_in_16_bits_tokens_part_at_near_ties_only(name, dtype, record_property):
    skip_without_flash(name)
    equal, total = 0, 0
    for (tokens, _), (others, ahead) in zip(tell(name, "cuda", dtype), tell("sdpa", "cuda", dtype)):
        place = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), len(tokens))
        assert place == len(tokens) or ahead[place] <= NEAR_TIE[dtype], f"token {place}: ahead by {ahead[place]:.2f}"
        equal, total = equal + place, total + len(tokens)
    kind = str(dtype).removeprefix("torch.")
    record_property(f"{name}, {kind}: tokens equal to sdpa's, up to the first near tie", f"{equal} of {total}")
