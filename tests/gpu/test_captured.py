"""Captured steps: decode steps that are replayed as CUDA graphs give the tokens of eager ones."""

from __future__ import annotations

import random

import pytest

from folovllm import LLM, SamplingParams
from folovllm.tales import EMBEDDED_MODEL

PROMPTS = ("Once upon a time", "从前", "Long ago, in the swamp", "In the forest 🦊")
SETTINGS = {
    "plain": {},
    "caching": {"enable_prefix_caching": True},
    "chunks": {"enable_chunked_prefill": True, "max_num_batched_tokens": 20},
    "recompute": {"num_blocks": 24},
    "swap": {"num_blocks": 24, "preemption_mode": "swap"},
    "blocks of 1": {"block_size": 1, "num_blocks": 400},
    "three at once": {"max_num_seqs": 3},
}


def make_llm(**kwargs) -> LLM:
    fixed = {"device": "cuda", "dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 200}
    return LLM(str(EMBEDDED_MODEL), **{**fixed, "max_num_seqs": 11, **kwargs})


def make_requests() -> list[tuple[str, SamplingParams]]:
    """Greedy and seeded ones, some with several answers, of many lengths, so that batches of many sizes come up."""
    rng = random.Random(0)
    return [
        (
            rng.choice(PROMPTS),
            SamplingParams(
                temperature=rng.choice([0.0, 0.9]),
                n=rng.choice([1, 1, 3]),
                seed=seed,
                max_tokens=rng.randint(1, 60),
                ignore_eos=True,
                logprobs=rng.choice([None, 2]),
            ),
        )
        for seed in range(24)
    ]


def tell(llm: LLM) -> list[list[list[int]]]:
    prompts, params = zip(*make_requests())
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    llm.engine.check_integrity()
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def told_eagerly():
    return tell(make_llm(enforce_eager=True))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_tokens_are_those_of_eager_steps(settings, told_eagerly):
    llm = make_llm(enforce_eager=False, **settings)
    assert tell(llm) == told_eagerly
    assert tell(llm) == told_eagerly  # in a cache that is used already
