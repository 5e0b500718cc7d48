"""Tokens to text as they come: whole characters only, stop strings wherever they lie."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from folovllm import SamplingParams
from folovllm.engine.detokenizer import Detokenizer
from folovllm.tales import EMBEDDED_MODEL

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def feed(text, prompt="", **params):
    """A detokenizer that was given the tokens of a text, what it showed after each, and the stop string it found."""
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(**params), TOKENIZER.encode(prompt))
    shown = []
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        stop = detokenizer.add(token_id)
        shown.append(detokenizer.visible_text())
        if stop is not None:
            return detokenizer, shown, stop
    detokenizer.finish()
    return detokenizer, shown, None


@given(text=st.text(max_size=60), prompt=st.text(max_size=10))
def test_the_pieces_are_the_text(text, prompt):
    # skip_special_tokens would leave out markers that the text spells
    detokenizer, shown, _ = feed(text, prompt, skip_special_tokens=False)
    assert detokenizer.text == TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False))
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_half_a_character_is_not_shown():
    _, shown, _ = feed("a🦊b")
    assert shown == ["a", "a", "a", "a", "a🦊", "a🦊b"]


def test_what_never_becomes_a_character_is_shown_at_the_end():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(), [])
    for token_id in TOKENIZER.encode("a🦊")[:-1]:
        detokenizer.add(token_id)
    assert detokenizer.text == "a"
    detokenizer.finish()
    assert detokenizer.text == "a\ufffd"


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_where_it_is_first_complete(text, stops):
    detokenizer, shown, stop = feed(text, stop=stops)
    ends = [text.find(each) + len(each) for each in stops if each in text]
    if not ends:
        assert stop is None and detokenizer.text == text
    else:
        # A token may complete several; within it, the one that ends first.
        assert text.startswith(detokenizer.text + stop) and len(detokenizer.text + stop) == min(ends)
    assert all(detokenizer.text.startswith(piece) for piece in shown[:-1])


def test_the_stop_string_is_kept_when_asked_for():
    detokenizer, _, stop = feed("the fox named Mira", stop=["x na"], include_stop_str_in_output=True)
    assert detokenizer.text == "the fox na" and stop == "x na"


def test_a_stream_holds_back_what_may_be_a_beginning():
    _, shown, _ = feed("abc", stop=["zzzz"])
    assert max(map(len, shown)) == 0


@pytest.mark.parametrize("min_tokens, found", [(0, "b"), (2, "b"), (3, None)])
def test_min_tokens_delays_a_stop_string(min_tokens, found):
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["b"], min_tokens=min_tokens), [])
    ids = [TOKENIZER.encode(letter)[0] for letter in "abc"]
    assert [detokenizer.add(i) for i in ids][1] == found


def test_special_tokens_are_left_out_unless_asked_for():
    assert feed("a<|im_end|>")[0].text == "a"
    assert feed("a<|im_end|>", skip_special_tokens=False)[0].text == "a<|im_end|>"
