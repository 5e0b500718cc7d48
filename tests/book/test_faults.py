"""Every planted fault is noticed by the judges that judge our own engine, whose parts all pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from folovllm import LLMEngine, SamplingParams
from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import NotYet
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.detokenizer import Detokenizer
from folovllm.llm import make_engine_config
from folovllm.tales import EMBEDDED_MODEL
from folovllm.worker.model_runner import ModelRunner

ARRIVALS = [
    judges.Arrival(
        str(i),
        list(range(10 + 7 * i, 10 + 7 * i + length)),
        SamplingParams(temperature=1.0, seed=i, n=n, max_tokens=12, ignore_eos=True),
        step,
    )
    for i, (length, n, step) in enumerate([(12, 1, 0), (20, 2, 0), (16, 1, 3), (5, 1, 9)])
]

PARTS = {
    Scheduler: "step|r\\d+ gets other tokens",
    KVCacheManager: "step|r\\d+ gets other tokens",
    ModelRunner: "other tokens",
    Detokenizer: "yours shows|should see",
}
"""The kinds of parts, and what the judges' sentences about them look like."""


def embedded_engine() -> LLMEngine:
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, block_size=16, num_blocks=16)
    return LLMEngine(config, "cpu")


@pytest.fixture(scope="module")
def tokens_alone() -> dict[tuple[str, int], list[int]]:
    """What the embedded model answers to each request alone."""
    engine = embedded_engine()
    outputs = [judges.drive(engine, [judges.Arrival(a.name, a.prompt, a.params)])[a.name] for a in ARRIVALS]
    return {(o.request_id, answer.index): answer.token_ids for o in outputs for answer in o.outputs}


def judge(part: type[Any], tokens_alone: dict[tuple[str, int], list[int]]) -> None:
    """Puts a part into an engine by whichever judge fits."""
    if issubclass(part, Detokenizer):
        judges.judge_detokenizer(part)
    elif issubclass(part, ModelRunner):
        engine = faults.replace_part(embedded_engine(), part)
        judges.Watch(engine)
        outputs = judges.drive(engine, ARRIVALS)
        judges.check_outputs(ARRIVALS, outputs, lambda a, index: tokens_alone[a.name, index])
    else:

        def make(settings: Mapping[str, Any]) -> LLMEngine:
            return faults.replace_part(judges.make_engine(settings), part)

        judges.judge_engine(make)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_noticed(fault: str, tokens_alone: dict[tuple[str, int], list[int]]) -> None:
    part = faults.FAULTS[fault]
    kind = next(kind for kind in PARTS if issubclass(part, kind))
    with pytest.raises(NotYet, match=PARTS[kind]) as caught:
        judge(part, tokens_alone)
    assert "your code raised" not in str(caught.value), "a fault is to be a wrong answer, not a crash"


@pytest.mark.parametrize("kind", PARTS)
def test_our_own_part_is_sound(kind: type, tokens_alone: dict[tuple[str, int], list[int]]) -> None:
    judge(type(f"My{kind.__name__}", (kind,), {}), tokens_alone)


def test_the_doors_lead_to_the_same_judges() -> None:
    judges.judge_scheduler(Scheduler, same_steps=True)
    judges.judge_cache(KVCacheManager)
    for judge_part, part in ((judges.judge_scheduler, faults.YoungestFirst), (judges.judge_cache, faults.LeaksABlock)):
        with pytest.raises(NotYet):
            judge_part(part)


def test_a_fault_is_planted_by_its_name() -> None:
    engine = judges.make_engine(judges.SETTINGS[0])
    for fault in ("the newest is served first", "memory runs out by evening", "broken letters"):
        assert faults.plant(engine, fault) is engine
    assert type(engine.scheduler) is faults.YoungestFirst and type(engine.cache) is faults.LeaksABlock
    assert engine.scheduler.cache is engine.cache
    assert engine.output_processor.detokenizer_cls is faults.HalfCharacters


def test_what_cannot_be_planted_is_refused() -> None:
    engine = judges.make_engine(judges.SETTINGS[0])
    with pytest.raises(ValueError, match=r"fault must be one of .*'broken letters'.*got 'broken legs'"):
        faults.plant(engine, "broken legs")
    with pytest.raises(ValueError, match="got int"):
        faults.replace_part(engine, int)
    engine.add_request("r", [5], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="while no request is unfinished"):
        faults.plant(engine, "broken letters")


def endless(self: Any, output: Any, budget: int) -> None:
    while self.waiting and len(self.running) < self.config.max_num_seqs:
        if self._admit_waiting(seq := self.waiting[0], output, budget):
            self.running.append(seq)


@pytest.mark.parametrize(
    "attempt, sentence",
    [
        (3, "begins with `class Name\\(Scheduler\\):`, yours is 3"),
        (type("Other", (), {}), "begins with `class Name"),
        (type("Endless", (Scheduler,), {"_admit": endless}), "a loop does not end"),
        (type("Nobody", (Scheduler,), {"_admit": lambda *_: None}), "computes nothing"),
        (type("Broken", (Scheduler,), {"_admit": lambda self, output: None}), "your code raised TypeError"),
        (type("NotBuilt", (Scheduler,), {"__init__": lambda self: None}), "before the first step: your code raised"),
    ],
)
def test_a_wrong_scheduler_gets_a_sentence(attempt: Any, sentence: str) -> None:
    with pytest.raises(NotYet, match=sentence):
        judges.judge_scheduler(attempt)
