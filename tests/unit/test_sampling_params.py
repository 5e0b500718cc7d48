"""SamplingParams: defaults, both sides of every bound, and what each mistake is answered with."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, is_dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from unit_helpers import ANYTHING, error_of

from folovllm.sampling_params import (
    MAX_STRUCTURE_CHARS,
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
    check_params,
    tokenize_bad_word,
)

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
    "structured_outputs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "skip_reading_prefix_cache": False,
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
    "skip_reading_prefix_cache",
}
TINY = 5e-324
MAX = 16_384
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
            ("n", MAX),
            ("best_of", 1),
            ("best_of", MAX),
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
            ("repetition_penalty", 1.7e308),
            ("length_penalty", -3.5),
            ("early_stopping", True),
            ("max_tokens", 1),
            ("max_tokens", None),
            ("min_tokens", 0),
            ("min_tokens", 16),
            ("logprobs", 0),
            ("logprobs", 5),
            ("logprobs", -1),
            ("prompt_logprobs", 0),
            ("prompt_logprobs", -1),
            ("skip_reading_prefix_cache", True),
            ("detokenize", False),
            *(("output_kind", kind) for kind in RequestOutputKind),
            ("logit_bias", {}),
            ("logit_bias", {0: -100, 7: 100}),
            ("allowed_token_ids", [0]),
            ("bad_words", []),
            ("bad_words", ["fox"]),
            ("structured_outputs", StructuredOutputsParams(regex="a+")),
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
            ({"n": MAX + 1}, "n must be at most 16384, got 16385"),
            ({"n": 10**9}, "n must be at most 16384, got 1000000000"),
            ({"best_of": MAX + 1}, "best_of must be at most 16384, got 16385"),
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
            ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
            ({"repetition_penalty": -TINY}, "repetition_penalty must be above 0, got -5e-324"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
            ({"min_tokens": -1}, "min_tokens must not be negative, got -1"),
            ({"logprobs": -2}, "logprobs must be 0 or more, or -1 for the whole vocabulary, got -2"),
            ({"prompt_logprobs": -2}, "prompt_logprobs must be 0 or more, or -1 for the whole vocabulary, got -2"),
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

    def test_a_best_of_that_is_set_later_stays(self):
        params = SamplingParams(n=2)
        params.best_of = 5
        params.check()
        assert params.best_of == 5

    def test_what_followed_from_a_field_follows_it_when_that_is_changed(self):
        params, told = SamplingParams(), SamplingParams(best_of=2, skip_reading_prefix_cache=False, prompt_logprobs=1)
        for each in (params, told, params.clone()):
            each.n, each.prompt_logprobs = 2, 1
            each.check()
            assert each.best_of == 2 and each.skip_reading_prefix_cache is (each is not told)
        told.n = 3
        assert error_of(told.check) == "best_of (2) must be >= n (3)"

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
    @pytest.mark.parametrize("value", [0, 1, "True", np.bool_(True)])
    def test_a_flag_is_a_bool(self, field, value):
        assert field in error_of(SamplingParams, **{field: value})

    @pytest.mark.parametrize("field", sorted(set(DEFAULTS) - NONE_ALLOWED))
    def test_none_is_refused_where_it_means_nothing(self, field):
        assert field in error_of(SamplingParams, **{field: None})

    def test_beam_search_is_refused_with_a_way_out(self):
        message = error_of(SamplingParams, use_beam_search=True, error=NotImplementedError)
        assert message.startswith("use_beam_search must be False, got True")
        assert "LLM.beam_search(prompts, BeamSearchParams(" in message

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
    @pytest.mark.parametrize("value", [5, "5", b"5", [-1], [1.0], ["1"], [True], [None], [[5]], {5: 1}])
    def test_token_ids_are_non_negative_integers(self, field, value):
        assert field in error_of(SamplingParams, **{field: value})

    def test_no_allowed_token_at_all_is_an_error(self):
        assert "allowed_token_ids" in error_of(SamplingParams, allowed_token_ids=[])

    @pytest.mark.parametrize(
        "value",
        [
            {-1: 1.0},
            {"-1": 1.0},
            {"5.0": 1.0},
            {"five": 1.0},
            {"": 1.0},
            {"9" * 5000: 1.0},
            {"\u0665": 1.0},
            {"5": 1.0, 5: 1.0},
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

    @pytest.mark.parametrize("token_id", [5, np.int64(5), "5", torch.tensor(5)])
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

    @pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
    @pytest.mark.parametrize(
        "value",
        [(5, 7), {5, 7}, range(5, 8, 2), np.array([5, 7]), torch.tensor([5, 7]), [np.int64(5), torch.tensor(7)]],
    )
    def test_token_ids_in_whatever_holds_them(self, field, value):
        held = getattr(SamplingParams(**{field: value}), field)
        assert sorted(held) == [5, 7] and type(held) is list and all(type(token_id) is int for token_id in held)

    @pytest.mark.parametrize("field", ["stop", "bad_words"])
    @pytest.mark.parametrize("value", [("a", "b"), {"a", "b"}, np.array(["a", "b"]), {"a": 1, "b": 2}.keys()])
    def test_texts_in_whatever_holds_them(self, field, value):
        held = getattr(SamplingParams(**{field: value}), field)
        assert sorted(held) == ["a", "b"] and type(held) is list

    @pytest.mark.parametrize("field", ["stop", "stop_token_ids", "allowed_token_ids", "bad_words"])
    def test_a_generator_is_read_once(self, field):
        entries = ["a", "b"] if field in ("stop", "bad_words") else [5, 7]
        assert getattr(SamplingParams(**{field: (entry for entry in entries)}), field) == entries

    @pytest.mark.parametrize("field, value", [("temperature", 0.5), ("max_tokens", 3), ("seed", 3)])
    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_numbers_in_arrays_and_tensors_without_dimensions(self, field, value, make):
        held = getattr(SamplingParams(**{field: make(value)}), field)
        assert held == value and type(held) is type(value)

    def test_stop_strings_need_text(self):
        message = error_of(SamplingParams, stop="a", detokenize=False)
        assert message.startswith("stop") and "detokenize" in message and "stop_token_ids" in message
        assert SamplingParams(stop_token_ids=[1], detokenize=False).stop == []

    @pytest.mark.parametrize("value", [1, "DELTA", None, SamplingType.RANDOM])
    def test_an_output_kind_is_one_of_three(self, value):
        message = error_of(SamplingParams, output_kind=value)
        assert message.startswith("output_kind") and "FINAL_ONLY" in message and repr(value) in message

    def test_output_kinds_are_vllms(self):
        assert {kind.name: kind.value for kind in RequestOutputKind} == {"CUMULATIVE": 0, "DELTA": 1, "FINAL_ONLY": 2}

    def test_news_of_the_likeliest_answers_cannot_be_given_before_the_end(self):
        message = error_of(SamplingParams, n=2, best_of=3, output_kind=RequestOutputKind.DELTA)
        assert message.startswith("best_of (3) must equal n (2) to use output_kind=DELTA")
        assert SamplingParams(n=2, output_kind=RequestOutputKind.DELTA).best_of == 2

    @pytest.mark.parametrize("prompt_logprobs, skip", [(None, False), (0, True), (-1, True)])
    def test_prompt_logprobs_leave_cached_blocks_unread_unless_told_otherwise(self, prompt_logprobs, skip):
        assert SamplingParams(prompt_logprobs=prompt_logprobs).skip_reading_prefix_cache is skip
        told = SamplingParams(prompt_logprobs=prompt_logprobs, skip_reading_prefix_cache=not skip)
        assert told.skip_reading_prefix_cache is not skip

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

    FILLED = SamplingParams(
        n=2, stop=["a"], stop_token_ids=[1], logit_bias={1: 1.0}, allowed_token_ids=[1], bad_words=["a"], seed=3
    )

    def test_a_clone_is_equal(self):
        clone = self.FILLED.clone()
        assert clone is not self.FILLED and clone == self.FILLED and type(clone) is SamplingParams

    def test_a_clone_shares_nothing_that_can_change(self):
        original = copy.deepcopy(self.FILLED)
        clone = original.clone()
        for f in fields(clone):
            value = getattr(clone, f.name)
            if isinstance(value, (list, dict)):
                value.clear()
            else:
                setattr(clone, f.name, None)
        assert original == self.FILLED

    def test_what_has_been_changed_since_can_be_checked_again(self):
        params = SamplingParams()
        params.top_p = 2
        assert error_of(params.check) == "top_p must be in (0, 1], got 2.0"
        params.top_p, params.stop = 0.5, "a"
        params.check()
        assert params.stop == ["a"]

    def test_equal_when_all_fields_are(self):
        assert SamplingParams(top_k=5) == SamplingParams(top_k=5) != SamplingParams(top_k=6)


@pytest.mark.parametrize("field", DEFAULTS)
@given(value=ANYTHING)
def test_any_value_at_all_is_held_in_the_fields_type_or_refused_by_the_fields_name(field, value):
    try:
        params = SamplingParams(**{field: value})
    except NotImplementedError as error:
        assert field == "use_beam_search" and value is True and "LLM.beam_search" in str(error)
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
    elif field == "output_kind":
        assert isinstance(held, RequestOutputKind)
    elif field == "logit_bias":
        assert all(type(key) is int and type(bias) is float for key, bias in held.items())
    elif field == "structured_outputs":
        assert isinstance(held, StructuredOutputsParams)
    else:
        kind = str if field in ("stop", "bad_words") else int
        assert type(held) is list and all(isinstance(entry, kind) for entry in held)
    assert isinstance(repr(params), str)


class TestStructuredOutputsParams:
    """What an answer must be, in words; whether it can be followed, a tokenizer must know."""

    @pytest.mark.parametrize("field", [field.name for field in fields(StructuredOutputsParams)])
    @given(value=ANYTHING)
    def test_any_value_at_all_is_held_as_text_or_refused_by_name(self, field, value):
        try:
            held = getattr(StructuredOutputsParams(**{field: value}), field)
        except ValueError as error:
            assert str(error).startswith("structured_outputs") and "\n" not in str(error)
            return
        kind = {"json_object": bool, "choice": tuple}.get(field, str)
        assert type(held) is kind and held

    @pytest.mark.parametrize(
        "given_fields, said",
        [
            ({}, "exactly one of json, regex, choice, grammar and json_object, got none"),
            ({"regex": "a", "json": "{}"}, "got json and regex"),
            ({"json_object": False}, "got none"),
            ({"regex": ""}, "structured_outputs.regex must be a non-empty string, got ''"),
            ({"regex": "a\0"}, "structured_outputs.regex must have no NUL character, got one at character 1"),
            ({"regex": "a" * (MAX_STRUCTURE_CHARS + 1)}, "at most 1048576 characters, got 1048577"),
            ({"grammar": "\ud800"}, "structured_outputs.grammar must be Unicode text"),
            ({"json": "{"}, "structured_outputs.json must be JSON (Expecting property name"),
            ({"json": "[" * 100_000}, "structured_outputs.json must be JSON ("),
            ({"json": {"enum": [float("nan")]}}, "structured_outputs.json must be JSON ("),
            ({"json": {"enum": {1, 2}}}, "not JSON serializable"),
            ({"json": [1]}, "structured_outputs.json must be a JSON schema as a dict or a text, got [1]"),
            ({"choice": []}, "structured_outputs.choice must have at least one text, got []"),
            ({"choice": "ab"}, "structured_outputs.choice must be a list of strings, got 'ab'"),
            ({"choice": ["a", 1]}, "structured_outputs.choice[1] must be a string, got 1"),
            ({"choice": ["a" * MAX_STRUCTURE_CHARS, "b"]}, "at most 1048576 characters, got 1048577"),
        ],
    )
    def test_mistakes_are_one_sentence(self, given_fields, said):
        message = error_of(StructuredOutputsParams, **given_fields)
        assert message.startswith("structured_outputs") and said in message

    def test_a_schema_in_whatever_holds_it(self):
        class Card:
            @classmethod
            def model_json_schema(cls):
                return {"type": "integer"}

        expected = StructuredOutputsParams(json={"type": "integer"})
        assert StructuredOutputsParams(json=Card) == StructuredOutputsParams(json='{"type": "integer"}') == expected
        assert hash(StructuredOutputsParams(json=Card)) == hash(expected)

    def test_it_cannot_be_changed(self):
        schema, choice = {"enum": [1]}, ["a", "b", "a"]
        held, chosen = StructuredOutputsParams(json=schema), StructuredOutputsParams(choice=choice)
        schema["enum"].append(2)
        choice.append("c")
        assert (held.json, chosen.choice) == ('{"enum": [1]}', ("a", "b"))
        with pytest.raises(AttributeError):
            held.json = "{}"

    def test_what_it_shows(self):
        assert repr(StructuredOutputsParams(regex="a+")) == "StructuredOutputsParams(regex='a+')"
        assert len(repr(StructuredOutputsParams(regex="a" * 10_000))) < 600

    def test_another_kind_of_object_is_refused(self):
        assert error_of(SamplingParams, structured_outputs={"regex": "a"}) == (
            "structured_outputs must be a StructuredOutputsParams or None, got {'regex': 'a'}"
        )


class AsciiTokenizer:
    """A character is a token, and its ASCII code the token's id; 0 ends a text, and a tab is no token at all."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [0] * add_special_tokens + [ord(character) for character in text if character != "\t"]


class TestCheckParams:
    """What depends on the model: 128 tokens, of which 0 ends a text."""

    TOKENIZER = AsciiTokenizer()

    def check(self, vocab_size=128, tokenizer=TOKENIZER, eos_token_ids=(0,), **given_fields):
        check_params(SamplingParams(**given_fields), vocab_size, tokenizer, eos_token_ids)

    @pytest.mark.parametrize(
        "given_fields",
        [
            {},
            {"logit_bias": {127: 1.0}, "allowed_token_ids": [127], "stop_token_ids": [127]},
            {"logit_bias": {}, "bad_words": []},
            {"bad_words": ["a", "fox", "\ta"]},
            {"allowed_token_ids": [0]},
            {"allowed_token_ids": [0, 5], "min_tokens": 3},
            {"allowed_token_ids": [97, 98], "bad_words": ["a"]},
            {"allowed_token_ids": [97], "bad_words": ["ab"]},
            {"stop_token_ids": list(range(128))},
        ],
    )
    def test_accepts(self, given_fields):
        self.check(**given_fields)

    @pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
    @pytest.mark.parametrize("token_id", [128, 2**62])
    def test_a_token_outside_the_vocabulary(self, field, token_id):
        value = {1: 1.0, token_id: 1.0} if field == "logit_bias" else [1, token_id]
        message = error_of(self.check, **{field: value})
        assert message == f"{field} names token id {token_id}, but the vocabulary has 128 tokens"

    def test_a_bad_word_without_tokens(self):
        message = error_of(self.check, bad_words=["fox", "\t"])
        assert message == "bad_words must be spelled in at least one token, got '\\t'"

    def test_bad_words_without_a_tokenizer(self):
        message = error_of(self.check, tokenizer=None, bad_words=["fox"])
        assert message.startswith("bad_words") and "tokenizer" in message and "fox" in message

    @pytest.mark.parametrize(
        "given_fields",
        [
            {"allowed_token_ids": [0], "min_tokens": 1},
            {"allowed_token_ids": [0, 7], "stop_token_ids": [7], "min_tokens": 1},
            {"allowed_token_ids": [97], "bad_words": ["a"]},
            {"allowed_token_ids": [97, 0], "bad_words": ["a"], "min_tokens": 1},
            {"stop_token_ids": list(range(128)), "min_tokens": 1},
            {"vocab_size": 1, "min_tokens": 1},
        ],
    )
    def test_nothing_that_the_first_token_could_be(self, given_fields):
        message = error_of(self.check, **given_fields)
        assert all(name in message for name in ("allowed_token_ids", "bad_words", "min_tokens"))

    def test_tokens_without_a_logit_take_nothing_away(self):
        self.check(vocab_size=2, eos_token_ids=[0, 5, 6], min_tokens=1)
        self.check(vocab_size=2, bad_words=["a", "b", "c"])

    def test_what_has_been_changed_since_is_checked_again(self):
        params = SamplingParams()
        params.min_p = 7
        assert error_of(check_params, params, 128).startswith("min_p must be in [0, 1]")


class TestTokenizeBadWord:
    def test_with_and_without_a_space_before_it(self):
        assert tokenize_bad_word(" ab", AsciiTokenizer()) == [[32, 97, 98], [97, 98]]

    def test_white_space_as_it_is(self):
        assert tokenize_bad_word("\n", AsciiTokenizer()) == [[10]]
        assert [10, 97, 98] in tokenize_bad_word("\nab", AsciiTokenizer())


BEAM_DEFAULTS = {
    "ignore_eos": False,
    "temperature": 0.0,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
}


class TestBeamSearchParams:
    def test_fields_and_defaults(self):
        params = BeamSearchParams(4, 16)
        assert {f.name: getattr(params, f.name) for f in fields(params)} == {
            "beam_width": 4,
            "max_tokens": 16,
            **BEAM_DEFAULTS,
        }

    @pytest.mark.parametrize(
        "field, value",
        [
            ("beam_width", 1),
            ("beam_width", MAX),
            ("max_tokens", 1),
            ("temperature", 0),
            ("length_penalty", -10),
            ("length_penalty", 10),
        ],
    )
    def test_bounds_that_are_allowed(self, field, value):
        assert getattr(BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, field: value}), field) == value

    @pytest.mark.parametrize(
        "field, value",
        [
            ("beam_width", 0),
            ("beam_width", MAX + 1),
            ("beam_width", True),
            ("beam_width", 2.0),
            ("max_tokens", 0),
            ("max_tokens", None),
            ("temperature", -TINY),
            ("length_penalty", -10.5),
            ("length_penalty", 11),
            ("length_penalty", math.nan),
            ("ignore_eos", 1),
        ],
    )
    def test_what_is_refused_is_named(self, field, value):
        message = error_of(BeamSearchParams, **{"beam_width": 2, "max_tokens": 3, field: value})
        assert message.startswith(field) and "got" in message


@pytest.mark.parametrize("field", ["beam_width", "max_tokens", *BEAM_DEFAULTS])
@given(value=ANYTHING)
def test_any_value_of_a_beam_search_is_held_in_the_fields_type_or_refused_by_the_fields_name(field, value):
    try:
        held = getattr(BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, field: value}), field)
    except ValueError as error:
        assert field in str(error) and "\n" not in str(error)
    else:
        assert type(held) is type(BEAM_DEFAULTS.get(field, 1))
