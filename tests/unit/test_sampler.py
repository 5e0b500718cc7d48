"""From logits to a token: every stage by hand-computed examples, their order, and others' code as a reference.

The examples are written as probabilities where that is easier to follow; their logarithms are logits.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as hf
from unit_helpers import error_of

from folovllm import SamplingParams
from folovllm.logprobs import Logprob, decode_token
from folovllm.sample import sampler
from folovllm.sample.sampler import (
    Sampler,
    SamplerOutput,
    SamplingMetadata,
    apply_allowed_token_ids,
    apply_logit_bias,
    apply_min_p,
    apply_penalties,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    ban_tokens,
    compute_prompt_logprobs,
    draw,
    find_bad_word_ends,
    gather_logprobs,
    make_generator,
    truncate,
)

INF = math.inf
VOCAB_SIZES = [50, 2000, 5000]
ALMOST_ONE = math.nextafter(1.0, 0.0)


def logits_of(*probs: float) -> Tensor:
    """One row of logits whose softmax is ``probs``."""
    return torch.tensor([probs], dtype=torch.float64).log().float()


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor) -> list[list[int]]:
    """The tokens of each row that were not removed."""
    return [torch.nonzero(row > -INF).flatten().tolist() for row in logits]


def metadata_of(*params: SamplingParams, **kwargs) -> SamplingMetadata:
    return SamplingMetadata(list(params), **kwargs)


def sample(logits: Tensor, *params: SamplingParams, tokenizer=None, eos_token_ids=None, **kwargs) -> SamplerOutput:
    return Sampler(tokenizer, eos_token_ids)(logits, metadata_of(*params, **kwargs))


def probs_of(logits: Tensor, *params: SamplingParams, tokenizer=None, eos_token_ids=None, **kwargs) -> Tensor:
    return Sampler(tokenizer, eos_token_ids).compute_probs(logits, metadata_of(*params, **kwargs))


class AsciiTokenizer:
    """A character is a token, and its ASCII code the token's id; 0 ends a text, and a tab is no token at all."""

    eos_token_id = 0

    is_fast = True

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [0] * add_special_tokens + [ord(character) for character in text if character != "\t"]

    def decode(self, token_ids, **kwargs):
        return "".join(map(chr, token_ids))


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


# --- every stage alone ---------------------------------------------------------------------------------------------


class TestAllowedTokenIds:
    def test_only_they_are_kept(self):
        assert kept(apply_allowed_token_ids(torch.zeros(1, 5), [[3, 1, 3]])) == [[1, 3]]

    def test_none_allows_all_whatever_the_other_rows_allow(self):
        assert kept(apply_allowed_token_ids(torch.zeros(3, 4), [[0], None, [3]])) == [[0], [0, 1, 2, 3], [3]]

    def test_what_is_kept_is_not_changed(self):
        out = apply_allowed_token_ids(torch.tensor([[1.0, 2.0, 3.0]]), [[0, 2]])
        assert out.tolist() == [[1.0, -INF, 3.0]]

    @pytest.mark.parametrize("token_id", [5, -1, 2**40])
    def test_a_token_outside_the_vocabulary(self, token_id):
        message = error_of(apply_allowed_token_ids, torch.zeros(2, 5), [None, [token_id]])
        assert "row 1" in message and str(token_id) in message and "5" in message


class TestBanTokens:
    def test_they_are_removed_and_nothing_else_is_changed(self):
        out = ban_tokens(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), [[1, 1], []])
        assert out.tolist() == [[1.0, -INF, 3.0], [4.0, 5.0, 6.0]]

    @pytest.mark.parametrize("token_id", [3, -1])
    def test_a_token_outside_the_vocabulary(self, token_id):
        assert "row 0" in error_of(ban_tokens, torch.zeros(1, 3), [[token_id]])


class TestBadWordEnds:
    @pytest.mark.parametrize(
        "words, output, ends",
        [
            ([[7]], [], [7]),  # a word of one token is always about to be complete
            ([[7]], [1, 2], [7]),
            ([[5, 6]], [], []),
            ([[5, 6]], [5], [6]),
            ([[5, 6]], [5, 5], [6]),
            ([[5, 6]], [5, 1], []),
            ([[5, 6]], [5, 6], []),
            ([[1, 2, 3]], [2], []),  # too early: only its middle is there
            ([[1, 2, 3]], [1, 2], [3]),
            ([[1, 2, 3]], [9, 1, 2], [3]),
            ([[1, 2, 3]], [1, 9, 2], []),
            ([[1, 1, 2]], [1, 1, 1], [2]),
            ([[1, 2, 3], [2, 4], [9]], [1, 2], [3, 4, 9]),
            ([], [1, 2], []),
        ],
    )
    def test_the_last_token_of_a_word_whose_others_have_just_come(self, words, output, ends):
        assert find_bad_word_ends(words, output) == ends

    def test_a_word_that_is_no_token_is_never_complete(self):
        assert find_bad_word_ends([[]], [1]) == []


class TestLogitBias:
    def test_it_is_added(self):
        out = apply_logit_bias(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), [{0: 1.5, 2: -100}, None])
        assert out.tolist() == [[2.5, 2.0, -97.0], [4.0, 5.0, 6.0]]

    def test_it_does_not_bring_back_what_was_removed(self):
        assert apply_logit_bias(torch.tensor([[-INF, 0.0]]), [{0: 100}]).tolist() == [[-INF, 0.0]]

    @pytest.mark.parametrize("bias", [{}, None])
    def test_no_bias_changes_nothing(self, bias):
        assert apply_logit_bias(torch.tensor([[1.0, 2.0]]), [bias]).tolist() == [[1.0, 2.0]]

    def test_a_token_outside_the_vocabulary(self):
        assert "row 0" in error_of(apply_logit_bias, torch.zeros(1, 3), [{3: 1.0}])


class TestPenalties:
    LOGITS = torch.tensor([[2.0, -2.0, 1.0, 0.0, 4.0, -4.0]])

    def penalized(self, prompt=(), output=(), repetition=1.0, frequency=0.0, presence=0.0):
        (row,) = apply_penalties(self.LOGITS, [prompt], [output], [repetition], [frequency], [presence]).tolist()
        return row

    def test_repetition_looks_at_prompt_and_output_and_always_lowers(self):
        row = self.penalized(prompt=[0, 1], output=[4, 5], repetition=2.0)
        assert row == [1.0, -4.0, 1.0, 0.0, 2.0, -8.0]

    def test_repetition_below_one_raises(self):
        assert self.penalized(prompt=[0, 1], repetition=0.5) == [4.0, -1.0, 1.0, 0.0, 4.0, -4.0]

    def test_repetition_does_not_count(self):
        assert self.penalized(prompt=[0, 0], output=[0, 0], repetition=2.0)[0] == 1.0

    def test_frequency_counts_the_output_alone(self):
        assert self.penalized(prompt=[2, 0], output=[0, 0, 1], frequency=0.5) == [1.0, -2.5, 1.0, 0.0, 4.0, -4.0]

    def test_presence_does_not_count_and_ignores_the_prompt(self):
        assert self.penalized(prompt=[2, 0], output=[0, 0, 1], presence=0.5) == [1.5, -2.5, 1.0, 0.0, 4.0, -4.0]

    def test_negative_ones_encourage(self):
        assert self.penalized(output=[0, 0], frequency=-0.5, presence=-0.25)[0] == 3.25

    def test_together_repetition_comes_first(self):
        row = self.penalized(prompt=[4], output=[1, 1, 0], repetition=2.0, frequency=0.5, presence=0.25)
        assert row == [2 / 2 - 0.75, -2 * 2 - 1.25, 1.0, 0.0, 4 / 2, -4.0]

    @pytest.mark.parametrize("penalty", [5e-324, 1e-30, 2.0, 1e30, 1.7e308])
    def test_no_logit_becomes_infinite(self, penalty):
        logits = torch.tensor([[3.4e38, 1.0, 0.0, -1.0, -1e38]])
        out = apply_penalties(logits, [[0, 1, 2, 3, 4]], [[]], [penalty], [0.0], [0.0])
        assert out.isfinite().all()

    def test_each_row_has_its_own(self):
        logits = torch.tensor([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])
        out = apply_penalties(logits, [[0], [], []], [[], [0, 0], [1]], [2, 1, 1], [0, 0.5, 0], [0, 0, 0.25])
        assert out.tolist() == [[1.0, 2.0], [1.0, 2.0], [2.0, 1.75]]

    def test_what_was_removed_stays_removed(self):
        out = apply_penalties(torch.tensor([[-INF, 1.0]]), [[0]], [[0]], [0.5], [-2.0], [-2.0])
        assert out[0, 0] == -INF

    @pytest.mark.parametrize("where", ["prompt", "output"])
    def test_a_token_outside_the_vocabulary(self, where):
        assert "row 0" in error_of(self.penalized, **{where: [6]})


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 10.0])
    def test_it_divides_the_logits(self, temperature):
        logits = random_logits(2, 20)
        out = apply_temperature(logits, [temperature, 1.0])
        torch.testing.assert_close(out[0].softmax(-1), (logits[0] / temperature).softmax(-1))
        torch.testing.assert_close(out[1].softmax(-1), logits[1].softmax(-1))

    @pytest.mark.parametrize("temperature, probs", [(5e-324, [0, 1, 0]), (1.7e308, [1 / 3] * 3)])
    def test_the_extremes_are_certainty_and_indifference(self, temperature, probs):
        out = apply_temperature(torch.tensor([[1.0, 3.0, 2.0]]), [temperature]).softmax(-1)
        torch.testing.assert_close(out, torch.tensor([probs], dtype=torch.float32))

    def test_what_was_removed_stays_removed(self):
        assert kept(apply_temperature(torch.tensor([[-INF, 1.0, 2.0]]), [0.5])) == [[1, 2]]


class TestMinP:
    @pytest.mark.parametrize(
        "min_p, tokens",
        [(0.0, [0, 1, 2, 3]), (0.1, [0, 1, 2, 3]), (0.2, [0, 1, 2]), (0.45, [0, 1]), (0.7, [0]), (1.0, [0])],
    )
    def test_at_least_this_fraction_of_the_likeliest(self, min_p, tokens):
        # Against the likeliest: 1, 0.6, 0.3, 0.1.
        assert kept(apply_min_p(logits_of(0.5, 0.3, 0.15, 0.05), [min_p * 0.999])) == [tokens]

    def test_one_keeps_all_that_are_as_likely_as_the_likeliest(self):
        assert kept(apply_min_p(torch.tensor([[2.0, 1.0, 2.0]]), [1.0])) == [[0, 2]]

    def test_each_row_has_its_own(self):
        assert kept(apply_min_p(torch.zeros(2, 2) + torch.tensor([0.0, -1.0]), [0.5, 0.0])) == [[0], [0, 1]]


class TestTopK:
    ROW = torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0]])

    @pytest.mark.parametrize(
        "k, tokens",
        [
            (1, [1]),
            (2, [1, 3]),
            (4, [1, 2, 3, 4]),
            (5, [0, 1, 2, 3, 4]),
            (6, [0, 1, 2, 3, 4]),
            (10**12, [0, 1, 2, 3, 4]),
            (-1, [0, 1, 2, 3, 4]),
        ],
    )
    def test_the_k_likeliest(self, k, tokens):
        assert kept(apply_top_k(self.ROW, [k])) == [tokens]

    @pytest.mark.parametrize("k, tokens", [(1, [0, 3]), (2, [0, 3]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 3])])
    def test_ties_with_the_kth_are_kept(self, k, tokens):
        assert kept(apply_top_k(torch.tensor([[3.0, 2.0, 2.0, 3.0, 1.0]]), [k])) == [tokens]

    def test_each_row_has_its_own(self):
        out = apply_top_k(self.ROW.repeat(4, 1), [1, -1, 3, 10**12])
        assert kept(out) == [[1], [0, 1, 2, 3, 4], [1, 2, 3], [0, 1, 2, 3, 4]]

    def test_what_is_kept_is_not_changed(self):
        assert apply_top_k(self.ROW, [2]).tolist() == [[-INF, 5.0, -INF, 4.0, -INF]]

    def test_fewer_left_than_k(self):
        assert kept(apply_top_k(torch.tensor([[-INF, 1.0, -INF, 2.0]]), [3])) == [[1, 3]]


def top_p_reference(logits: Tensor, p: float) -> set[int]:
    """In float64 and by a loop: the likeliest tokens until their sum reaches p, and those tied with the last."""
    probs = logits.double().softmax(-1)
    total, last = 0.0, 0.0
    for last in probs.sort(descending=True).values.tolist():
        total += last
        if total >= p:
            break
    return set(torch.nonzero(probs >= last).flatten().tolist())


class TestTopP:
    @pytest.mark.parametrize(
        "p, tokens",
        [
            (5e-324, [1]),  # always one at least
            (0.1, [1]),
            (0.39, [1]),
            (0.41, [1, 3]),  # the token that crosses p is kept
            (0.69, [1, 3]),
            (0.71, [1, 2, 3]),
            (0.89, [1, 2, 3]),
            (0.91, [0, 1, 2, 3]),
            (1.0, [0, 1, 2, 3]),
        ],
    )
    def test_the_likeliest_until_they_reach_p(self, p, tokens):
        assert kept(apply_top_p(logits_of(0.1, 0.4, 0.2, 0.3), [p])) == [tokens]

    def test_exactly_reached_is_reached(self):
        assert kept(apply_top_p(torch.tensor([[0.0, -1e9]]), [0.5])) == [[0]]

    def test_one_keeps_even_what_no_float_can_add(self):
        assert kept(apply_top_p(torch.tensor([[0.0, -90.0, -200.0]]), [1.0])) == [[0, 1, 2]]

    def test_what_is_kept_does_not_depend_on_the_order_of_ties(self):
        assert kept(apply_top_p(logits_of(0.2, 0.3, 0.2, 0.3), [0.5])) == [[1, 3]]
        assert kept(apply_top_p(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), [0.4])) == [[0, 2]]

    def test_each_row_has_its_own(self):
        out = apply_top_p(logits_of(0.1, 0.4, 0.2, 0.3).repeat(3, 1), [0.5, 1.0, 0.1])
        assert kept(out) == [[1, 3], [0, 1, 2, 3], [1]]

    def test_what_was_removed_before_does_not_count(self):
        logits = torch.tensor([[-INF, 1.0, 1.0 - math.log(3)]])  # 3/4 and 1/4 of what is left
        assert kept(apply_top_p(logits, [0.7])) == [[1]]
        assert kept(apply_top_p(logits, [0.8])) == [[1, 2]]

    @pytest.mark.parametrize("vocab_size", [1023, 1024, 1025, 5000])
    @pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
    @pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
    def test_a_large_vocabulary_whether_or_not_1024_tokens_reach_p(self, vocab_size, scale, p):
        (logits,) = random_logits(1, vocab_size, seed=7) * scale / 3
        (tokens,) = kept(apply_top_p(logits[None], [p]))
        # A float32 sum of thousands may reach p a token earlier or later.
        assert top_p_reference(logits, p - 1e-5) <= set(tokens) <= top_p_reference(logits, p + 1e-5)

    @pytest.mark.parametrize("first_try", [1, 2, 16, 299, 300, 10**6])
    def test_the_shortcut_changes_nothing(self, first_try, monkeypatch):
        logits = random_logits(8, 300) * torch.tensor([0, 0.01, 0.1, 0.3, 1, 2, 5, 100])[:, None]
        p = [0.99, 0.9, 0.5, 0.9, 0.1, 0.999999, 0.9, 0.5]
        monkeypatch.setattr(sampler, "TOP_P_FIRST_TRY", 300)
        by_full_sort = kept(apply_top_p(logits, p))
        monkeypatch.setattr(sampler, "TOP_P_FIRST_TRY", first_try)
        assert kept(apply_top_p(logits, p)) == by_full_sort

    def test_a_flat_row_beside_it_changes_nothing(self):
        sharp, flat = random_logits(1, 5000), 0.001 * random_logits(1, 5000, seed=1)
        alone = kept(apply_top_p(sharp, [0.9])) + kept(apply_top_p(flat, [0.95]))
        assert kept(apply_top_p(torch.cat([sharp, flat]), [0.9, 0.95])) == alone
        assert len(alone[0]) < 1024 < len(alone[1])

    @given(
        rows=st.lists(st.lists(st.integers(-3, 3), min_size=9, max_size=9), min_size=1, max_size=4),
        k=st.integers(1, 9),
        p=st.floats(0, 1, exclude_min=True),
    )
    def test_knowing_what_top_k_has_left_changes_nothing(self, rows, k, p):
        logits = apply_top_k(torch.tensor(rows, dtype=torch.float32), [k] * len(rows))
        assert kept(apply_top_p(logits, [p] * len(rows), k)) == kept(apply_top_p(logits, [p] * len(rows)))

    @given(
        values=st.lists(st.sampled_from([-INF, 0.0, 0.5, 1.0, 1.5, 3.0, 9.0]), min_size=1, max_size=12),
        p=st.floats(0, 1, exclude_min=True),
    )
    def test_the_fewest_that_reach_p(self, values, p):
        assume(max(values) > -INF)
        logits = torch.tensor([values])
        probs = logits.double().softmax(-1)[0]
        (tokens,) = kept(apply_top_p(logits, [p]))
        assert tokens
        rest = [t for t in range(len(values)) if t not in tokens]
        least = min(probs[tokens])
        assert all(probs[t] < least for t in rest)
        assert sum(probs[tokens]) >= p - 1e-6
        # Without the least likely (and its ties) p is not reached.
        if p < 1 - 1e-6:
            assert sum(probs[[t for t in tokens if probs[t] > least]]) < p + 1e-6


class TestDraw:
    @pytest.mark.parametrize(
        "u, token",
        [(0.0, 0), (0.24, 0), (0.25, 2), (0.5, 2), (0.74, 2), (0.75, 3), (0.99, 3), (ALMOST_ONE, 3)],
    )
    def test_where_the_cumulative_distribution_exceeds_u(self, u, token):
        assert draw(torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]), [u]).tolist() == [token]

    @pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, ALMOST_ONE])
    @pytest.mark.parametrize(
        "probs", [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0.5, 0, 0.5, 0], [0, 1e-38, 0], [0, 0.1, 0.3, 0.3, 0.3, 0]]
    )
    def test_a_token_of_probability_zero_is_never_drawn(self, u, probs):
        (token,) = draw(torch.tensor([probs], dtype=torch.float32), [u]).tolist()
        assert probs[token] > 0

    @pytest.mark.parametrize("scale", [0.5, 0.999999, 1.000001, 3.0])
    @pytest.mark.parametrize("u, token", [(0.0, 0), (0.49, 0), (0.51, 1), (ALMOST_ONE, 1)])
    def test_the_sum_need_not_be_one(self, scale, u, token):
        assert draw(torch.tensor([[0.5, 0.5]]) * scale, [u]).tolist() == [token]

    def test_each_row_has_its_own_number(self):
        assert draw(torch.tensor([[0.5, 0.5]]).repeat(3, 1), [0.7, 0.2, 0.9]).tolist() == [1, 0, 1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_an_even_grid_of_numbers_gives_every_token_its_share(self, dtype):
        probs = torch.tensor([0.1, 0.0, 0.35, 0.05, 0.5], dtype=dtype)
        n = 10_000
        tokens = draw(probs.repeat(n, 1), [(i + 0.5) / n for i in range(n)])
        shares = torch.bincount(tokens, minlength=5) / n
        torch.testing.assert_close(shares, probs.float() / probs.float().sum(), atol=2e-4, rtol=0)
        assert tokens.tolist() == sorted(tokens.tolist())  # a larger number never gives an earlier token

    def test_a_tail_too_thin_for_float32_can_still_be_drawn(self):
        assert draw(torch.tensor([[1.0, 1e-9, 1e-9]]), [ALMOST_ONE]).tolist() == [2]
        assert draw(torch.tensor([[1.0, 1e-9, 1e-9]]), [1 - 1.5e-9]).tolist() == [1]

    def test_a_large_vocabulary_loses_no_tail(self):
        n = 200_000
        probs = torch.full((1, n), 1 / n)
        for u in (0.0, 0.1, 0.5, 0.9, ALMOST_ONE):
            assert abs(draw(probs, [u]).item() - u * n) <= 1

    @given(
        probs=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8).filter(lambda probs: sum(probs) > 0),
        u=st.floats(0, 1, exclude_max=True),
    )
    def test_any_row_and_any_number(self, probs, u):
        (token,) = draw(torch.tensor([probs]), [u]).tolist()
        assert 0 <= token < len(probs) and probs[token] > 0
        total = math.fsum(probs)
        assert math.fsum(probs[:token]) <= u * total * (1 + 1e-12)
        assert math.fsum(probs[: token + 1]) >= u * total * (1 - 1e-12)


# --- the order of the stages ---------------------------------------------------------------------------------------


class TestOrder:
    def constrained(self, logits, params, tokenizer=None, eos_token_ids=None, **kwargs):
        return Sampler(tokenizer, eos_token_ids).apply_constraints(logits, metadata_of(params, **kwargs))

    def test_bias_comes_before_penalties(self):
        params = SamplingParams(logit_bias={0: -2.0}, repetition_penalty=2.0)
        out = self.constrained(torch.tensor([[1.0, 0.0]]), params, output_token_ids=[[0]])
        assert out.tolist() == [[-2.0, 0.0]]  # (1 - 2) * 2, and not 1 / 2 - 2

    def test_bias_does_not_bring_back_a_token_that_is_not_allowed_banned_or_too_early(self):
        params = SamplingParams(
            logit_bias={0: 100, 1: 100, ord("x"): 100},
            allowed_token_ids=[0, 2, ord("x")],
            bad_words=["x"],
            min_tokens=1,
        )
        out = self.constrained(torch.zeros(1, 128), params, tokenizer=AsciiTokenizer())
        assert kept(out) == [[2]]

    def test_penalties_decide_a_greedy_row(self):
        params = SamplingParams(temperature=0, repetition_penalty=2.0)
        logits = torch.tensor([[3.0, 2.0]])
        assert sample(logits, params).token_ids == [0]
        assert sample(logits, params, prompt_token_ids=[[0]]).token_ids == [1]

    def test_temperature_comes_before_min_p(self):
        # 1/4 of the likeliest becomes 1/2 of it at temperature 2.
        params = SamplingParams(temperature=2.0, min_p=0.4)
        assert kept(truncate(logits_of(0.8, 0.2), [params])) == [[0, 1]]

    def test_temperature_comes_before_top_p(self):
        params = SamplingParams(temperature=2.0, top_p=0.75)
        assert kept(truncate(logits_of(0.8, 0.2), [params])) == [[0, 1]]

    def test_min_p_comes_before_top_p(self):
        # min_p leaves 0.4 and 0.35, of which the first is more than half.
        params = SamplingParams(min_p=0.5, top_p=0.5)
        assert kept(truncate(logits_of(0.4, 0.35, 0.15, 0.1), [params])) == [[0]]

    def test_top_k_comes_before_top_p(self):
        params = SamplingParams(top_k=2, top_p=0.5)
        assert kept(truncate(logits_of(0.4, 0.3, 0.2, 0.1), [params])) == [[0]]

    def test_a_greedy_row_among_them_is_not_divided_by_zero(self):
        logits = random_logits(1, 20)
        out = truncate(logits, [SamplingParams(temperature=0)])
        torch.testing.assert_close(out.softmax(-1), logits.softmax(-1))

    def test_penalties_come_before_temperature(self):
        params = SamplingParams(presence_penalty=1.0, temperature=0.5)
        out = probs_of(torch.tensor([[1.0, 1.0]]), params, output_token_ids=[[0]])
        torch.testing.assert_close(out, torch.tensor([[0.0, 2.0]]).softmax(-1))


# --- the sampler ---------------------------------------------------------------------------------------------------


class TestSamplingMetadata:
    def test_what_is_left_out_is_empty(self):
        metadata = metadata_of(SamplingParams(), SamplingParams())
        assert metadata.prompt_token_ids == metadata.output_token_ids == [[], []]
        assert len(metadata.generators) == 2 and metadata.generators[0] is not metadata.generators[1]
        assert metadata.output_token_ids[0] is not metadata.output_token_ids[1]

    def test_the_lists_are_kept_not_copied(self):
        outputs = [[1], [2]]
        assert metadata_of(SamplingParams(), SamplingParams(), output_token_ids=outputs).output_token_ids is outputs

    @pytest.mark.parametrize("field", ["prompt_token_ids", "output_token_ids", "generators"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_one_entry_a_row(self, field, count):
        entries = [random.Random() if field == "generators" else [1] for _ in range(count)]
        message = error_of(metadata_of, SamplingParams(), SamplingParams(), **{field: entries})
        assert field in message and "2" in message and str(count) in message


class TestGenerators:
    def test_sequence_i_of_a_seeded_request_has_seed_plus_i(self):
        for i in range(3):
            assert make_generator(SamplingParams(seed=5), i).random() == random.Random(5 + i).random()

    def test_seed_zero_is_a_seed(self):
        assert make_generator(SamplingParams(seed=0)).random() == random.Random(0).random()

    def test_without_a_seed_no_two_are_alike(self):
        assert len({make_generator(SamplingParams()).random() for _ in range(100)}) == 100

    def test_without_a_seed_the_global_one_decides(self):
        random.seed(1)
        first = make_generator(SamplingParams()).random()
        random.seed(1)
        assert make_generator(SamplingParams()).random() == first

    def test_a_seeded_one_takes_nothing_from_the_global_one(self):
        random.seed(1)
        state = random.getstate()
        make_generator(SamplingParams(seed=3)).random()
        assert random.getstate() == state

    def test_a_token_costs_one_number(self):
        metadata = metadata_of(SamplingParams(seed=3, top_k=5), SamplingParams(seed=4, top_p=0.5))
        for step in range(4):
            Sampler()(random_logits(2, 50, seed=step), metadata)
        for generator, seed in zip(metadata.generators, (3, 4)):
            expected = random.Random(seed)
            for _ in range(4):
                expected.random()
            assert generator.getstate() == expected.getstate()

    def test_looking_at_the_distribution_costs_none(self):
        metadata = metadata_of(SamplingParams(seed=3))
        Sampler().compute_probs(random_logits(1, 50), metadata)
        assert metadata.generators[0].getstate() == random.Random(3).getstate()

    def test_the_same_seed_gives_the_same_tokens(self):
        def run(seed):
            metadata = metadata_of(SamplingParams(seed=seed))
            return [Sampler()(random_logits(1, 1000, seed=step), metadata).token_ids for step in range(20)]

        assert run(1) == run(1) != run(2)


class TestSampler:
    def test_greedy_takes_the_largest_logit(self):
        assert sample(torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(temperature=0)).token_ids == [1]

    def test_greedy_ignores_top_k_top_p_and_min_p_and_needs_no_luck(self):
        params = SamplingParams(temperature=0, top_k=1, top_p=0.01, min_p=1.0)
        metadata = metadata_of(params, params)
        logits = random_logits(2, 100)
        for _ in range(5):
            assert Sampler()(logits, metadata).token_ids == logits.argmax(-1).tolist()

    def test_greedy_and_random_rows_in_one_batch(self):
        greedy = SamplingParams(temperature=0)
        logits = random_logits(4, 200)
        params = [greedy, SamplingParams(seed=1), greedy, SamplingParams(seed=2)]
        found = sample(logits, *params).token_ids
        assert [found[0], found[2]] == logits.argmax(-1)[[0, 2]].tolist()
        for row in (1, 3):
            assert [found[row]] == sample(logits[row : row + 1], params[row]).token_ids

    def test_a_drawn_token_is_the_inverse_of_the_distribution(self):
        params = SamplingParams(seed=11, temperature=0.7, top_k=40, top_p=0.9)
        logits = random_logits(1, 500)
        u = random.Random(11).random()
        cumulative = probs_of(logits, params)[0].double().cumsum(0)
        expected = int((cumulative <= u * cumulative[-1]).sum())
        assert sample(logits, params).token_ids == [expected]

    def test_token_ids_are_plain_integers(self):
        found = sample(random_logits(2, 9), SamplingParams(), SamplingParams(temperature=0))
        assert [type(token_id) for token_id in found.token_ids] == [int, int]

    def test_the_logits_are_left_as_they_were(self):
        logits = random_logits(3, 128)
        before = logits.clone()
        every_stage = SamplingParams(
            seed=0,
            temperature=0.5,
            top_k=9,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.5,
            frequency_penalty=1,
            presence_penalty=1,
            logit_bias={3: 1.0},
            allowed_token_ids=list(range(100)),
            bad_words=["ab"],
            min_tokens=3,
            logprobs=2,
        )
        sample(
            logits,
            every_stage,
            SamplingParams(),
            SamplingParams(temperature=0),
            tokenizer=AsciiTokenizer(),
            output_token_ids=[[1], [2], [3]],
        )
        assert torch.equal(logits, before)

    def test_no_rows_give_no_tokens(self):
        assert sample(torch.zeros(0, 10)).token_ids == []

    def test_a_vocabulary_of_one(self):
        params = SamplingParams(top_k=1, top_p=0.5, min_p=1, logprobs=3)
        found = sample(torch.tensor([[0.3]]), params)
        assert found.token_ids == [0] and found.logprobs == [{0: Logprob(0.0, 1)}]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_any_float_dtype_gives_float32_probabilities(self, dtype):
        logits = random_logits(1, 1000).to(dtype)
        probs = probs_of(logits, SamplingParams(temperature=0.7))
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs, (logits.float() / 0.7).softmax(-1))

    def test_compute_probs_of_a_greedy_row_is_certain(self):
        params = SamplingParams(temperature=0, logit_bias={2: 100})
        probs = probs_of(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]), params, SamplingParams())
        torch.testing.assert_close(probs, torch.tensor([[0, 0, 1], [1 / 3] * 3], dtype=torch.float32))


class TestBatch:
    """A row's token depends on the row alone."""

    PARAMS = (
        SamplingParams(seed=0),
        SamplingParams(temperature=0),
        SamplingParams(seed=1, temperature=0.3, top_p=0.9),
        SamplingParams(seed=2, top_k=3),
        SamplingParams(seed=3, temperature=5.0, top_p=0.999),
        SamplingParams(seed=4, min_p=0.2),
        SamplingParams(seed=5, repetition_penalty=1.7, frequency_penalty=0.5, presence_penalty=-0.5),
        SamplingParams(temperature=0, logit_bias={3: 20.0}),
        SamplingParams(seed=6, allowed_token_ids=[1, 2, 3, 40]),
        SamplingParams(seed=7, bad_words=["a", "bc"], min_tokens=4, stop_token_ids=[7]),
        SamplingParams(seed=8, temperature=0.01, top_k=40, top_p=0.5, min_p=0.01),
    )

    @pytest.mark.parametrize("vocab_size", [128, 2000, 5000])
    @pytest.mark.parametrize("order", ["as they are", "reversed", "twice"])
    def test_a_row_alone_and_in_any_batch(self, vocab_size, order):
        n = len(self.PARAMS)
        logits = random_logits(n, vocab_size)
        prompts, outputs = [[i, i + 1] for i in range(n)], [[i + 1, 98] for i in range(n)]
        tokenizer = AsciiTokenizer()

        def alone(row):
            where = dict(tokenizer=tokenizer, prompt_token_ids=[prompts[row]], output_token_ids=[outputs[row]])
            chosen = sample(logits[row : row + 1], self.PARAMS[row], **where).token_ids[0]
            return chosen, probs_of(logits[row : row + 1], self.PARAMS[row], **where)[0]

        rows = {"as they are": [*range(n)], "reversed": [*range(n)][::-1], "twice": [*range(n)] * 2}[order]
        where = dict(
            tokenizer=tokenizer,
            prompt_token_ids=[prompts[row] for row in rows],
            output_token_ids=[outputs[row] for row in rows],
        )
        params = [self.PARAMS[row] for row in rows]
        chosen, probs = sample(logits[rows], *params, **where).token_ids, probs_of(logits[rows], *params, **where)
        for place, row in enumerate(rows):
            token, distribution = alone(row)
            assert chosen[place] == token, f"row {row}"
            assert torch.equal(probs[place], distribution), f"row {row}"

    def test_a_prompt_is_looked_at_only_by_the_row_that_asks(self):
        # A model's embedding may have more rows than its output; only a repetition penalty has to find them there.
        plain, penalized = SamplingParams(temperature=0), SamplingParams(temperature=0, repetition_penalty=1.5)
        logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        assert sample(logits[:1], plain, prompt_token_ids=[[9]]).token_ids == [1]
        assert sample(logits, plain, penalized, prompt_token_ids=[[9], [0]]).token_ids == [1, 1]


class TestBadWords:
    def allowed(self, *words, output="", **kwargs):
        params = SamplingParams(bad_words=list(words))
        probs = probs_of(
            torch.zeros(1, 128), params, tokenizer=AsciiTokenizer(), output_token_ids=[ids(output)], **kwargs
        )
        return {chr(token) for token in torch.nonzero(probs[0]).flatten().tolist()}

    def test_a_word_of_one_token_is_banned_at_once(self):
        assert "a" not in self.allowed("a") and "b" in self.allowed("a")

    @pytest.mark.parametrize(
        "output, banned", [("", ""), ("f", ""), ("fo", "x"), ("a fo", "x"), ("fo ", ""), ("foo", "")]
    )
    def test_a_longer_word_at_its_last_token(self, output, banned):
        every = {chr(i) for i in range(128)}
        assert every - self.allowed("fox", output=output) == set(banned)

    @pytest.mark.parametrize("word", ["x", " x"])
    @pytest.mark.parametrize("output", ["", "a"])
    def test_a_word_is_banned_with_and_without_the_space_before_it(self, word, output):
        # As in vLLM: both spellings of the word without its leading spaces.
        assert "x" not in self.allowed(word, output=output)

    def test_white_space_is_banned_as_it_is(self):
        every = {chr(i) for i in range(128)}
        assert every - self.allowed("\n") == {"\n"}

    def test_several_words(self):
        assert {"x", "y"}.isdisjoint(self.allowed("ax", "y", output="a"))

    def test_a_word_in_the_prompt_does_not_count(self):
        assert "b" in self.allowed("ab", prompt_token_ids=[ids("a")])

    def test_they_hold_for_greedy_rows_too(self):
        logits = torch.zeros(1, 128)
        logits[0, ord("x")] = 9.0
        logits[0, ord("y")] = 8.0
        params = SamplingParams(temperature=0, bad_words=["x"])
        assert sample(logits, params, tokenizer=AsciiTokenizer()).token_ids == [ord("y")]

    def test_not_every_word_that_was_ever_banned_is_remembered(self, monkeypatch):
        monkeypatch.setattr("folovllm.sample.sampler.MAX_BAD_WORDS", 3)
        sampler = Sampler(AsciiTokenizer())
        for word in ("ab", "cd", "ef", "gh", "ab"):
            sampler(torch.zeros(1, 128), SamplingMetadata([SamplingParams(bad_words=[word])]))
            assert 0 < len(sampler._bad_words) <= 3

    def test_a_word_needs_a_tokenizer(self):
        message = error_of(sample, torch.zeros(1, 128), SamplingParams(bad_words=["fox"]))
        assert "bad_words" in message and "tokenizer" in message

    def test_a_word_that_the_tokenizer_cannot_spell(self):
        message = error_of(sample, torch.zeros(1, 128), SamplingParams(bad_words=["\t"]), tokenizer=AsciiTokenizer())
        assert "bad_words" in message


class TestMinTokens:
    def kept(self, params, num_outputs, tokenizer=None, eos_token_ids=(1,)):
        logits = torch.zeros(1, 5)
        probs = probs_of(
            logits, params, tokenizer=tokenizer, eos_token_ids=eos_token_ids, output_token_ids=[[4] * num_outputs]
        )
        return torch.nonzero(probs[0]).flatten().tolist()

    @pytest.mark.parametrize(
        "num_outputs, tokens", [(0, [0, 3, 4]), (1, [0, 3, 4]), (2, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4])]
    )
    def test_eos_and_stop_ids_wait_for_it(self, num_outputs, tokens):
        assert self.kept(SamplingParams(min_tokens=2, stop_token_ids=[2]), num_outputs) == tokens

    def test_every_eos_waits(self):
        assert self.kept(SamplingParams(min_tokens=1), 0, eos_token_ids=[0, 3]) == [1, 2, 4]

    def test_without_min_tokens_nothing_waits(self):
        assert self.kept(SamplingParams(stop_token_ids=[2]), 0) == [0, 1, 2, 3, 4]

    def test_the_tokenizers_eos_unless_told_otherwise(self):
        params = SamplingParams(min_tokens=1)
        assert self.kept(params, 0, AsciiTokenizer(), None) == [1, 2, 3, 4]
        assert self.kept(params, 0, AsciiTokenizer(), [3]) == [0, 1, 2, 4]

    def test_a_model_may_have_no_eos_at_all(self):
        assert self.kept(SamplingParams(min_tokens=1), 0, AsciiTokenizer(), []) == [0, 1, 2, 3, 4]

    def test_greedy_rows_wait_too(self):
        params = SamplingParams(temperature=0, min_tokens=1)
        assert sample(torch.tensor([[5.0, 1.0]]), params, eos_token_ids=[0]).token_ids == [1]


class TestLogprobs:
    PROBS = (0.1, 0.4, 0.2, 0.3)

    def one(self, logits=None, **params):
        (found,) = sample(logits_of(*self.PROBS) if logits is None else logits, SamplingParams(**params)).logprobs
        return found

    def test_none_when_nobody_asked(self):
        assert self.one() is None

    def test_zero_gives_the_sampled_token_alone(self):
        found = self.one(logprobs=0, temperature=0)
        assert list(found) == [1]
        assert found[1].logprob == pytest.approx(math.log(0.4), abs=1e-6) and found[1].rank == 1

    @pytest.mark.parametrize("token, rank", [(0, 4), (1, 1), (2, 3), (3, 2)])
    @pytest.mark.parametrize("count", [0, 1, 2, 4, 9])
    def test_the_sampled_token_first_then_the_likeliest(self, token, rank, count):
        found = self.one(logprobs=count, allowed_token_ids=[token])
        likeliest = [1, 3, 2, 0][:count]
        assert list(found) == [token, *(other for other in likeliest if other != token)]
        assert [found[other].rank for other in (1, 3, 2, 0) if other in found] == [
            place for place, other in enumerate((1, 3, 2, 0), 1) if other in found
        ]
        assert found[token].rank == rank
        for other, logprob in found.items():
            assert type(other) is int and isinstance(logprob, Logprob)
            assert logprob.logprob == pytest.approx(math.log(self.PROBS[other]), abs=1e-6)

    def test_they_are_the_raw_ones(self):
        found = self.one(
            logprobs=4,
            temperature=0.1,
            top_k=1,
            top_p=0.1,
            min_p=1,
            logit_bias={0: 50},
            repetition_penalty=2,
            frequency_penalty=2,
            presence_penalty=2,
        )
        assert next(iter(found)) == 0  # by the bias
        for token, probability in enumerate(self.PROBS):
            assert found[token].logprob == pytest.approx(math.log(probability), abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_they_are_computed_in_float32(self, dtype):
        logits = random_logits(1, 500).to(dtype)
        found = self.one(logits, logprobs=3, temperature=0)
        expected = logits.float().log_softmax(-1)[0]
        assert all(value.logprob == pytest.approx(expected[token].item(), abs=1e-6) for token, value in found.items())

    def test_numbers_are_plain(self):
        for logprob in self.one(logprobs=2).values():
            assert type(logprob.logprob) is float and type(logprob.rank) is int

    def test_the_text_comes_from_the_tokenizer(self):
        logits = torch.zeros(1, 128)
        logits[0, ord("x")] = 5
        params = SamplingParams(temperature=0, logprobs=2)
        (found,) = sample(logits, params, tokenizer=AsciiTokenizer()).logprobs
        assert all(logprob.decoded_token == chr(token) for token, logprob in found.items())
        assert self.one(temperature=0, logprobs=0)[1].decoded_token is None

    def test_best_of_must_be_ranked_whether_asked_or_not(self):
        found = self.one(n=1, best_of=2, temperature=0.5)
        assert len(found) == 1

    def test_each_row_gets_what_it_asked_for(self):
        params = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=3, temperature=0)]
        found = sample(random_logits(3, 50), *params).logprobs
        assert [row and len(row) for row in found] == [None, 1, 3]

    def test_equally_likely_tokens_have_the_same_rank_whichever_was_chosen(self):
        logprobs = logits_of(0.3, 0.3, 0.4)
        ((if_first,), (if_second,)) = (gather_logprobs(logprobs, [chosen], [3]) for chosen in (0, 1))
        assert [if_first[token].rank for token in range(3)] == [if_second[token].rank for token in range(3)]

    @pytest.mark.parametrize("count", [-1, 50, 10**18])
    def test_minus_one_gives_the_whole_vocabulary(self, count):
        logits = random_logits(1, 50)
        found = self.one(logits, logprobs=count, temperature=0)
        assert [found[token].rank for token in logits[0].argsort(descending=True).tolist()] == [*range(1, 51)]

    @given(data=st.data())
    def test_all_rows_at_once_as_each_by_itself(self, data):
        # Few different values, so that there are ties.
        values = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), max_size=5))
        chosen = data.draw(st.lists(st.integers(0, 6), min_size=len(values), max_size=len(values)))
        counts = data.draw(st.lists(st.sampled_from([-1, 0, 1, 3, 7, 9]), min_size=len(values), max_size=len(values)))
        logprobs = torch.tensor(values, dtype=torch.float32).reshape(-1, 7).log_softmax(-1)
        for row, token, count, found in zip(logprobs, chosen, counts, gather_logprobs(logprobs, chosen, counts)):
            assert next(iter(found)) == token
            assert len(found) in ({7} if count in (-1, 7, 9) else {count, count + 1} - {0})
            for other, logprob in found.items():
                assert logprob == Logprob(row[other].item(), int((row > row[other]).sum()) + 1)
            least = min((row[other] for other in list(found)[1:]), default=INF)
            assert all(other in found or row[other] <= least for other in range(7))

    @pytest.mark.parametrize("num_rows", [1, 4, 64])
    @pytest.mark.parametrize("counts", [[0], [5], [0, 3, -1, 20], [None]])
    def test_however_many_rows_ask_the_device_is_waited_for_twice(self, num_rows, counts):
        asking = [SamplingParams(temperature=0, best_of=2, logprobs=counts[i % len(counts)]) for i in range(num_rows)]
        plain = [SamplingParams(temperature=0)] * num_rows
        logits = random_logits(num_rows, 100)
        waits = []
        for params in (plain, asking):
            with Waits() as counted:
                sample(logits, *params, tokenizer=AsciiTokenizer())
            waits.append(counted.number)
        assert waits == [2, 4]

    def test_random_rows_too(self):
        params = [SamplingParams(seed=i, top_k=5, top_p=0.9, min_p=0.01, best_of=2, logprobs=i) for i in range(9)]
        with Waits() as counted:
            sample(random_logits(9, 100), *params)
        assert counted.number <= 5


class Waits(TorchFunctionMode):
    """Counts the calls for which a GPU would have to be waited for: a tensor becomes something of Python's."""

    METHODS = frozenset(
        {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "equal", "is_nonzero"}
        | {f"__{kind}__" for kind in ("bool", "int", "float", "index", "contains", "array", "iter_items")}
    )

    def __enter__(self):
        self.number = 0
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += getattr(func, "__name__", "") in self.METHODS
        return func(*args, **(kwargs or {}))


class TestDecodedToken:
    """Tokens of single bytes: 0xe4 0xb8 0xad is one character, and 0xff is never part of one."""

    class ByteTokenizer(AsciiTokenizer):
        def decode(self, token_ids, **kwargs):
            return bytes(token_ids).decode("utf-8", "replace")

    def texts(self, data: bytes) -> list[str]:
        tokenizer = self.ByteTokenizer()
        return [decode_token(token, list(data[:i]), tokenizer) for i, token in enumerate(data)]

    def test_nothing_until_a_character_is_whole(self):
        assert self.texts("a中é🦊b".encode()) == ["a", "", "", "中", "", "é", "", "", "", "🦊", "b"]

    def test_what_becomes_no_character(self):
        assert self.texts(b"\xffa\xe4\xb8b") == ["", "a", "", "", "b"]

    @given(st.text(max_size=8))
    def test_together_they_are_the_text(self, text):
        assume("\ufffd" not in text)
        data = text.encode("utf-8", "ignore")
        assert "".join(self.texts(data)) == data.decode()

    def test_a_rows_own_tokens_come_before_it(self):
        logits = torch.zeros(4, 256)
        logits[:, 0xAD] = 9.0
        logits[:, ord("x")] = 8.0
        output = sample(
            logits,
            *[SamplingParams(temperature=0, logprobs=2)] * 4,
            tokenizer=self.ByteTokenizer(),
            prompt_token_ids=[[0xE4, 0xB8], [0xE4], [0xE4, 0xB8], [*b"abcdef"]],
            output_token_ids=[[], [0xB8], [0x61], [0xE4, 0xB8]],
        )
        assert [[logprob.decoded_token for logprob in row.values()] for row in output.logprobs] == [
            ["中", "x"],
            ["中", "x"],
            ["", "x"],
            ["中", "x"],
        ]

    @pytest.mark.parametrize("split", range(1, 9))
    def test_a_prompt_in_one_piece_or_in_two(self, split):
        tokens = [*"a中é🦊".encode()]
        logits, tokenizer = torch.zeros(len(tokens), 256), self.ByteTokenizer()
        found = compute_prompt_logprobs(logits, tokens, 0, tokenizer)[1:]
        assert [logprob.decoded_token for row in found for logprob in row.values()] == self.texts(bytes(tokens))[1:]
        pieces = compute_prompt_logprobs(logits[:split], tokens[: split + 1], 0, tokenizer)
        pieces += compute_prompt_logprobs(logits[split:], tokens[split:], 0, tokenizer, context=tokens[:split])[1:]
        assert pieces[1:] == found

    def test_each_token_is_decoded_once(self):
        decoded = []

        class Counting(AsciiTokenizer):
            def decode(self, token_ids, **kwargs):
                decoded.append(token_ids)
                return super().decode(token_ids)

        tokenizer = Counting()
        for _ in range(3):
            gather_logprobs(torch.zeros(2, 9).log_softmax(-1), [1, 2], [-1, 0], tokenizer)
        assert len(decoded) == 9


class Largest(TorchDispatchMode):
    """The most elements that a tensor of float32 had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and made.dtype == torch.float32:
                self.size = max(self.size, made.numel())
        return out


class TestPromptLogprobs:
    @pytest.mark.parametrize("slice_size", [1, 50, 100, 149, 10**6])
    @pytest.mark.parametrize("count", [0, 3, -1])
    def test_a_few_rows_at_a_time_or_all(self, slice_size, count, monkeypatch):
        logits, tokens = random_logits(9, 50).bfloat16(), list(range(9))
        at_once = compute_prompt_logprobs(logits, tokens, count)
        monkeypatch.setattr(sampler, "PROMPT_LOGPROBS_SLICE", slice_size)
        with Largest() as largest:
            assert compute_prompt_logprobs(logits, tokens, count) == at_once
        num_rows = max(slice_size // 50, 1)
        assert largest.size <= num_rows * (50 + 1)  # and the chosen token's own

    def test_each_token_as_by_itself(self):
        logits = random_logits(5, 50)
        found = compute_prompt_logprobs(logits, [7, 3, 3, 49, 0], 4)
        for row, token, given_out in zip(logits.log_softmax(-1), [3, 3, 49, 0], found[1:]):
            assert [given_out] == gather_logprobs(row[None], [token], [4])

    def test_nothing_predicts_the_first_token(self):
        assert compute_prompt_logprobs(torch.zeros(1, 5), [3], 0) == [None]

    def test_each_token_by_the_logits_of_the_one_before(self):
        logits = torch.cat([logits_of(0.1, 0.2, 0.7), logits_of(0.5, 0.3, 0.2), logits_of(1 / 3, 1 / 3, 1 / 3)])
        first, second, third = compute_prompt_logprobs(logits, [2, 1, 0], 1)
        assert first is None
        assert list(second) == [1, 2] and [second[t].rank for t in second] == [2, 1]
        assert second[1].logprob == pytest.approx(math.log(0.2), abs=1e-6)
        assert second[2].logprob == pytest.approx(math.log(0.7), abs=1e-6)
        assert list(third) == [0] and third[0].logprob == pytest.approx(math.log(0.5), abs=1e-6)

    def test_the_text_comes_from_the_tokenizer(self):
        _, found = compute_prompt_logprobs(torch.zeros(2, 128), ids("ab"), 0, AsciiTokenizer())
        assert found[ord("b")].decoded_token == "b"


class TestErrors:
    @pytest.mark.parametrize("shape", [(1, 5), (3, 5), (5,), (2, 1, 5), ()])
    def test_one_row_of_logits_for_each_params(self, shape):
        message = error_of(sample, torch.zeros(shape), SamplingParams(), SamplingParams())
        assert "logits must be [2, vocab_size]" in message and str(list(shape)) in message

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(allowed_token_ids=[0], min_tokens=1),
            SamplingParams(allowed_token_ids=[ord("a")], bad_words=["a"]),
            SamplingParams(temperature=0, allowed_token_ids=[0], min_tokens=1),
        ],
    )
    def test_nothing_left_to_choose(self, params):
        message = error_of(sample, torch.zeros(2, 128), SamplingParams(), params, tokenizer=AsciiTokenizer())
        assert "row 1" in message
        assert all(name in message for name in ("allowed_token_ids", "bad_words", "min_tokens"))

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(allowed_token_ids=[0, 5]),
            SamplingParams(logit_bias={5: 1.0}),
            SamplingParams(stop_token_ids=[5], min_tokens=1),
            SamplingParams(allowed_token_ids=[2**62]),
            SamplingParams(logit_bias={2**62: 1.0}),
        ],
    )
    def test_a_token_outside_the_vocabulary_names_row_token_and_size(self, params):
        message = error_of(sample, torch.zeros(2, 5), SamplingParams(), params)
        assert "row 1" in message and "5 tokens" in message

    @pytest.mark.parametrize("bad", [math.nan, INF])
    @pytest.mark.parametrize("temperature", [0, 1])
    @pytest.mark.parametrize("sample_or_look", [sample, probs_of])
    def test_logits_that_are_no_numbers(self, bad, temperature, sample_or_look):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        message = error_of(sample_or_look, logits, *[SamplingParams(temperature=temperature)] * 2)
        assert "row 1" in message

    def test_some_logits_may_be_minus_infinity(self):
        assert sample(torch.tensor([[-INF, 0.0, -INF]]), SamplingParams()).token_ids == [1]

    def test_a_failed_batch_costs_nobody_a_random_number(self):
        metadata = metadata_of(SamplingParams(seed=1), SamplingParams(allowed_token_ids=[9]))
        error_of(Sampler(), torch.zeros(2, 5), metadata)
        assert metadata.generators[0].getstate() == random.Random(1).getstate()


# --- rows that cannot be sampled -----------------------------------------------------------------------------------


REMOVERS = "structured_outputs, allowed_token_ids, bad_words and min_tokens"
BAD_PARAMS = [
    {"allowed_token_ids": [0], "min_tokens": 9},
    {"allowed_token_ids": [ord("a")], "bad_words": ["a"]},
    {"allowed_token_ids": [128]},
    {"logit_bias": {2**62: 1.0}},
    {"stop_token_ids": [128], "min_tokens": 9},
    {"bad_words": ["\t"]},
]
GOOD_PARAMS = [*TestBatch.PARAMS, SamplingParams(temperature=0, logprobs=3), SamplingParams(seed=9, best_of=2)]


class TestRowsSampledAgain:
    """What a metadata object keeps for its rows is what a new one would find."""

    def test_step_by_step(self):
        n, chooser = len(GOOD_PARAMS), Sampler(AsciiTokenizer())
        prompts, outputs = [[i, i + 1] for i in range(n)], [[] for _ in range(n)]
        same = metadata_of(*GOOD_PARAMS, prompt_token_ids=prompts, output_token_ids=outputs)
        generators = [make_generator(params) for params in GOOD_PARAMS]
        for step in range(8):
            logits = random_logits(n, 128, seed=step)
            new = metadata_of(*GOOD_PARAMS, prompt_token_ids=prompts, output_token_ids=outputs, generators=generators)
            found = chooser.sample(logits, same)
            assert found == chooser.sample(logits, new)
            for output, token in zip(outputs, found.token_ids):
                output.append(token)

    @pytest.mark.parametrize("vocab_size", [40, 128, 3000])
    def test_with_another_vocabulary(self, vocab_size):
        params = SamplingParams(temperature=0, logit_bias={3: 50.0}, logprobs=-1)
        metadata = metadata_of(params, params)
        for size in (vocab_size, 50, vocab_size):
            found = Sampler()(random_logits(2, size), metadata)
            assert found.token_ids == [3, 3] and [len(row) for row in found.logprobs] == [size, size]


class TestRowsThatCannotBeSampled:
    @settings(max_examples=60)
    @given(data=st.data())
    def test_the_others_get_what_they_get_without_them(self, data):
        kinds = st.sampled_from([math.nan, INF, -INF, *range(len(BAD_PARAMS))])
        rows = data.draw(st.lists(st.sampled_from(range(len(GOOD_PARAMS))) | kinds.map(lambda kind: (kind,))))
        vocab_size = 128
        logits = random_logits(len(rows), vocab_size, seed=len(rows))
        params, bad, not_finite = [], set(), set()
        for place, row in enumerate(rows):
            if not isinstance(row, tuple):
                params.append(GOOD_PARAMS[row])
                continue
            bad.add(place)
            temperature = data.draw(st.sampled_from([0, 1]))
            if isinstance(row[0], int):
                params.append(SamplingParams(temperature=temperature, seed=3, logprobs=2, **BAD_PARAMS[row[0]]))
                continue
            if row[0] != -INF:
                not_finite.add(place)
            params.append(SamplingParams(temperature=temperature, seed=3, top_p=0.9, logprobs=2))
            everything = row[0] == -INF or data.draw(st.booleans())
            logits[place, slice(None) if everything else 5] = row[0]
        where = {
            "prompt_token_ids": [[place % 7] for place in range(len(rows))],
            "output_token_ids": [[place % 5, 98] for place in range(len(rows))],
        }
        good = [place for place in range(len(rows)) if place not in bad]
        metadata = metadata_of(*params, **where)
        without = metadata_of(
            *(params[place] for place in good), **{k: [v[place] for place in good] for k, v in where.items()}
        )
        before = logits.clone()
        chooser = Sampler(AsciiTokenizer())
        found, expected = chooser.sample(logits, metadata), chooser(logits[good], without)
        assert set(found.errors) == bad and found.not_finite == not_finite and len(found.token_ids) == len(rows)
        assert all("\n" not in reason and "row" not in reason for reason in found.errors.values())
        assert all(type(token) is int and 0 <= token < vocab_size for token in found.token_ids)
        assert [found.token_ids[place] for place in good] == expected.token_ids
        assert [found.logprobs[place] for place in good] == expected.logprobs
        for place, generator in zip(good, without.generators):
            if params[place].seed is not None:
                assert metadata.generators[place].getstate() == generator.getstate()
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(
        "fields, reason",
        [
            (BAD_PARAMS[0], f"the request has no token left: {REMOVERS} remove all"),
            (BAD_PARAMS[2], "the request names token id 128, but the vocabulary has 128 tokens"),
            (BAD_PARAMS[5], "bad_words must be spelled in at least one token, got '\\t'"),
        ],
    )
    def test_the_reason_is_a_sentence_for_whoever_made_the_request(self, fields, reason):
        metadata = metadata_of(SamplingParams(), SamplingParams(**fields))
        assert Sampler(AsciiTokenizer()).sample(torch.zeros(2, 128), metadata).errors == {1: reason}

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_a_forward_pass_that_went_wrong(self, temperature):
        logits = torch.zeros(3, 5)
        logits[0, 1], logits[2, 4] = math.nan, INF
        found = Sampler().sample(logits, metadata_of(*[SamplingParams(temperature=temperature)] * 3))
        assert list(found.errors) == [0, 2] and found.not_finite == {0, 2}
        reason = "the request has a logit of nan: a weight is no number, 16 bits have no room for"
        assert found.errors[0].startswith(reason)

    def test_without_such_rows_it_is_the_same_as_a_call(self):
        logits = random_logits(len(GOOD_PARAMS), 128)
        found = Sampler(AsciiTokenizer()).sample(logits, metadata_of(*GOOD_PARAMS))
        assert found == sample(logits, *GOOD_PARAMS, tokenizer=AsciiTokenizer()) and found.errors == {}

    def test_a_tokenizer_may_know_more_tokens_than_there_are_logits(self):
        params = SamplingParams(min_tokens=1, bad_words=["a"], temperature=0)
        assert Sampler(AsciiTokenizer(), [0, 99]).sample(torch.zeros(1, 3), metadata_of(params)).errors == {}

    @pytest.mark.parametrize("shape", [(1, 5), (5,)])
    def test_a_wrong_shape_is_nobodys_row(self, shape):
        metadata = metadata_of(SamplingParams(), SamplingParams())
        assert "logits must be [2, vocab_size]" in error_of(Sampler().sample, torch.zeros(shape), metadata)


# --- others' code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
class TestAgainstTransformers:
    """transformers' logits processors, which share the semantics of the stage they are compared with."""

    ROWS = 4

    def random(self, vocab_size):
        rng = random.Random(vocab_size)
        context = [[rng.randrange(min(vocab_size, 60)) for _ in range(12)] for _ in range(self.ROWS)]
        return random_logits(self.ROWS, vocab_size, seed=vocab_size), context

    @pytest.mark.parametrize("temperature", [0.1, 0.7, 1.5])
    def test_temperature(self, vocab_size, temperature):
        logits, _ = self.random(vocab_size)
        expected = hf.TemperatureLogitsWarper(temperature)(None, logits).softmax(-1)
        torch.testing.assert_close(apply_temperature(logits, [temperature] * self.ROWS).softmax(-1), expected)

    @pytest.mark.parametrize("k", [1, 7, 49, 1500])
    def test_top_k(self, vocab_size, k):
        logits, _ = self.random(vocab_size)
        assert torch.equal(apply_top_k(logits, [k] * self.ROWS), hf.TopKLogitsWarper(k)(None, logits))

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("scale", [0.1, 1.0])
    def test_top_p(self, vocab_size, p, scale):
        logits = self.random(vocab_size)[0] * scale
        at_least, at_most = (kept(hf.TopPLogitsWarper(p + e)(None, logits.double())) for e in (-1e-5, 1e-5))
        for low, found, high in zip(at_least, kept(apply_top_p(logits, [p] * self.ROWS)), at_most):
            assert set(low) <= set(found) <= set(high)

    @pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
    def test_min_p(self, vocab_size, min_p):
        logits, _ = self.random(vocab_size)
        expected = kept(hf.MinPLogitsWarper(min_p)(None, logits.double()))
        assert kept(apply_min_p(logits, [min_p] * self.ROWS)) == expected

    @pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0])
    def test_repetition_penalty(self, vocab_size, penalty):
        logits, context = self.random(vocab_size)
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(context), logits.clone())
        prompts, outputs = [row[:7] for row in context], [row[7:] for row in context]
        off = [0.0] * self.ROWS
        found = apply_penalties(logits, prompts, outputs, [penalty] * self.ROWS, off, off)
        torch.testing.assert_close(found, expected)

    def test_bad_words(self, vocab_size):
        logits, context = self.random(vocab_size)
        words = [[3], [11, 12], *([row[-1], 5] for row in context), *([row[-2], row[-1], 6] for row in context)]
        words += [[context[0][-2], 13], [*context[1][-4:], 7]]
        expected = hf.NoBadWordsLogitsProcessor(words)(torch.tensor(context), logits.clone())
        found = ban_tokens(logits, [find_bad_word_ends(words, output) for output in context])
        assert kept(found) == kept(expected)
        assert all(vocab_size - len(row) > 2 for row in kept(found))

    @pytest.mark.parametrize("min_tokens", [0, 4, 5, 6, 12])
    def test_min_tokens(self, vocab_size, min_tokens):
        logits, context = self.random(vocab_size)
        processor = hf.MinNewTokensLengthLogitsProcessor(7, min_tokens, [2, 9], device="cpu")
        expected = processor(torch.tensor(context), logits.clone())
        params = SamplingParams(min_tokens=min_tokens, stop_token_ids=[9])
        metadata = metadata_of(*[params] * self.ROWS, output_token_ids=[row[7:] for row in context])
        assert torch.equal(Sampler(eos_token_ids=[2]).apply_constraints(logits, metadata), expected)

    def test_logit_bias(self, vocab_size):
        logits, context = self.random(vocab_size)
        bias = {3: 5.0, 17: -7.25, 49: 100.0}
        processor = hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
        expected = processor(torch.tensor(context), logits.clone())
        torch.testing.assert_close(apply_logit_bias(logits, [bias] * self.ROWS), expected)

    def test_all_of_them_in_a_row(self, vocab_size):
        logits, context = self.random(vocab_size)
        inputs = torch.tensor(context)
        expected = logits.double()
        for processor in (
            hf.NoBadWordsLogitsProcessor([[4], [context[0][-1], 8]]),
            hf.MinNewTokensLengthLogitsProcessor(7, 9, [2], device="cpu"),
            hf.SequenceBiasLogitsProcessor([[[3], 2.0]]),
            hf.RepetitionPenaltyLogitsProcessor(1.3),
            hf.TemperatureLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.01),
            hf.TopKLogitsWarper(30),
            hf.TopPLogitsWarper(0.9),
        ):
            expected = processor(inputs, expected)

        class Words(AsciiTokenizer):
            def encode(self, text, add_special_tokens=True, verbose=True):
                return {"four": [4], "last": [context[0][-1], 8]}[text.strip()]

        params = SamplingParams(
            bad_words=["four", "last"],
            min_tokens=9,
            logit_bias={3: 2.0},
            repetition_penalty=1.3,
            temperature=0.8,
            min_p=0.01,
            top_k=30,
            top_p=0.9,
        )
        found = probs_of(
            logits,
            *[params] * self.ROWS,
            tokenizer=Words(),
            eos_token_ids=[2],
            prompt_token_ids=[row[:7] for row in context],
            output_token_ids=[row[7:] for row in context],
        )
        torch.testing.assert_close(found, expected.softmax(-1).float())


class TestStatistics:
    """Many draws with fixed seeds: they give the same numbers in every run, so these tests cannot flake."""

    def draws(self, logits: Tensor, params: dict, num_rows: int, num_steps: int) -> Tensor:
        metadata = metadata_of(*(SamplingParams(seed=seed, **params) for seed in range(num_rows)))
        batch = logits.expand(num_rows, -1)
        return torch.tensor([Sampler()(batch, metadata).token_ids for _ in range(num_steps)])

    @pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 12, "top_p": 0.8}])
    @pytest.mark.parametrize("num_rows, num_steps", [(1, 2000), (40, 100), (4000, 1)])
    def test_tokens_come_as_often_as_their_probabilities_say(self, params, num_rows, num_steps):
        logits = random_logits(1, 20, seed=5) / 3
        probs = probs_of(logits, SamplingParams(**params))[0].double()
        tokens = self.draws(logits, params, num_rows, num_steps)
        counts = torch.bincount(tokens.flatten(), minlength=20).double()
        possible = probs > 0
        assert counts[~possible].sum() == 0
        p_value = stats.chisquare(counts[possible], (probs / probs.sum() * tokens.numel())[possible]).pvalue
        assert p_value > 1e-3
        # The same draws are far from another temperature's distribution, so the test can tell.
        other = probs_of(logits, SamplingParams(**{**params, "temperature": params.get("temperature", 1) * 1.5}))[0]
        expected = (other.double() / other.double().sum() * tokens.numel())[possible]
        if (other > 0).equal(possible):
            assert stats.chisquare(counts[possible], expected).pvalue < 1e-3

    def test_one_steps_token_says_nothing_about_the_nexts(self):
        tokens = self.draws(torch.zeros(1, 4), {}, 50, 101)
        pairs = torch.bincount((tokens[:-1] * 4 + tokens[1:]).flatten(), minlength=16)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


# --- any default dtype ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("stage", ["greedy", "random", "probs", "prompt"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), num_rows=st.integers(0, 4))
def test_torchs_default_dtype_changes_nothing(default_dtype, stage, seed, num_rows):
    """People set bfloat16 to build models of their own, and float64 for numerics."""
    rng = random.Random(seed)
    logits = random_logits(num_rows, 128, seed)
    tokens = [[rng.randrange(128) for _ in range(3)] for _ in range(num_rows)]
    params = [
        SamplingParams(
            seed=row,
            temperature=0 if stage == "greedy" else 0.7,
            top_k=rng.choice([-1, 40]),
            top_p=rng.choice([1, 0.9]),
            min_p=rng.choice([0, 0.05]),
            repetition_penalty=rng.choice([1, 1.1]),
            frequency_penalty=rng.choice([0, 0.3]),
            presence_penalty=rng.choice([0, 0.1]),
            logit_bias=rng.choice([None, {}, {3: 0.1, 5: -7.3}]),
            allowed_token_ids=rng.choice([None, list(range(100))]),
            bad_words=rng.choice([None, ["a", "bc"]]),
            min_tokens=rng.choice([0, 9]),
            logprobs=rng.choice([None, 0, 3, -1]),
        )
        for row in range(num_rows)
    ]

    def run():
        if stage == "prompt":
            return compute_prompt_logprobs(logits, list(range(num_rows)) or [0], 3, AsciiTokenizer())
        if stage == "probs":
            return probs_of(logits, *params, tokenizer=AsciiTokenizer(), prompt_token_ids=tokens).tolist()
        return sample(logits, *params, tokenizer=AsciiTokenizer(), prompt_token_ids=tokens, output_token_ids=tokens)

    before = torch.get_default_dtype()
    expected = run()
    torch.set_default_dtype(default_dtype)
    try:
        assert run() == expected
    finally:
        torch.set_default_dtype(before)


# --- anything valid ------------------------------------------------------------------------------------------------

VOCAB = 128
IDS = st.integers(0, VOCAB + 1)
NUMBERS = st.floats(0, 1) | st.fractions(0, 1) | st.sampled_from([0, 1, 5e-324, np.float32(0.5), np.int8(1)])
PENALTIES = st.floats(-2, 2) | st.sampled_from([0, Fraction(1, 3), np.float16(2)])
VALID = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63)},
    optional={
        "temperature": NUMBERS | st.floats(0, 1.7e308),
        "top_p": NUMBERS.filter(lambda p: p > 0),
        "top_k": st.sampled_from([-1, 1, 2, VOCAB - 1, VOCAB, VOCAB + 1, 10**18]),
        "min_p": NUMBERS,
        "repetition_penalty": st.floats(0, 2, exclude_min=True) | st.sampled_from([5e-324, 2, 3, 1e30, 1.7e308]),
        "presence_penalty": PENALTIES,
        "frequency_penalty": PENALTIES,
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100) | st.integers(-100, 100) | st.fractions(-100, 100)),
        "allowed_token_ids": st.lists(IDS, min_size=1, max_size=5),
        "bad_words": st.lists(st.text("abc \t", min_size=1, max_size=3), max_size=3),
        "min_tokens": st.integers(0, 3),
        "stop_token_ids": st.lists(IDS, max_size=3),
        "logprobs": st.sampled_from([-1, 0, 1, 5, VOCAB + 1, 10**18]),
        "ignore_eos": st.booleans(),
    },
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def finite_logits(draw_, num_rows):
    """Rows of logits of every size a float32 can have, ties included."""
    rows = []
    for _ in range(num_rows):
        values = draw_(st.lists(FINITE | st.floats(-30, 30, width=32), min_size=1, max_size=6))
        order = random.Random(draw_(st.integers(0, 99)))
        rows.append([order.choice(values) for _ in range(VOCAB)])
    return torch.tensor(rows).to(draw_(st.sampled_from([torch.float32, torch.float64])))


@settings(max_examples=100)
@given(data=st.data(), all_fields=st.lists(VALID, min_size=1, max_size=3))
def test_any_valid_params_and_finite_logits_give_a_token_or_one_sentence(data, all_fields):
    logits = data.draw(finite_logits(len(all_fields)))
    texts = st.lists(st.integers(0, VOCAB - 1), max_size=4)
    prompts, outputs = data.draw(st.tuples(*[st.lists(texts, min_size=len(logits), max_size=len(logits))] * 2))
    params = [SamplingParams(**fields) for fields in all_fields]
    chooser = Sampler(AsciiTokenizer())
    metadata = metadata_of(*params, prompt_token_ids=prompts, output_token_ids=outputs)
    try:
        probs = chooser.compute_probs(logits, metadata)
    except ValueError as error:
        assert "\n" not in str(error)
        message = error_of(chooser, logits, metadata)
        assert message == str(error)
        return
    assert probs.shape == logits.shape
    assert not probs.isnan().any() and (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits)), atol=1e-5, rtol=0)
    found = chooser(logits, metadata)
    for row, token in enumerate(found.token_ids):
        assert type(token) is int and 0 <= token < VOCAB
        assert probs[row, token] > 0
        allowed = params[row].allowed_token_ids
        assert allowed is None or token in allowed
        if len(outputs[row]) < params[row].min_tokens:
            assert token not in (0, *params[row].stop_token_ids)
        if params[row].logprobs is not None:
            assert next(iter(found.logprobs[row])) == token
            assert all(logprob.logprob <= 1e-6 for logprob in found.logprobs[row].values())
