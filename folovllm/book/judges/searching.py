"""A judge of beam search: step by step beside ours, and many searches at once in an engine."""

from __future__ import annotations

import itertools
import math
import random
from functools import cache
from typing import cast

from folovllm.book.exercises.verdict import NotYet, blame_part, expect, expect_subclass
from folovllm.book.judges.pretended import (
    MAX_MODEL_LEN,
    PretendedRunner,
    tokenizer,
)
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.beam_search import BeamSearch, run_searches
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.output_processor import OutputSink
from folovllm.engine.served_model import ServedModel
from folovllm.llm import make_engine_config
from folovllm.logprobs import Logprob
from folovllm.outputs import BeamSearchSequence, RunnerOutput
from folovllm.sampling_params import BeamSearchParams
from folovllm.tales import EMBEDDED_MODEL

NUM_WORDS = 14
"""Tokens that the pretended model of a search knows."""

SEARCHES: tuple[tuple[list[int], BeamSearchParams, tuple[int, ...]], ...] = (
    ([5], BeamSearchParams(2, 3), ()),
    ([6, 7, 8, 9, 10, 11], BeamSearchParams(3, 6, length_penalty=0.0), (0,)),
    ([9, 8, 7], BeamSearchParams(4, 5, length_penalty=2.0), (0, 1, 2)),
    ([7] * 21, BeamSearchParams(1, 4, length_penalty=0.5), (3, 4)),
    ([6, 5], BeamSearchParams(5, 8), (0, 1)),
    ([8, 9, 10, 11, 12], BeamSearchParams(2, 9, length_penalty=-1.0), (1, 2, 3)),
    ([5, 6, 7, 8, 9, 10], BeamSearchParams(4, 6, length_penalty=0.5), (0, 1, 2)),
)
"""Prompt, params and end tokens of each search of a judge."""


@cache
def next_logprobs(token_ids: tuple[int, ...]) -> dict[int, Logprob]:
    """What the pretended model finds how likely after some tokens, the likeliest first."""
    rng = random.Random(hash(token_ids))
    weights = [rng.uniform(0.01, 1) ** 4 for _ in range(NUM_WORDS)]
    found = {i: Logprob(math.log(weight / sum(weights))) for i, weight in enumerate(weights)}
    return dict(sorted(found.items(), key=lambda item: -item[1].logprob))


class SearchedRunner(PretendedRunner):
    """Tells log probabilities of what it reads through the block table."""

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """As `PretendedRunner.run`, with as many likeliest tokens as are asked for."""
        super().run(scheduler_output)
        found = [
            dict(itertools.islice(next_logprobs(self._read(seq)).items(), cast(int, seq.sampling_params.logprobs)))
            for seq, _ in scheduler_output.sampled
        ]
        return RunnerOutput([[next(iter(each))] for each in found], [[each] for each in found])


def judge_search(attempt: type, ours: type[BeamSearch] = BeamSearch) -> None:
    """Runs a reader's search beside ours, step by step, and then all of `SEARCHES` at once in an engine.

    Args:
        attempt: given to an `LLM` as ``beam_search_cls``.
        ours: what it must do alike.

    Raises:
        NotYet: with the sentence about the first thing that is wrong.
    """
    expect_subclass(attempt, BeamSearch)
    for prompt, params, ends in SEARCHES:
        right, got = (cls(list(prompt), params, ends) for cls in (ours, attempt))
        for step in range(params.max_tokens):
            found = [next_logprobs(tuple(text.tokens)) for text in right.beams]
            likeliest = [dict(itertools.islice(each.items(), right.num_candidates)) for each in found]
            right.step(likeliest)
            try:
                got.step(likeliest)
                _compare_search(right, got, f"step {step} of a beam of {params.beam_width}")
            except NotYet:
                raise
            except Exception as error:
                raise NotYet(f"step {step}: {blame_part(error)}.") from error
            if not right.beams:
                break
    _search_in_engine(attempt, ours)


def _compare_search(right: BeamSearch, got: BeamSearch, where: str) -> None:
    num_prompt, params = len(right.prompt_token_ids), right.params
    kinds = (("go on", right.beams, got.beams), ("have ended", right.finished, got.finished))
    for kind, ours, yours in kinds:
        shown, told = ([text.tokens[num_prompt:] for text in texts] for texts in (ours, yours))
        settings = f"length_penalty={params.length_penalty:g}, ends {[*right.end_token_ids]}"
        expect(shown == told, f"after {where} ({settings}) {shown} {kind}, and by yours {told}.")
        for one, other in zip(ours, yours):
            output = other.tokens[num_prompt:]
            expect(other.tokens == one.tokens, f"{where}: a text's tokens begin with the prompt's, which are lost.")
            expect(
                math.isclose(one.cum_logprob, other.cum_logprob, abs_tol=1e-9),
                f"after {where} the sum of {output} should be {one.cum_logprob:.3f}, yours is {other.cum_logprob:.3f}.",
            )
            expect(
                one.finish_reason == other.finish_reason,
                f"after {where} the finish_reason of {output} should be {one.finish_reason!r}, yours is "
                f"{other.finish_reason!r}.",
            )
            expect(one.logprobs == other.logprobs, f"after {where} the logprobs of {output} are not what it had.")


def _search_in_engine(attempt: type, ours: type[BeamSearch]) -> None:
    found: list[list[list[BeamSearchSequence]]] = []
    for cls in (ours, attempt):
        settings = {"block_size": 2, "num_blocks": 200, "max_num_seqs": 8, "enable_prefix_caching": True}
        config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=MAX_MODEL_LEN, **settings)
        engine = LLMEngine(config, model=ServedModel(SearchedRunner(200, 2), NUM_WORDS, 512, tokenizer()))
        searches = [cls(list(prompt), params, ends) for prompt, params, ends in SEARCHES]
        sink = OutputSink()
        try:
            for _ in run_searches(engine, sink, searches):
                engine.check_integrity()
        except Exception as error:
            raise NotYet(f"in the engine: {blame_part(error)}.") from error
        finally:
            engine.close(sink)
        found.append([search.finished for search in searches])
    expect(found[0] == found[1], "side by side in the engine, your searches find other texts than alone.")
