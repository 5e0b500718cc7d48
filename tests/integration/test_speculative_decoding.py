"""Guessing in the running engine: the same answers, and nothing is left of a guess that was wrong."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from scipy.stats import chisquare

from folovllm import LLM, SamplingParams
from folovllm.book import judges
from folovllm.config import SchedulerConfig
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.llm_engine import LLMEngine
from folovllm.logprobs import Logprob
from folovllm.model import decoder
from folovllm.model.checkpoint import ModelLoadError
from folovllm.outputs import RunnerOutput
from folovllm.request import MAX_GUESSED_ROWS, NUM_RECENT_GUESSES, Request
from folovllm.tales import EMBEDDED_MODEL, draft_model
from folovllm.tales.tokenizer import next_token_probs
from folovllm.worker.model_runner import CPU_CACHE_BYTES, token_bytes

LOOKUP = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ITSELF = {"method": "draft_model", "model": str(EMBEDDED_MODEL), "num_speculative_tokens": 4}


def make_llm(**kwargs) -> LLM:
    return LLM(str(EMBEDDED_MODEL), device="cpu", **{"dtype": "float32", "max_model_len": 256, **kwargs})


@pytest.fixture(scope="module")
def llm():
    return make_llm(max_logprobs=-1)


def say(engine: LLMEngine, token_ids: list[int], num_per_step: int) -> None:
    """Makes a pretended model say these tokens, so many in each step, with a log probability for each."""

    def run(scheduler_output):
        found = RunnerOutput([], [])
        for seq, _ in scheduler_output.sampled:
            first = seq.get_output_len()
            found.sampled_token_ids.append(token_ids[first : first + num_per_step])
            found.logprobs.append([{i: Logprob(-i / 3, 1)} for i in found.sampled_token_ids[-1]])
        return found

    engine.runner.run = run


TEXT = "Once upon a time there was a fox. The fox had a red ball. One day it went to the hill."


@pytest.mark.parametrize("kind", ["generate", "stream"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"stop": ["fox had"]},
        {"stop": ["ox ", "ball"], "include_stop_str_in_output": True},
        {"stop": ["a "], "min_tokens": 6},
        {"max_tokens": 5},
        {"max_tokens": 5, "stop": ["hill"]},
        {"stop": ["time"], "stop_token_ids": [0]},
        {"stop": ["fox"], "logprobs": 0},
    ],
)
def test_stops_are_found_where_they_are_in_a_step(llm, monkeypatch, kind, params):
    monkeypatch.setattr(llm.engine.runner, "run", llm.engine.runner.run)
    token_ids = llm.engine.tokenizer.encode(TEXT)
    found = []
    for num_per_step in (1, 2, 3, 7, 100):
        say(llm.engine, token_ids, num_per_step)
        asked = SamplingParams(temperature=0, **{"max_tokens": len(token_ids), **params})
        if kind == "stream":
            found.append("".join(llm.stream("Tell me.", asked)))
        else:
            (output,) = llm.generate("Tell me.", asked, use_tqdm=False)
            found.append(output.outputs[0])
    assert all(a == b for a, b in itertools.pairwise(found))
    llm.engine.check_integrity()
    assert llm.engine.cache.pool.num_free == llm.engine.cache.pool.num_blocks


@pytest.mark.parametrize("num", [1, 3, 7])
def test_a_pretended_model_with_many_right_guesses_in_all_settings(num):
    """Its cache holds tokens, so a block that a wrong guess has poisoned says so."""
    guessing = {"speculative_config": {"method": "ngram", "num_speculative_tokens": num}}
    watched = judges.judge_engine(settings=[{**each, **guessing} for each in judges.SETTINGS])
    plain = judges.judge_engine()
    assert sum(w.num_steps for w in watched) < sum(w.num_steps for w in plain)


def make_scheduler(prompt_len: int = 6, num_blocks: int = 8, caching: bool = True, **kwargs):
    """A scheduler with one running request that has computed its prompt and got token 50; blocks of four."""
    params = SamplingParams(**{"max_tokens": None, **kwargs.pop("params", {})})
    config = SchedulerConfig(**{"max_num_batched_tokens": 64, "max_model_len": 64, **kwargs})
    scheduler = Scheduler(config, KVCacheManager(num_blocks, 4, caching))
    request = Request("0", None, list(range(2, 2 + prompt_len)), params, num_pending=1)
    scheduler.add_request(request)
    scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[50]], [None]))
    return scheduler, request.get_seqs()[0]


def other_model(folder):
    """A model with eight tokens."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class TestRoom:
    """Guesses get what is left, and nobody loses anything to them."""

    @pytest.mark.parametrize(
        "kwargs, num",
        [
            ({}, 5),
            ({"max_num_batched_tokens": 8}, 5),
            ({"max_num_batched_tokens": 7, "prompt_len": 4}, 5),
            ({"max_num_batched_tokens": 6, "prompt_len": 4}, 5),
            ({"max_num_batched_tokens": 5, "prompt_len": 4}, 4),
            ({"params": {"max_tokens": 4}}, 2),
            ({"params": {"max_tokens": 2}}, 0),
            ({"max_model_len": 10}, 2),
            ({"max_model_len": 8}, 0),
            ({"num_blocks": 2}, 1),
        ],
    )
    def test_as_many_as_may_come(self, kwargs, num):
        scheduler, seq = make_scheduler(**kwargs)
        seq.spec_token_ids = [60, 61, 62, 63, 64]
        output = scheduler.schedule()
        assert output.get_guesses(seq) == [60, 61, 62, 63, 64][:num] and output.num_new_tokens == [1 + num]
        assert seq.spec_token_ids == [] and output.num_computed_tokens == [seq.get_len() - 1]
        assert output.sampled == [(seq, 0)] and output.get_sampled_rows() == list(range(num + 1))
        scheduler.cache.check_integrity([seq])

    def test_a_step_that_checks_guesses_has_few_rows(self):
        """Also where a grammar says what must follow, which is guessed however many sequences there are."""
        scheduler, _ = make_scheduler(num_blocks=40, max_num_batched_tokens=512, max_model_len=256)
        for i in range(1, 4):
            scheduler.add_request(Request(str(i), None, [9], SamplingParams(max_tokens=None), num_pending=1))
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[50]] * 4, [None] * 4))
        for other in scheduler.running:
            other.spec_token_ids = [60] * 40
        assert len(scheduler.schedule().get_sampled_rows()) == MAX_GUESSED_ROWS

    def test_running_and_waiting_sequences_come_first(self):
        scheduler, seq = make_scheduler(num_blocks=5, max_num_batched_tokens=8)
        scheduler.add_request(Request("1", None, [9] * 5, SamplingParams(), num_pending=1))
        seq.spec_token_ids = [60, 61, 62, 63]
        output = scheduler.schedule()
        assert output.num_new_tokens == [3, 5]  # 8 tokens in all: two guesses are left
        assert output.sampled[0] == (seq, 0) and output.sampled[1][1] == 7

    def test_they_preempt_nobody(self):
        scheduler, _ = make_scheduler(prompt_len=5, num_blocks=3)
        scheduler.add_request(Request("1", None, [9, 9, 9], SamplingParams(), num_pending=1))
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[51], [70]], [None, None]))
        for other in scheduler.running:
            other.spec_token_ids = [60] * 4
        output = scheduler.schedule()
        assert not output.preempted and [seq.request_id for seq in output.seqs] == ["0", "1"]
        assert scheduler.cache.pool.num_free == 0

    def test_a_preempted_sequence_forgets_its_guesses(self):
        scheduler, seq = make_scheduler()
        seq.spec_token_ids = [60]
        scheduler.running.clear()
        scheduler._preempt(seq, scheduler.schedule())
        assert seq.spec_token_ids == [] and seq.num_computed_tokens == 0


class TestRefusedGuesses:
    """A refused guess leaves nothing: as if it had never been made."""

    def state(self, scheduler, seq):
        pool = scheduler.cache.pool
        return seq.num_computed_tokens, len(seq.block_ids), pool.num_free, sorted(pool._by_hash), seq.data

    @pytest.mark.parametrize("num_accepted", range(6))
    def test_the_state_is_that_of_single_tokens(self, num_accepted):
        scheduler, seq = make_scheduler()
        guesses = [60, 61, 62, 63, 64]
        seq.spec_token_ids = list(guesses)
        given = [*guesses[:num_accepted], 99]
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([list(given)], [None]))
        single, alone = make_scheduler()
        for token_id in given:
            single.update_from_output(single.schedule(), RunnerOutput([[token_id]], [None]))
        assert self.state(scheduler, seq) == self.state(single, alone)
        assert seq.recent_guesses == [i < num_accepted for i in range(5)]
        scheduler.cache.check_integrity([seq])

    def test_only_the_newest_are_remembered(self):
        scheduler, seq = make_scheduler()
        seq.recent_guesses, seq.spec_token_ids = [False] * NUM_RECENT_GUESSES, [60, 61]
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[60, 61, 62]], [None]))
        assert seq.recent_guesses == [False] * (NUM_RECENT_GUESSES - 2) + [True, True]

    def test_no_block_is_found_by_guesses(self):
        scheduler, seq = make_scheduler()
        seq.spec_token_ids = [60, 61, 62]
        scheduler.schedule()  # 7 tokens, and guesses that would fill the second block
        wanted = Request("1", None, [*range(2, 8), 50, 60, 61], SamplingParams(), num_pending=1).start_answer()
        assert scheduler.cache.get_computed_blocks(wanted) == 4

    def test_accepted_guesses_of_an_answer_that_ends_are_found(self):
        """As they are without guessing: a conversation goes on from there."""
        scheduler, seq = make_scheduler(params={"stop_token_ids": [61]})
        seq.spec_token_ids = [60, 61, 62]
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[60, 61, 62, 9]], [None]))
        assert seq.is_finished() and seq.data.output_token_ids == [50, 60, 61]
        wanted = Request("1", None, [*range(2, 8), 50, 60, 61], SamplingParams(), num_pending=1).start_answer()
        assert scheduler.cache.get_computed_blocks(wanted) == 8

    def test_a_run_that_an_error_cuts_short_goes_on_from_its_last_token(self):
        scheduler, seq = make_scheduler()
        seq.spec_token_ids = [60, 61]
        scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[60, 61]], [None]))
        assert seq.num_computed_tokens == seq.get_len() - 1
        assert scheduler.schedule().num_new_tokens == [1]


def ask(llm: LLM, prompts, **params):
    asked = [SamplingParams(**{"temperature": 1.0, "max_tokens": 45, "seed": i, **params}) for i in range(len(prompts))]
    return llm.generate(list(prompts), asked, use_tqdm=False)


TALE = "Once upon a time"
STARTS = [TALE, "One winter", "很久很久以前", "Once upon a time, in a village by the sea,"]
ANSWERS = [
    {},
    {"temperature": 0.0},
    {"n": 3},
    {"n": 2, "best_of": 4},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"bad_words": [" the", "fox"]},
    {"min_tokens": 40},
    {"stop": ["the ", "。"]},
    {"logprobs": 2, "prompt_logprobs": 1},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"logit_bias": {5: 3.0}},
]


def comparable(outputs):
    return [
        [
            (a.index, a.text, a.token_ids, a.finish_reason, a.stop_reason, a.logprobs and [list(x) for x in a.logprobs])
            for a in output.outputs
        ]
        for output in outputs
    ]


@pytest.fixture(scope="module")
def drafting():
    config = {"method": "draft_model", "model": draft_model(), "num_speculative_tokens": 3}
    return make_llm(speculative_config=config, max_num_seqs=16)


@pytest.fixture(scope="module")
def guessing():
    return make_llm(speculative_config=NGRAM, enable_prefix_caching=True, block_size=4)


@pytest.mark.parametrize("params", ANSWERS)
def test_looked_up_guesses_change_no_answer(llm, guessing, params):
    for temperature in {0.0, params.get("temperature", 1.0)}:
        asked = {**params, "temperature": temperature}
        if asked.get("n", 1) > 1 and temperature == 0:
            continue
        assert comparable(ask(guessing, STARTS, **asked)) == comparable(ask(llm, STARTS, **asked))
    guessing.engine.check_integrity()
    assert guessing.engine.cache.pool.num_free == guessing.engine.cache.pool.num_blocks


SMALL = {"block_size": 4, "num_blocks": 45}
CACHES = {
    "as it is": {},
    "prefixes": {"enable_prefix_caching": True, "block_size": 4},
    "recompute": SMALL,
    "swap": {**SMALL, "preemption_mode": "swap", "swap_space": 0.05, "enable_prefix_caching": True},
    "chunks": {"enable_chunked_prefill": True, "max_num_batched_tokens": 29, "block_size": 3},
    "static": {"batching": "static", "max_num_seqs": 2},
}


@pytest.mark.parametrize("kwargs", CACHES.values(), ids=CACHES)
def test_a_model_that_drafts_for_itself_is_always_right(llm, kwargs):
    """Whatever happens to the blocks, the draft model's cache has the same: with anything else it would guess wrong."""
    both = make_llm(**kwargs, speculative_config=ITSELF)
    both.engine.runner.proposer.min_accepted = 0  # or it gives up, since such a draft costs as much as the model
    greedy = {"temperature": 0, "max_tokens": 40}
    assert comparable(ask(both, STARTS, **greedy)) == comparable(ask(llm, STARTS, **greedy))
    outputs = ask(both, [*STARTS, *STARTS[:2]], n=2, max_tokens=30, ignore_eos=True)
    guessing = [output.metrics.spec_decoding for output in outputs if output.metrics.spec_decoding is not None]
    assert sum(g.num_draft_tokens for g in guessing) > 100
    assert all(g.num_accepted_tokens == g.num_draft_tokens for g in guessing)
    if kwargs.get("num_blocks"):
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    both.engine.check_integrity()
    assert both.engine.cache.pool.num_free == both.engine.cache.pool.num_blocks


def test_a_draft_model_of_other_tokens_is_refused(llm, tmp_path):
    with pytest.raises(ValueError, match=r"must have the model's tokens: .* has 8, and .* 1294"):
        make_llm(speculative_config={**ITSELF, "model": str(other_model(tmp_path))})


def test_a_draft_model_for_shorter_texts_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "iterate_weights", lambda checkpoint: pytest.fail("a weight was read"))
    config = json.loads((Path(draft_model()) / "config.json").read_text())
    shutil.copytree(draft_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    with pytest.raises(ValueError, match=r"^max_model_len must be at most the 100 tokens of the draft .*, got 256"):
        make_llm(speculative_config={**ITSELF, "model": str(tmp_path)})


def test_a_draft_model_that_looks_at_pictures_is_refused_by_its_name(tmp_path):
    config = json.loads((Path(draft_model()) / "config.json").read_text())
    shutil.copytree(draft_model(), tmp_path, dirs_exist_ok=True)
    whole = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelLoadError, match="no architecture LlavaForConditionalGeneration"):
        make_llm(speculative_config={**ITSELF, "model": str(tmp_path)})


class TestTheEmbeddedDraft:
    def test_it_is_small_and_has_the_same_tokens(self, llm):
        small = LLM(draft_model(), device="cpu", dtype="float32", max_model_len=256).engine
        large = llm.engine
        sizes = [sum(math.prod(shape) for shape in _shapes(folder)) for folder in (draft_model(), EMBEDDED_MODEL)]
        assert 5 * sizes[0] <= sizes[1] and small.decoder.config.num_layers == 2
        assert small.tokenizer.get_vocab() == large.tokenizer.get_vocab()
        assert small.tokenizer.chat_template == large.tokenizer.chat_template

    def test_the_memory_for_the_cache_is_shared_by_both_models(self):
        config = {"method": "draft_model", "model": draft_model(), "num_speculative_tokens": 2}
        engine = make_llm(speculative_config=config, max_num_seqs=10**6).engine
        block_bytes = 16 * (token_bytes(engine.decoder) + token_bytes(engine.runner.draft.decoder))
        assert engine.cache.pool.num_blocks == CPU_CACHE_BYTES // block_bytes

    def test_it_guesses_well_and_greedy_answers_stay_as_they_are(self, llm, drafting):
        greedy = {"temperature": 0, "max_tokens": 60}
        outputs = ask(drafting, STARTS, **greedy)
        assert comparable(outputs) == comparable(ask(llm, STARTS, **greedy))
        found = [output.metrics.spec_decoding for output in outputs]
        assert sum(f.num_accepted_tokens for f in found) > 0.6 * sum(f.num_draft_tokens for f in found)

    @pytest.mark.parametrize("params", ANSWERS)
    def test_greedy_answers_stay_as_they_are_with_everything(self, llm, drafting, params):
        asked = {**params, "temperature": 0.0, "max_tokens": 42, "n": 1, "best_of": 1}
        assert comparable(ask(drafting, STARTS, **asked)) == comparable(ask(llm, STARTS, **asked))

    def test_what_is_drawn_has_the_models_distribution(self, llm, drafting):
        """Two tokens, 1,500 times, against the model's own probabilities and the grammar's."""
        start, num = "Once upon a time, in the forest, there lived a", 1_500
        exact, true = joint_probs(llm, start)
        params = [SamplingParams(temperature=1, seed=i, max_tokens=3, ignore_eos=True) for i in range(num)]
        outputs = drafting.generate([start] * num, params, use_tqdm=False)
        counts = Counter(tuple(output.outputs[0].token_ids[:2]) for output in outputs)
        guessing = [output.metrics.spec_decoding for output in outputs]
        assert sum(g.num_draft_tokens - g.num_accepted_tokens for g in guessing) > 10  # some were refused
        pairs = [pair for pair, p in exact.items() if p * num >= 5]
        rest = 1 - sum(exact[pair] for pair in pairs)
        seen = np.array([*(counts[pair] for pair in pairs), num - sum(counts[pair] for pair in pairs)])
        expected = num * np.array([*(exact[pair] for pair in pairs), rest])
        assert chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-3
        # KL(grammar || engine), of the model's probabilities and of the counts: the noise of a count is cells / 2N.
        of_model = sum(p * math.log(p / exact[pair]) for pair, p in true.items())
        of_counts = sum(p * math.log(p * num / counts[pair]) for pair, p in true.items())
        assert abs(of_counts - of_model) < 2 * len(true) / num


def _shapes(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118


def joint_probs(llm: LLM, start: str):
    """Probabilities of the first two tokens after a beginning: the model's, and the grammar's."""
    tokenizer, everything = llm.engine.tokenizer, SamplingParams(temperature=1, max_tokens=1, logprobs=-1)

    def probs(token_ids):
        (output,) = llm.generate({"prompt_token_ids": token_ids}, everything, use_tqdm=False)
        return {i: math.exp(found.logprob) for i, found in output.outputs[0].logprobs[0].items()}

    ids, exact, true = tokenizer.encode(start), {}, {}
    likely = {i: p for i, p in probs(ids).items() if p > 1e-3}
    for first, p in likely.items():
        exact |= {(first, second): p * q for second, q in probs([*ids, first]).items()}
    for first, p in next_token_probs(start, tokenizer).items():
        for second, q in next_token_probs(start + tokenizer.decode([first]), tokenizer).items():
            true[first, second] = p * q
    return exact, true


class TestWhereItPays:
    """Counts; tests/benchmarks/speculation.py has the seconds."""

    def test_a_card_that_is_in_the_conversation_takes_a_third_of_the_passes(self, llm):
        both = make_llm(speculative_config=LOOKUP)
        conversation = [{"role": "user", "content": "Tell a tale about a wolf in the forest."}]
        greedy = SamplingParams(temperature=0, max_tokens=120)
        for question in ("Who is the hero?", "Write the card.", "Write the card."):
            (output,) = both.chat(conversation, greedy, use_tqdm=False)
            conversation += [
                {"role": "assistant", "content": output.outputs[0].text},
                {"role": "user", "content": question},
            ]
        (output,) = both.chat(conversation, greedy, use_tqdm=False)
        assert output.outputs == llm.chat(conversation, greedy, use_tqdm=False)[0].outputs
        metrics = output.metrics
        assert metrics.tokens_per_pass > 3 and metrics.num_generated_tokens == len(output.outputs[0].token_ids)
        assert metrics.spec_decoding.acceptance_length > 3
        assert metrics.num_computed_tokens < 2 * len(output.prompt_token_ids)

    @pytest.mark.parametrize("config", [LOOKUP, {**ITSELF, "model": draft_model()}])
    def test_in_a_large_batch_nothing_is_guessed(self, config):
        both = make_llm(speculative_config=config)
        outputs = ask(both, [TALE] * 64, max_tokens=6, ignore_eos=True)
        assert all(output.metrics.spec_decoding is None for output in outputs)
        assert {output.metrics.tokens_per_pass for output in outputs} == {1.0}

    def test_steps_say_what_guessing_gave(self):
        both = make_llm(speculative_config={**ITSELF, "model": draft_model()})
        outputs = ask(both, STARTS)
        steps = both.engine.stats()
        given = [step.spec_decoding for step in steps if step.spec_decoding is not None]
        of_requests = [output.metrics.spec_decoding for output in outputs]
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            assert sum(getattr(g, name) for g in given) == sum(getattr(g, name) for g in of_requests)
        assert sum(step.num_draft_tokens for step in steps) == sum(g.num_draft_tokens for g in given)
        assert sum(step.num_generated_tokens for step in steps) == sum(len(o.outputs[0].token_ids) for o in outputs)
        assert sum(step.num_passes for step in steps) == sum(o.metrics.num_passes for o in outputs)
        assert sum(step.num_decode_tokens for step in steps) == sum(o.metrics.num_passes - 1 for o in outputs)
        for g in of_requests:
            assert (
                g.num_draft_tokens_per_pos[0] == g.num_drafts and sum(g.num_draft_tokens_per_pos) == g.num_draft_tokens
            )
            assert sum(g.num_accepted_tokens_per_pos) == g.num_accepted_tokens
            assert all(0 <= rate <= 1 for rate in g.acceptance_rates)
