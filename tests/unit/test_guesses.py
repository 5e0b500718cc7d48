"""Guessing and checking: looked-up guesses change no token, drawn ones no probability, and counts say when to stop."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from folovllm import SamplingParams, Sequence, SequenceData, SpeculativeConfig
from folovllm.request import NUM_RECENT_GUESSES
from folovllm.sample.sampler import Sampler, SamplingMetadata, make_generator
from folovllm.sample.speculative import (
    MAX_GUESSED_ROWS,
    PAUSE,
    NgramProposer,
    Proposer,
    draw_guesses,
    rejection_sample,
    verify,
)
from folovllm.worker.draft_model import _Draft, _metadata

VOCAB_SIZE = 11


def looked_up(token_ids: list[int], num_tokens: int, min_n: int, max_n: int) -> list[int]:
    """The definition, word by word."""
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(token_ids) - n):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n : start + n + num_tokens]
    return []


class TestNgrams:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.sampled_from([0, 1, 2, 256, 2**40 + 1]), min_size=1, max_size=30),
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(0, 4),
    )
    def test_they_are_those_of_the_definition(self, token_ids, num_tokens, min_n, more):
        found = NgramProposer(min_n, min_n + more).propose(token_ids, num_tokens)
        assert found == looked_up(token_ids, num_tokens, min_n, min_n + more)

    def test_a_match_begins_where_a_token_does(self):
        # As bytes, 256 is 0 1 0 0 0 0 0 0: one further on it looks like the beginning of 1.
        assert NgramProposer(1, 1).propose([256, 7, 1], 2) == []


def sequence(output_len: int = 0, **state) -> Sequence:
    data = SequenceData([1, 2, 3], [4] * output_len)
    return Sequence("a-0", "a", data, SamplingParams(max_tokens=None), **state)


class TestGivingUp:
    config = SpeculativeConfig(8, "ngram", prompt_lookup_min=1)

    def num_guessed(self, seq: Sequence, num_seqs: int = 1, config: SpeculativeConfig | None = None, **kwargs) -> int:
        seqs = [seq, *(sequence() for _ in range(num_seqs - 1))]
        return len(Proposer(config or self.config, **kwargs).propose(seqs, [[2]] + [[9]] * (num_seqs - 1))[0])

    def test_few_in_a_large_batch(self):
        seq = Sequence("a-0", "a", SequenceData([1, 2, *range(3, 30)], []), SamplingParams(max_tokens=None))
        found = [self.num_guessed(seq, num_seqs) for num_seqs in (1, 7, 8, 16, 32, 33, 64)]
        assert found == [8, 8, 7, 3, 1, 0, 0]
        assert all(num_seqs * (num + 1) <= MAX_GUESSED_ROWS for num_seqs, num in zip((1, 7, 8, 16, 32, 33, 64), found))

    def test_after_too_few_were_right_and_for_a_while(self):
        lucky = [True, False, False, False] * (NUM_RECENT_GUESSES // 4)
        assert self.num_guessed(sequence(10, recent_guesses=list(lucky))) > 0
        assert self.num_guessed(sequence(10, recent_guesses=lucky[: NUM_RECENT_GUESSES - 1])) > 0
        unlucky = sequence(10, recent_guesses=[True] + [False] * (NUM_RECENT_GUESSES - 1))
        assert self.num_guessed(unlucky) == 0 and unlucky.recent_guesses == []
        unlucky.data.output_token_ids += [4] * (PAUSE - 1)
        assert self.num_guessed(unlucky) == 0
        unlucky.data.output_token_ids.append(4)
        assert self.num_guessed(unlucky) > 0

    def test_a_draft_model_must_be_right_more_often_the_larger_it_is(self):
        config = SpeculativeConfig(8, model="m")
        recent = [True, True, True, False] * (NUM_RECENT_GUESSES // 4)
        assert self.num_guessed(sequence(10, recent_guesses=list(recent)), config=config, draft_cost=0.5) == 8
        assert self.num_guessed(sequence(10, recent_guesses=list(recent)), config=config, draft_cost=0.7) == 0

    def test_a_sequence_without_a_token_gets_no_guess(self):
        assert Proposer(SpeculativeConfig(2, model="m")).propose([sequence(), sequence()], [[], [1]]) == [[], [-1, -1]]


PARAMS = st.builds(
    lambda **kwargs: SamplingParams(max_tokens=None, ignore_eos=True, **kwargs),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 5),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    top_k=st.sampled_from([-1, 2]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([None, [4]]),
    logprobs=st.sampled_from([None, 0, 2]),
)


@settings(max_examples=60, deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=4), seed=st.integers(0, 10**6), data=st.data())
def test_looked_up_guesses_change_nothing(params, seed, data):
    """Each sequence alone and token by token, or all at once with guesses, right ones and wrong ones: the same."""
    sampler, rng = Sampler(eos_token_ids=[0]), np.random.default_rng(seed)
    prompts = [[int(rng.integers(VOCAB_SIZE)) for _ in range(3)] for _ in params]
    num_places = 5
    logits = torch.from_numpy(2 * rng.normal(size=(len(params), num_places, VOCAB_SIZE))).float()
    expected, states, all_logprobs = [], [], []
    for row, (p, prompt) in enumerate(zip(params, prompts)):
        alone = SamplingMetadata([p], [prompt], [[]], [make_generator(p)])
        tokens, found, seen = [], [], []
        for place in range(num_places):
            output = sampler(logits[row, place : place + 1], alone)
            alone.output_token_ids[0].append(output.token_ids[0])
            found.append(output.logprobs[0])
            seen.append(alone.generators[0].getstate())
        tokens = alone.output_token_ids[0]
        expected.append(tokens), states.append(seen), all_logprobs.append(found)
    guesses = [
        [data.draw(st.sampled_from([token, token, 5])) for token in tokens[: data.draw(st.integers(0, num_places - 1))]]
        for tokens in expected
    ]
    flat = torch.cat([logits[row, : len(found) + 1] for row, found in enumerate(guesses)])
    metadata = SamplingMetadata(params, prompts, [[] for _ in params], [make_generator(p) for p in params])
    output = verify(sampler, flat, metadata, guesses)
    for row, (tokens, found) in enumerate(zip(expected, guesses)):
        num_right = next((i for i, (a, b) in enumerate(zip(tokens, found)) if a != b), len(found))
        assert output.sampled_token_ids[row] == tokens[: num_right + 1]
        assert metadata.generators[row].getstate() == states[row][num_right]
        given_logprobs = output.logprobs[row]
        if params[row].logprobs is None:
            assert given_logprobs is None
        else:
            assert [list(entry) for entry in given_logprobs] == [list(x) for x in all_logprobs[row][: num_right + 1]]
    assert metadata.output_token_ids == [[] for _ in params]


def test_a_row_without_a_token_ends_the_run_before_it():
    """Its reason is that of the next step, in which it is the first."""
    params = [SamplingParams(temperature=0, bad_words=None, max_tokens=9)] * 2
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[0, 3], logits[1], logits[2, 5], logits[3, 6] = 1, torch.nan, 1, 1
    metadata = SamplingMetadata(params)
    output = verify(Sampler(), logits, metadata, [[3], [5]])
    assert output.sampled_token_ids == [[3], [5, 6]] and not output.errors
    output = verify(Sampler(), logits[[1, 0, 2, 3]], metadata, [[3], [5]])
    assert output.sampled_token_ids == [[], [5, 6]] and set(output.errors) == output.not_finite == {0}
    logits[1] = -torch.inf
    output = verify(Sampler(), logits[[1, 0, 2, 3]], metadata, [[3], [5]])
    assert set(output.errors) == {0} and output.not_finite == set()


def test_each_answer_of_a_seeded_request_is_guessed_with_numbers_of_its_own():
    params = SamplingParams(n=2, seed=0)
    seqs = [Sequence(f"a-{i}", "a", SequenceData([1]), params, index=i) for i in range(2)]
    first, second = _metadata([_Draft(seq, [-1], 0, None) for seq in seqs], 0).generators
    assert first.random() != second.random()


NUM_DRAWS = 20_000


def check_distribution(token_ids: torch.Tensor, probs: np.ndarray) -> None:
    counts = np.bincount(token_ids.numpy(), minlength=len(probs))
    assert not counts[probs == 0].any()
    assert chisquare(counts[probs > 0], probs[probs > 0] / probs.sum() * counts.sum()).pvalue > 1e-3


class TestRejection:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("kind", ["other", "nearly the same", "certain", "apart"])
    def test_it_keeps_the_distribution(self, seed, kind):
        rng = np.random.default_rng(seed)
        p, q = (torch.from_numpy(rng.dirichlet(np.full(VOCAB_SIZE, 0.7))).float() for _ in range(2))
        if kind == "nearly the same":
            q = (p + 1e-4 * q) / (1 + 1e-4)
        elif kind == "certain":
            q = torch.nn.functional.one_hot(torch.tensor(3), VOCAB_SIZE).float()
        elif kind == "apart":
            p, q = p * (torch.arange(VOCAB_SIZE) < 4), q * (torch.arange(VOCAB_SIZE) >= 4)
            p, q = p / p.sum(), q / q.sum()
        generator = torch.Generator().manual_seed(seed)
        guesses = torch.multinomial(q, NUM_DRAWS, replacement=True, generator=generator)
        uniforms = torch.rand(NUM_DRAWS, dtype=torch.float64, generator=generator)
        rows = (NUM_DRAWS, VOCAB_SIZE)
        token_ids = rejection_sample(p.expand(rows), q.expand(rows), guesses, uniforms)
        check_distribution(token_ids, p.double().numpy())
        accepted = (token_ids == guesses).double().mean().item()
        assert accepted == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.02)  # as often as possible

    def test_without_a_guess_it_draws(self):
        probs = torch.tensor([[0.25, 0.0, 0.75]] * 3)
        token_ids = rejection_sample(
            probs, torch.zeros(3, 3), torch.full((3,), -1), torch.tensor([0.0, 0.24, 0.25], dtype=torch.float64)
        )
        assert token_ids.tolist() == [0, 0, 2]

    def test_two_places_have_the_joint_distribution(self):
        """Through the sampler: a draft model's guesses of two tokens, the second depending on the first."""
        rng, sampler = np.random.default_rng(0), Sampler()
        size = 4
        p_logits, q_logits = (torch.from_numpy(rng.normal(size=(size + 1, size))).float() for _ in range(2))
        params = SamplingParams(temperature=0.8, top_k=3, max_tokens=None)
        num = NUM_DRAWS // 2
        both = [[make_generator(SamplingParams(seed=2 * i + kind)) for i in range(num)] for kind in range(2)]
        asked, prompts = [params] * num, [[0]] * num
        first, q_first = draw_guesses(
            sampler, q_logits[-1].expand(num, size), SamplingMetadata(asked, prompts, [[] for _ in asked], both[0])
        )
        second, q_second = draw_guesses(
            sampler, q_logits[first], SamplingMetadata(asked, prompts, [[token] for token in first], both[0])
        )
        logits = torch.stack([p_logits[-1].expand(num, size), p_logits[first], p_logits[second]], dim=1)
        probs = torch.stack([q_first, q_second, torch.zeros(num, size)], dim=1)
        guesses = [list(pair) for pair in zip(first, second)]
        metadata = SamplingMetadata(asked, prompts, [[] for _ in asked], both[1])
        output = verify(sampler, logits.flatten(0, 1), metadata, guesses, probs.flatten(0, 1))
        one = sampler.compute_probs(p_logits, SamplingMetadata([params] * (size + 1))).double().numpy()
        tokens = output.sampled_token_ids
        check_distribution(torch.tensor([found[0] for found in tokens]), one[-1])
        for token in range(size):
            after = torch.tensor([found[1] for found in tokens if found[0] == token and len(found) > 1])
            # A second token comes along only where the first was the guess, and then from its own distribution.
            if len(after):
                check_distribution(after, one[token])
        assert {len(found) for found in tokens} == {1, 2, 3}

    def test_greedy_rows_get_the_likeliest_token(self):
        sampler, params = Sampler(), [SamplingParams(temperature=0, max_tokens=None)]
        logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        for guess, tokens in ([1, 0], [1, 0, 2]), ([1, 2], [1, 0]), ([2, 0], [1]):
            draft_probs = torch.cat([torch.nn.functional.one_hot(torch.tensor(guess), 3), torch.zeros(1, 3)])
            output = verify(sampler, logits, SamplingMetadata(params), [guess], draft_probs.float())
            assert output.sampled_token_ids == [tokens]

    def test_a_draft_that_is_no_number_is_refused_rightly(self):
        sampler, params = Sampler(), SamplingParams(max_tokens=None)
        num = 4_000
        generators = [random.Random(i) for i in range(num)]
        metadata = SamplingMetadata([params] * num, generators=generators)
        token_ids, draft_probs = draw_guesses(sampler, torch.full((num, 3), torch.nan), metadata)
        p = torch.tensor([0.2, 0.5, 0.3])
        drawn = rejection_sample(
            p.expand(num, 3),
            draft_probs,
            torch.tensor(token_ids),
            torch.tensor([g.random() for g in copy.deepcopy(generators)], dtype=torch.float64),
        )
        check_distribution(drawn, p.double().numpy())
