"""Several tokens of one step: the same answers as with one token per step."""

from __future__ import annotations

import itertools

import pytest

from folovllm import LLM, SamplingParams
from folovllm.engine.llm_engine import LLMEngine
from folovllm.logprobs import Logprob
from folovllm.outputs import RunnerOutput
from folovllm.tales import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def llm():
    return LLM(str(EMBEDDED_MODEL), device="cpu", dtype="float32", max_model_len=128)


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
