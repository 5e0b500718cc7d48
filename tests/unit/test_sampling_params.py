"""SamplingParams: defaults, both sides of every bound, and what each mistake is answered with."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from unit_helpers import ANYTHING, error_of

from folovllm import SamplingParams, SamplingType

DEFAULTS = {
    "n": 1,
    "best_of": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop": [],
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "seed": None,
}
FLOATS = {
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
}
INTS = {"n", "best_of", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed"}
BOOLS = {name for name, default in DEFAULTS.items() if isinstance(default, bool)}
NONE_ALLOWED = {name for name, default in DEFAULTS.items() if default is None} | {
    "best_of",
    "stop",
    "stop_token_ids",
    "max_tokens",
}
TINY = 5e-324
ABOVE = {bound: math.nextafter(bound, math.inf) for bound in (1, 2)}


class TestSamplingType:
    def test_values(self):
        assert {kind.name: kind.value for kind in SamplingType} == {"GREEDY": 0, "RANDOM": 1}
        assert isinstance(SamplingType.GREEDY, int)

    @pytest.mark.parametrize(
        "temperature, kind",
        [
            (0, SamplingType.GREEDY),
            (0.0, SamplingType.GREEDY),
            (-0.0, SamplingType.GREEDY),
            (TINY, SamplingType.RANDOM),
            (1.0, SamplingType.RANDOM),
        ],
    )
    def test_temperature_decides(self, temperature, kind):
        assert SamplingParams(temperature=temperature).sampling_type is kind

    def test_it_follows_the_temperature(self):
        params = SamplingParams()
        params.temperature = 0.0
        assert params.sampling_type is SamplingType.GREEDY


class TestSamplingParams:
    def test_fields_and_defaults(self):
        assert is_dataclass(SamplingParams)
        params = SamplingParams()
        assert {f.name: getattr(params, f.name) for f in fields(params)} == DEFAULTS

    def test_two_requests_share_no_list(self):
        assert SamplingParams().stop is not SamplingParams().stop
        assert SamplingParams().stop_token_ids is not SamplingParams().stop_token_ids

    @pytest.mark.parametrize(
        "field, value",
        [
            ("n", 1),
            ("n", 100),
            ("best_of", 1),
            ("temperature", 0),
            ("temperature", TINY),
            ("temperature", 1e9),
            ("top_p", TINY),
            ("top_p", 1),
            ("top_k", -1),
            ("top_k", 1),
            ("top_k", 10**9),
            ("min_p", 0),
            ("min_p", 1),
            ("presence_penalty", -2),
            ("presence_penalty", 2),
            ("frequency_penalty", -2),
            ("frequency_penalty", 2),
            ("repetition_penalty", TINY),
            ("repetition_penalty", 2),
            ("length_penalty", -3.5),
            ("early_stopping", True),
            ("max_tokens", 1),
            ("max_tokens", None),
            ("min_tokens", 0),
            ("min_tokens", 16),
            ("logprobs", 0),
            ("logprobs", 5),
            ("prompt_logprobs", 0),
            ("logit_bias", {}),
            ("logit_bias", {0: -100, 7: 100}),
            ("allowed_token_ids", [0]),
            ("bad_words", []),
            ("bad_words", ["fox"]),
            ("seed", 0),
            ("seed", 2**63),
        ],
    )
    def test_accepts(self, field, value):
        assert getattr(SamplingParams(**{field: value}), field) == value

    @pytest.mark.parametrize(
        "given_fields, message",
        [
            ({"n": 0}, "n must be at least 1, got 0"),
            ({"n": -1}, "n must be at least 1, got -1"),
            ({"n": 2, "best_of": 1}, "best_of (1) must be >= n (2)"),
            ({"best_of": 0}, "best_of (0) must be >= n (1)"),
            ({"temperature": -TINY}, "temperature must be non-negative, got -5e-324"),
            ({"temperature": -1}, "temperature must be non-negative, got -1"),
            ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
            ({"top_p": -0.1}, "top_p must be in (0, 1], got -0.1"),
            ({"top_p": ABOVE[1]}, "top_p must be in (0, 1], got 1.0000000000000002"),
            ({"top_k": 0}, "top_k must be -1 (disabled) or >= 1, got 0"),
            ({"top_k": -2}, "top_k must be -1 (disabled) or >= 1, got -2"),
            ({"min_p": -TINY}, "min_p must be in [0, 1], got -5e-324"),
            ({"min_p": ABOVE[1]}, "min_p must be in [0, 1], got 1.0000000000000002"),
            ({"presence_penalty": ABOVE[2]}, "presence_penalty must be in [-2, 2], got 2.0000000000000004"),
            ({"presence_penalty": -ABOVE[2]}, "presence_penalty must be in [-2, 2], got -2.0000000000000004"),
            ({"frequency_penalty": ABOVE[2]}, "frequency_penalty must be in [-2, 2], got 2.0000000000000004"),
            ({"frequency_penalty": -ABOVE[2]}, "frequency_penalty must be in [-2, 2], got -2.0000000000000004"),
            ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2], got 0"),
            ({"repetition_penalty": ABOVE[2]}, "repetition_penalty must be in (0, 2], got 2.0000000000000004"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
            ({"min_tokens": -1}, "min_tokens must not be negative, got -1"),
            ({"logprobs": -1}, "logprobs must not be negative, got -1"),
            ({"prompt_logprobs": -1}, "prompt_logprobs must not be negative, got -1"),
        ],
    )
    def test_out_of_bounds(self, given_fields, message):
        # A float field may print 0 as 0.0.
        assert error_of(SamplingParams, **given_fields).removesuffix(".0") == message

    @pytest.mark.parametrize("max_tokens, min_tokens", [(16, 17), (3, 4)])
    def test_min_tokens_must_fit_into_max_tokens(self, max_tokens, min_tokens):
        message = error_of(SamplingParams, max_tokens=max_tokens, min_tokens=min_tokens)
        assert all(part in message for part in ("min_tokens", str(min_tokens), "max_tokens", str(max_tokens)))

    def test_without_max_tokens_any_min_tokens_fits(self):
        assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6

    def test_best_of_becomes_n(self):
        assert SamplingParams(n=3).best_of == 3
        assert SamplingParams(n=2, best_of=5).best_of == 5

    @pytest.mark.parametrize("field", sorted(FLOATS | INTS))
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", "", True, False, b"1", [1], {}, 1j])
    def test_what_is_no_number_is_refused_by_name(self, field, value):
        message = error_of(SamplingParams, **{field: value})
        assert message.startswith(field) and repr(value) in message

    @pytest.mark.parametrize("field", sorted(INTS))
    @pytest.mark.parametrize("value", [1.0, 1.5, Fraction(1), np.float32(1)])
    def test_a_count_is_an_integer(self, field, value):
        assert error_of(SamplingParams, **{field: value}).startswith(field)

    @pytest.mark.parametrize("field", sorted(BOOLS))
    @pytest.mark.parametrize("value", [0, 1, "True", None, np.bool_(True)])
    def test_a_flag_is_a_bool(self, field, value):
        assert field in error_of(SamplingParams, **{field: value})

    @pytest.mark.parametrize("field", sorted(set(DEFAULTS) - NONE_ALLOWED))
    def test_none_is_refused_where_it_means_nothing(self, field):
        assert field in error_of(SamplingParams, **{field: None})

    def test_beam_search_is_refused_with_a_way_out(self):
        message = error_of(SamplingParams, use_beam_search=True, error=NotImplementedError)
        assert message.startswith("Beam search is not supported")
        assert "best_of" in message

    @pytest.mark.parametrize(
        "stop, held", [(None, []), ("a", ["a"]), ("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([], [])]
    )
    def test_stop_becomes_a_list(self, stop, held):
        assert SamplingParams(stop=stop).stop == held

    @pytest.mark.parametrize("field", ["stop", "bad_words"])
    @pytest.mark.parametrize("value", [[""], ["a", ""], [1], [None], [b"a"], 5, b"a", {"a": 1}, True])
    def test_texts_are_non_empty_strings(self, field, value):
        assert field in error_of(SamplingParams, **{field: value})

    def test_an_empty_stop_string_is_an_error(self):
        assert "stop" in error_of(SamplingParams, stop="")

    def test_bad_words_is_a_list_not_one_string(self):
        assert error_of(SamplingParams, bad_words="fox").startswith("bad_words must be a list")

    @pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
    @pytest.mark.parametrize("value", [5, "5", [-1], [1.0], ["1"], [True], [None], {5}, {5: 1}])
    def test_token_ids_are_non_negative_integers(self, field, value):
        assert field in error_of(SamplingParams, **{field: value})

    def test_no_allowed_token_at_all_is_an_error(self):
        assert "allowed_token_ids" in error_of(SamplingParams, allowed_token_ids=[])

    @pytest.mark.parametrize(
        "value",
        [
            {-1: 1.0},
            {"5": 1.0},
            {1.0: 1.0},
            {True: 1.0},
            {5: math.nan},
            {5: math.inf},
            {5: "1"},
            {5: True},
            {5: None},
            {5: math.nextafter(100, 101)},
            {5: -100.1},
            [(5, 1.0)],
            "5",
            5,
        ],
    )
    def test_logit_bias_is_a_dict_of_token_id_to_number(self, value):
        assert "logit_bias" in error_of(SamplingParams, logit_bias=value)

    @pytest.mark.parametrize("token_id", [5, np.int64(5)])
    @pytest.mark.parametrize("bias", [2, 2.0, np.float16(2), Fraction(2)])
    def test_logit_bias_is_held_as_int_to_float(self, token_id, bias):
        ((held_id, held_bias),) = SamplingParams(logit_bias={token_id: bias}).logit_bias.items()
        assert (held_id, held_bias) == (5, 2.0)
        assert type(held_id) is int and type(held_bias) is float

    @pytest.mark.parametrize(
        "field, value, change",
        [
            ("stop", ["a"], lambda held: held.append("")),
            ("stop_token_ids", [1], lambda held: held.append(-1)),
            ("allowed_token_ids", [1], lambda held: held.append(-1)),
            ("bad_words", ["a"], lambda held: held.append("")),
            ("logit_bias", {1: 1.0}, lambda held: held.update({-1: math.nan})),
        ],
    )
    def test_what_was_checked_cannot_be_changed_from_outside(self, field, value, change):
        params = SamplingParams(**{field: value})
        before = getattr(params, field).copy()
        change(value)
        assert getattr(params, field) == before

    def test_minus_one_is_no_seed(self):
        assert SamplingParams(seed=-1).seed is None

    def test_other_negative_seeds_are_refused(self):
        message = error_of(SamplingParams, seed=-2)
        assert message.startswith("seed") and "-2" in message

    def test_repr(self):
        text = repr(SamplingParams(n=2, temperature=0.5, top_p=0.9, top_k=5, max_tokens=7))
        assert "SamplingParams" in text
        for part in ("n=2", "temperature=0.5", "top_p=0.9", "top_k=5", "max_tokens=7"):
            assert part in text

    def test_equal_when_all_fields_are(self):
        assert SamplingParams(top_k=5) == SamplingParams(top_k=5) != SamplingParams(top_k=6)


@pytest.mark.parametrize("field", DEFAULTS)
@given(value=ANYTHING)
def test_any_value_at_all_is_held_in_the_fields_type_or_refused_by_the_fields_name(field, value):
    try:
        params = SamplingParams(**{field: value})
    except NotImplementedError as error:
        assert field == "use_beam_search" and value is True and str(error).startswith("Beam search is not supported")
        return
    except ValueError as error:
        assert field in str(error)
        return
    held = getattr(params, field)
    if held is None:
        assert field in NONE_ALLOWED
    elif field in FLOATS:
        assert type(held) is float and math.isfinite(held)
    elif field in INTS:
        assert type(held) is int
    elif field in BOOLS:
        assert type(held) is bool
    elif field == "logit_bias":
        assert all(type(key) is int and type(bias) is float for key, bias in held.items())
    else:
        kind = str if field in ("stop", "bad_words") else int
        assert type(held) is list and all(isinstance(entry, kind) for entry in held)
    assert isinstance(repr(params), str)
