"""Every planted fault is noticed by the judges that judge our own engine, whose parts all pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from folovllm import LLMEngine, SamplingParams, SequenceStatus
from folovllm.attention import AttentionBackend
from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import NotYet
from folovllm.book.few_bits import WeightReader
from folovllm.book.in_place import InPlaceAttention
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.beam_search import BeamSearch
from folovllm.engine.detokenizer import Detokenizer
from folovllm.sample.structured_output import GuidanceBackend
from folovllm.worker.model_runner import ModelRunner

PARTS = {
    Scheduler: "step|r\\d+ gets other tokens",
    KVCacheManager: "step|r\\d+ gets other tokens",
    ModelRunner: "other tokens",
    InPlaceAttention: "other tokens",
    GuidanceBackend: "allowed|aborted",
    Detokenizer: "yours shows|should see",
    WeightReader: "zero points of row 0",
    BeamSearch: "and by yours",
}
"""The kinds of parts, and what the judges' sentences about them look like."""


def judge(part: type[Any]) -> None:
    """Puts a part into an engine by whichever judge fits."""
    if issubclass(part, Detokenizer):
        judges.judge_detokenizer(part)
    elif issubclass(part, BeamSearch):
        judges.judge_search(part)
    elif issubclass(part, GuidanceBackend):
        judges.judge_grammars(part)
    elif issubclass(part, ModelRunner):
        judges.judge_runner(part)
        judges.judge_runner(part, guessing=True)
    elif issubclass(part, WeightReader):
        judges.judge_reader(part)
    elif issubclass(part, AttentionBackend):
        judges.judge_attention(part)
    else:

        def make(settings: Mapping[str, Any]) -> LLMEngine:
            return faults.replace_part(judges.make_engine(settings), part)

        judges.judge_engine(make)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    part = faults.FAULTS[fault]
    kind = next(kind for kind in PARTS if issubclass(part, kind))
    with pytest.raises(NotYet, match=PARTS[kind]) as caught:
        judge(part)
    assert "your code raised" not in str(caught.value), "a fault is to be a wrong answer, not a crash"


@pytest.mark.parametrize("kind", PARTS)
def test_our_own_part_is_sound(kind: type) -> None:
    judge(type(f"My{kind.__name__}", (kind,), {}))


def test_the_doors_lead_to_the_same_judges() -> None:
    judges.judge_scheduler(Scheduler, same_steps=True)
    judges.judge_cache(KVCacheManager)
    for judge_part, part in ((judges.judge_scheduler, faults.YoungestFirst), (judges.judge_cache, faults.LeaksABlock)):
        with pytest.raises(NotYet):
            judge_part(part)


def test_a_fault_is_planted_by_its_name() -> None:
    engine = judges.make_engine(judges.SETTINGS[0])
    for fault in ("some never get an answer", "memory runs out by evening", "broken letters"):
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
        if num_new := self._admit_waiting(seq := self.waiting[0], output, budget):
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            output.add(seq, num_new)


@pytest.mark.parametrize(
    "attempt, sentence",
    [
        (3, "begins with `class Name\\(Scheduler\\):`, and yours does not"),
        (type("Other", (), {}), "begins with `class Name"),
        (type("Endless", (Scheduler,), {"_admit": endless}), "a loop does not end"),
        (type("Nobody", (Scheduler,), {"_admit": lambda *_: None}), "computes nothing"),
        (
            type("Broken", (Scheduler,), {"_admit": lambda self, output: None}),
            "the engine cannot work with what your class",
        ),
        (
            type("NotBuilt", (Scheduler,), {"__init__": lambda self: None}),
            "before the first step: the engine cannot work with",
        ),
    ],
)
def test_a_wrong_scheduler_gets_a_sentence(attempt: Any, sentence: str) -> None:
    with pytest.raises(NotYet, match=sentence):
        judges.judge_scheduler(attempt)
