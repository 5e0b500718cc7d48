"""What a beam search did, step by step, for the figures of chapter 17, and how likely its texts are by the grammar."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.input_processor import Prompt
from folovllm.llm import LLM
from folovllm.logprobs import Logprob
from folovllm.outputs import BeamSearchOutput, BeamSearchSequence, RunnerOutput
from folovllm.sampling_params import BeamSearchParams
from folovllm.tales.grammar import continuations


@dataclass
class SearchStep:
    """One step of a search."""

    texts: list[BeamSearchSequence]
    """Those that go on after it, the likeliest first, and behind them those that it ended."""
    parents: list[int]
    """For each of these the place of the text that it came from, among those of the step before."""
    tables: list[list[int]] = field(default_factory=list)
    """The block table of each text that was computed."""
    num_computed: int = 0
    """Tokens that were computed."""


def record_search(llm: LLM, prompt: Prompt, params: BeamSearchParams) -> tuple[BeamSearchOutput, list[SearchStep]]:
    """Searches for one prompt; nobody else may use the ``llm`` meanwhile.

    Returns:
        what `folovllm.llm.LLM.beam_search` gives, and a record of each step.
    """
    steps: list[SearchStep] = []
    run, search_cls = llm.engine.runner.run, llm.beam_search_cls
    computed: list[SchedulerOutput] = []
    tables: list[list[int]] = []

    class Recorded(search_cls):  # type: ignore[misc, valid-type]
        def step(self, logprobs: Iterable[dict[int, Logprob]]) -> None:
            before = [text.tokens for text in self.beams]
            super().step(logprobs)
            length = len(before[0]) + 1
            texts = [*self.beams, *(text for text in self.finished if len(text.tokens) == length)]
            parents = [before.index(text.tokens[:-1]) for text in texts]
            num_computed = sum(sum(output.num_new_tokens) for output in computed)
            steps.append(SearchStep(texts, parents, list(tables), num_computed))
            computed.clear()
            tables.clear()

    def recorded_run(scheduler_output: SchedulerOutput) -> RunnerOutput:
        computed.append(scheduler_output)
        tables.extend(list(seq.block_ids) for seq in scheduler_output.seqs)
        return run(scheduler_output)

    llm.beam_search_cls, llm.engine.runner.run = Recorded, recorded_run  # type: ignore[method-assign]
    try:
        (output,) = llm.beam_search([prompt], params, use_tqdm=False)
    finally:
        llm.beam_search_cls, llm.engine.runner.run = search_cls, run  # type: ignore[method-assign]
    return output, steps


def grammar_logprob(text: str, prompt: str) -> float:
    """How likely the grammar finds a text after a prompt, in nats; -inf if it never writes it.

    Args:
        text: the prompt and what follows, its end marker included if the document is complete.
        prompt: its beginning.

    Raises:
        ValueError: if no document of the grammar begins with ``prompt``.
    """
    logprob, prefix = 0.0, prompt
    while len(prefix) < len(text):
        rest = text[len(prefix) :]
        options = continuations(prefix)
        whole = [option for option in options if rest.startswith(option)]
        if not whole:  # it ends inside a word that the grammar knows, or goes on as no document does
            begun = sum(probability for option, probability in options.items() if option.startswith(rest))
            return logprob + math.log(begun) if begun else -math.inf
        logprob += math.log(options[whole[0]])
        prefix += whole[0]
    return logprob
