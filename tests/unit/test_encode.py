"""From a text to tokens: what cannot be served is refused first, and no tokenizer is changed."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from tokenizer_kinds import FAST, SLOW, TEXTS, byte_fallback, byte_level
from unit_helpers import error_of

from folovllm import CacheConfig, EngineConfig, ModelConfig
from folovllm.engine.encode import encode_text
from folovllm.engine.input_processor import InputProcessor
from folovllm.engine.served_model import ServedModel
from folovllm.sampling_params import tokenize_bad_word

TOKENIZER = FAST["embedded"]


@pytest.mark.parametrize("kind", FAST | SLOW)
@given(text=TEXTS)
def test_the_tokens_are_the_tokenizers_own(kind, text):
    tokenizer = (FAST | SLOW)[kind]
    for special in (True, False):
        assert encode_text(tokenizer, text, 512, special) == tokenizer.encode(text, add_special_tokens=special)


def test_a_text_of_nothing_has_what_the_tokenizer_adds():
    config = EngineConfig(ModelConfig("m", max_model_len=64), CacheConfig(num_blocks=8))
    for tokenizer in (byte_fallback(), TOKENIZER):
        process = InputProcessor(config, ServedModel(None, len(tokenizer), 64, tokenizer, [])).process
        if added := tokenizer.encode(""):
            assert process("r", "", None, 0.0).prompt_token_ids == added
        else:
            assert error_of(process, "r", "", None, 0.0) == "prompt must have at least one token, got ''"


def test_a_text_much_too_long_is_refused_before_it_is_encoded():
    longest = max(map(len, TOKENIZER.get_vocab()))

    class Refusing:
        is_fast = True
        get_vocab = staticmethod(TOKENIZER.get_vocab)
        __len__ = staticmethod(TOKENIZER.__len__)

    message = error_of(encode_text, Refusing(), "a" * (8 * longest + 1), 8)
    assert f"at most {8 * longest} characters" in message and f"got {8 * longest + 1}" in message
    assert len(encode_text(TOKENIZER, "a" * (8 * longest), 8)) > 8


@pytest.mark.parametrize("text, index", [("\udce9", 0), ("caf\udce9!", 3), ("\ud83e\udd8a", 0)])
def test_half_a_surrogate_pair_is_refused(text, index):
    assert f"prompt must be Unicode text, got {text[index]!r} at character {index}" in error_of(
        encode_text, TOKENIZER, text, 64
    )


def test_a_token_that_was_added_later_is_known():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer("a", truncation=True, max_length=4)  # which its backend remembers
    encode_text(tokenizer, "a", 8)
    tokenizer.add_tokens(["<" + "new" * 100 + ">"])
    text = "<" + "new" * 100 + ">"
    assert encode_text(tokenizer, text, 2) == [len(tokenizer) - 1]


def test_a_token_that_was_added_later_may_be_the_longest():
    tokenizer = copy.deepcopy(TOKENIZER)
    assert "must have at most" in error_of(encode_text, tokenizer, "é" * 5000, 10)
    tokenizer.add_tokens(["é" * 1000])
    assert encode_text(tokenizer, "é" * 5000, 10) == [len(tokenizer) - 1] * 5


def test_limits_that_another_thread_sets_meanwhile(monkeypatch):
    tokenizer = byte_level()
    encode, want = tokenizer.encode, tokenizer.encode("a fox 🦊")
    limits = [1]

    def disturbed(*args, **kwargs):
        if not limits:
            return encode(*args, **kwargs)
        tokenizer.backend_tokenizer.enable_truncation(limits.pop())
        return want[:1]

    monkeypatch.setattr(tokenizer, "encode", disturbed)
    assert encode_text(tokenizer, "a fox 🦊", 64) == want


def test_a_bad_word_is_spelled_whole_and_nothing_is_changed():
    tokenizer = byte_level()
    want = tokenize_bad_word("a fox 🦊", tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(1)
    before = tokenizer.backend_tokenizer.truncation
    assert tokenize_bad_word("a fox 🦊", tokenizer) == want and min(map(len, want)) > 1
    assert tokenizer.backend_tokenizer.truncation == before


@pytest.mark.parametrize("truncates", [True, False])
def test_no_padding_nor_truncation_of_the_tokenizer_matters_or_is_changed(truncates):
    tokenizer = byte_level()
    want = tokenizer.encode("a fox 🦊")
    tokenizer.backend_tokenizer.enable_padding(length=50)
    if truncates:
        tokenizer.backend_tokenizer.enable_truncation(2)
    before = (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation)
    with ThreadPoolExecutor(4) as pool:
        assert set(map(tuple, pool.map(lambda _: encode_text(tokenizer, "a fox 🦊", 64), range(64)))) == {tuple(want)}
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == before
