"""The sampler on a GPU: the tokens and log probabilities of the CPU's."""

from __future__ import annotations

import random

import pytest
import torch

from folovllm import SamplingParams
from folovllm.sample.sampler import Sampler, SamplingMetadata

NUM_ROWS = 64


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([-1, 1, 20]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([None, {rng.randrange(vocab_size): 3.0}]),
        logprobs=rng.choice([None, 0, 4]),
        seed=rng.randrange(1000),
    )


@pytest.mark.parametrize("vocab_size", [50, 2000, 151_936])
def test_the_same_logits_give_the_same_tokens(vocab_size):
    rng = random.Random(vocab_size)
    logits = 3 * torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(0))
    params = [random_params(rng, vocab_size) for _ in range(NUM_ROWS)]
    prompts, outputs = (
        [[rng.randrange(vocab_size) for _ in range(rng.randrange(20))] for _ in params] for _ in range(2)
    )
    expected, found = (
        Sampler().sample(logits.to(device), SamplingMetadata(params, prompts, outputs)) for device in ("cpu", "cuda")
    )
    assert found.token_ids == expected.token_ids and found.errors == expected.errors == {}
    for ours, theirs in zip(found.logprobs, expected.logprobs):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert list(ours) == list(theirs)
            assert [x.logprob for x in ours.values()] == pytest.approx([x.logprob for x in theirs.values()], abs=1e-4)
