"""Whose output is it: streams, `generate` and a user's own requests on one engine, in any order, from threads."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import threading

import numpy as np
import pytest
import torch
from devices import DEVICE, HERE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folovllm import LLM, SamplingParams
from folovllm.core.kv_cache import BlockPool, KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.detokenizer import Detokenizer
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.output_processor import OutputSink
from folovllm.llm import make_engine_config
from folovllm.sampling_params import RequestOutputKind
from folovllm.tales import EMBEDDED_MODEL

PROMPTS = ("Once upon a time", "从前", "Long ago, in the swamp", "In the forest 🦊")
LENGTHS = (3, 12, 25)


def params_of(i: int, length: int, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=i, max_tokens=length, ignore_eos=True, **kwargs)


@pytest.fixture(scope="module")
def llm():
    """A cache so small that requests must make room for each other."""
    return LLM(str(EMBEDDED_MODEL), **HERE, max_model_len=64, num_blocks=16, block_size=8, max_num_seqs=6)


@pytest.fixture(scope="module")
def alone(llm):
    """The text of each prompt and length, when nobody else is there."""
    return {
        (i, length): llm.generate(prompt, params_of(i, length), use_tqdm=False)[0].outputs[0].text
        for i, prompt in enumerate(PROMPTS)
        for length in LENGTHS
    }


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    gc.collect()
    llm.engine.step()
    assert not llm.engine.has_unfinished_requests() and not llm.engine.scheduler.has_unfinished()
    assert not llm.engine.output_processor.states
    llm.engine.check_integrity()
    assert llm.engine.cache.pool.num_free == llm.engine.cache.pool.num_blocks


def finish(engine) -> dict[str, str]:
    """Steps until one's own requests are finished; the newest text of each."""
    texts = {}
    while engine.has_unfinished_requests():
        texts |= {output.request_id: output.outputs[0].text for output in engine.step()}
    return texts


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_order_of_reading(llm, alone, data):
    """Open streams, own requests and calls of generate are moved on in a random order; some streams are dropped."""
    engine, streams, read, own, texts = llm.engine, {}, {}, {}, {}
    dropped = set()
    for action in data.draw(
        st.lists(st.sampled_from(["stream", "read", "add", "step", "generate", "drop"]), max_size=40)
    ):
        key = data.draw(st.tuples(st.integers(0, 3), st.sampled_from(LENGTHS)))
        name = f"{len(streams)}-{len(own)}"
        if action == "stream":
            streams[name] = (key, llm.stream(PROMPTS[key[0]], params_of(*key)))
            read[name] = ""
        elif action == "add":
            own[name] = key
            engine.add_request(name, PROMPTS[key[0]], params_of(*key))
        elif action == "step":
            texts |= {output.request_id: output.outputs[0].text for output in engine.step()}
        elif action == "generate":
            (output,) = llm.generate(PROMPTS[key[0]], params_of(*key), use_tqdm=False)
            assert output.outputs[0].text == alone[key]
        elif streams:
            name = data.draw(st.sampled_from(sorted(streams)))
            if action == "read" and name not in dropped:
                read[name] += next(streams[name][1], "")
            elif action == "drop" and name not in dropped:
                dropped.add(name)
                streams[name][1].close()
    for name, (key, stream) in streams.items():
        if name not in dropped:
            read[name] += "".join(stream)
            assert read[name] == alone[key]
        assert alone[key].startswith(read[name])
    texts |= finish(engine)
    assert texts == {name: alone[key] for name, key in own.items()}


class TestOwners:
    def test_generate_runs_nobody_else_to_the_end_and_swallows_nothing(self, llm, alone):
        engine = llm.engine
        engine.add_request("mine", PROMPTS[0], params_of(0, 25))
        (output,) = llm.generate(PROMPTS[1], params_of(1, 3), use_tqdm=False)
        assert output.outputs[0].text == alone[1, 3]
        assert engine.has_unfinished_requests() and engine.scheduler.running[0].get_output_len() < 25
        assert finish(engine) == {"mine": alone[0, 25]}

    def test_steps_give_no_outputs_of_a_stream(self, llm, alone):
        stream = llm.stream(PROMPTS[0], params_of(0, 12))
        assert not llm.engine.has_unfinished_requests()
        assert llm.engine.step() == []
        assert "".join(stream) == alone[0, 12]

    def test_a_stream_that_nobody_reads_waits_with_all_its_text(self, llm, alone):
        stream = llm.stream(PROMPTS[0], params_of(0, 12))
        llm.generate(PROMPTS[1], params_of(1, 25), use_tqdm=False)
        assert list(stream) == [alone[0, 12]]

    @pytest.mark.parametrize("read", [0, 2])
    def test_a_dropped_stream_ends_its_request_and_no_other(self, llm, alone, read):
        engine = llm.engine
        kept, stream = llm.stream(PROMPTS[1], params_of(1, 25)), llm.stream(PROMPTS[0], params_of(0, 25))
        for _ in range(read):
            next(stream)
        del stream
        gc.collect()
        engine.step()
        assert len(engine.output_processor.states) == 1
        assert "".join(kept) == alone[1, 25]

    def test_a_stream_refuses_more_than_one_answer_when_it_is_asked_for(self, llm):
        for kwargs in ({"n": 2}, {"best_of": 2}):
            with pytest.raises(ValueError, match="a stream is one answer, got n="):
                llm.stream(PROMPTS[0], SamplingParams(**kwargs))

    def test_a_stream_is_text(self, llm):
        with pytest.raises(ValueError, match="a stream is text, got detokenize=False"):
            llm.stream(PROMPTS[0], SamplingParams(detokenize=False))

    def test_a_stream_whose_request_is_ended_by_an_error_says_so(self, llm):
        run, stream = llm.engine.runner.run, llm.stream(PROMPTS[0], params_of(0, 12))
        next(stream)

        def failing(scheduler_output):
            raise MemoryError("no memory left")

        llm.engine.runner.run = failing
        try:
            with pytest.raises(MemoryError):
                llm.generate(PROMPTS[1], params_of(1, 3), use_tqdm=False)
        finally:
            llm.engine.runner.run = run
        with pytest.raises(RuntimeError, match="ended before its answer was complete: MemoryError: no memory left"):
            next(stream)

    def test_an_interrupt_while_a_request_is_added_leaves_nothing_behind(self, llm, monkeypatch):
        def interrupted(request):
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.scheduler, "add_request", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.engine.add_request("r", PROMPTS[0], params_of(0, 3))
        assert not llm.engine.has_unfinished_requests()

    def test_a_mistake_in_a_list_leaves_nothing_behind(self, llm):
        with pytest.raises(ValueError, match="at least one token"):
            llm.generate([PROMPTS[0], ""], use_tqdm=False)

    def test_threads(self, llm, alone):
        """Each thread generates, streams and drops streams; every text is the one it would have been alone."""
        wrong, done = [], []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(6):
                    key = rng.randrange(4), rng.choice(LENGTHS)
                    prompt, params = PROMPTS[key[0]], params_of(*key)
                    kind = rng.choice(["generate", "stream", "drop"])
                    if kind == "generate":
                        text = llm.generate([prompt, prompt], params, use_tqdm=False)[1].outputs[0].text
                    elif kind == "stream":
                        text = "".join(llm.stream(prompt, params))
                    else:
                        next(llm.stream(prompt, params))
                        continue
                    if text != alone[key]:
                        wrong.append((key, text))
                done.append(seed)
            except BaseException as error:  # reported below: a thread's own is lost
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == [] and len(done) == 5


class TestKinds:
    def outputs(self, llm, kind, **kwargs):
        llm.engine.add_request("r", PROMPTS[0], params_of(0, 12, output_kind=kind, logprobs=0, **kwargs))
        found = []
        while llm.engine.has_unfinished_requests():
            found += llm.engine.step()
        return found

    def test_deltas_are_the_whole_in_pieces(self, llm, alone):
        pieces = self.outputs(llm, RequestOutputKind.DELTA)
        assert len(pieces) == 12 and [output.finished for output in pieces] == [False] * 11 + [True]
        assert "".join(output.outputs[0].text for output in pieces) == alone[0, 12]
        assert all(len(output.outputs[0].token_ids) == len(output.outputs[0].logprobs) == 1 for output in pieces)

    def test_the_first_delta_has_the_log_probabilities_of_the_prompt(self, llm):
        first, *others = self.outputs(llm, RequestOutputKind.DELTA, prompt_logprobs=0)
        assert len(first.prompt_logprobs) == len(first.prompt_token_ids)
        assert [output.prompt_logprobs for output in others] == [None] * 11
        first.add(others[0])
        assert len(first.prompt_logprobs) == len(first.prompt_token_ids)

    def test_deltas_of_several_answers_keep_their_numbers(self, llm):
        texts = ["", "", ""]
        for output in self.outputs(llm, RequestOutputKind.DELTA, n=3):
            for answer in output.outputs:
                texts[answer.index] += answer.text
        whole = llm.generate(PROMPTS[0], params_of(0, 12, n=3), use_tqdm=False)[0].outputs
        assert texts == [answer.text for answer in whole] and [answer.index for answer in whole] == [0, 1, 2]

    def test_final_only_is_one_output(self, llm, alone):
        (output,) = self.outputs(llm, RequestOutputKind.FINAL_ONLY)
        assert output.outputs[0].text == alone[0, 12]

    def test_cumulative_outputs_only_grow(self, llm, alone):
        texts = [output.outputs[0].text for output in self.outputs(llm, RequestOutputKind.CUMULATIVE)]
        assert (
            all(after.startswith(before) for before, after in itertools.pairwise(texts)) and texts[-1] == alone[0, 12]
        )

    def test_deltas_that_nobody_took_are_joined_and_cumulative_ones_replaced(self, llm, alone):
        for kind in (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE):
            sink = OutputSink()
            llm.engine.add_request("r", PROMPTS[0], params_of(0, 12, output_kind=kind), sink=sink)
            while sink.unfinished:
                llm.engine.step()
            (output,) = llm.engine.wait(sink)
            assert output.outputs[0].text == alone[0, 12] and len(output.outputs[0].token_ids) == 12

    @pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
    def test_a_name_that_is_used_again_has_outputs_of_its_own(self, llm, alone, kind):
        engine, sink = llm.engine, OutputSink()
        engine.add_request("name", PROMPTS[0], params_of(0, 25, output_kind=kind), sink=sink)
        (begun,) = engine.wait(sink)
        engine.abort_request("name")
        engine.add_request("name", PROMPTS[1], params_of(1, 3, output_kind=kind), sink=sink)
        while sink.unfinished:
            engine.step()
        old, new = sink.take()
        assert old.prompt == begun.prompt and old.outputs[0].finish_reason == "abort"
        assert new.prompt == PROMPTS[1] and new.outputs[0].text == alone[1, 3]

    def test_best_of_is_chosen_once_at_the_end(self, llm):
        llm.engine.add_request("r", PROMPTS[0], params_of(0, 12, n=2, best_of=4))
        outputs = []
        while llm.engine.has_unfinished_requests():
            outputs += llm.engine.step()
        (output,) = outputs
        every = llm.generate(PROMPTS[0], params_of(0, 12, n=4, logprobs=0), use_tqdm=False)[0].outputs
        best = sorted(every, key=lambda answer: -answer.cumulative_logprob)[:2]
        assert [(a.index, a.text) for a in output.outputs] == [(a.index, a.text) for a in best]

    @pytest.mark.parametrize("kwargs", [{}, {"logprobs": 1}])
    def test_answers_keep_their_number_with_logprobs_or_without(self, llm, kwargs):
        llm.engine.add_request("r", PROMPTS[0], params_of(0, 12, n=3, **kwargs))
        tokens = {}
        while llm.engine.has_unfinished_requests():
            for output in llm.engine.step():
                for answer in output.outputs:
                    old = tokens.setdefault(answer.index, [])
                    assert answer.token_ids[: len(old)] == old
                    tokens[answer.index] = answer.token_ids
        assert sorted(tokens) == [0, 1, 2]


class TestOneCaller:
    def test_outputs_that_change_later_change_nothing(self, llm):
        engine = llm.engine
        params = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1, "n": 8}

        (whole,) = llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), False)
        stop = whole.outputs[0].text[12:15]

        def answers(spoil: bool) -> list[tuple[list[int], str, float, int]]:
            for name in ("a", "b"):
                engine.add_request(name, [5, 6, 7, 8], SamplingParams(**params, stop=[stop]))
            found = []
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        found += [
                            (each.token_ids, each.text, each.cumulative_logprob, len(output.prompt_logprobs))
                            for each in output.outputs
                        ]
                    elif spoil:
                        output.prompt_token_ids.append(9)
                        output.prompt_logprobs.clear()
                        for each in output.outputs:
                            each.token_ids.clear()
                            for logprobs in each.logprobs:
                                for logprob in logprobs.values():
                                    logprob.logprob = 1.0
                                logprobs.clear()
            return found

        expected = answers(spoil=False)
        assert len(expected[0][0]) < 20 and answers(spoil=True) == expected

    def test_a_closed_sink_takes_no_request(self, llm):
        sink = OutputSink()
        llm.engine.close(sink)
        with pytest.raises(ValueError, match="the sink of request 'a' is closed"):
            llm.engine.add_request("a", "Once", sink=sink)

    def test_a_sink_that_is_gone_keeps_no_name_and_no_block(self, llm):
        sink = OutputSink()
        llm.engine.add_request("a", "Once", SamplingParams(max_tokens=20, ignore_eos=True), sink=sink)
        llm.engine.wait(sink)
        del sink
        gc.collect()
        assert llm.reset_prefix_cache()
        sink = OutputSink()
        llm.engine.add_request("a", "Once", SamplingParams(max_tokens=2, ignore_eos=True), sink=sink)
        while sink.unfinished:
            llm.engine.wait(sink)

    def test_params_that_change_later_change_nothing(self, llm, alone):
        params = params_of(0, 25)
        llm.engine.add_request("first", PROMPTS[0], params)
        llm.engine.step()
        params.max_tokens, params.temperature = 2, 0.0
        params.stop_token_ids.append(5)
        assert finish(llm.engine) == {"first": alone[0, 25]}

    def test_an_engine_leaves_the_callers_random_numbers_alone(self):
        def states():
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

        before = states()
        llm = LLM(str(EMBEDDED_MODEL), **HERE, max_model_len=64)
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=3), use_tqdm=False)
        assert states() == before

    def test_two_engines_with_one_seed_draw_the_same_and_another_seed_does_not(self):
        texts = []
        for seed in (0, 0, 1):
            llm = LLM(str(EMBEDDED_MODEL), **HERE, max_model_len=64, seed=seed)
            params = SamplingParams(max_tokens=30, temperature=2.0, ignore_eos=True)
            texts.append([o.outputs[0].text for o in llm.generate([PROMPTS[0]] * 2, params, use_tqdm=False)])
        assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]

    def test_a_name_is_text(self, llm):
        with pytest.raises(ValueError, match="request_id must be Unicode text") as caught:
            llm.engine.add_request("a\ud800", "Long ago")
        assert str(caught.value).encode()

    @pytest.mark.parametrize(
        "prompt",
        [
            b"bytes",
            {},
            {"prompt": [5]},
            {"prompt_token_ids": "a"},
            {"prompt": "a", "prompt_token_ids": "a"},
            3.5,
            None,
            {"prompt": "a", "salt": "x"},
            {"prompt": b"a"},
            {"prompt": "a", "cache_salt": ""},
            {"prompt": "a", "cache_salt": "\ud800"},
            {"prompt": "\ud800", "prompt_token_ids": [5]},
            [[]],
            [5.5],
            ["a", 5],
        ],
        ids=repr,
    )
    def test_what_is_no_prompt_is_one_sentence(self, llm, prompt):
        with pytest.raises(ValueError) as caught:
            llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        assert "\n" not in str(caught.value)

    def test_bools_are_no_token_ids(self, llm):
        with pytest.raises(ValueError, match="prompt must be a list of token ids, got True"):
            llm.generate([True, 5], use_tqdm=False)

    @pytest.mark.parametrize(
        "prompt",
        [(5, 6), np.array([5, 6]), torch.tensor([5, 6]), [np.int64(5), 6], {"prompt_token_ids": (5, 6)}, range(5, 7)],
        ids=repr,
    )
    def test_what_is_as_good_as_a_list_is_taken(self, llm, prompt):
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert output.prompt_token_ids == [5, 6]

    @pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 5, [None, None], [{"n": 1}]], ids=repr)
    def test_what_are_no_params_is_one_sentence(self, llm, params):
        with pytest.raises(ValueError, match="sampling_params must be"):
            llm.generate(PROMPTS[0], params, use_tqdm=False)

    def test_a_hundred_answers_take_turns(self, llm):
        wild = {"temperature": 3.0, "max_tokens": 8, "ignore_eos": True}
        (output,) = llm.generate(PROMPTS[0], SamplingParams(seed=0, n=100, **wild), use_tqdm=False)
        assert [answer.index for answer in output.outputs] == list(range(100))
        assert len({tuple(answer.token_ids) for answer in output.outputs}) > 90
        one = llm.generate(PROMPTS[0], SamplingParams(seed=77, **wild), use_tqdm=False)[0].outputs[0]
        assert output.outputs[77].token_ids == one.token_ids  # seed + index

    def test_as_many_as_are_allowed_start_at_once_and_end_at_once(self, llm):
        llm.engine.add_request("many", PROMPTS[0], params_of(0, 50, n=16_384))
        llm.engine.step()
        assert len(llm.engine.scheduler.requests["many"].sequences) <= 7
        llm.engine.abort_request("many", "enough")
        (output,) = llm.engine.step()
        assert output.finished and len(output.outputs) == 16_384
        assert {answer.finish_reason for answer in output.outputs} == {"abort"}

    @pytest.mark.parametrize("min_tokens, fits", [(60, True), (61, False)])
    def test_min_tokens_that_cannot_fit_is_refused(self, llm, min_tokens, fits):
        prompt, params = [5, 6, 7, 8], SamplingParams(min_tokens=min_tokens, max_tokens=None)
        if fits:
            llm.engine.add_request("r", prompt, params)
            llm.engine.abort_request("r")
            llm.engine.step()
        else:
            with pytest.raises(ValueError, match="min_tokens must fit behind the prompt, got 61 where 60"):
                llm.engine.add_request("r", prompt, params)

    @pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
    @pytest.mark.parametrize("limit, most", [(20, 20), (3, 3), (0, 0), (5_000, -1), (-1, -1)])
    def test_no_more_log_probabilities_than_the_engine_gives(self, name, limit, most):
        settings = {} if limit == 20 else {"max_logprobs": limit}  # 20 is what it gives unless told otherwise
        engine = LLM(str(EMBEDDED_MODEL), **HERE, max_model_len=64, **settings).engine
        engine.add_request("fits", [5, 6], SamplingParams(max_tokens=1, **{name: most}))
        (output,) = engine.step()
        found = output.outputs[0].logprobs if name == "logprobs" else output.prompt_logprobs[1:]
        assert len(found[0]) >= (1294 if most == -1 else most)
        for count in () if most == -1 else (most + 1, -1):
            sentence = rf"{name} must be at most max_logprobs \({limit}\), got {count}: raise max_logprobs"
            with pytest.raises(ValueError, match=sentence):
                engine.add_request("more", [5, 6], SamplingParams(**{name: count}))


class TestHooks:
    def test_a_hook_sees_every_step(self, llm):
        seen = []
        llm.engine.step_hooks.append(lambda *step: seen.append(step))
        try:
            llm.generate(PROMPTS[0], params_of(0, 12), use_tqdm=False)
        finally:
            llm.engine.step_hooks.clear()
        assert len(seen) == 12
        scheduler_output, runner_output, stats = seen[0]
        assert [seq.get_output_len() for seq in scheduler_output.seqs] == [12]  # a hook sees the engine's own objects
        assert len(runner_output.sampled_token_ids) == 1 and stats.num_prefill_tokens > 1
        assert list(stats.seconds) == ["schedule", "run", "update"]

    def test_a_hook_may_do_what_can_be_done_between_two_steps(self, llm, alone):
        engine = llm.engine

        def hook(*step):
            engine.abort_request("mine")
            engine.check_integrity()

        engine.step_hooks.append(hook)
        try:
            engine.add_request("mine", PROMPTS[0], params_of(0, 25))
            text = llm.generate(PROMPTS[1], params_of(1, 12), use_tqdm=False)[0].outputs[0].text
        finally:
            engine.step_hooks.clear()
        assert text == alone[1, 12]
        (output,) = engine.step()
        assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) == 1

    def test_times_come_from_the_clock_that_the_engine_was_given(self):
        class Ticking:
            us = 0

            def now_us(self) -> int:
                self.us += 1_000_000
                return self.us

        engine = LLMEngine(make_engine_config(str(EMBEDDED_MODEL), max_model_len=64), DEVICE, clock=Ticking())
        engine.add_request("r", PROMPTS[0], params_of(0, 1))
        (output,) = engine.step()
        assert (output.metrics.arrival_time, output.metrics.first_token_time) == (1.0, 5.0)
        assert engine.stats()[0].seconds == {"schedule": 1.0, "run": 1.0, "update": 2.0}


class TestDoors:
    """A reader's own parts go in by three doors, and the texts stay the same."""

    def test_a_scheduler_a_cache_manager_and_a_detokenizer(self, alone):
        class LastComeFirst(Scheduler):
            def _admit(self, output, budget):
                self.waiting.reverse()
                super()._admit(output, budget)
                self.waiting.reverse()

        class Pool(BlockPool):
            def allocate(self):
                block_id = next(reversed(self._free))  # the one that was freed last
                self._free.move_to_end(block_id, last=False)
                return super().allocate()

        class Manager(KVCacheManager):
            block_pool_cls = Pool

            @staticmethod
            def hash_block(parent, token_ids):
                return hashlib.sha256(parent + repr(token_ids).encode()).digest()

        class Shouting(Detokenizer):
            @property
            def text(self):
                return super().text.upper()

        class Engine(LLMEngine):
            detokenizer_cls = Shouting

        settings = {"scheduler_cls": LastComeFirst, "kv_cache_manager_cls": Manager, "enable_prefix_caching": True}
        settings |= {"max_num_seqs": 1, "block_size": 4, "dtype": "float32"}
        engine = Engine(make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, **settings), DEVICE)
        for i, prompt in enumerate(PROMPTS[:3]):
            engine.add_request(str(i), prompt, params_of(i, 12))
        order, texts = [], {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    order.append(output.request_id)
                    texts[output.request_id] = output.outputs[0].text
        assert order == ["2", "1", "0"] and isinstance(engine.cache.pool, Pool)
        assert texts == {str(i): alone[i, 12].upper() for i in range(3)}
        assert {len(block_hash) for block_hash in engine.cache.pool._by_hash} == {32}
