"""Checks of the exercises of chapter 12."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from folovllm.book import faults, judges
from folovllm.book.exercises.verdict import exercise, expect, expect_subclass
from folovllm.core.scheduler import Scheduler, SchedulerOutput

PASSES = (
    (1188, 2048, 1, 1, "it fits into one step"),
    (1188, 32, 1, 39, "each step has room for 31 tokens beside the stream"),
    (1188, 32, 0, 38, "with no stream each step has room for 32"),
    (31, 32, 1, 1, "31 tokens and one stream fill the step exactly"),
    (32, 32, 1, 2, "the 32nd token does not fit beside the stream"),
    (5, 4, 3, 5, "three streams leave one token per step"),
    (100, 20, 10, 10, "ten streams leave half of the budget"),
    (1, 8, 2, 1, "a single token takes a step, too"),
)
"""Prompt, budget, streams, steps, and why."""


@exercise("the streams take their tokens first, and the last chunk may be small.")
def check_count_passes(attempt: Callable[[int, int, int], int]) -> None:
    """``attempt(prompt_len, budget, num_decoding)``: steps in which a prompt is read beside so many streams."""
    for prompt_len, budget, num_decoding, right, why in PASSES:
        got = attempt(prompt_len, budget, num_decoding)
        expect(
            got == right,
            f"prompt {prompt_len}, budget {budget}, streams {num_decoding}: {right} ({why}), yours says {got}.",
        )


def _stairs(stairs: Mapping[int, float]) -> Callable[[int], float]:
    """The time of a step: that of the first stair that is as wide as the step."""
    return lambda num_tokens: next(seconds for width, seconds in sorted(stairs.items()) if num_tokens <= width)


BUDGETS: tuple[tuple[Mapping[int, float], int, float, int, int, str], ...] = (
    ({256: 0.008, 999: 0.030}, 4, 0.010, 512, 256, "257 tokens take 30 ms"),
    ({255: 0.008, 999: 0.030}, 4, 0.010, 512, 255, "256 tokens take 30 ms"),
    ({256: 0.010, 999: 0.030}, 4, 0.010, 512, 256, "exactly 10 ms keeps the promise"),
    ({999: 0.008}, 4, 0.010, 512, 512, "every step keeps the promise, so the limit is the budget"),
    ({999: 0.008}, 4, 0.010, 64, 64, "every step keeps the promise, and the limit is 64 this time"),
    ({999: 0.030}, 4, 0.010, 512, 0, "no step keeps the promise"),
    ({999: 0.008}, 4, 0.010, 4, 0, "the limit leaves nothing for a prompt beside four streams"),
    ({5: 0.008, 999: 0.030}, 4, 0.010, 512, 5, "5 tokens are just enough for four streams and a prompt"),
    ({4: 0.008, 999: 0.030}, 4, 0.010, 512, 0, "a budget of 4 leaves nothing for a prompt beside four streams"),
    ({100: 0.008, 200: 0.040, 999: 0.050}, 0, 0.045, 300, 200, "201 tokens take 50 ms"),
    ({1: 0.008, 999: 0.030}, 0, 0.010, 64, 1, "without streams a budget of one token is small, and right"),
)
"""Stairs, streams, promise, limit, budget, and why."""


@exercise("the largest step that keeps the promise, with room for every stream and a piece of a prompt.")
def check_choose_budget(attempt: Callable[[Callable[[int], float], int, float, int], int]) -> None:
    """``attempt(step_seconds, num_decoding, slo, limit)``: the largest budget that keeps a promise, or 0."""
    for stairs, num_decoding, slo, limit, right, why in BUDGETS:
        got = attempt(_stairs(stairs), num_decoding, slo, limit)
        expect(
            got == right and not isinstance(got, bool),
            f"{num_decoding} streams, at most {slo * 1e3:g} ms, a limit of {limit}: {right} ({why}), yours says {got}.",
        )


class _Considerate(Scheduler):
    """What the exercise asks for."""

    small = 16

    def schedule(self) -> SchedulerOutput:
        """Decides the next step, with the small budget while somebody decodes."""
        is_decoding = any(seq.get_output_len() for seq in self.running)
        whole = self.config.max_num_batched_tokens or 0
        self.max_num_batched_tokens = self.small if is_decoding else whole
        return super().schedule()


CHUNKED: tuple[dict[str, Any], ...] = tuple(
    {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 6,
        "block_size": 4,
        "num_blocks": num_blocks,
    }
    for budget, num_blocks in ((48, 200), (30, 200), (64, 200), (30, 24))
)
"""Engines for the considerate scheduler; the last has too few blocks for all who come."""


@exercise("small steps while somebody reads along, large ones while nobody does.")
def check_considerate(attempt: type) -> None:
    """``attempt``: a `Scheduler` that uses the budget ``small`` in steps in which somebody decodes."""
    expect_subclass(attempt, Scheduler)
    asked: Any = getattr(attempt, "small", None)
    expect(isinstance(asked, int), "the small budget should be an attribute of the class, as in `small = 16`.")
    for small in (asked, 9):
        theirs, ours = (_with_budget(base, small) for base in (attempt, _Considerate))
        for seed, settings in enumerate(CHUNKED):
            found, right = (
                judges.run_watched(judges.make_engine, {**settings, "scheduler_cls": cls}, seed)
                for cls in (theirs, ours)
            )
            budget = settings["max_num_batched_tokens"]
            _compare_sizes(found.steps, right.steps, f"small = {small} and a whole budget of {budget}")


def _with_budget(base: type[Scheduler], small: int) -> type[Scheduler]:
    """The scheduler with another small budget, and with a sentence about a forgotten ``return``."""

    def schedule(self: Scheduler) -> SchedulerOutput:
        output = base.schedule(self)
        expect(isinstance(output, SchedulerOutput), "schedule should return what super().schedule() gives")
        return output

    return type(base.__name__, (base,), {"small": small, "schedule": schedule})


def _compare_sizes(found: list[dict[str, int]], right: list[dict[str, int]], budgets: str) -> None:
    """Says in which step a scheduler first computes more, fewer or other tokens than it should."""
    for step, (theirs, ours) in enumerate(zip(found, right)):
        got, wanted = sum(theirs.values()), sum(ours.values())
        expect(
            got <= wanted,
            f"with {budgets}, step {step} computes {got} tokens and should compute {wanted}: a running sequence has an "
            "output.",
        )
        expect(
            got >= wanted,
            f"with {budgets}, step {step} computes {got} tokens and could compute {wanted}: there is room for more.",
        )
        expect(theirs == ours, f"with {budgets}, step {step} should compute {ours}, yours computes {theirs}.")
    expect(len(found) == len(right), f"with {budgets}, {len(right)} steps are enough, yours takes {len(found)}.")


@exercise("streams first again, and every step is the engine's own.")
def check_steady_stream(attempt: type) -> None:
    """``attempt``: a mended `folovllm.book.faults.LongestFirst`."""
    expect_subclass(attempt, faults.LongestFirst)
    judges.judge_scheduler(attempt, same_steps=True)
