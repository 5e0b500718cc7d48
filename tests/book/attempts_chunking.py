"""Attempts at the exercises of chapter 12, wrong ones and right ones."""

from __future__ import annotations

import math
from typing import Any, cast

from folovllm.book import faults
from folovllm.core.scheduler import Scheduler


class OnlyAtDoor(Scheduler):
    """Small as soon as anybody runs, even one whose prompt is still being read."""

    small = 16

    def schedule(self) -> Any:
        self.max_num_batched_tokens = self.small if self.running else self.config.max_num_batched_tokens
        return super().schedule()


class AlwaysSmall(Scheduler):
    small = 16

    def schedule(self) -> Any:
        self.max_num_batched_tokens = self.small
        return super().schedule()


class NeverBack(Scheduler):
    """Goes on with the small budget when the last stream has ended."""

    small = 16

    def schedule(self) -> Any:
        if any(seq.get_output_len() for seq in self.running):
            self.max_num_batched_tokens = self.small
        return super().schedule()


class FixedNumbers(Scheduler):
    small = 16

    def schedule(self) -> Any:
        self.max_num_batched_tokens = 16 if any(seq.get_output_len() for seq in self.running) else 48
        return super().schedule()


class TheWrongWay(Scheduler):
    small = 16

    def schedule(self) -> Any:
        streaming = any(seq.get_output_len() for seq in self.running)
        self.max_num_batched_tokens = self.config.max_num_batched_tokens if streaming else self.small
        return super().schedule()


class EveryoneStreams(Scheduler):
    small = 16

    def schedule(self) -> Any:
        streaming = bool(self.running) and all(seq.get_output_len() for seq in self.running)
        self.max_num_batched_tokens = self.small if streaming else self.config.max_num_batched_tokens
        return super().schedule()


class ByItsName(Scheduler):
    """The number of this class, whatever a child of it says."""

    small = 16

    def schedule(self) -> Any:
        streaming = any(seq.get_output_len() for seq in self.running)
        self.max_num_batched_tokens = ByItsName.small if streaming else self.config.max_num_batched_tokens
        return super().schedule()


class OneTokenLeft(Scheduler):
    """Takes whoever has one token left to compute for a stream."""

    small = 16

    def schedule(self) -> Any:
        streaming = any(seq.get_len() - seq.num_computed_tokens == 1 for seq in self.running)
        self.max_num_batched_tokens = self.small if streaming else self.config.max_num_batched_tokens
        return super().schedule()


class TheFirstOnly(Scheduler):
    small = 16

    def schedule(self) -> Any:
        streaming = bool(self.running) and self.running[0].get_output_len() > 0
        self.max_num_batched_tokens = self.small if streaming else self.config.max_num_batched_tokens
        return super().schedule()


class ChangesTheConfig(Scheduler):
    small = 16

    def schedule(self) -> Any:
        if any(seq.get_output_len() for seq in self.running):
            self.config.max_num_batched_tokens = self.small
        return super().schedule()


class StepTooLate(Scheduler):
    small = 16

    def schedule(self) -> Any:
        output = super().schedule()
        streaming = any(seq.get_output_len() for seq in self.running)
        self.max_num_batched_tokens = self.small if streaming else cast(int, self.config.max_num_batched_tokens)
        return output


class PutBack(Scheduler):
    """Right, and leaves the budget as it was."""

    small = 16

    def schedule(self) -> Any:
        before = self.max_num_batched_tokens
        if any(seq.get_output_len() > 0 for seq in self.running):
            self.max_num_batched_tokens = self.small
        output = super().schedule()
        self.max_num_batched_tokens = before
        return output


class NoSmall(Scheduler):
    pass


class ForgetsTheStep(Scheduler):
    small = 16

    def schedule(self) -> Any:
        self.max_num_batched_tokens = self.small


class InALoop(Scheduler):
    """Right, and written by hand."""

    small = 16

    def schedule(self) -> Any:
        self.max_num_batched_tokens = self.config.max_num_batched_tokens
        for seq in self.running:
            if seq.data.output_token_ids:
                self.max_num_batched_tokens = self.small
        return Scheduler.schedule(self)


class StillLongest(faults.LongestFirst):
    pass


class ShortestFirst(faults.LongestFirst):
    """Streams first; but then the prompt that came last is read before the one that came first."""

    def schedule(self) -> Any:
        self.running.sort(key=lambda seq: seq.get_len() - seq.num_computed_tokens)
        return Scheduler.schedule(self)


class ByRank(faults.LongestFirst):
    """A further answer of an early request passes those that came while its prompt was read."""

    def schedule(self) -> Any:
        self.running.sort(key=self._rank)
        return Scheduler.schedule(self)


class Restored(faults.LongestFirst):
    schedule = Scheduler.schedule


WRONG: dict[str, dict[str, Any]] = {
    "check_count_passes": {
        "the whole budget for the prompt": lambda prompt, budget, decoding: -(-prompt // budget),
        "rounds down": lambda prompt, budget, decoding: prompt // (budget - decoding),
        "always one more": lambda prompt, budget, decoding: prompt // (budget - decoding) + 1,
        "one stream always": lambda prompt, budget, decoding: -(-prompt // (budget - 1)),
        "streams on top": lambda prompt, budget, decoding: -(-prompt // (budget + decoding)),
        "prompt and streams together": lambda prompt, budget, decoding: -(-(prompt + decoding) // budget),
        "rounds to the nearest": lambda prompt, budget, decoding: round(prompt / (budget - decoding)),
        "no brackets": lambda prompt, budget, decoding: -(-prompt // budget - decoding),
    },
    "check_choose_budget": {
        "the first that fits": lambda step, decoding, slo, limit: next(
            (n for n in range(decoding + 1, limit + 1) if step(n) <= slo), 0
        ),
        "strictly below": lambda step, decoding, slo, limit: next(
            (n for n in range(limit, decoding, -1) if step(n) < slo), 0
        ),
        "no room for a prompt": lambda step, decoding, slo, limit: next(
            (n for n in range(limit, decoding - 1, -1) if step(n) <= slo), 0
        ),
        "powers of two": lambda step, decoding, slo, limit: max(
            (2**i for i in range(15) if decoding < 2**i <= limit and step(2**i) <= slo), default=0
        ),
        "below the limit": lambda step, decoding, slo, limit: next(
            (n for n in range(limit - 1, decoding, -1) if step(n) <= slo), 0
        ),
        "never gives up": lambda step, decoding, slo, limit: next(
            (n for n in range(limit, decoding, -1) if step(n) <= slo), decoding + 1
        ),
        "streams on top": lambda step, decoding, slo, limit: next(
            (n for n in range(limit, 0, -1) if n + decoding <= limit and step(n + decoding) <= slo), 0
        ),
        "one below the first that breaks it": lambda step, decoding, slo, limit: next(
            (n - 1 for n in range(decoding + 1, limit + 1) if step(n) > slo), limit
        ),
        "the chunk": lambda step, decoding, slo, limit: next(
            (n - decoding for n in range(limit, decoding, -1) if step(n) <= slo), 0
        ),
        "in proportion": lambda step, decoding, slo, limit: int(min(limit, limit * slo / step(limit))),
        "the time": lambda step, decoding, slo, limit: step(limit),
        "truth": lambda step, decoding, slo, limit: step(limit) <= slo,
    },
    "check_considerate": {
        "the engine's own": type("Considerate", (Scheduler,), {"small": 16}),
        "small while anybody runs": OnlyAtDoor,
        "always small": AlwaysSmall,
        "never large again": NeverBack,
        "numbers instead of names": FixedNumbers,
        "the wrong way round": TheWrongWay,
        "only when all decode": EveryoneStreams,
        "no small budget": NoSmall,
        "the number of this class": ByItsName,
        "one token left": OneTokenLeft,
        "only the first": TheFirstOnly,
        "changes the config": ChangesTheConfig,
        "a step too late": StepTooLate,
        "no step": ForgetsTheStep,
        "no scheduler": type("Considerate", (), {"small": 16}),
    },
    "check_steady_stream": {
        "nothing mended": StillLongest,
        "shortest first": ShortestFirst,
        "by request and answer": ByRank,
        "from scratch": Scheduler,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_count_passes": {
        "adds first": lambda prompt, budget, decoding: (prompt + budget - decoding - 1) // (budget - decoding),
        "by math.ceil": lambda prompt, budget, decoding: math.ceil(prompt / (budget - decoding)),
        "chunk by chunk": lambda prompt, budget, decoding: len(range(0, prompt, budget - decoding)),
    },
    "check_choose_budget": {
        "largest of all": lambda step, decoding, slo, limit: max(
            (n for n in range(decoding + 1, limit + 1) if step(n) <= slo), default=0
        )
    },
    "check_considerate": {"in a loop": InALoop, "put back": PutBack},
    "check_steady_stream": {"the parent's": Restored},
}

SAME: dict[str, dict[str, str]] = {
    "check_considerate": {
        change: "the exercise leaves open how small the small budget is"
        for change in ("small = 16 → small = 17", "small = 16 → small = 15")
    }
}
"""Changes of a solution that mean the same, and why."""
