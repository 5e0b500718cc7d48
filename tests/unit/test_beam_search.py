"""Which texts of a beam search go on and which end, on tables of random probabilities instead of a model."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.engine.beam_search import BeamSearch
from folovllm.logprobs import Logprob
from folovllm.sampling_params import BeamSearchParams

PROMPT = [9, 9, 9]
SMALLEST = 1e-3


class Table:
    """A model: the probabilities of the next token after each output, made of random numbers where they are needed."""

    def __init__(self, numbers, vocab_size):
        self.numbers, self.vocab_size, self.rows = numbers, vocab_size, {}

    def row(self, output):
        if output not in self.rows:
            weights = [self.numbers.uniform(SMALLEST, 1) ** 3 for _ in range(self.vocab_size)]
            self.rows[output] = [math.log(weight / sum(weights)) for weight in weights]
        return self.rows[output]

    def likeliest(self, output, count):
        row = self.row(output)
        best = sorted(range(self.vocab_size), key=lambda token_id: -row[token_id])[:count]
        return {token_id: Logprob(row[token_id]) for token_id in best}

    def logprob(self, output):
        return sum(self.row(output[:i])[token_id] for i, token_id in enumerate(output))


def run(table, params, ends=(), watch=lambda search: None):
    search = BeamSearch(PROMPT, params, ends)
    while search.beams:
        search.step(table.likeliest(output_of(text), search.num_candidates) for text in search.beams)
        watch(search)
    return search


def output_of(text):
    assert text.tokens[: len(PROMPT)] == PROMPT
    return tuple(text.tokens[len(PROMPT) :])


def all_outputs(vocab_size, max_tokens, ends):
    """Every text that ends by itself, or because it is as long as it may be."""
    for length in range(1, max_tokens + 1):
        for output in itertools.product(range(vocab_size), repeat=length):
            if not any(token_id in ends for token_id in output[:-1]) and (output[-1] in ends or length == max_tokens):
                yield output


def greedy(table, max_tokens, ends):
    output = ()
    while len(output) < max_tokens and not (output and output[-1] in ends):
        row = table.row(output)
        output += (row.index(max(row)),)
    return output


SETTINGS = {
    "numbers": st.randoms(use_true_random=False),
    "vocab_size": st.integers(2, 5),
    "max_tokens": st.integers(1, 4),
    "num_ends": st.integers(0, 2),
    "penalty": st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]),
}


@given(**SETTINGS)
def test_a_beam_as_wide_as_all_texts_finds_the_best_of_all(numbers, vocab_size, max_tokens, num_ends, penalty):
    table, ends = Table(numbers, vocab_size), range(min(num_ends, vocab_size - 1))
    outputs = [*all_outputs(vocab_size, max_tokens, ends)]
    params = BeamSearchParams(len(outputs), max_tokens, length_penalty=penalty)
    best = max(table.logprob(output) / len(output) ** penalty for output in outputs)
    found = run(table, params, ends).finished
    assert {output_of(text) for text in found} == {*outputs} and len(found) == len(outputs)
    assert math.isclose(found[0].cum_logprob / len(output_of(found[0])) ** penalty, best)


@given(**SETTINGS)
def test_a_beam_of_one_is_greedy(numbers, vocab_size, max_tokens, num_ends, penalty):
    table, ends = Table(numbers, vocab_size), range(min(num_ends, vocab_size - 1))
    (text,) = run(table, BeamSearchParams(1, max_tokens, length_penalty=penalty), ends).finished
    assert output_of(text) == greedy(table, max_tokens, ends)


@given(**SETTINGS, width=st.integers(1, 6))
def test_what_is_true_of_every_step_and_every_text(numbers, vocab_size, max_tokens, num_ends, penalty, width):
    table, ends = Table(numbers, vocab_size + 10), range(num_ends)
    steps = []

    def watch(search):
        steps.append(len(search.beams))
        sums = [text.cum_logprob for text in search.beams]
        assert sums == sorted(sums, reverse=True) and len(sums) in (0, width)
        assert all(text.finish_reason is None and len(output_of(text)) == len(steps) for text in search.beams)
        assert not {output_of(text)[-1] for text in search.beams} & {*ends}

    search = run(table, BeamSearchParams(width, max_tokens, length_penalty=penalty), ends, watch)
    found, outputs = search.finished, [output_of(text) for text in search.finished]
    assert len(found) == len({*outputs}) == width and len(steps) <= max_tokens
    assert [*map(search.score, found)] == sorted(map(search.score, found), reverse=True)
    for text, output in zip(found, outputs):
        assert text.finish_reason == ("stop" if output[-1] in ends else "length")
        assert text.finish_reason == "stop" or len(output) == max_tokens
        assert math.isclose(text.cum_logprob, table.logprob(output))
        assert len(text.logprobs) == len(output)
        assert all(token_id in found_there for token_id, found_there in zip(output, text.logprobs))


@given(**SETTINGS, width=st.integers(1, 6))
def test_it_is_never_less_likely_than_greedy_unless_greedys_beginning_was_dropped(
    numbers, vocab_size, max_tokens, num_ends, penalty, width
):
    table = Table(numbers, vocab_size + 10)
    best_of_all, dropped = greedy(table, max_tokens, ()), []

    def watch(search):
        begun = [output_of(text) for text in search.beams]
        dropped.extend([1] if begun and best_of_all[: len(begun[0])] not in begun else [])

    search = run(table, BeamSearchParams(width, max_tokens, length_penalty=penalty), (), watch)
    likeliest = max(text.cum_logprob for text in search.finished)
    assert dropped or likeliest >= table.logprob(best_of_all) - 1e-9
    # The first token of greedy is the likeliest, so it is never dropped before the second is chosen.
    assert not dropped or max_tokens > 2


class Written(Table):
    """A model whose probabilities are written down."""

    def __init__(self, probabilities):
        super().__init__(None, len(probabilities[()]))
        self.rows = {output: [math.log(p) for p in row] for output, row in probabilities.items()}


def test_a_wider_beam_may_find_a_less_likely_text():
    """Greedy's beginning is dropped for two that seem better, and turn out to be worse."""
    flat, sharp, halves, thirds = [0.4, 0.3, 0.3], [0.98, 0.01, 0.01], [0.5, 0.49, 0.01], [0.34, 0.33, 0.33]
    probabilities = {(): [0.36, 0.33, 0.31], (0,): flat, (1,): halves, (2,): halves}
    for first, second in itertools.product(range(3), repeat=2):
        probabilities[first, second] = sharp if first == 0 else thirds
    table = Written(probabilities)
    best = [run(table, BeamSearchParams(width, 3)).finished[0] for width in (1, 2)]
    assert [output_of(text) for text in best] == [(0, 0, 0), (1, 0, 0)]
    assert best[1].cum_logprob < best[0].cum_logprob


def test_a_text_ends_only_from_a_place_within_the_width():
    """Token 0 ends. In third place it is dropped; in second it ends a text, and the beam is filled from behind."""
    table = Written({(): [0.18, 0.5, 0.22, 0.1]})
    search = BeamSearch(PROMPT, BeamSearchParams(2, 9), (0,))
    search.step([table.likeliest((), 4)])
    assert ([output_of(text) for text in search.beams], search.finished) == ([(1,), (2,)], [])
    table = Written({(): [0.3, 0.5, 0.1, 0.1]})
    search = BeamSearch(PROMPT, BeamSearchParams(2, 9), (0,))
    search.step([table.likeliest((), 4)])
    assert [output_of(text) for text in search.finished] == [(0,)]
    assert [output_of(text) for text in search.beams] == [(1,), (2,)]


def test_beside_all_ends_there_is_a_candidate_that_goes_on():
    """Also where there are more ends than the beam is wide."""
    assert BeamSearch(PROMPT, BeamSearchParams(1, 5), (6, 7, 8)).num_candidates >= 4


def test_it_is_over_once_as_many_texts_have_ended_as_the_beam_is_wide():
    table = Written({(): [0.5, 0.4, 0.1], (1,): [0.7, 0.2, 0.1], (2,): [0.1, 0.1, 0.8]})
    search = run(table, BeamSearchParams(2, 9), (0,))
    assert [output_of(text) for text in search.finished] == [(1, 0), (0,)]
    assert [text.finish_reason for text in search.finished] == ["stop", "stop"]


@pytest.mark.parametrize("penalty, best", [(0, (0,)), (0.5, (0,)), (1, (1, 0)), (2, (1, 0))])
def test_the_penalty_divides_by_generated_tokens_alone(penalty, best):
    """-0.69 for one token against -1.27 for two: divided by 2 and by 4 the longer one is better."""
    table = Written({(): [0.5, 0.4, 0.1], (1,): [0.7, 0.2, 0.1], (2,): [0.1, 0.1, 0.8]})
    search = run(table, BeamSearchParams(2, 9, length_penalty=penalty), (0,))
    assert output_of(search.finished[0]) == best
    for text in search.finished:
        assert search.score(text) == text.cum_logprob / len(output_of(text)) ** penalty


def test_an_error_ends_it_and_what_had_ended_before_stays():
    table = Written({(): [0.5, 0.4, 0.1], (1,): [0.7, 0.2, 0.1], (2,): [0.1, 0.1, 0.8]})
    search = BeamSearch(PROMPT, BeamSearchParams(2, 9), (0,))
    search.step([table.likeliest((), 3)])
    search.abort("a reason")
    assert [(output_of(text), text.finish_reason, text.stop_reason) for text in search.finished] == [
        ((0,), "stop", None),
        ((1,), "abort", "a reason"),
    ]
    assert not search.beams
