"""Answers that must fit: valid whenever they end by themselves, whatever is drawn, and whoever else is in the batch."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from devices import DEVICE

from folovllm import LLM, SamplingParams, StructuredOutputsParams
from folovllm.book import judges
from folovllm.outputs import RunnerOutput
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.grammar import CARD_SLOTS

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
NUM_SCHEMAS, NUM_REGEXES = 500, 200
TEMPERATURES = (0.0, 0.7, 1.0, 2.0)
TIGHT = {
    "block_size": 4,
    "num_blocks": 110,
    "max_num_seqs": 24,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 48,
}
"""Too few blocks for all who are let in, so that some are preempted, and prompts that come in chunks."""


def make_llm(**kwargs: Any) -> LLM:
    return LLM(str(EMBEDDED_MODEL), device=DEVICE, dtype="float32", max_model_len=256, **kwargs)


@pytest.fixture(scope="module")
def llm():
    return make_llm()


FORKED = """
import os
from folovllm import LLM, SamplingParams, StructuredOutputsParams
from folovllm.tales import EMBEDDED_MODEL

llm = LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=64)
params = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputsParams(regex="[a-z ]{5,30}"))
for _ in range(2):  # first the parent, then its child
    assert len(llm.generate(["Once"] * 4, params, use_tqdm=False)) == 4
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_masks_of_several_rows_in_a_child_of_a_fork():
    """It has none of the threads that computed them for its parent."""
    assert (
        subprocess.run(
            [sys.executable, "-c", FORKED], timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
        == 0
    )


def structured(**asked: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**asked)


class Schemas:
    """Random JSON schemas, small enough for an answer to come to its end, with all that is often asked for."""

    TEXTS = ("fox", "狐狸", "🦊", 'a "quote"', "tab\t", "", "naïve", "\\")

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def whole(self) -> dict[str, Any]:
        schema = self.any(depth=2)
        if self.rng.random() < 0.2:
            schema = {"$defs": {"part": self.any(depth=1)}, "type": "array", "items": {"$ref": "#/$defs/part"}}
            schema |= {"minItems": 1, "maxItems": 2}
        if self.rng.random() < 0.6:  # else white space may go on for as long as it likes
            schema["x-guidance"] = {"whitespace_flexible": False}
        return schema

    def any(self, depth: int) -> dict[str, Any]:
        kinds = [self.integer, self.number, self.string, self.pattern, self.choice, self.constant, self.simple]
        kinds += [self.object, self.object, self.array, self.either] if depth else []
        return self.rng.choice(kinds)(depth)

    def integer(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + self.rng.choice((0, 1, 9, 1000))}

    def number(self, depth: int) -> dict[str, Any]:
        low = self.rng.choice((-3.5, 0, 0.25, 17))
        return {"type": "number", "minimum": low, self.rng.choice(("maximum", "exclusiveMaximum")): low + 2.5}

    def string(self, depth: int) -> dict[str, Any]:
        least = self.rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self.rng.randint(0, 5)}

    def pattern(self, depth: int) -> dict[str, Any]:
        pattern = self.rng.choice(("^[a-f]{1,4}$", "^(red|blue) [0-9]{2}$", "^狐?狸+$", "^[^a-z]{0,3}$"))
        return {"type": "string", "pattern": pattern, "maxLength": 8}

    def choice(self, depth: int) -> dict[str, Any]:
        values = [*self.TEXTS, 0, -1.5, True, None, [], {"a": 1}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 4))}

    def constant(self, depth: int) -> dict[str, Any]:
        return {"const": self.rng.choice([*self.TEXTS, 7, None, {"狐": [1, "🦊"]}])}

    def simple(self, depth: int) -> dict[str, Any]:
        return {"type": self.rng.choice(("boolean", "null", ["boolean", "null"]))}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(["hero", "name", "place", "färbe", "事", "a b", '"'], self.rng.randint(0, 3))
        required = [name for name in names if self.rng.random() < 0.6]
        properties = {name: self.any(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def array(self, depth: int) -> dict[str, Any]:
        least = self.rng.randint(0, 2)
        return {"type": "array", "items": self.any(depth - 1), "minItems": least, "maxItems": least + 1}

    def either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any(depth - 1) for _ in range(self.rng.randint(1, 3))]}


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """A pattern that Python and Rust read alike."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["fox", "a", "[a-f]", "[^a-z ]", r"\.", "狐狸", "🦊", "[0-9]", " ", "é", "[狐-狸]", "\\+"])
    part = random_regex(rng, depth - 1)
    repeated = f"(?:{part}){rng.choice(['?', '{1,3}', '{2}', '{0,2}', '+', '*'])}"
    joined = f"{part}{random_regex(rng, depth - 1)}"
    return rng.choice([repeated, joined, joined, f"(?:{part}|{random_regex(rng, depth - 1)})"])


def ask_all(llm: LLM, asked: list[StructuredOutputsParams], seed: int) -> list[tuple[int, str]]:
    """The answers that ended by themselves, each with the number of what it was asked for."""
    rng, prompts, params = random.Random(seed), [], []
    for i, one in enumerate(asked):
        prompts.append(rng.choice(["Once upon a time", "The card is:", "从前", "Write the card.\n"]))
        temperature = TEMPERATURES[i % len(TEMPERATURES)]
        penalties = {"presence_penalty": 1.0, "repetition_penalty": 1.2} if rng.random() < 0.2 else {}
        params.append(
            SamplingParams(
                temperature=temperature,
                seed=i,
                n=rng.choice((1, 1, 2, 3)),
                max_tokens=60,
                structured_outputs=one,
                **penalties,
            )
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert {answer.finish_reason for output in outputs for answer in output.outputs} <= {"stop", "length"}
    return [
        (i, answer.text)
        for i, output in enumerate(outputs)
        for answer in output.outputs
        if answer.finish_reason == "stop"
    ]


class TestEveryAnswerThatEndsIsValid:
    @pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
    def test_of_500_schemas(self, preemption_mode):
        half = NUM_SCHEMAS // 2
        first = half * (preemption_mode == "swap")
        schemas = [Schemas(seed).whole() for seed in range(first, first + half)]
        llm = make_llm(**TIGHT, preemption_mode=preemption_mode, swap_space=0.01)
        found = ask_all(llm, [structured(json=schema) for schema in schemas], seed=first)
        for i, text in found:
            jsonschema.validate(json.loads(text), schemas[i])
        assert len({i for i, _ in found}) > 0.8 * half
        assert sum(step.num_preempted for step in llm.engine.stats()) > 20
        llm.engine.check_integrity()

    def test_of_200_regular_expressions(self):
        rng = random.Random(0)
        regexes = [random_regex(rng) for _ in range(NUM_REGEXES)]
        llm = make_llm(**TIGHT)
        found = ask_all(llm, [structured(regex=regex) for regex in regexes], seed=1)
        for i, text in found:
            assert re.fullmatch(regexes[i], text), (regexes[i], text)
        assert len({i for i, _ in found}) > 0.8 * NUM_REGEXES

    def test_of_a_grammar_that_no_state_machine_could_follow(self, llm):
        asked = structured(grammar='start: "(" start ")" | "(" ")" | start start')
        params = SamplingParams(structured_outputs=asked, n=16, temperature=2.0, seed=0, max_tokens=40)
        answers = llm.generate("Once", params, use_tqdm=False)[0].outputs
        ended = [answer.text for answer in answers if answer.finish_reason == "stop"]
        for text in ended:
            while "()" in text:
                text = text.replace("()", "")
            assert text == ""
        assert len(ended) > 3 and max(map(len, ended)) > 4


CARD = {
    "type": "object",
    "properties": {slot: {"type": "string", "maxLength": 12} for slot in CARD_SLOTS[:3]},
    "required": list(CARD_SLOTS[:3]),
    "additionalProperties": False,
}
KINDS = [
    structured(json=CARD),
    structured(regex="[A-Z][a-z]{2,9}( the (fox|bear|cat))?"),
    structured(choice=["lost", "found", "丢了"]),
    None,
]


def mixed(max_tokens: int = 24) -> list[SamplingParams]:
    """Every kind, greedy and seeded, alone and in several."""
    return [
        SamplingParams(temperature=temperature, seed=i, n=n, max_tokens=max_tokens, structured_outputs=asked)
        for i, asked in enumerate(KINDS)
        for temperature, n in ((0.0, 1), (1.0, 3))
    ]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(llm):
    """What each of `mixed` is given without company."""
    return tokens_of(llm.generate("Tell me:", params, use_tqdm=False)[0] for params in mixed())


class TestTheSameTokens:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {**TIGHT, "num_blocks": 24},
            {**TIGHT, "num_blocks": 24, "preemption_mode": "swap", "swap_space": 0.01},
            {"max_num_seqs": 2},
            {"batching": "static", "max_num_seqs": 5},
            {"speculative_config": NGRAM},
            {**TIGHT, "num_blocks": 24, "preemption_mode": "swap", "swap_space": 0.01, "speculative_config": NGRAM},
        ],
        ids=["together", "preempted", "swapped", "two at a time", "static", "guessed", "guessed and swapped"],
    )
    def test_whoever_else_is_there(self, alone, settings):
        llm = make_llm(**settings)
        params = mixed()
        assert tokens_of(llm.generate(["Tell me:"] * len(params), params, use_tqdm=False)) == alone
        if "num_blocks" in settings:
            assert sum(step.num_preempted for step in llm.engine.stats()) > 0

    def test_the_likeliest_of_several(self, llm):
        params = SamplingParams(n=2, best_of=8, seed=0, structured_outputs=KINDS[2], max_tokens=8)
        answers = llm.generate("A", params, use_tqdm=False)[0].outputs
        assert {answer.text for answer in answers} <= set(KINDS[2].choice) and len(answers) == 2

    def test_answers_that_have_to_wait_for_a_place(self):
        llm = make_llm(max_num_seqs=2)
        params = SamplingParams(n=7, seed=0, structured_outputs=KINDS[1])
        answers = llm.generate("A", params, use_tqdm=False)[0].outputs
        assert all(re.fullmatch(KINDS[1].regex, answer.text) for answer in answers)
        assert len({answer.text for answer in answers}) > 3


class TestGuesses:
    def card(self, llm, **given_fields) -> tuple[str, int]:
        """A card, and how many steps it took."""
        spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        asked = structured(json={**CARD, "x-guidance": spaced})
        params = SamplingParams(**{"temperature": 0, "max_tokens": 60, **given_fields}, structured_outputs=asked)
        answer = llm.generate("Write the card.", params, use_tqdm=False)[0].outputs[0]
        jsonschema.validate(json.loads(answer.text), CARD)
        return answer.text, len(llm.engine.stats())

    def test_what_must_follow_is_had_for_nothing(self, llm):
        llm.engine.steps.clear()
        text, num_steps = self.card(llm)
        guessed, num_guessed_steps = self.card(make_llm(speculative_config=NGRAM))
        assert guessed == text and num_guessed_steps < 0.7 * num_steps

    @pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
    def test_a_draft_model_follows_the_grammar(self, temperature):
        """One that is the model itself is always right, then, as far as the answer goes."""
        drafted = make_llm(speculative_config={"model": str(EMBEDDED_MODEL), "num_speculative_tokens": 3})
        drafted.engine.runner.proposer.min_accepted = 0  # or it gives up, since such a draft costs as much as the model
        params = [SamplingParams(temperature=temperature, seed=i, structured_outputs=KINDS[i % 3], n=2, max_tokens=48)
                  for i in range(9)]  # fmt: skip
        for i, output in enumerate(drafted.generate(["Write the card."] * 9, params, use_tqdm=False)):
            for answer in output.outputs:
                assert answer.finish_reason in ("stop", "length")
                if answer.finish_reason == "stop":
                    assert fits(KINDS[i % 3], answer.text)
        drafted.engine.check_integrity()
        guessing = [step.spec_decoding for step in drafted.engine.stats() if step.spec_decoding is not None]
        # What is guessed behind an end is not accepted.
        assert sum(g.num_accepted_tokens for g in guessing) > 0.85 * sum(g.num_draft_tokens for g in guessing)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_schemas(self, seed):
        llm = make_llm(**TIGHT, speculative_config=NGRAM)
        schemas = [Schemas(1000 * seed + i).whole() for i in range(25)]
        found = ask_all(llm, [structured(json=schema) for schema in schemas], seed)
        for i, text in found:
            jsonschema.validate(json.loads(text), schemas[i])
        assert len(found) > 20


def fits(asked: StructuredOutputsParams, text: str) -> bool:
    if asked.json:
        return not list(jsonschema.Draft202012Validator(json.loads(asked.json)).iter_errors(json.loads(text)))
    return text in asked.choice if asked.choice else bool(re.fullmatch(asked.regex, text))


class TestEnds:
    def one(self, llm, **given_fields):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **given_fields})
        return llm.generate("The hero is a", params, use_tqdm=False)[0].outputs[0]

    def test_the_end_is_the_end_token(self, llm):
        answer = self.one(llm, structured_outputs=structured(choice=["fox"]))
        assert (answer.text, answer.finish_reason) == ("fox", "stop")
        assert answer.token_ids[-1] in llm.engine.eos_token_ids

    def test_ignore_eos_goes_on_with_nothing(self, llm):
        answer = self.one(llm, structured_outputs=structured(choice=["fox"]), ignore_eos=True)
        assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("fox", "length", 12)
        assert set(answer.token_ids[1:]) <= set(llm.engine.eos_token_ids)

    def test_max_tokens_may_cut_it(self, llm):
        answer = self.one(llm, structured_outputs=structured(regex="[a-z]{50}"), max_tokens=3)
        assert answer.finish_reason == "length" and re.fullmatch("[a-z]+", answer.text)

    def test_min_tokens_that_the_grammar_cannot_reach(self, llm):
        """It keeps what it has, and is told which two wishes do not go together."""
        answer = self.one(llm, structured_outputs=structured(choice=["fox"]), min_tokens=5)
        assert (answer.text, answer.finish_reason) == ("fox", "abort")
        assert answer.stop_reason.startswith("the request has no token left: structured_outputs")

    def test_min_tokens_that_it_can(self, llm):
        answer = self.one(llm, structured_outputs=structured(regex="a*"), min_tokens=5, max_tokens=60, temperature=1)
        assert set(answer.text) <= {"a"} and len(answer.token_ids) >= 5

    def test_stop_strings_and_stop_tokens_end_it_before(self, llm):
        asked = structured(regex="fox, wolf, bear")
        answer = self.one(llm, structured_outputs=asked, stop=", b")
        assert (answer.text, answer.finish_reason, answer.stop_reason) == ("fox, wolf", "stop", ", b")
        comma = llm.engine.tokenizer.encode(",")[0]
        answer = self.one(llm, structured_outputs=asked, stop_token_ids=[comma])
        assert answer.text.startswith("fox") and answer.stop_reason == comma

    def test_a_stream(self, llm):
        params = SamplingParams(temperature=1, seed=3, max_tokens=200, structured_outputs=structured(json=CARD))
        text = "".join(llm.stream("Write the card.", params))
        jsonschema.validate(json.loads(text), CARD)


class TestMistakes:
    def test_a_schema_that_cannot_be_compiled_is_its_callers_alone(self, llm):
        good = SamplingParams(temperature=0, max_tokens=8, structured_outputs=KINDS[2])
        expected = llm.generate("A", good, use_tqdm=False)[0].outputs[0].token_ids
        engine = llm.engine
        engine.add_request("good", "A", good)
        engine.step()
        random_numbers = engine.input_processor._random.getstate()
        with pytest.raises(ValueError, match=r"^structured_outputs\.json cannot be followed: Invalid type: strin$"):
            engine.add_request("bad", "A", SamplingParams(structured_outputs=structured(json={"type": "strin"})))
        assert engine.input_processor._random.getstate() == random_numbers  # or later requests got other seeds
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert outputs[-1].outputs[0].token_ids == expected
        assert not engine.output_processor.states

    def test_without_a_tokenizer(self):
        engine = judges.make_engine({"num_blocks": 20, "block_size": 4})
        engine.input_processor.tokenizer = None
        params = SamplingParams(detokenize=False, structured_outputs=KINDS[1])
        with pytest.raises(ValueError, match=r"^structured_outputs needs a"):
            engine.add_request("a", [5, 6], params)

    def test_a_runner_whose_token_does_not_fit_ends_that_request_alone(self, llm):
        """As a fault in a mask would; nothing that is not valid is ever given out as ended."""
        llm = make_llm()
        engine = llm.engine
        wrong = engine.tokenizer.encode("x")[0]
        run = engine.runner.run

        def fail(scheduler_output) -> RunnerOutput:
            output = run(scheduler_output)
            for i, (seq, _) in enumerate(scheduler_output.sampled):
                if seq.request_id == "bad" and seq.get_output_len() == 1:
                    output.sampled_token_ids[i] = [wrong]
            return output

        engine.runner.run = fail
        for name in ("bad", "good"):
            params = SamplingParams(temperature=0, structured_outputs=structured(choice=["under a leaf"]))
            engine.add_request(name, "A", params)
        finished = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output.outputs[0]
                    assert output.metrics.num_generated_tokens == len(output.outputs[0].token_ids)
        assert finished["good"].text == "under a leaf"
        assert finished["bad"].finish_reason == "abort" and "under a leaf".startswith(finished["bad"].text)
        said = f"tokens [{wrong}] do not fit the structured_outputs of the request ("
        assert finished["bad"].stop_reason.startswith(said)
