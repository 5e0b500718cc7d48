"""Tokens to text as they come: whole characters only, stop strings wherever they lie."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import CLEAN_UP, FAST, SLOW, TEXTS, token_ids
from tokenizers.decoders import DecodeStream

from folovllm import SamplingParams
from folovllm.engine.detokenizer import CONTEXT, Detokenizer
from folovllm.logprobs import decode_token

TOKENIZER = FAST["embedded"]
BYTES = {"embedded", "byte-level", "byte fallback", "Unigram with bytes", "ByT5"}
"""Tokenizers with tokens for parts of characters."""


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


@pytest.mark.parametrize("tokenizer", [*FAST.values(), *SLOW.values()], ids=[*FAST, *SLOW])
def test_a_token_that_the_model_has_and_the_tokenizer_has_not_is_no_text(tokenizer):
    unknown = len(tokenizer) + 20
    ids = tokenizer.encode("ab", add_special_tokens=False)
    for prompt, output in (([unknown, *ids], [*ids, unknown]), ([*ids, unknown], [unknown, *ids])):
        expected, _ = read(tokenizer, ids, ids, bool)
        assert read(tokenizer, prompt, output, lambda index: True)[0].text == expected.text
    assert decode_token(unknown, [unknown, *ids], tokenizer) == ""


def test_half_a_character_is_not_shown():
    _, shown, _ = feed("a🦊b")
    assert shown == ["a", "a", "a", "a", "a🦊", "a🦊b"]


def test_what_never_becomes_a_character_is_not_shown_at_the_end_but_within_a_text():
    fox = TOKENIZER.encode("a🦊")[:-1]
    detokenizer, shown = read(TOKENIZER, [], fox, lambda index: True)
    assert shown[-1] == detokenizer.text == "a"
    assert read(TOKENIZER, [], fox + TOKENIZER.encode("b"), lambda index: True)[0].text == "a\ufffdb"


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


@pytest.mark.parametrize("min_tokens, found", [(0, "b"), (1, "b"), (2, None), (3, None)])
def test_min_tokens_delays_a_stop_string(min_tokens, found):
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["b"], min_tokens=min_tokens), [])
    ids = [TOKENIZER.encode(letter)[0] for letter in "abc"]
    assert [detokenizer.add(i) for i in ids][1] == found


def test_a_stop_string_may_begin_within_min_tokens():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["abc"], min_tokens=2), [])
    assert [detokenizer.add(TOKENIZER.encode(letter)[0]) for letter in "abc"] == [None, None, "abc"]


@pytest.mark.parametrize("include, stop, text", [(False, None, "a"), (True, "b", "ab")])
def test_a_token_that_ends_the_output_is_text_only_if_the_stop_string_is(include, stop, text):
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["b"], include_stop_str_in_output=include), [])
    detokenizer.add(TOKENIZER.encode("a")[0])
    assert detokenizer.add(TOKENIZER.encode("b")[0], stop_terminated=True) == stop
    detokenizer.finish()
    assert detokenizer.text == detokenizer.visible_text() == text


def test_nothing_is_held_back_at_the_end():
    detokenizer, _, _ = feed("abc", stop=["zzzz"])
    assert detokenizer.visible_text() == "abc"


def test_special_tokens_are_left_out_unless_asked_for():
    assert feed("a<|im_end|>")[0].text == "a"
    assert feed("a<|im_end|>", skip_special_tokens=False)[0].text == "a<|im_end|>"


def read(tokenizer, prompt, ids, is_read, **params):
    """A detokenizer at its end, and its texts: after the tokens whose index ``is_read``, and at the end."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), prompt)
    texts = []
    for index, token_id in enumerate(ids):
        detokenizer.add(token_id)
        if is_read(index):
            texts.append(detokenizer.text)
    detokenizer.finish()
    return detokenizer, [*texts, detokenizer.text]


def shared(a, b):
    """How many characters two texts have in common from the beginning on."""
    return max(num for num in range(min(len(a), len(b)) + 1) if a[:num] == b[:num])


def read_all_ways(tokenizer, prompt, ids, data, **params):
    """The texts after each token, which must not depend on when they are read and only grow."""
    _, texts = read(tokenizer, prompt, ids, lambda index: True, **params)
    some = data.draw(st.sets(st.integers(0, len(ids))))
    assert read(tokenizer, prompt, ids, some.__contains__, **params)[1][-1] == texts[-1]
    assert read(tokenizer, prompt, ids, lambda index: False, **params)[1] == texts[-1:]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    return texts


@pytest.mark.parametrize("kind", FAST)
@given(data=st.data(), prompt=TEXTS, skip=st.booleans())
def test_the_texts_are_those_of_the_librarys_own_stream(kind, data, prompt, skip):
    tokenizer = FAST[kind]
    prompt, ids = tokenizer.encode(prompt), data.draw(token_ids(tokenizer))
    texts = read_all_ways(tokenizer, prompt, ids, data, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if "\ufffd" in whole and kind in BYTES - {"embedded", "byte-level"}:
        return  # runs of byte tokens that are no characters: the library's stream gives up, or repeats what it gave
    stream, streamed = DecodeStream(prompt, skip_special_tokens=skip), [""]
    streamed += [stream.step(tokenizer.backend_tokenizer, token_id) or "" for token_id in ids]
    assert texts[:-1] == ["".join(streamed[: num + 2]) for num in range(len(ids))]


@pytest.mark.parametrize("kind", CLEAN_UP | SLOW)
@given(data=st.data(), prompt=TEXTS, skip=st.booleans())
def test_the_text_is_that_of_the_whole_less_the_prompts(kind, data, prompt, skip):
    tokenizer = (CLEAN_UP | SLOW)[kind]
    prompt, ids = tokenizer.encode(prompt), tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    texts = read_all_ways(tokenizer, prompt, ids, data, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if not whole.endswith("\ufffd"):
        assert texts[-1] == whole[shared(whole, tokenizer.decode(prompt, skip_special_tokens=skip)) :]


@pytest.mark.parametrize("kind", sorted(BYTES))
@given(data=st.data(), text=TEXTS)
def test_a_prompt_may_end_within_a_character(kind, data, text):
    tokenizer = (FAST | SLOW)[kind]
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    num = data.draw(st.integers(0, len(ids)))
    texts = read_all_ways(tokenizer, ids[:num], ids[num:], data, skip_special_tokens=False)
    whole = tokenizer.decode(ids)
    # Of the whole text, the prompt's is as much as its tokens or fewer of them spell.
    spelled = max(shared(whole, tokenizer.decode(ids[:end])) for end in range(num + 1))
    assert texts[-1] == whole[spelled:]


@pytest.mark.parametrize("kind", FAST | CLEAN_UP | SLOW)
@given(data=st.data(), include=st.booleans(), min_tokens=st.integers(0, 6))
def test_the_stop_string_that_is_complete_first_ends_any_text(kind, data, include, min_tokens):
    tokenizer = (FAST | CLEAN_UP | SLOW)[kind]
    ids = data.draw(token_ids(tokenizer))
    texts = read(tokenizer, [], ids, lambda index: True)[1][:-1]
    whole = texts[-1] if texts else ""
    parts = st.builds(lambda start, size: whole[start : start + size], st.integers(0, len(whole)), st.integers(1, 4))
    stops = data.draw(st.lists(parts.filter(bool) if whole else st.just("z"), min_size=1, max_size=3, unique=True))
    # The oracle: after each token, the first end of a stop string in what is new since the last one.
    want = None
    for num, (before, now) in enumerate(pairwise(["", *texts]), start=1):
        ends = [
            (end, stop) for end in range(len(before) + 1, len(now) + 1) for stop in stops if now[:end].endswith(stop)
        ]
        if num > min_tokens and ends:
            end, want = ends[0]
            whole = now[: end if include else end - len(want)]
            break
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    detokenizer, shown, found = Detokenizer(tokenizer, params, []), "", None
    for token_id in ids:
        found = detokenizer.add(token_id)
        assert detokenizer.visible_text().startswith(shown)
        shown = detokenizer.visible_text()
        if found:
            break
    assert (found, detokenizer.text) == (want, whole)
    assert shown == whole if found else whole.startswith(shown)


@pytest.mark.parametrize("spaces, text", [(True, "fox </s> </s> fox </s>"), (False, "fox </s></s> fox </s>")])
def test_special_tokens_in_a_row_have_spaces_between_them_unless_asked_for(spaces, text):
    tokenizer = FAST["WordLevel"]
    fox, end = tokenizer.convert_tokens_to_ids(["fox", "</s>"])
    params = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
    assert read(tokenizer, [], [fox, end, end, fox, end], lambda index: False, **params)[0].text == text


@pytest.mark.parametrize("kind", ["embedded", "byte fallback"])
def test_what_is_decoded_again_does_not_grow_with_the_text(kind, monkeypatch):
    tokenizer, lengths = FAST[kind], Counter()
    ids = tokenizer.encode("a 中文🦊 fox " * 100, add_special_tokens=False) + [tokenizer.eos_token_id] * 500
    detokenizer = Detokenizer(tokenizer, SamplingParams(), tokenizer.encode("🦊" * 50))
    decode = detokenizer._decode
    monkeypatch.setattr(detokenizer, "_decode", lambda ids: lengths.update([len(ids)]) or decode(ids))
    for token_id in ids:
        detokenizer.add(token_id)
        assert detokenizer.visible_text() is not None
    assert max(lengths) <= 2 * CONTEXT + 4 and lengths.total() <= 2.5 * len(ids)


def test_threads_may_share_a_tokenizer():
    def work(number):
        text = f"{number} 中文 fox 🦊 " * 20
        return read(tokenizer, [], tokenizer.encode(text), lambda index: True)[0].text == text

    for kind in ("embedded", "byte-level"):
        tokenizer = FAST[kind]
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(16)))
