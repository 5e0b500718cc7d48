"""Everything at once for 20,000 steps: threads, streams, dropped streams, aborts, bad requests, preemption, caching."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc

import pytest

from folovllm import LLM, SamplingParams
from folovllm.book.judges.pretended import expected_tokens, next_token
from folovllm.engine.detokenizer import Detokenizer
from folovllm.outputs import RunnerOutput
from folovllm.tales import EMBEDDED_MODEL

NUM_STEPS = 20_000
NUM_THREADS = 4
BAD = (
    ([[]], {}),
    ([10**6], {}),
    (b"bytes", {}),
    ([5] * 500, {}),
    ([5], {"stop_token_ids": [10**6]}),
    ([5], {"min_tokens": 100, "max_tokens": None}),
    ("a \udce9", {}),
)


def make_llm() -> LLM:
    """An engine whose model is pretended, so that its steps are fast, and everything else is real."""
    llm = LLM(
        str(EMBEDDED_MODEL),
        device="cpu",
        max_model_len=64,
        num_blocks=30,
        block_size=4,
        max_num_seqs=8,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=24,
        preemption_mode="swap",
        swap_space=1e-4,
        policy="priority",
    )

    def run(scheduler_output):
        found = RunnerOutput([], [])
        for i, (seq, _) in enumerate(scheduler_output.sampled):
            if seq.sampling_params.top_k == 7:  # stands for a row that only a step finds out to be bad
                found.errors[i] = "no token left"
            guesses, text, seed = scheduler_output.get_guesses(seq), seq.get_token_ids(), seq.sampling_params.seed
            for place in range(len(guesses) + 1):
                text.append(next_token(text, seed + seq.index))
                if place < len(guesses) and text[-1] != guesses[place]:
                    break
            found.sampled_token_ids.append(text[seq.get_len() :])
            found.logprobs.append(None)
            next_one = next_token(text, seed + seq.index)
            found.spec_token_ids.append([next_one, 5, 5] if next_one % 2 else [])
        return found

    llm.engine.runner.run = run
    return llm


class Caller:
    """One thread's random life with the engine; what went wrong is in ``wrong``."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.rng, self.name = llm, random.Random(seed), seed
        self.wrong: list[object] = []
        self.done: dict[str, int] = {}

    def request(self) -> tuple[list[int], SamplingParams]:
        # Few beginnings, so that some requests share them.
        prompt = [self.rng.randrange(3, 6) for _ in range(self.rng.randint(1, 30))]
        params = SamplingParams(seed=self.rng.randrange(3), max_tokens=self.rng.randint(1, 30), ignore_eos=True)
        return prompt, params

    def check(self, what: str, ok: bool, *seen: object) -> None:
        self.done[what] = self.done.get(what, 0) + 1
        if not ok:
            self.wrong.append((what, seen))

    def generate(self) -> None:
        prompt, params = self.request()
        params.n = self.rng.randint(1, 3)
        params.best_of = params.n
        (output,) = self.llm.generate([prompt], params, use_tqdm=False, priority=[self.rng.randint(-1, 1)])
        tokens = [answer.token_ids for answer in output.outputs]
        self.check("generate", tokens == [expected_tokens(prompt, params, i) for i in range(params.n)], tokens)

    def stream(self) -> None:
        prompt, params = self.request()
        alone = Detokenizer(self.llm.engine.tokenizer, params, prompt)
        for token_id in expected_tokens(prompt, params):
            alone.add(token_id)
        alone.finish()
        text = "".join(self.llm.stream(prompt, params))
        self.check("stream", text == alone.text, text, alone.text)

    def drop(self) -> None:
        prompt, params = self.request()
        stream = self.llm.stream(prompt, params)
        for _ in range(self.rng.randint(0, 3)):
            next(stream, None)
        del stream
        self.check("drop", True)

    def bad(self) -> None:
        prompt, kwargs = self.rng.choice(BAD)
        try:
            self.llm.generate(prompt, SamplingParams(**kwargs), use_tqdm=False)
            self.check("bad", False, prompt, kwargs)
        except ValueError as error:
            self.check("bad", "\n" not in str(error), error)

    def bad_row(self) -> None:
        prompt, params = self.request()
        params.top_k = 7
        (output,) = self.llm.generate([prompt], params, use_tqdm=False)
        answer = output.outputs[0]
        self.check("bad row", (answer.finish_reason, answer.stop_reason) == ("abort", "no token left"), answer)

    def live(self, stop: threading.Event) -> None:
        actions = [self.generate, self.generate, self.stream, self.drop, self.bad, self.bad_row]
        try:
            while not stop.is_set():
                self.rng.choice(actions)()
        except BaseException as error:  # a thread's own errors are lost unless they are kept
            self.wrong.append(error)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_20000_steps_of_everything_at_once(traced):
    llm = make_llm()
    engine, rng, stop = llm.engine, random.Random(99), threading.Event()
    counted = {"steps": 0, "preempted": 0, "swapped": 0, "cached": 0}

    def count(scheduler_output, _, stats) -> None:
        counted["steps"] += 1
        counted["preempted"] += stats.num_preempted
        counted["swapped"] += len(scheduler_output.swap_in)
        counted["cached"] += stats.num_cached_tokens

    engine.step_hooks.append(count)
    callers = [Caller(llm, seed) for seed in range(NUM_THREADS)]
    threads = [threading.Thread(target=caller.live, args=(stop,), daemon=True) for caller in callers]
    mine, aborted, given, memory = Caller(llm, 50), set(), {}, []
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    for thread in threads:
        thread.start()
    while counted["steps"] < NUM_STEPS and not any(caller.wrong for caller in callers):
        if len(asked) - len(given) < 6:
            name = str(len(asked))
            asked[name] = mine.request()
            engine.add_request(name, *asked[name], priority=rng.randint(-1, 1))
            if rng.random() < 0.2:
                aborted.add(name)
                engine.abort_request(name, "changed my mind")
        given |= {output.request_id: output for output in engine.step() if output.finished}
        if rng.random() < 0.01:
            engine.check_integrity()
        if counted["steps"] // 2500 > len(memory):
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0] - sum(map(len, asked)) - 4000 * len(given))
    stop.set()
    for thread in threads:
        thread.join(60)
    while engine.has_unfinished_requests():
        given |= {output.request_id: output for output in engine.step() if output.finished}

    assert [caller.wrong for caller in callers] == [[]] * NUM_THREADS and not any(t.is_alive() for t in threads)
    assert set(given) == set(asked)
    for name, (prompt, params) in asked.items():
        (answer,) = given[name].outputs
        whole = expected_tokens(prompt, params)
        assert answer.token_ids == whole[: len(answer.token_ids)]
        assert (answer.finish_reason == "length") == (answer.token_ids == whole)
        assert answer.finish_reason == "length" or name in aborted
    gc.collect()
    engine.step()
    engine.check_integrity()
    assert not engine.scheduler.has_unfinished() and not engine.output_processor.states
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert counted["steps"] >= NUM_STEPS and counted["preempted"] > 500
    assert counted["swapped"] > 100 and counted["cached"] > 1000
    for kind in ("generate", "stream", "drop", "bad", "bad row"):
        assert sum(caller.done.get(kind, 0) for caller in callers) > 50
    assert max(memory[-2:]) < min(memory[1:3]) + 2**20, memory
