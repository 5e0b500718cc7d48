"""The numbers behind the figures of chapter 17, and of what they are drawn from."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from figure_helpers import heights, legend, line, texts
from matplotlib.axes import Axes

from folovllm import LLM, BeamSearchParams
from folovllm.book import plotting
from folovllm.book.searching import SearchStep, grammar_logprob, record_search
from folovllm.engine.beam_search import BeamSearch
from folovllm.outputs import BeamSearchSequence
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.grammar import sample


class Letters:
    """A tokenizer of three tokens."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(" " + "abc"[token_id] for token_id in token_ids)


def text(*tokens: int, p: float, ends: bool = False) -> BeamSearchSequence:
    return BeamSearchSequence([*tokens], [], math.log(p), finish_reason="stop" if ends else None)


STEPS = [
    SearchStep([text(0, p=0.5), text(1, p=0.3)], [0, 0], [[0, 1]], 5),
    SearchStep([text(1, 2, p=0.25), text(1, 0, p=0.125), text(1, 1, p=0.06, ends=True)], [1] * 3, [[0, 2], [0, 3]], 4),
    SearchStep([text(1, 0, 1, p=0.1), text(1, 2, 1, p=0.05)], [1, 0], [[0, 2, 4], [0, 2, 5]], 2),
]
DRAWN = [-20.0, -21.5, -22.5, -22.6, -25.0]

FIGURES: dict[str, Callable[[], Axes | np.ndarray]] = {
    "plot_beam_tree": lambda: plotting.plot_beam_tree(STEPS, Letters(), [1, 0, 1]),
    "plot_search_blocks": lambda: plotting.plot_search_blocks(STEPS),
    "plot_width": lambda: plotting.plot_width([1, 2, 4], {"tales": [-20, -18, -17]}, "nats", -16.5),
    "plot_likelihoods": lambda: plotting.plot_likelihoods(DRAWN, {"greedy": -14.0, "beam": -13.0}),
}


def test_numbers_of_beam_tree() -> None:
    ax = plotting.plot_beam_tree(STEPS, Letters(), [1, 0, 1])
    labels = ["␣a 0.500", "␣b 0.300", "␣c 0.250", "␣a 0.125", "end 0.060", "␣b 0.100", "␣b 0.050"]
    assert [label.replace("\n", " ") for label in texts(ax)] == labels
    assert legend(ax) == ["the best at the end", "goes on", "has ended", "is dropped"]
    assert "'␣b ␣a ␣b', has a probability of 0.100, and it stands in rows 2, 2 and 1 of the drawing" in ax.figure.alt
    assert "1 texts are dropped" in ax.figure.alt


def test_numbers_of_search_blocks() -> None:
    ax = plotting.plot_search_blocks(STEPS)
    assert "Map of 6 blocks along 3 steps" in ax.figure.alt
    assert "In step 2 the tables of 2 texts have 6 entries, which are 4 different blocks, 2 of them in every" in (
        ax.figure.alt
    )


def test_numbers_of_width() -> None:
    ax = plotting.plot_width([1, 2, 4], {"tales": [-20, -18, -17]}, "nats", -16.5)
    assert line(ax, "tales") == ([1, 2, 4], [-20, -18, -17])
    told = "nats, for widths of the beam of 1, 2 and 4: tales -20, -18 and -17. The best there is: -16.5."
    assert told in ax.figure.alt


def test_numbers_of_likelihoods() -> None:
    ax = plotting.plot_likelihoods(DRAWN, {"greedy": -21.0, "beam": -13.0})
    assert heights(ax) == [1, 0, 2, 1, 1] and [label.strip() for label in texts(ax)] == ["beam", "greedy"]
    assert (
        "greedy at -21, with 1 of them at least as likely; beam at -13, with 0 of them at least as likely"
        in ax.figure.alt
    )


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(EMBEDDED_MODEL), device="cpu", enable_prefix_caching=True, block_size=4)


def test_a_search_is_recorded(llm: LLM) -> None:
    params = BeamSearchParams(3, 5)
    output, steps = record_search(llm, "Once upon a time, in the", params)
    (again,) = llm.beam_search("Once upon a time, in the", params, use_tqdm=False)
    assert [found.tokens for found in output.sequences] == [found.tokens for found in again.sequences]
    assert [len(step.texts) for step in steps] == [3] * 5 and [len(step.tables) for step in steps] == [1, 3, 3, 3, 3]
    for before, step in itertools.pairwise(steps):
        for found, parent in zip(step.texts, step.parents):
            assert found.tokens[:-1] == before.texts[parent].tokens
    assert steps[-1].texts == output.sequences
    num_prompt = len(llm.get_tokenizer().encode("Once upon a time, in the"))
    assert steps[0].num_computed == num_prompt
    assert [step.num_computed for step in steps[1:]] == [3 * ((num_prompt + i) % 4 + 1) for i in range(4)]
    assert llm.beam_search_cls is BeamSearch and llm.engine.runner.run.__name__ == "run"


def test_the_grammars_probability_is_that_of_the_document() -> None:
    rng = random.Random(0)
    for start in ("Once upon a time", "从前"):
        for _ in range(20):
            document = sample(rng, start=start)
            assert math.isclose(grammar_logprob(document.text, start), document.logprob)


def test_the_grammars_probability_of_other_texts() -> None:
    prompt = "Once upon a time, in the"
    total = sum(1 / rank for rank in range(1, 11))
    assert math.isclose(grammar_logprob(prompt + " forest, there", prompt), math.log(1 / total))
    assert math.isclose(grammar_logprob(prompt + " for", prompt), math.log(1 / total))
    assert grammar_logprob(prompt + " kitchen", prompt) == -math.inf
    assert grammar_logprob(prompt, prompt) == 0.0
