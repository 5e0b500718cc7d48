"""The checks of single values: what passes, in which type it comes back, and how a refusal reads."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from unit_helpers import ANYTHING, HUGE, UNPRINTABLE, error_of

from folovllm.sampling_params import SamplingParams
from folovllm.validation import check_bool, check_int, check_number, check_str, check_token_ids, check_unicode, require

CHECKS = [check_int, check_number, check_bool, check_str, check_token_ids]


class TestRequire:
    def test_says_nothing_when_all_is_well(self):
        require(True, "unseen")

    def test_raises_the_sentence_it_was_given(self):
        assert error_of(require, False, "n must be at least 1, got 0") == "n must be at least 1, got 0"


class TestCheckInt:
    @pytest.mark.parametrize("value", [0, -1, 2**63, np.int8(3), np.uint64(2**63)])
    def test_integers_come_back_as_int(self, value):
        checked = check_int("n", value)
        assert type(checked) is int and checked == value

    @pytest.mark.parametrize("value", [True, False, np.bool_(True), 1.0, np.float32(1), Fraction(1), "1", b"1", None])
    def test_what_only_looks_like_one_is_refused(self, value):
        assert error_of(check_int, "n", value) == f"n must be an integer, got {value!r}"


class TestCheckUnicode:
    @pytest.mark.parametrize("text", ["", "a", "é狐🦊", "\x00"])
    def test_text_comes_back(self, text):
        assert check_unicode("prompt", text) == text

    def test_half_a_surrogate_pair_is_refused(self):
        message = error_of(check_unicode, "prompt", "caf\udce9")
        assert message.startswith("prompt must be Unicode text, got '\\udce9' at character 3;")


class TestCheckNumber:
    @pytest.mark.parametrize("value", [0, -1.5, 5e-324, 1.7e308, Fraction(1, 2), np.float16(0.5), np.int8(3)])
    def test_numbers_come_back_as_float(self, value):
        checked = check_number("x", value)
        assert type(checked) is float and checked == value

    @pytest.mark.parametrize("value", [True, np.bool_(False), "1.0", b"1", None, 1j, Decimal("0.5"), [1.0]])
    def test_what_is_no_number(self, value):
        assert error_of(check_number, "x", value) == f"x must be a number, got {value!r}"

    @pytest.mark.parametrize(
        "value", [math.nan, math.inf, -math.inf, np.float32("nan"), HUGE, -HUGE, np.longdouble("1e4000")]
    )
    def test_what_is_not_finite_as_a_float(self, value):
        assert error_of(check_number, "x", value) == f"x must be a finite number, got {value!r}"


class TestCheckBool:
    @pytest.mark.parametrize("value", [True, False])
    def test_bools(self, value):
        assert check_bool("b", value) is value

    @pytest.mark.parametrize("value", [0, 1, "True", None, [], np.bool_(True)])
    def test_nothing_else(self, value):
        assert error_of(check_bool, "b", value) == f"b must be True or False, got {value!r}"


class TestCheckStr:
    @pytest.mark.parametrize("value", ["a", " ", "\n", "🦊", "\ud800"])
    def test_any_text_of_one_character_or_more(self, value):
        assert check_str("s", value) == value

    @pytest.mark.parametrize("value", ["", None, 1, b"a", ["a"]])
    def test_nothing_else(self, value):
        assert error_of(check_str, "s", value) == f"s must be a non-empty string, got {value!r}"


class TestCheckTokenIds:
    @pytest.mark.parametrize("value", [[], (), [0], [3, 1, 3], (2**40,), [np.int64(5)]])
    def test_ids_come_back_as_a_list_of_int(self, value):
        checked = check_token_ids("ids", value)
        assert type(checked) is list and checked == list(value)
        assert all(type(token_id) is int for token_id in checked)

    def test_the_list_is_a_copy(self):
        ids = [1, 2]
        assert check_token_ids("ids", ids) is not ids

    @pytest.mark.parametrize("value", [None, 5, "12", b"12", {1}, {1: 2}, range(3)])
    def test_no_list(self, value):
        assert error_of(check_token_ids, "ids", value) == f"ids must be a list of token ids, got {value!r}"

    @pytest.mark.parametrize("bad", [True, 1.0, "1", None, [1]])
    def test_an_entry_that_is_no_integer_is_named(self, bad):
        assert error_of(check_token_ids, "ids", [7, bad]) == f"ids[1] must be an integer, got {bad!r}"

    def test_a_negative_entry_is_named(self):
        message = error_of(check_token_ids, "ids", [0, 1, -1])
        assert message.startswith("ids[2]") and message.endswith("got -1")


@pytest.mark.parametrize("check", CHECKS)
@given(value=ANYTHING)
def test_any_value_passes_or_is_refused_by_name(check, value):
    try:
        check("the_field", value)
    except ValueError as error:
        assert str(error).startswith("the_field")


@pytest.mark.parametrize("check", [check_number, check_bool, check_str, check_token_ids])
def test_a_value_too_long_to_print_is_still_refused_by_name(check):
    assert "the_field" in error_of(check, "the_field", UNPRINTABLE)


def test_a_bound_names_its_field_however_long_the_value():
    assert "top_k" in error_of(SamplingParams, top_k=-UNPRINTABLE)
