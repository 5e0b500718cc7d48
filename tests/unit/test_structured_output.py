"""Grammars and their masks: what may come next, where a text may end, and what each mistake is answered with."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import byte_fallback, byte_level, unigram_with_bytes
from transformers import AutoTokenizer
from unit_helpers import error_of

from folovllm.core.guesses import fit_guesses
from folovllm.request import StructuredOutputGrammar
from folovllm.sample import structured_output
from folovllm.sample.sampler import Sampler, SamplingMetadata, apply_grammar_bitmask
from folovllm.sample.structured_output import GuidanceBackend, GuidanceGrammar, fill_bitmasks
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams
from folovllm.tales import EMBEDDED_MODEL

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
EOS = {TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
VOCAB_SIZE = len(TOKENIZER) + 40  # as if the model had rows of padding
BACKEND = GuidanceBackend(TOKENIZER, VOCAB_SIZE, sorted(EOS))


def grammar_of(backend: GuidanceBackend = BACKEND, **asked) -> GuidanceGrammar:
    return backend.compile_grammar(StructuredOutputsParams(**asked))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def bits(words: np.ndarray) -> set[int]:
    return set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def allowed(grammar: GuidanceGrammar) -> set[int]:
    return bits(fill_bitmasks([grammar])[0])


def texts(token_ids: set[int]) -> set[str]:
    return {TOKENIZER.decode([token_id]) for token_id in token_ids}


class TestMasks:
    def test_a_token_fits_if_all_its_characters_do(self):
        words = ("fox", "frog", "fish")
        grammar = grammar_of(regex="(fox|frog|fish)(es)?")
        beginnings = {word[:n] for word in words for n in range(1, len(word) + 1)}
        assert texts(allowed(grammar)) == beginnings & texts(set(range(len(TOKENIZER))))
        assert grammar.accept_tokens(encode("fo"))
        assert texts(allowed(grammar)) == {"x"}
        assert grammar.accept_tokens(encode("x"))
        assert allowed(grammar) - EOS and allowed(grammar) >= EOS

    def test_what_must_come_is_written_in_the_tokenizers_own_way(self):
        """Where the text is certain, llguidance leaves one token, though its letters would fit as well."""
        grammar = grammar_of(regex="fox(es)?")
        assert texts(allowed(grammar)) == {"fox"}
        assert grammar.accept_tokens(encode("f")) and texts(allowed(grammar)) == {"o", "ox"} & texts(allowed(grammar))

    def test_where_it_ends_every_end_token_and_nothing_else(self):
        grammar = grammar_of(choice=["fox"])
        assert not allowed(grammar) & EOS
        assert grammar.accept_tokens(encode("fox"))
        assert allowed(grammar) == EOS

    def test_after_the_end_there_are_only_ends(self):
        """As they come where ``ignore_eos`` is set."""
        for regex in ("a", "ab?"):
            grammar = grammar_of(regex=regex)
            for token_id in [*encode("a"), *EOS, *EOS]:
                assert token_id in allowed(grammar) and grammar.accept_tokens([token_id])
            assert allowed(grammar) == EOS
            assert not grammar.accept_tokens(encode("b"))

    def test_what_does_not_fit_is_not_accepted(self):
        for wrong in (encode("b"), sorted(EOS), [VOCAB_SIZE - 1], [10**6]):
            assert not grammar_of(regex="a").accept_tokens(wrong[:1])

    def test_no_text_at_all(self):
        assert allowed(grammar_of(choice=[""])) == EOS
        assert allowed(grammar_of(choice=["", "fox"])) > EOS

    def test_many_texts_that_begin_alike(self):
        texts = [f"number {i}" for i in range(20_000)]
        for text in (texts[7], texts[-1]):
            grammar = grammar_of(choice=texts)
            assert grammar.accept_tokens(encode(text)) and allowed(grammar) >= EOS

    def test_ids_that_the_tokenizer_does_not_know_are_never_allowed(self):
        assert max(allowed(grammar_of(regex="(?s:.*)"))) < len(TOKENIZER)

    def test_a_tokenizer_larger_than_the_vocabulary(self):
        """Its masks are longer than the logits, whose end is what counts."""
        backend = GuidanceBackend(TOKENIZER, 300, sorted(EOS))
        words = fill_bitmasks([grammar_of(backend, regex="(?s:.*)")])
        masked = apply_grammar_bitmask(torch.zeros(1, 300), words)
        assert set(masked[0].isfinite().nonzero().flatten().tolist()) == {i for i in bits(words[0]) if i < 300}

    def test_special_tokens_are_no_text(self):
        special = set(TOKENIZER.all_special_ids)
        assert not allowed(grammar_of(regex="(?s:.+)")) & special
        assert allowed(grammar_of(json_object=True)) & special == set()

    @pytest.mark.parametrize("text", ["狐狸", "🦊", "naïve café", "a\u0301", "\U0010ffff", '"\\\t\n狐'])
    def test_characters_of_several_tokens(self, text):
        """Each token must be allowed after the ones before it, though they may be parts of a character."""
        for asked in ({"choice": [text, "fox"]}, {"regex": re.escape(text)}):
            grammar = grammar_of(**asked)
            for token_id in encode(text):
                assert token_id in allowed(grammar)
                assert grammar.accept_tokens([token_id])
            assert allowed(grammar) == EOS

    def test_half_a_character_is_no_end(self):
        grammar = grammar_of(regex=".+")
        fox = encode("🦊")
        assert len(fox) == 4
        for token_id in fox[:-1]:
            assert grammar.accept_tokens([token_id])
            assert not allowed(grammar) & EOS
        assert grammar.accept_tokens(fox[-1:]) and allowed(grammar) >= EOS

    @pytest.mark.parametrize(
        "asked, text",
        [
            ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 5}'),
            ({"json_object": True}, '{"x": [1, null, {"y": "狐"}]}'),
            ({"grammar": 'start: "a" inner "b"\ninner: start | "-"'}, "aaa-bbb"),
            ({"regex": "[0-9]{4}-[0-9]{2}"}, "2026-11"),
            ({"regex": r"a\\"}, "a\\"),
            ({"choice": ["lost", "found"]}, "found"),
        ],
    )
    def test_all_kinds(self, asked, text):
        grammar = grammar_of(**asked)
        assert grammar.accept_tokens(encode(text)) and allowed(grammar) >= EOS

    @pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram_with_bytes])
    def test_other_kinds_of_tokenizers(self, make):
        tokenizer = make()
        backend = GuidanceBackend(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
        grammar = grammar_of(backend, regex="[ab]+ 中")
        rng, found = np.random.default_rng(0), []
        while True:
            token_id = int(rng.choice(sorted(allowed(grammar))))
            if token_id == tokenizer.eos_token_id:
                break
            assert grammar.accept_tokens([token_id])
            found.append(token_id)
        assert re.fullmatch("[ab]+ 中", tokenizer.decode([*encode_with(tokenizer, "."), *found]).removeprefix("."))


def encode_with(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class TestPlaces:
    """Copies and guesses: the place in a grammar is what its tokens say, however it got there."""

    REGEXES = ("(fox|frog)+", "a?b{2,3}", "[a-f]*x?", "狐狸?")

    def test_a_copy_goes_on_by_itself(self):
        grammar = grammar_of(regex="ab|cd")
        copied = grammar.copy()
        assert grammar.accept_tokens(encode("a")) and copied.accept_tokens(encode("c"))
        assert (texts(allowed(grammar)), texts(allowed(copied))) == ({"b"}, {"d"})

    def test_one_compiled_for_all_is_still_each_ones_own(self):
        first, second = grammar_of(regex="ab"), grammar_of(regex="ab")
        assert first.accept_tokens(encode("a"))
        assert texts(allowed(second)) == {"a", "ab"} & texts(set(range(len(TOKENIZER))))

    def test_no_more_are_kept_than_should_be(self, monkeypatch):
        monkeypatch.setattr(structured_output, "MAX_GRAMMARS", 3)
        backend = GuidanceBackend(TOKENIZER, VOCAB_SIZE, sorted(EOS))
        for i in [*range(5), 4, 4]:
            grammar_of(backend, regex=f"a{i}")
        assert backend._compile_once.cache_info()[::3] == (2, 3)

    @given(st.data())
    def test_guesses(self, data):
        """The mask of each place is the one that would be there, and the grammars stay where they are."""
        grammars, guesses, expected = [], [], []
        for regex in data.draw(st.lists(st.sampled_from(self.REGEXES), min_size=1, max_size=4)):
            grammar = grammar_of(regex=regex)
            ahead, tokens = grammar.copy(), []
            expected.append(allowed(ahead))
            for _ in range(data.draw(st.integers(0, 5))):
                tokens.append(data.draw(st.sampled_from(sorted(expected[-1]))))
                assert ahead.accept_tokens(tokens[-1:])
                expected.append(allowed(ahead))
            grammars.append(grammar)
            guesses.append(tokens)
        before = [allowed(grammar) for grammar in grammars]
        assert [bits(words) for words in fill_bitmasks(grammars, guesses)] == expected
        assert [allowed(grammar) for grammar in grammars] == before

    def test_guesses_that_do_not_fit_are_cut(self):
        grammar = grammar_of(regex="ab?")
        a, b, end = *encode("a"), *encode("b"), min(EOS)
        for guesses, fit in [
            ([], 0),
            ([b], 0),
            ([a, a], 1),
            ([a, b, b], 2),
            ([a, end], 2),
            ([a, b, end], 3),
            ([end], 0),
        ]:
            assert grammar.validate_tokens(guesses) == guesses[:fit]
        assert allowed(grammar) == allowed(grammar_of(regex="ab?"))

    def test_of_guesses_that_a_grammar_refuses_the_first_that_fit_stay(self):
        """Though more tokens were guessed than it says must follow."""
        good, bad = encode("ab"), encode("zz")
        assert fit_guesses(grammar_of(choice=["ab", "ca"]), [*good, *bad, *bad]) == good

    def test_nothing_more_fits_where_it_has_ended(self):
        grammar = grammar_of(regex="a")
        assert grammar.accept_tokens(encode("a")) and grammar.validate_tokens(encode("a")) == []

    def test_what_must_follow(self):
        grammar = grammar_of(regex="The fox is (red|blue), said Mira.")
        assert grammar.accept_tokens(encode("The"))
        forced = grammar.compute_ff_tokens()
        assert forced and grammar.validate_tokens(forced) == forced
        assert TOKENIZER.decode(forced).startswith(" fox is"[: len(TOKENIZER.decode(forced))])

    def test_a_grammar_of_somebody_elses_is_asked_nothing_behind_a_wrong_guess(self):
        class Strict(StructuredOutputGrammar):
            """An A, then whatever it cannot tell; and it complains of being used after a token that did not fit."""

            vocab_size = 64

            def __init__(self, tokens=()):
                self.tokens = list(tokens)

            def accept_tokens(self, token_ids):
                assert set(self.tokens) <= {1}
                self.tokens += token_ids
                return set(self.tokens) <= {1}

            def fill_bitmask(self, bitmask, row):
                assert set(self.tokens) <= {1}
                if len(self.tokens) == 2:
                    raise ValueError("I do not know")
                bitmask[row] = (2, 0)

            def copy(self):
                return Strict(self.tokens)

        found = fill_bitmasks([Strict(), Strict()], [[1, 7, 7], [1, 1, 1]])
        assert [bits(words) for words in found] == [{1}, {1}, set(), set()] * 2
        with pytest.raises(ValueError, match="I do not know"):
            fill_bitmasks([Strict([1, 1])], [[1]])

    def test_a_grammar_of_somebody_elses(self):
        class Countdown(StructuredOutputGrammar):
            vocab_size = 64

            def __init__(self, left=3):
                self.left = left

            def accept_tokens(self, token_ids):
                self.left -= len(token_ids)
                return self.left >= 0

            def fill_bitmask(self, bitmask, row):
                bitmask[row] = (1 << self.left, 0)

            def copy(self):
                return Countdown(self.left)

        found = fill_bitmasks([Countdown(), Countdown(1)], [[9, 9], []])
        assert [bits(words) for words in found] == [{3}, {2}, {1}, {1}]
        assert Countdown().validate_tokens([9] * 5) == [9] * 3 and Countdown().compute_ff_tokens() == []


class TestMistakes:
    @pytest.mark.parametrize(
        "asked, said",
        [
            ({"regex": "a("}, "structured_outputs.regex cannot be followed: unclosed group"),
            ({"regex": "(?=a)b"}, "structured_outputs.regex cannot be followed: look-around"),
            ({"regex": r"(a)\1"}, "structured_outputs.regex cannot be followed: backreferences are not supported"),
            ({"regex": r"[^\s\S]"}, "structured_outputs.regex cannot be followed: no text fits it"),
            ({"regex": "(" * 100_000}, "structured_outputs.regex cannot be followed: "),
            ({"grammar": "start: x"}, 'structured_outputs.grammar cannot be followed: at 1(8): unknown name: "x"'),
            ({"grammar": "hello"}, "structured_outputs.grammar cannot be followed: "),
            ({"grammar": "start: " + "(" * 20_000}, "too deeply nested"),
            ({"json": {"type": "strin"}}, "structured_outputs.json cannot be followed: Invalid type: strin"),
            ({"json": {"enum": []}}, "Unsatisfiable schema"),
            ({"json": {"$ref": "#/nope"}}, "Pointer '/nope' does not exist"),
            ({"json": {"$ref": "http://example.com/x.json"}}, "does not fetch resources"),
            ({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
            ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
            ({"json": '{"items":' * 900 + "{}" + "}" * 900}, "recursion limit exceeded"),
            ({"json": {"$ref": "#"}}, "structured_outputs.json cannot be followed: "),
            ({"json": "5"}, "schema must be an object or boolean"),
            ({"json": {"properties": {f"p{i}": {} for i in range(3000)}, "type": "object"}}, "max is 2000"),
        ],
    )
    def test_what_cannot_be_followed_is_one_sentence(self, asked, said):
        message = error_of(grammar_of, **asked)
        assert said in message and "\n" not in message and len(message) < 700

    def test_rules_that_name_each_other_a_thousandfold_do_not_end_the_process(self):
        """In a process of its own, and with the tokens of single bytes, so that it imports little."""
        script = (
            "import sys, types; sys.modules['transformers'] = types.SimpleNamespace(PreTrainedTokenizerFast=object)\n"
            "import json\nfrom llguidance import LLTokenizer\n"
            "from folovllm.sample import structured_output\n"
            "from folovllm.sampling_params import StructuredOutputsParams\n"
            "structured_output.from_tokenizer = lambda *_: LLTokenizer('byte')\n"
            "backend = structured_output.GuidanceBackend(None, 262, [261])\n"
            "array = {'type': 'array', 'minItems': 1}\n"
            "rules = {f'd{i}': {**array, 'items': {'$ref': f'#/$defs/d{i + 1}'}} for i in range(2999)}\n"
            "schema = {'$defs': {**rules, 'd2999': {'const': 5}}, '$ref': '#/$defs/d0'}\n"
            "asked = StructuredOutputsParams(json=schema)\n"
            "print(backend.compile_grammar(asked).accept_tokens(b'[' * 2999 + b'5'))\n"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr

    def test_a_mistake_is_made_again(self):
        assert error_of(grammar_of, regex="a(") == error_of(grammar_of, regex="a(")

    def test_without_a_tokenizer_or_an_end(self):
        message = error_of(GuidanceBackend, None, 100, [1])
        assert message.startswith("structured_outputs needs a fast tokenizer") and "NoneType" in message
        assert error_of(GuidanceBackend, TOKENIZER, 100, []) == (
            "structured_outputs needs a token that ends a text, and this model has none"
        )
        assert "needs a token that ends" in error_of(GuidanceBackend, TOKENIZER, 100, [10**6])

    def test_a_parser_that_gives_up_allows_no_end(self, monkeypatch):
        """Its own mask would then be an end, wherever the text is."""
        tight = structured_output.LLParserLimits(
            step_lexer_fuel=50, step_max_items=20, precompute_large_lexemes=False, verbose_errors=False
        )
        matcher = structured_output.LLMatcher(
            BACKEND._tokenizer, structured_output.LLMatcher.grammar_from_json_schema("{}"), limits=tight, log_level=0
        )
        grammar = GuidanceGrammar(matcher, BACKEND)
        said = "structured_outputs could not be followed any further: "
        for _ in range(2):
            assert error_of(fill_bitmasks, [grammar_of(regex="a"), grammar]).startswith(said)
        assert not grammar.accept_tokens(encode("1")) and grammar.validate_tokens(encode("1")) == []
        assert not grammar.accept_tokens([min(EOS)])

    def test_a_parser_that_gives_up_behind_a_wrong_guess_goes_on(self):
        """What only the guess has made too much is no mistake of the text; no token is said to fit behind it."""
        lark = 'start: "x" | "a" /[0-9]/ /[-_]/ b\nb: "c" ("d"|"e"){0,50} | "c" ("d"|"f"){0,50}'
        tight = structured_output.LLParserLimits(step_max_items=40, verbose_errors=False)
        matcher = structured_output.LLMatcher(
            BACKEND._tokenizer, structured_output.LLMatcher.grammar_from_lark(lark), limits=tight, log_level=0
        )
        grammar, guesses = GuidanceGrammar(matcher, BACKEND), [encode(letter)[0] for letter in "a1-c"]
        first, *behind = fill_bitmasks([grammar], [guesses])
        assert texts(bits(first)) == {"x", "a"} and not any(bits(words) for words in behind)
        assert grammar.accept_tokens(encode("x")) and allowed(grammar) == EOS


class TestApplyGrammarBitmask:
    @given(st.data())
    def test_against_one_token_after_the_other(self, data):
        num_rows, vocab_size, num_words = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 3)))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        rows = None if data.draw(st.booleans()) else sorted(rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)])
        masked_rows = list(range(num_rows)) if rows is None else rows
        words = rng.integers(-(2**31), 2**31, (len(masked_rows), num_words)).astype(np.int32)
        logits = torch.from_numpy(rng.normal(size=(num_rows, vocab_size)).astype(np.float32))
        found = apply_grammar_bitmask(logits, words, None if rows is None else torch.tensor(rows))
        for row in range(num_rows):
            for token_id in range(vocab_size):
                is_allowed = row not in masked_rows or token_id in bits(words[masked_rows.index(row)])
                assert found[row, token_id] == (logits[row, token_id] if is_allowed else -torch.inf)


class TestSampler:
    """Rows with grammars among rows without."""

    LOGITS = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def metadata(self, grammars, **given_fields) -> SamplingMetadata:
        params = [SamplingParams(**{"temperature": 0, **given_fields}) for _ in grammars]
        return SamplingMetadata(params, grammars=grammars)

    def test_the_likeliest_that_fits(self):
        grammars = [grammar_of(regex="[a-f]"), None, grammar_of(choice=["yes", "no"]), None]
        found = Sampler(TOKENIZER)(self.LOGITS, self.metadata(grammars)).token_ids
        for row, (token_id, grammar) in enumerate(zip(found, grammars)):
            fits = sorted(allowed(grammar)) if grammar else range(VOCAB_SIZE)
            assert token_id == max(fits, key=lambda i: self.LOGITS[row, i])

    def test_the_same_rows_go_on(self):
        """The metadata stay, and with them what was worked out; the masks do not."""
        metadata, sampler, text = self.metadata([grammar_of(regex="(ab)+c")]), Sampler(TOKENIZER), []
        for _ in range(7):
            (token_id,) = sampler(self.LOGITS[:1], metadata).token_ids
            assert metadata.grammars[0].accept_tokens([token_id])
            text.append(token_id)
        written = TOKENIZER.decode([i for i in text if i not in EOS])
        assert re.match("(ab)*(ab?|(ab)+c)$", written), written

    def test_log_probabilities_are_the_raw_ones(self):
        grammar = grammar_of(regex="[a-f]")
        output = Sampler(TOKENIZER)(self.LOGITS[:1], self.metadata([grammar], logprobs=0))
        (token_id,) = output.token_ids
        assert output.logprobs[0][token_id].logprob == pytest.approx(self.LOGITS[0].log_softmax(-1)[token_id].item())
        assert output.logprobs[0][token_id].rank > 1

    def test_with_everything_else(self):
        a, b = encode("a")[0], encode("b")[0]
        for given_fields, expected in (
            ({"allowed_token_ids": [b, 500]}, b),
            ({"bad_words": ["a"]}, b),
            ({"logit_bias": {b: 100.0}}, b),
            ({"logit_bias": {a: 100.0, 500: 100.0}}, a),
            ({"temperature": 1.0, "top_k": 1, "logit_bias": {a: 50.0}}, a),
        ):
            metadata = self.metadata([grammar_of(regex="[ab]")], **given_fields)
            assert Sampler(TOKENIZER)(self.LOGITS[:1], metadata).token_ids == [expected]

    def test_a_row_without_a_token_left_is_told_so_alone(self):
        metadata = self.metadata([grammar_of(choice=[""]), grammar_of(regex="a")], min_tokens=1)
        output = Sampler(TOKENIZER, sorted(EOS)).sample(self.LOGITS[:2], metadata)
        removers = "structured_outputs, allowed_token_ids, bad_words and min_tokens"
        assert output.errors == {0: f"the request has no token left: {removers} remove all"}
        assert output.token_ids[1] == encode("a")[0]

    def test_a_row_whose_grammar_gives_up_is_told_so_alone(self):
        broken = grammar_of(regex="a")
        assert not broken.accept_tokens(encode("b"))
        grammars = [grammar_of(regex="a"), broken, None, grammar_of(regex="b")]
        expected = Sampler(TOKENIZER)(self.LOGITS[[0, 2, 3]], self.metadata([grammars[0], None, grammars[3]]))
        output = Sampler(TOKENIZER).sample(self.LOGITS, self.metadata(grammars))
        assert list(output.errors) == [1] and output.errors[1].startswith("structured_outputs could not be followed")
        assert [output.token_ids[row] for row in (0, 2, 3)] == expected.token_ids
