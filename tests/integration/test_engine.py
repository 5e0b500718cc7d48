"""The engine: the same tokens whatever the settings, every block back at the end, and errors that hurt nobody else."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from devices import BACKENDS, DEVICE, HERE, cpu_only, default_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config

from folovllm import ModelConfig, SamplingParams, Sequence, SequenceData
from folovllm.book import judges
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.stats import MAX_STEPS, count_requests
from folovllm.llm import LLM, make_engine_config
from folovllm.outputs import RequestMetrics, RunnerOutput
from folovllm.tales import EMBEDDED_MODEL
from folovllm.worker import model_runner

MAX_MODEL_LEN, MAX_TOKENS = 64, 20
PROMPT_LENS = (1, 3, 15, 16, 17, 31, 33, 40)
VOCAB_SIZE = 1294


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Qwen3 with random weights and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.4 if weight.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def prompts():
    """Some begin alike, at lengths around a block of 16."""
    rng = random.Random(0)
    common = [rng.randrange(2, VOCAB_SIZE) for _ in range(64)]
    return [common[:n] for n in PROMPT_LENS] + [[rng.randrange(2, VOCAB_SIZE) for _ in range(n)] for n in PROMPT_LENS]


@pytest.fixture(scope="module")
def greedy_tokens(checkpoint, prompts):
    """What transformers generates for each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model.generate(
                torch.tensor([p]), do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=None, pad_token_id=0
            )[0, len(p) :].tolist()
            for p in prompts
        ]


def make_engine(checkpoint, **kwargs) -> LLMEngine:
    settings = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, **kwargs}
    return LLMEngine(make_engine_config(str(checkpoint), **settings), DEVICE)


@cpu_only
def test_what_steps_free_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(model_runner, "keep_freed_memory", lambda: calls.append(None))
    make_engine(EMBEDDED_MODEL)
    assert calls == [None]


GUESSES = [
    {"method": "ngram", "num_speculative_tokens": num, "prompt_lookup_min": least, "prompt_lookup_max": most}
    for num, least, most in ((1, 1, 1), (4, 1, 3), (16, 2, 2))
]
SEEDED = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True, "max_tokens": MAX_TOKENS, "seed": 5}
GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_TOKENS}


@pytest.fixture(scope="module")
def seeded_tokens(checkpoint, prompts):
    """What the engine draws for each prompt alone, four answers each."""
    engine = make_engine(checkpoint)
    return [[a.token_ids for a in run_one(engine, p, SamplingParams(**SEEDED, n=4)).outputs] for p in prompts]


def run_one(engine, prompt, params):
    engine.add_request("only", prompt, params)
    return run_all(engine)["only"]


def run_all(engine, max_steps=5000):
    finished = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            finished[output.request_id] = output
    else:
        raise AssertionError("the engine does not come to an end")
    engine.check_integrity()
    pool = engine.cache.pool
    assert pool.num_free == pool.num_blocks and not any(pool.ref_counts)
    assert engine.cache.swap_pool.num_free == engine.cache.swap_pool.num_blocks
    return finished


@st.composite
def arrivals(draw):
    """Up to eight requests, by name; each has the number of its prompt in front of its name."""
    made = []
    for i in range(draw(st.integers(1, 8))):
        base = SEEDED if draw(st.booleans()) else GREEDY
        params = SamplingParams(
            **{**base, "max_tokens": draw(st.integers(1, MAX_TOKENS)), "n": draw(st.integers(1, 4))}
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 15)))
        prompt, step, priority = draw(st.integers(0, 15)), draw(st.integers(0, 12)), draw(st.integers(-1, 1))
        made.append(judges.Arrival(f"{prompt} {i}", [], params, step, priority, None, abort_after))
    return sorted(made, key=lambda a: a.step)


@st.composite
def engine_settings(draw):
    block_size = draw(st.sampled_from([1, 3, 16, MAX_MODEL_LEN, 256]))
    fits_one = -(-(max(PROMPT_LENS) + MAX_TOKENS) // block_size)
    chunked = draw(st.booleans())
    return {
        "attention_backend": draw(st.sampled_from(BACKENDS)),
        "block_size": block_size,
        "num_blocks": fits_one + draw(st.integers(0, 2 * fits_one)),
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": draw(st.integers(1, 80) if chunked else st.integers(MAX_MODEL_LEN, 200)),
        "enable_prefix_caching": draw(st.booleans()),
        "max_num_seqs": draw(st.integers(1, 8)),
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "scheduler_reserve_full_isl": draw(st.booleans()),
        "batching": draw(st.sampled_from(["continuous", "continuous", "static"])),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap"])),
        "swap_space": draw(st.sampled_from([0.0, 1e-4, 0.01])),
        "speculative_config": draw(st.sampled_from([None, *GUESSES])),
    }


class TestInvariants:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(kwargs=engine_settings(), arrivals=arrivals())
    def test_the_same_tokens_whatever_the_settings(
        self, checkpoint, prompts, greedy_tokens, seeded_tokens, kwargs, arrivals
    ):
        """By the judges that judge readers' parts: see there for what is checked in each step."""

        def expected(a, index):
            prompt = int(a.name.split()[0])
            return seeded_tokens[prompt][index] if a.params.seed is not None else greedy_tokens[prompt]

        arrivals = [replace(a, prompt=prompts[int(a.name.split()[0])]) for a in arrivals]
        engine = make_engine(checkpoint, **kwargs)
        judges.Watch(engine)
        judges.check_outputs(arrivals, judges.drive(engine, arrivals, max_steps=20_000), expected)

    def test_20000_random_steps_leave_no_block_in_use(self, checkpoint):
        """No model here, random tokens: the books of scheduler and cache alone."""
        engine = make_engine(
            checkpoint,
            num_blocks=40,
            block_size=4,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            max_num_batched_tokens=40,
            max_num_seqs=8,
            preemption_mode="swap",
            swap_space=1e-4,
        )
        rng = random.Random(1)

        def run(scheduler_output):
            count = len(scheduler_output.sampled)
            return RunnerOutput([[rng.randrange(VOCAB_SIZE)] for _ in range(count)], [None] * count)

        engine.runner.run = run
        steps = []
        engine.step_hooks.append(lambda output, _, stats: steps.append(stats))
        alive = set()
        for step in range(20_000):
            if rng.random() < 0.3 and len(alive) < 30:
                params = SamplingParams(
                    temperature=0, ignore_eos=True, max_tokens=rng.randint(1, 30), n=rng.randint(1, 4)
                )
                engine.add_request(str(step), [rng.randrange(2, 5) for _ in range(rng.randint(1, 33))], params)
                alive.add(str(step))
            if alive and rng.random() < 0.05:
                engine.abort_request(rng.choice(sorted(alive)))
            alive -= {output.request_id for output in engine.step() if output.finished}
            if step % 1000 == 0:
                engine.check_integrity()
        run_all(engine)
        assert sum(s.num_preempted for s in steps) > 1000 and any(s.num_swapped for s in steps)
        assert any(s.num_cached_tokens for s in steps) and len(steps) > len(engine.steps) == MAX_STEPS

    def test_the_integrity_check_notices_a_lost_block(self, checkpoint):
        engine = make_engine(checkpoint, num_blocks=8)
        engine.cache.pool.allocate()
        with pytest.raises(RuntimeError, match="block 0 has reference count 1, stands in 0 tables"):
            engine.check_integrity()


class TestSharing:
    def test_a_prompt_is_computed_once_for_all_its_answers(self, checkpoint, prompts):
        engine = make_engine(checkpoint)
        output = run_one(engine, prompts[6], SamplingParams(**SEEDED, n=4))
        assert output.metrics.num_computed_tokens == 33 + 4 * (MAX_TOKENS - 1)
        assert output.metrics.num_shared_tokens == 3 * 33
        assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4

    def test_what_later_answers_find_of_their_own_prompt_is_shared_and_not_cached(self, checkpoint):
        engine = make_engine(checkpoint, max_num_seqs=1, enable_prefix_caching=True, block_size=4)
        params = SamplingParams(temperature=0, n=4, max_tokens=2, ignore_eos=True)
        for found in (0, 20):
            metrics = run_one(engine, list(range(5, 26)), params).metrics
            assert (metrics.num_cached_tokens, metrics.num_shared_tokens) == (found, 3 * 20)

    def test_the_second_of_two_requests_finds_the_first_ones_blocks(self, checkpoint, prompts, greedy_tokens):
        engine = make_engine(checkpoint, enable_prefix_caching=True)
        for cached in (0, 32):
            output = run_one(engine, prompts[6], SamplingParams(**GREEDY))
            assert output.metrics.num_cached_tokens == cached
            assert output.outputs[0].token_ids == greedy_tokens[6]

    def test_what_is_found_again_after_a_preemption_is_not_cached(self):
        seq, metrics = Sequence("a", "r", SequenceData([1]), SamplingParams(), num_preemptions=1), RequestMetrics(0.0)
        count_requests(SchedulerOutput(admitted=[(seq, 16)]), lambda request_id: metrics)
        assert metrics.num_cached_tokens == 0

    @cpu_only
    @pytest.mark.parametrize("num_heads", [1, 2])
    def test_key_heads_computed_apart_or_together_give_the_same_tokens(
        self, checkpoint, prompts, greedy_tokens, monkeypatch, num_heads
    ):
        monkeypatch.setattr("folovllm.attention.gather.GATHER_BYTES", 0 if num_heads == 1 else 2**24)
        engine = make_engine(checkpoint)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, SamplingParams(**GREEDY))
        assert {name: output.outputs[0].token_ids for name, output in run_all(engine).items()} == {
            str(i): tokens for i, tokens in enumerate(greedy_tokens)
        }
        assert engine.runner.attention._readable.shape[2] == 2 // num_heads

    def test_a_prompt_that_ends_with_a_block_recomputes_that_block(self, checkpoint, prompts):
        engine = make_engine(checkpoint, enable_prefix_caching=True)
        run_one(engine, prompts[3], SamplingParams(**GREEDY))
        assert run_one(engine, prompts[3], SamplingParams(**GREEDY)).metrics.num_cached_tokens == 0  # 16 tokens

    def test_best_of_gives_back_the_likeliest(self, checkpoint, prompts):
        engine = make_engine(checkpoint)
        every = run_one(engine, prompts[2], SamplingParams(**SEEDED, n=4, logprobs=0)).outputs
        best = run_one(engine, prompts[2], SamplingParams(**SEEDED, n=1, best_of=4)).outputs
        assert best[0].token_ids == max(every, key=lambda answer: answer.cumulative_logprob).token_ids


class TestWork:
    @cpu_only  # on a GPU the last steps are recorded
    @pytest.mark.parametrize("prompt_logprobs", [None, 0])
    def test_the_last_layer_multiplies_what_is_sampled_and_no_more(self, checkpoint, prompt_logprobs, monkeypatch):
        """Behind its attention; all of a prompt if its log probabilities are asked for."""
        engine = make_engine(checkpoint, enable_chunked_prefill=True, max_num_batched_tokens=40)
        counts = []
        for layer in (engine.decoder.layers[0], engine.decoder.layers[-1]):
            rows = []
            multiply = layer.down_proj.multiply
            monkeypatch.setattr(
                layer.down_proj, "multiply", lambda x, rows=rows, multiply=multiply: rows.append(len(x)) or multiply(x)
            )
            counts.append(rows)
        params = SamplingParams(**{**GREEDY, "max_tokens": 2}, prompt_logprobs=prompt_logprobs)
        for i, length in enumerate((50, 20)):
            engine.add_request(str(i), list(range(3, 3 + length)), params)
        run_all(engine)
        # 40 tokens of the first prompt, of which none is sampled; its other 10 and the second prompt; one of each.
        assert counts[0] == [40, 30, 2]
        assert counts[1] == ([1, 2, 2] if prompt_logprobs is None else [40, 30, 2])


@pytest.fixture(scope="module")
def llm():
    return LLM(str(EMBEDDED_MODEL), **HERE, max_model_len=300)


class TestParams:
    """Each field, end to end, on the embedded model, which has something to say."""

    GREEDY = SamplingParams(temperature=0.0, max_tokens=150)

    def tell(self, llm, prompt="Once upon a time", **kwargs):
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 150, **kwargs})
        return llm.generate(prompt, params, use_tqdm=False)[0]

    def test_it_stops_at_the_end_token_which_is_no_text(self, llm):
        answer = self.tell(llm).outputs[0]
        (end,) = llm.engine.tokenizer.encode("<|endoftext|>")
        assert (answer.finish_reason, answer.stop_reason, answer.token_ids[-1]) == ("stop", end, end)
        assert answer.text.endswith(".")

    def test_the_tokenizers_own_end_token_is_not_named(self, llm):
        (output,) = llm.chat([{"role": "user", "content": "Tell a tale about a fox."}], self.GREEDY, use_tqdm=False)
        answer = output.outputs[0]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
        assert answer.token_ids[-1] == llm.engine.tokenizer.eos_token_id

    def test_ignore_eos_and_max_tokens(self, llm):
        answer = self.tell(llm, ignore_eos=True, max_tokens=140).outputs[0]
        assert answer.finish_reason == "length" and len(answer.token_ids) == 140

    def test_max_tokens_none_runs_to_max_model_len(self, llm):
        output = self.tell(llm, ignore_eos=True, max_tokens=None)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 300

    @pytest.mark.parametrize("include", [False, True])
    def test_a_stop_string_across_tokens(self, llm, include):
        answer = self.tell(llm, stop=["ox named M", "never"], include_stop_str_in_output=include).outputs[0]
        assert answer.finish_reason == "stop" and answer.stop_reason == "ox named M"
        assert answer.text.endswith("ox named M" if include else "little f")

    def test_the_stop_string_that_is_complete_first_wins(self, llm):
        assert self.tell(llm, stop=[" named Mira", "fox"]).outputs[0].stop_reason == "fox"

    def test_a_stop_token(self, llm):
        (fox,) = llm.engine.tokenizer.encode(" fox")
        answer = self.tell(llm, stop_token_ids=[fox]).outputs[0]
        assert (answer.stop_reason, answer.token_ids[-1]) == (fox, fox) and answer.text.endswith("little")

    def test_min_tokens_delays_every_end(self, llm):
        free = self.tell(llm).outputs[0]
        assert len(self.tell(llm, min_tokens=len(free.token_ids) + 5).outputs[0].token_ids) >= len(free.token_ids) + 5
        delayed = self.tell(llm, stop=["Mira"], min_tokens=40).outputs[0]
        assert len(delayed.token_ids) >= 40 and delayed.text.count("Mira") > 1

    def test_logprobs_are_those_of_the_sampler(self, llm):
        output = self.tell(llm, logprobs=2, prompt_logprobs=1, max_tokens=5)
        answer = output.outputs[0]
        assert [next(iter(found)) for found in answer.logprobs] == answer.token_ids
        assert all(len(found) == 2 for found in answer.logprobs)
        assert answer.cumulative_logprob == pytest.approx(
            sum(f[t].logprob for f, t in zip(answer.logprobs, answer.token_ids))
        )
        assert output.prompt_logprobs[0] is None
        assert [next(iter(found)) for found in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]

    def test_prompt_logprobs_are_the_same_in_chunks(self, llm):
        chunked = LLM(str(EMBEDDED_MODEL), **HERE, enable_chunked_prefill=True, max_num_batched_tokens=3)
        text = "Once upon a time, in the forest, there lived a brave"
        whole, parts = (self.tell(x, text, prompt_logprobs=0, max_tokens=1).prompt_logprobs for x in (llm, chunked))
        for a, b in zip(whole[1:], parts[1:]):
            assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)

    def test_prompt_logprobs_of_one_token_are_none(self, llm):
        assert llm.generate([5], SamplingParams(prompt_logprobs=1), use_tqdm=False)[0].prompt_logprobs == [None]

    def test_prompt_logprobs_keep_their_places_where_the_cache_was_read(self, checkpoint, prompts):
        engine = make_engine(checkpoint, enable_prefix_caching=True, block_size=4)
        whole = run_one(engine, prompts[6], SamplingParams(**GREEDY, prompt_logprobs=0)).prompt_logprobs
        params = SamplingParams(**GREEDY, prompt_logprobs=0, skip_reading_prefix_cache=False)
        output = run_one(engine, prompts[6], params)
        found, num_cached = output.prompt_logprobs, output.num_cached_tokens
        assert num_cached > 0 and found[: num_cached + 1] == [None] * (num_cached + 1) and len(found) == len(whole)
        assert [set(each) for each in found[num_cached + 1 :]] == [set(each) for each in whole[num_cached + 1 :]]

    def test_bias_bad_words_and_allowed_tokens(self, llm):
        tokenizer = llm.engine.tokenizer
        prompt = "Once upon a time, in the"
        (castle,), (forest,) = tokenizer.encode(" castle"), tokenizer.encode(" forest")
        first = {
            "plain": self.tell(llm, prompt, max_tokens=1),
            "bias": self.tell(llm, prompt, max_tokens=1, logit_bias={castle: 50}),
            "bad": self.tell(llm, prompt, max_tokens=1, bad_words=["forest"]),
            "allowed": self.tell(llm, prompt, max_tokens=1, allowed_token_ids=[castle]),
        }
        found = {name: output.outputs[0].token_ids[0] for name, output in first.items()}
        assert found["plain"] == forest and found["bias"] == found["allowed"] == castle
        assert found["bad"] not in (forest, castle)

    def test_penalties_change_the_tale(self, llm):
        plain = self.tell(llm).outputs[0].token_ids
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert self.tell(llm, **{name: 2.0}).outputs[0].token_ids != plain

    def test_no_params_are_the_checkpoints_own(self, llm):
        assert llm.engine.default_params == SamplingParams(temperature=1.0, min_p=0.01)
        assert len(llm.generate("Long ago", use_tqdm=False)[0].outputs[0].token_ids) == 16

    def test_whoever_changes_the_recommended_params_changes_a_copy(self, llm):
        params = llm.get_default_sampling_params()
        params.max_tokens += 1
        assert llm.get_default_sampling_params().max_tokens == params.max_tokens - 1

    def test_special_tokens_are_text_when_asked_for(self, llm):
        answer = self.tell(llm, skip_special_tokens=False, include_stop_str_in_output=True).outputs[0]
        assert answer.text.endswith("<|endoftext|>")


class TestText:
    def test_a_stream_is_the_text_in_pieces(self):
        llm = LLM(str(EMBEDDED_MODEL), **HERE)
        params = SamplingParams(temperature=0, max_tokens=150, stop=["朋友"])
        pieces = list(llm.stream("从前", params))
        assert "".join(pieces) == llm.generate("从前", params, use_tqdm=False)[0].outputs[0].text
        assert len(pieces) > 20 and not any("\ufffd" in piece for piece in pieces)

    def test_a_stream_that_is_left_early_leaves_nothing(self):
        llm = LLM(str(EMBEDDED_MODEL), **HERE)
        for _ in llm.stream("Once", SamplingParams(max_tokens=50)):
            break
        assert not llm.engine.has_unfinished_requests()
        llm.engine.check_integrity()


class TestBadInput:
    CASES = (
        ("empty", [], {}, "at least one token"),
        ("too long", [5] * MAX_MODEL_LEN, {}, "prompt has 64 tokens, and max_model_len is 64"),
        ("unknown token", [VOCAB_SIZE], {}, f"token id {VOCAB_SIZE}, but the vocabulary has {VOCAB_SIZE}"),
        ("negative token", [-1], {}, "-1"),
        ("too large for the cache", [5] * 20, {"max_tokens": 40}, "4 blocks, and the cache has 3"),
        ("duplicate", [5], {}, "'good' is taken"),
    )

    @pytest.mark.parametrize("name, prompt, kwargs, message", CASES, ids=[case[0] for case in CASES])
    def test_one_sentence_for_one_caller_and_the_others_finish(
        self, checkpoint, prompts, greedy_tokens, name, prompt, kwargs, message
    ):
        engine = make_engine(checkpoint, num_blocks=3)
        engine.add_request("good", prompts[1], SamplingParams(**GREEDY))
        engine.step()
        with pytest.raises(ValueError, match=message):
            engine.add_request("good" if name == "duplicate" else "bad", prompt, SamplingParams(**kwargs))
        assert run_all(engine)["good"].outputs[0].token_ids == greedy_tokens[1]

    def test_a_request_that_just_fits_the_cache_is_served(self, checkpoint):
        """Its last token is never computed, so it needs no slot."""
        engine = make_engine(checkpoint, num_blocks=2)
        output = run_one(engine, [5], SamplingParams(**{**GREEDY, "max_tokens": 32}))
        assert len(output.outputs[0].token_ids) == 32

    def test_a_bad_prompt_in_a_list_takes_nothing_with_it(self, checkpoint):
        llm = LLM(str(checkpoint), **HERE, max_model_len=MAX_MODEL_LEN)
        with pytest.raises(ValueError, match="at least one token"):
            llm.generate([[5, 6], []], use_tqdm=False)
        assert not llm.engine.has_unfinished_requests()
        assert len(llm.generate([[5, 6]], use_tqdm=False)) == 1

    def test_a_priority_is_one_for_all_or_one_for_each(self, checkpoint):
        llm = LLM(str(checkpoint), **HERE, max_model_len=MAX_MODEL_LEN, policy="priority")
        for five in (5, np.int64(5), torch.tensor(5)):
            assert len(llm.generate([[5, 6], [7]], SamplingParams(max_tokens=1), use_tqdm=False, priority=five)) == 2
        with pytest.raises(ValueError, match="priority must be one, or one for each of 2 prompts, got 3"):
            llm.generate([[5, 6], [7]], use_tqdm=False, priority=[0, 5, 5])
        assert not llm.engine.has_unfinished_requests()

    @pytest.mark.parametrize("name, nearest", [("blocksize", "block_size"), ("devise", "device")])
    def test_an_unknown_argument_names_the_nearest(self, checkpoint, name, nearest):
        with pytest.raises(ValueError, match=f"no argument '{name}'; the nearest is '{nearest}'"):
            LLM(str(checkpoint), **{name: 4})

    @cpu_only
    @pytest.mark.parametrize("num_blocks", [10**9, 2**62])
    def test_a_cache_larger_than_the_memory_is_refused(self, checkpoint, num_blocks):
        with pytest.raises(ValueError, match=f"num_blocks must fit into the CPU's memory, got {num_blocks}, which"):
            make_engine(checkpoint, num_blocks=num_blocks)

    @pytest.mark.parametrize("swap_space", [1e6, 1e300])
    def test_swap_space_larger_than_the_memory_is_refused(self, checkpoint, swap_space):
        with pytest.raises(ValueError, match=r"swap_space must be at most the CPU's memory of .* GiB, got 1e"):
            make_engine(checkpoint, swap_space=swap_space, preemption_mode="swap")
        make_engine(checkpoint, swap_space=swap_space)  # nobody asks for it

    def test_a_budget_below_max_model_len_needs_chunks(self, checkpoint):
        with pytest.raises(ValueError, match="enable_chunked_prefill=True"):
            make_engine(checkpoint, max_num_batched_tokens=8)


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
    @pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
    def test_a_forward_pass_that_raises_ends_those_who_ran_and_nobody_else(
        self, checkpoint, prompts, greedy_tokens, error, preemption_mode
    ):
        engine = make_engine(checkpoint, max_num_seqs=2, num_blocks=12, block_size=4, preemption_mode=preemption_mode)
        for i in range(4):
            engine.add_request(str(i), prompts[i], SamplingParams(**GREEDY))
        run, calls = engine.runner.run, itertools.count()

        def failing(scheduler_output):
            if next(calls) == 6:
                raise error
            return run(scheduler_output)

        engine.runner.run = failing
        finished = {}
        with pytest.raises(type(error)):
            while True:
                finished |= {output.request_id: output for output in engine.step()}
        running = [key for key, output in finished.items() if not output.finished]
        finished |= run_all(engine)
        reasons = {key: output.outputs[0].finish_reason for key, output in finished.items()}
        assert len(reasons) == 4 and "abort" in reasons.values() and "length" in reasons.values()
        for key, output in finished.items():
            answer = output.outputs[0]
            assert answer.token_ids == greedy_tokens[int(key)][: len(answer.token_ids)]
            if answer.finish_reason == "abort":
                assert key in running and answer.stop_reason == f"{type(error).__name__}: {error}"

    @pytest.mark.parametrize("fails_at", range(2))
    def test_an_answer_whose_last_tokens_were_never_read_does_not_look_complete(self, checkpoint, prompts, fails_at):
        engine = make_engine(checkpoint)
        for name in ("a", "b"):
            engine.add_request(name, prompts[0], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        engine.step()
        processor, calls = engine.output_processor, itertools.count()
        add_tokens = processor._add_tokens

        def failing(seq, token_ids):
            if next(calls) == fails_at:
                raise MemoryError("no room for text")
            return add_tokens(seq, token_ids)

        processor._add_tokens = failing
        with pytest.raises(MemoryError):
            engine.step()
        reasons = [output.outputs[0].finish_reason for output in engine.step()]
        assert reasons == [["abort", "abort"], ["length", "abort"]][fails_at]
        engine.check_integrity()

    def test_a_block_that_a_failed_step_did_not_write_is_never_found(self, checkpoint, prompts, greedy_tokens):
        engine = make_engine(checkpoint, enable_prefix_caching=True, block_size=4)
        run = engine.runner.run

        def failing(scheduler_output):
            raise RuntimeError("out of memory")

        engine.runner.run = failing
        for name in ("a", "b"):  # b finds in this very step what a is to write
            engine.add_request(name, prompts[7], SamplingParams(**GREEDY))
        with pytest.raises(RuntimeError):
            engine.step()
        engine.runner.run = run
        assert {output.request_id for output in engine.step()} == {"a", "b"}
        output = run_one(engine, prompts[7], SamplingParams(**GREEDY))
        assert output.num_cached_tokens == 0 and output.outputs[0].token_ids == greedy_tokens[7]

    FILES = ("scheduler.py", "kv_cache.py", "request.py")
    """Of the queues, the blocks and what becomes of the outputs."""

    @staticmethod
    def interrupt(num_lines, files=FILES):
        """A trace function that raises after some lines of some files."""

        def trace(frame, event, arg):
            nonlocal num_lines
            if frame.f_code.co_filename.rpartition("/")[2] not in files:
                return None if frame.f_code.co_name == "run" else trace
            num_lines -= event == "line"
            if num_lines == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        return trace

    def test_a_detokenizer_that_always_raises_leaves_nothing_behind(self, checkpoint, prompts):
        class Broken(Detokenizer):
            def add(self, token_id, stop_terminated=False):
                raise RuntimeError("no text")

            def finish(self):
                raise RuntimeError("no text")

        engine = make_engine(checkpoint)
        engine.output_processor.detokenizer_cls = Broken
        for name in ("a", "b"):
            engine.add_request(name, prompts[0], SamplingParams(**GREEDY))
        with pytest.raises(RuntimeError, match="no text"):
            engine.step()
        reasons = {output.request_id: output.outputs[0].stop_reason for output in engine.step()}
        assert reasons == dict.fromkeys("ab", "RuntimeError: no text")
        assert not engine.has_unfinished_requests()
        engine.check_integrity()

    def test_an_interrupt_while_a_failed_step_is_cleaned_up_loses_no_request(self, checkpoint, prompts, greedy_tokens):
        engine, before = make_engine(checkpoint, num_blocks=14, block_size=4), sys.gettrace()
        run, num_interrupted = engine.runner.run, 0

        def fail_and_interrupt(num_lines):
            def failing(scheduler_output):
                engine.runner.run = run
                sys.settrace(self.interrupt(num_lines, (*self.FILES, "output_processor.py")))
                raise RuntimeError("out of memory")

            return failing

        for num_lines in range(1, 400, 7):
            for i, prompt in enumerate(prompts[:4]):
                engine.add_request(str(i), prompt, SamplingParams(**GREEDY))
            finished = {output.request_id: output for output in engine.step()}
            engine.runner.run = fail_and_interrupt(num_lines)
            try:
                engine.step()
            except KeyboardInterrupt:
                num_interrupted += 1
            except RuntimeError:
                pass
            finally:
                sys.settrace(before)
            finished |= run_all(engine)
            engine.check_integrity()
            assert not engine.scheduler.has_unfinished() and len(finished) == 4
            for key, output in finished.items():
                answer, expected = output.outputs[0], greedy_tokens[int(key)]
                is_whole = answer.finish_reason != "abort"
                assert is_whole or answer.stop_reason == "RuntimeError: out of memory"
                assert answer.token_ids == (expected if is_whole else expected[: len(answer.token_ids)])
        assert num_interrupted > 20

    def test_an_interrupt_at_any_line_of_a_step_loses_no_block_and_no_request(self, checkpoint, prompts, greedy_tokens):
        rng, before = random.Random(0), sys.gettrace()
        for mode in ("recompute", "swap"):
            engine = make_engine(
                checkpoint,
                num_blocks=14,
                block_size=4,
                preemption_mode=mode,
                enable_prefix_caching=True,
                swap_space=0.01,
            )
            for _ in range(40):
                for i, prompt in enumerate(prompts[:5]):
                    engine.add_request(str(i), prompt, SamplingParams(**GREEDY))
                finished = {}
                for _ in range(rng.randrange(12)):
                    finished |= {output.request_id: output for output in engine.step()}
                sys.settrace(self.interrupt(rng.randrange(1, 400)))
                try:
                    finished |= {output.request_id: output for output in engine.step()}
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.settrace(before)
                engine.check_integrity()
                finished |= run_all(engine)
                assert len(finished) == 5
                for key, output in finished.items():
                    answer = output.outputs[0]
                    expected = greedy_tokens[int(key)]
                    is_whole = answer.finish_reason != "abort"
                    assert answer.token_ids == (expected if is_whole else expected[: len(answer.token_ids)])

    def test_a_forward_pass_that_is_not_a_number_touches_nobody_else(self, checkpoint, prompts, greedy_tokens):
        engine = make_engine(checkpoint, num_blocks=24, block_size=4)
        bad = next(i for i in range(3, VOCAB_SIZE) if not any(i in [*p, *t] for p, t in zip(prompts, greedy_tokens)))
        engine.decoder.embedding = engine.decoder.embedding.clone()
        engine.decoder.embedding[bad] = torch.nan
        engine.runner.initialize_kv_cache(24, 0)  # a recorded step would read the embedding that was there before
        for name, prompt in (("bad", [bad] * 30), ("0", prompts[0])):
            engine.add_request(name, prompt, SamplingParams(**GREEDY))
        engine.add_request("bad too", [bad] * 9, SamplingParams(**GREEDY))
        finished = run_all(engine)
        assert "logit of nan" in finished["bad"].outputs[0].stop_reason
        for i in range(1, 4):  # in the blocks that the bad ones have left
            engine.add_request(str(i), prompts[i], SamplingParams(**GREEDY))
        finished |= run_all(engine)
        assert [finished[str(i)].outputs[0].token_ids for i in range(4)] == greedy_tokens[:4]

    @pytest.mark.parametrize("kwargs", [{}, {"max_num_batched_tokens": 24, "enable_chunked_prefill": True}])
    @pytest.mark.parametrize("greedy", [True, False])
    def test_nor_does_it_touch_those_with_the_same_beginning(self, checkpoint, kwargs, greedy):
        """A token that is none spoils the blocks before it, and others find them, in the same step or later."""
        engine = make_engine(checkpoint, block_size=4, enable_prefix_caching=True, **kwargs)
        bad, beginning = VOCAB_SIZE - 1, [5, 6, 7, 8] * 4
        params = SamplingParams(
            temperature=0 if greedy else 1, seed=3, n=2, max_tokens=8, ignore_eos=True,
            allowed_token_ids=[*range(3, bad)],
        )  # fmt: skip
        prompts = {f"good {i}": [*beginning, 20 + i] for i in range(4)}

        def ask(*names: str) -> dict[str, list[list[int]]]:
            for name in names:
                engine.add_request(name, prompts.get(name, [*beginning, bad]), params)
            return {name: [answer.token_ids for answer in found.outputs] for name, found in run_all(engine).items()}

        alone = {}
        for name in prompts:
            alone |= ask(name)
            assert engine.reset_prefix_cache()
        engine.decoder.embedding = engine.decoder.embedding.clone()
        engine.decoder.embedding[bad] = torch.nan
        num_blocks = engine.config.cache_config.num_blocks
        engine.runner.initialize_kv_cache(num_blocks, 0)  # a recorded step would read the old embedding
        found = ask("bad", "good 0", "bad too", "good 1") | ask("good 2") | ask("good 3", "bad again")
        before = len(engine.steps)
        ask(*(f"bad {i}" for i in range(6)))
        assert len(engine.steps) - before <= (2 if not kwargs else 12)  # each begins anew once
        assert {name: tokens for name, tokens in found.items() if name in prompts} == alone
        assert all(not any(tokens) for name, tokens in found.items() if name not in prompts)
        engine.check_integrity()

    def test_a_stream_that_begins_anew_gives_all_of_its_text(self):
        llm = LLM(str(EMBEDDED_MODEL), block_size=4, enable_prefix_caching=True, **HERE)
        params = SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[*range(3, 900)])
        beginning = [5, 6, 7, 8] * 4
        expected = "".join(llm.stream([*beginning, 44], params))
        assert llm.reset_prefix_cache()
        llm.engine.decoder.embedding = llm.engine.decoder.embedding.clone()
        llm.engine.decoder.embedding[1000] = torch.nan
        llm.engine.runner.initialize_kv_cache(llm.engine.config.cache_config.num_blocks, 0)
        bad, good = llm.stream([*beginning, 1000], params), llm.stream([*beginning, 44], params)
        assert "".join(good) == expected != ""
        with pytest.raises(RuntimeError, match="logit of nan"):
            list(bad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("kwargs", [{}, {"quantization": "int8"}])
    def test_torchs_settings_change_no_token(self, dtype, kwargs):
        """Neither its default dtype nor autocast, while the model is loaded and while others' requests run."""

        def tell() -> list[list[int]]:
            llm = LLM(str(EMBEDDED_MODEL), **{**HERE, **kwargs})
            texts = ["Once upon a time, in the", "Long ago", "Once upon a time"]
            found = llm.generate(texts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
            return [output.outputs[0].token_ids for output in found]

        expected = tell()
        with default_dtype(dtype):
            found = tell()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert tell() == found == expected

    @pytest.mark.parametrize("kwargs", [{}, {"quantization": "int8"}, {"attention_backend": "sdpa"}])
    def test_nor_does_torchs_default_device(self, kwargs):
        """A prompt longer than `FEW_QUERIES` among them."""
        texts = ["Once upon a time in the forest there was a little fox. " * 5, "Long ago"]
        params = SamplingParams(temperature=0.7, seed=1, max_tokens=12)

        def tell() -> list[list[int]]:
            llm = LLM(str(EMBEDDED_MODEL), **{**HERE, "max_model_len": 256, **kwargs})
            return [output.outputs[0].token_ids for output in llm.generate(texts, params, use_tqdm=False)]

        expected = tell()
        with torch.device("meta"):
            assert tell() == expected

    def test_abort_takes_one_name_or_several(self, checkpoint, prompts):
        engine = make_engine(checkpoint)
        for name in "abcd":
            engine.add_request(name, prompts[0], SamplingParams(**GREEDY))
        engine.abort_request("a")
        engine.abort_request(["b", "c"])
        engine.abort_request(("d", "unknown"))
        reasons = {output.request_id: output.outputs[0].finish_reason for output in engine.step()}
        assert reasons == dict.fromkeys("abcd", "abort")
        with pytest.raises(ValueError, match="request_id must be a non-empty string, got 5"):
            engine.abort_request(5)

    def test_answers_that_never_started_have_the_reason_of_the_abort(self, checkpoint):
        engine = make_engine(checkpoint)
        engine.add_request("a", [5, 6, 7], SamplingParams(n=3))
        engine.abort_request("a", "too late")
        (output,) = engine.step()
        assert [answer.stop_reason for answer in output.outputs] == ["too late"] * 3

    def test_abort_of_an_unknown_request_is_nothing(self, checkpoint):
        make_engine(checkpoint).abort_request("nobody")


def test_chat_applies_the_template():
    llm = LLM(str(EMBEDDED_MODEL), **HERE)
    ask = [{"role": "user", "content": "Tell a tale about a turtle in the castle."}]
    greedy = SamplingParams(temperature=0, max_tokens=150)
    (output,) = llm.chat(ask, greedy, use_tqdm=False)
    assert "turtle" in output.outputs[0].text and "castle" in output.outputs[0].text
    assert output.prompt.endswith("<|im_start|>assistant\n")
    assert [o.outputs[0].text for o in llm.chat([ask, ask], greedy, use_tqdm=False)] == [output.outputs[0].text] * 2


def test_a_model_config_knows_nothing_of_the_engine(checkpoint):
    """The configs that `LLM` makes are those one can make by hand."""
    config = make_engine_config(str(checkpoint), block_size=4, max_model_len=32, max_num_seqs=3)
    assert (config.cache_config.block_size, config.scheduler_config.max_num_seqs) == (4, 3)
    assert config.scheduler_config.max_model_len == config.model_config.max_model_len == 32
    assert config.model_config == ModelConfig(str(checkpoint), max_model_len=32)
