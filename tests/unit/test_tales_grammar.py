"""The grammar of the tales: what it samples, what it says may come next, and whether its probabilities are true."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoTokenizer
from unit_helpers import error_of

from folovllm.tales import EMBEDDED_DRAFT, EMBEDDED_MODEL, default_model, draft_model
from folovllm.tales.grammar import (
    CARD_SLOTS,
    END_OF_TEXT,
    IM_END,
    IM_START,
    ROOT,
    STARTS,
    Branch,
    Choice,
    continuations,
    document_entropy,
    entropy,
    sample,
)
from folovllm.tales.tokenizer import next_token_probs

KINDS = ["english", "chinese", "chat"]


def choices_in(parts) -> list[Choice]:
    """Every choice below ``parts``, those of the branches included."""
    found = []
    for part in parts:
        if isinstance(part, Choice):
            found.append(part)
        elif isinstance(part, Branch):
            for case in part.cases.values():
                found += choices_in(case)
    return found


CHOICES = list({(c.slot, c.lead, tuple(c.weights)): c for c in choices_in(ROOT)}.values())


def documents(kind: str, count: int = 3):
    return [sample(random.Random(f"{kind}-{i}"), start=random.Random(i).choice(STARTS[kind])) for i in range(count)]


class TestChoice:
    @pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.slot)
    def test_no_value_is_the_beginning_of_another(self, choice):
        texts = [choice.lead + value for value in choice.weights]
        assert [(a, b) for a in texts for b in texts if a is not b and b.startswith(a)] == []
        assert all(texts)

    @pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.slot)
    def test_probabilities_sum_to_one_and_keep_the_weights_ratios(self, choice):
        assert math.fsum(choice.probs.values()) == pytest.approx(1, abs=1e-12)
        first = next(iter(choice.weights))
        for value, weight in choice.weights.items():
            assert choice.probs[value] / choice.probs[first] == pytest.approx(weight / choice.weights[first])
            assert choice.probs[value] > 0

    def test_entropy(self):
        assert Choice("x", {"a": 1, "b": 1}).entropy == pytest.approx(math.log(2))
        assert Choice("x", {"a": 3, "b": 1}).entropy == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
        assert Choice("x", {"a": 7}).entropy == 0

    def test_a_branch_has_a_case_for_every_value(self):
        def check(parts, values):
            for part in parts:
                if isinstance(part, Choice):
                    values = {**values, part.slot: set(part.weights)}
                elif isinstance(part, Branch):
                    assert set(part.cases) == values[part.slot]
                    for case in part.cases.values():
                        check(case, values)

        check(ROOT, {})


class TestSample:
    @pytest.mark.parametrize("seed", range(3))
    def test_the_same_seed_gives_the_same_document(self, seed):
        assert sample(random.Random(seed)) == sample(random.Random(seed))

    def test_another_seed_gives_another(self):
        assert len({sample(random.Random(seed)).text for seed in range(50)}) == 50

    @pytest.mark.parametrize("slot", ["start", "plot", "hero", "ending"])
    def test_values_come_as_often_as_their_probabilities_say(self, slot):
        start = {} if slot == "start" else {"start": "Long ago"}
        counts = Counter(sample(random.Random(seed), **start).slots[slot] for seed in range(1000))
        choice = {c.slot: c for c in choices_in(ROOT if slot == "start" else ROOT[1].cases["Long ago"])}[slot]
        expected = [1000 * p for p in choice.probs.values()]
        assert stats.chisquare([counts[value] for value in choice.probs], expected).pvalue > 1e-3

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_document_is_whole(self, kind):
        for document in documents(kind):
            assert document.text.startswith(document.slots["start"])
            assert document.text.endswith(IM_END if kind == "chat" else END_OF_TEXT)
            assert "{" not in document.text.split("\n")[-2] if kind == "chat" else "{" not in document.text
            assert document.text.count(IM_START) == document.text.count(IM_END)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_given_is_used_and_costs_nothing(self, kind):
        start = STARTS[kind][0]
        free = sample(random.Random(3), start=start)
        given_ = sample(random.Random(4), **free.slots)
        assert given_.text == free.text and given_.slots == free.slots
        assert given_.logprob == 0 and free.logprob < 0

    def test_the_first_words_are_not_part_of_the_log_probability(self):
        assert sample(random.Random(0)).logprob < 0
        given_start = sample(random.Random(0), start="Long ago")
        logprob = sum(
            math.log(choice.probs[given_start.slots[choice.slot]])
            for choice in {c.slot: c for c in choices_in(ROOT[1].cases["Long ago"])}.values()
            if choice.slot in given_start.slots
        )
        assert given_start.logprob == pytest.approx(logprob)

    @pytest.mark.parametrize("kind", KINDS)
    def test_recalls_point_at_the_slots_text(self, kind):
        for document in documents(kind):
            assert document.recalls
            for start, end, slot in document.recalls:
                assert document.text[start:end].strip() == document.slots[slot].strip()

    def test_a_recall_is_a_repetition(self):
        for document in [sample(random.Random(seed)) for seed in range(10)] + documents("chat"):
            for start, _, slot in document.recalls:
                assert document.slots[slot] in document.text[:start], f"{slot} stands here for the first time"

    def test_a_chat_ends_with_its_card_and_the_card_holds_the_facts(self):
        for document in documents("chat", 10):
            card = json.loads(document.text.split(f"{IM_START}assistant\n")[-1].removesuffix(IM_END))
            assert card == {slot: document.slots[slot] for slot in CARD_SLOTS}
            assert list(card) == list(CARD_SLOTS)

    @pytest.mark.parametrize("kind", KINDS)
    def test_turns_alternate(self, kind):
        for document in documents(kind):
            roles = [turn.split("\n")[0] for turn in document.text.split(IM_START)[1:]]
            assert roles == (["user", "assistant"] * 3 if kind == "chat" else [])


class TestContinuations:
    def test_of_nothing_are_the_starts(self):
        found = continuations("")
        assert set(found) == {start for kind in KINDS for start in STARTS[kind]}
        assert found == pytest.approx(ROOT[0].probs)

    def test_before_a_choice_they_are_its_values_likeliest_first(self):
        found = continuations("Once upon a time, in the")
        (place,) = (c for c in choices_in(ROOT[1].cases["Once upon a time"]) if c.slot == "place")
        assert found == pytest.approx({" " + value: p for value, p in place.probs.items()})
        assert list(found.values()) == sorted(found.values(), reverse=True)

    def test_inside_a_choice_they_are_what_is_left_of_those_that_fit(self):
        # " swamp" has weight 1/8; no other place begins with an s.
        assert continuations("Once upon a time, in the s") == {"wamp": 1.0}
        found = continuations("Once upon a time, in the forest, there lived a little fox named")
        mira_and_others = continuations("Once upon a time, in the forest, there lived a little fox named ")
        assert set(found) == {" " + name for name in mira_and_others}

    def test_inside_fixed_text_there_is_one(self):
        ((text, p),) = continuations("Once upon a time, in the forest, there").items()
        assert text.startswith(" lived a") and p == 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_prefix_of_a_document_goes_on_as_the_document_does(self, kind):
        (document,) = documents(kind, 1)
        for end in range(len(document.text)):
            found = continuations(document.text[:end])
            rest = document.text[end:]
            true = [text for text in found if rest.startswith(text)]
            assert len(true) == 1 and true[0], f"after {document.text[:end][-30:]!r}: {found}"
            assert math.fsum(found.values()) == pytest.approx(1)
            assert all(p > 0 for p in found.values())

    @pytest.mark.parametrize("kind", KINDS)
    def test_following_them_gives_the_documents_log_probability(self, kind):
        for document in documents(kind):
            text, logprob = document.slots["start"], 0.0
            while options := continuations(text):
                (step,) = (option for option in options if document.text.startswith(text + option))
                logprob += math.log(options[step])
                text += step
            assert text == document.text
            assert logprob == pytest.approx(document.logprob)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_finished_document_has_none(self, kind):
        assert continuations(documents(kind, 1)[0].text) == {}

    @pytest.mark.parametrize(
        "prefix",
        [
            "x",
            " ",
            "once upon a time",
            "Once upon a time in",
            "Once upon a time, in the forest, there lived a little fox named Mira. Tom",
            "Once upon a time, in the castl.",
            "Long ago, in the Forest",
            "从前，在森林里，住着一只聪明的狐狸。",
        ],
    )
    def test_no_tale_goes_on_like_this(self, prefix):
        message = error_of(continuations, prefix)
        assert message.startswith("no tale goes on like this")

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_comes_after_the_end(self, kind):
        assert "no tale" in error_of(continuations, documents(kind, 1)[0].text + "x")

    def test_a_name_must_stay_the_same(self):
        document = sample(random.Random(0), start="Long ago", name="Mira")
        assert "no tale" in error_of(continuations, document.text.replace("Mira loved", "Tom loved"))

    @given(prefix=st.text(max_size=20) | st.text("Onceuptima, htrslvgf从前，在", max_size=30))
    def test_any_text_has_continuations_or_one_sentence(self, prefix):
        try:
            assert math.fsum(continuations(prefix).values()) == pytest.approx(1)
        except ValueError as error:
            assert str(error).startswith("no tale") and "\n" not in str(error)
            assert error.__suppress_context__


class TestEntropy:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_the_mean_of_minus_log_probability(self, kind):
        rng = random.Random(0)
        surprises = [-sample(rng, start=STARTS[kind][0]).logprob for _ in range(2000)]
        standard_error = statistics.stdev(surprises) / math.sqrt(len(surprises))
        assert 0 < standard_error < 0.1
        assert abs(statistics.mean(surprises) - document_entropy(kind)) < 5 * standard_error

    def test_independent_choices_add_up(self):
        a, b = Choice("a", {"x": 1, "y": 1}), Choice("b", {"x": 1, "y": 3})
        assert entropy([a, " and ", b]) == pytest.approx(a.entropy + b.entropy)

    def test_a_recalled_slot_holds_no_surprise(self):
        a = Choice("a", {"x": 1, "y": 1})
        assert entropy([a, a, "{a}"]) == pytest.approx(math.log(2))

    def test_a_branch_weighs_its_cases(self):
        fork = Choice("fork", {"left": 3, "right": 1})
        branch = Branch("fork", {"left": [], "right": [Choice("b", {"x": 1, "y": 1})]})
        assert entropy([fork, branch]) == pytest.approx(fork.entropy + 0.25 * math.log(2))

    def test_a_slot_filled_on_one_path_only(self):
        fork, late = Choice("fork", {"left": 1, "right": 1}), Choice("b", {"x": 1, "y": 1})
        branch = Branch("fork", {"left": [late], "right": []})
        assert entropy([fork, branch, late]) == pytest.approx(2 * math.log(2))

    def test_what_is_known_before(self):
        branch = Branch("fork", {"left": [], "right": [Choice("b", {"x": 1, "y": 1})]})
        assert entropy([branch], {"fork": {"left": 0.5, "right": 0.5}}) == pytest.approx(0.5 * math.log(2))

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_start_of_a_kind_is_as_surprising(self, kind):
        assert [entropy(ROOT[1].cases[start]) for start in STARTS[kind]] == pytest.approx(
            [document_entropy(kind)] * len(STARTS[kind])
        )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


class TestNextTokenProbs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_sum_to_one_likeliest_first(self, tokenizer, kind):
        for start in STARTS[kind]:
            found = next_token_probs(start, tokenizer)
            assert math.fsum(found.values()) == pytest.approx(1)
            assert list(found.values()) == sorted(found.values(), reverse=True)

    def test_a_choice_of_words_is_a_choice_of_tokens(self, tokenizer):
        prefix = "Once upon a time, in the"
        found = {tokenizer.decode([token]): p for token, p in next_token_probs(prefix, tokenizer).items()}
        assert found == pytest.approx(continuations(prefix))

    @pytest.mark.parametrize("kind", KINDS)
    def test_along_a_document_the_true_token_has_its_true_probability(self, tokenizer, kind):
        for document in documents(kind):
            encoding = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
            logprob, after_start = 0.0, len(document.slots["start"])
            for token, (start, _) in zip(encoding["input_ids"], encoding["offset_mapping"]):
                if start < after_start:
                    continue
                found = next_token_probs(document.text[:start], tokenizer)
                written = tokenizer.decode([token])
                assert token in found, (
                    f"{written!r} comes after {document.text[:start][-20:]!r}, where next_token_probs has only "
                    f"{[tokenizer.decode([other]) for other in found]}"
                )
                logprob += math.log(found[token])
            assert logprob == pytest.approx(document.logprob)

    def test_the_end_of_a_document_has_none(self, tokenizer):
        assert next_token_probs(documents("english", 1)[0].text, tokenizer) == {}

    def test_no_tale_goes_on_like_this(self, tokenizer):
        assert error_of(next_token_probs, "x", tokenizer).startswith("no tale goes on like this")


class TestDefaultModel:
    def test_the_embedded_one(self, monkeypatch):
        monkeypatch.delenv("FOLOVLLM_MODEL", raising=False)
        assert default_model() == str(EMBEDDED_MODEL)

    def test_another_one_by_the_environment(self, monkeypatch):
        monkeypatch.setenv("FOLOVLLM_MODEL", "Qwen/Qwen3-0.6B")
        assert default_model() == "Qwen/Qwen3-0.6B"

    def test_an_empty_variable_is_none(self, monkeypatch):
        monkeypatch.setenv("FOLOVLLM_MODEL", "")
        assert default_model() == str(EMBEDDED_MODEL)

    @pytest.mark.parametrize(
        "model, draft, expected",
        [("", "", str(EMBEDDED_DRAFT)), ("other", "", "other"), ("other", "small", "small"), ("", "small", "small")],
    )
    def test_who_guesses_has_the_same_tokens(self, monkeypatch, model, draft, expected):
        monkeypatch.setenv("FOLOVLLM_MODEL", model)
        monkeypatch.setenv("FOLOVLLM_DRAFT_MODEL", draft)
        assert draft_model() == expected
