"""The checks of single values: what passes, in which type it comes back, and how a refusal reads."""

from __future__ import annotations

import math
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit_helpers import ANYTHING, HUGE, UNPRINTABLE, error_of

from folovllm.sampling_params import SamplingParams
from folovllm.validation import (
    MAX_SHOWN,
    check_bool,
    check_int,
    check_number,
    check_str,
    check_texts,
    check_token_ids,
    check_unicode,
    require,
    shorten,
    show,
)

CHECKS = [check_int, check_number, check_bool, check_str, check_token_ids, check_texts]


class TestRequire:
    def test_says_nothing_when_all_is_well(self):
        require(True, "unseen")

    def test_raises_the_sentence_it_was_given(self):
        assert error_of(require, False, "n must be at least 1, got 0") == "n must be at least 1, got 0"


class TestCheckInt:
    @pytest.mark.parametrize("value", [0, -1, 2**63, np.int8(3), np.uint64(2**63), np.array(3), torch.tensor(-3)])
    def test_integers_come_back_as_int(self, value):
        checked = check_int("n", value)
        assert type(checked) is int and checked == value

    @pytest.mark.parametrize(
        "value",
        [True, False, np.bool_(True), 1.0, np.float32(1), Fraction(1), "1", b"1", None, np.ndarray, torch.Tensor],
    )
    def test_what_only_looks_like_one_is_refused(self, value):
        assert error_of(check_int, "n", value) == f"n must be an integer, got {value!r}"

    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    @pytest.mark.parametrize("value", [[1], 1.0, True])
    def test_arrays_of_one_number_and_of_other_types_are_refused(self, make, value):
        assert error_of(check_int, "n", make(value)) == f"n must be an integer, got {make(value)!r}"


class TestCheckUnicode:
    @pytest.mark.parametrize("text", ["", "a", "é狐🦊", "\x00"])
    def test_text_comes_back(self, text):
        assert check_unicode("prompt", text) == text

    def test_half_a_surrogate_pair_is_refused(self):
        message = error_of(check_unicode, "prompt", "caf\udce9")
        assert message.startswith("prompt must be Unicode text, got '\\udce9' at character 3;")


class TestCheckNumber:
    @pytest.mark.parametrize(
        "value",
        [0, -1.5, 5e-324, 1.7e308, Fraction(1, 2), np.float16(0.5), np.int8(3), np.array(0.5), torch.tensor(0.5)],
    )
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

    @pytest.mark.parametrize(
        "make",
        [
            list,
            tuple,
            iter,
            deque,
            np.array,
            torch.tensor,
            lambda ids: (token_id for token_id in ids),
            lambda ids: np.array(ids, dtype=np.uint8),
            lambda ids: dict(enumerate(ids)).values(),
        ],
    )
    def test_whatever_holds_ids_in_order(self, make):
        checked = check_token_ids("ids", make([3, 1, 3]))
        assert checked == [3, 1, 3] and all(type(token_id) is int for token_id in checked)

    def test_a_range(self):
        assert check_token_ids("ids", range(3)) == [0, 1, 2]

    @pytest.mark.parametrize("value", [{1}, frozenset({1}), {1: 2}.keys()])
    def test_a_set_only_where_order_means_nothing(self, value):
        assert check_token_ids("ids", value, ordered=False) == [1]
        assert error_of(check_token_ids, "ids", value) == f"ids must be a list of token ids, got {value!r}"

    @pytest.mark.parametrize(
        "value",
        [None, 5, "12", b"12", bytearray(b"12"), memoryview(b"12"), {1: 2}, np.array(5), torch.tensor(5), np.int64(5)],
    )
    @pytest.mark.parametrize("ordered", [True, False])
    def test_no_list(self, value, ordered):
        assert error_of(check_token_ids, "ids", value, ordered) == f"ids must be a list of token ids, got {value!r}"

    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    @pytest.mark.parametrize("entries, shown", [([1.0], "1.0"), ([[1, 2]], "[1, 2]"), ([True], "True")])
    def test_arrays_of_anything_else(self, make, entries, shown):
        assert error_of(check_token_ids, "ids", make(entries)) == f"ids[0] must be an integer, got {shown}"

    def test_an_id_that_fits_no_64_bits(self):
        assert check_token_ids("ids", [2**64 - 1]) == [2**64 - 1]
        assert error_of(check_token_ids, "ids", [0, 2**64]).startswith("ids[1] must be an integer of at most 64 bits")

    @given(
        st.lists(st.integers(0, 9) | st.sampled_from([-1, True, 1.0, "1", None, np.int64(3), 2**64, [1]]), max_size=6)
    )
    def test_the_first_offender_is_named_as_if_each_were_checked_by_itself(self, ids):
        def one_by_one():
            checked = [check_int(f"ids[{i}]", token_id) for i, token_id in enumerate(ids)]
            for i, token_id in enumerate(checked):
                require(token_id >= 0, f"ids[{i}] must be a token id (0 or more), got {token_id}")
            return checked

        try:
            expected = one_by_one()
        except ValueError as error:
            assert error_of(check_token_ids, "ids", ids) == str(error)
        else:
            checked = check_token_ids("ids", ids)
            assert checked == expected and all(type(token_id) is int for token_id in checked)

    @pytest.mark.parametrize("bad", [True, 1.0, "1", None, [1]])
    def test_an_entry_that_is_no_integer_is_named(self, bad):
        assert error_of(check_token_ids, "ids", [7, bad]) == f"ids[1] must be an integer, got {bad!r}"

    def test_a_negative_entry_is_named(self):
        message = error_of(check_token_ids, "ids", [0, 1, -1])
        assert message.startswith("ids[2]") and message.endswith("got -1")


class TestCheckTexts:
    @pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), iter(["a", "b"]), np.array(["a", "b"])])
    def test_whatever_holds_texts(self, value):
        assert check_texts("words", value) == ["a", "b"]

    def test_a_set(self):
        assert sorted(check_texts("words", {"a", "b"})) == ["a", "b"]

    @pytest.mark.parametrize("value", ["ab", b"ab", None, 5, {"a": 1}])
    def test_no_list(self, value):
        assert error_of(check_texts, "words", value) == f"words must be a list of strings, got {value!r}"

    @pytest.mark.parametrize("bad", ["", None, 1, b"a"])
    def test_an_entry_that_is_no_text_is_named(self, bad):
        assert error_of(check_texts, "words", ["a", bad]) == f"words[1] must be a non-empty string, got {bad!r}"

    def test_each_must_be_text_that_can_be_encoded(self):
        message = error_of(check_texts, "words", ["a", "b\ud800"])
        assert message.startswith("words[1] must be Unicode text, got '\\ud800'")


class TestShow:
    @pytest.mark.parametrize("value", [1, "a\nb", [1, "b"], None])
    def test_short_values_as_python_shows_them(self, value):
        assert show(value) == repr(value)

    def test_arrays_on_one_line(self):
        assert "\n" not in show(np.zeros((3, 3))) and show(np.zeros((3, 3))).startswith("array([[0., 0., 0.],")

    def test_long_values_are_cut(self):
        assert len(show(list(range(100_000)))) < 600

    @pytest.mark.parametrize("length, end", [(MAX_SHOWN, "x"), (MAX_SHOWN + 1, "x...")])
    def test_a_text_is_cut_where_it_is_longer_than_may_be_shown(self, length, end):
        assert shorten("x" * length) == "x" * (MAX_SHOWN - 1) + end

    def test_what_python_will_not_print(self):
        nested: list = []
        for _ in range(100_000):
            nested = [nested]
        assert show(nested) == "a list too long to print"
        while nested:  # taken apart by hand: some Pythons recurse to free it
            nested = nested.pop()


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
