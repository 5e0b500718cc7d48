"""Workloads: what a seed, a file or a list makes of them."""

from __future__ import annotations

import itertools
import math
from statistics import mean, stdev

import pytest
from unit_helpers import error_of

from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.simulator.workload import TimedRequest, chats, from_list, poisson, replay


def gaps(workload) -> list[float]:
    arrivals = [request.arrival for request in workload.requests]
    return [after - before for before, after in itertools.pairwise(arrivals)]


class TestPoisson:
    def test_a_seed_is_a_workload(self):
        one, same, other = (poisson(20, 5, (3, 9), (1, 4), seed=seed) for seed in (1, 1, 2))
        assert one.requests == same.requests != other.requests

    def test_lengths_are_in_their_range(self):
        requests = poisson(200, 5, (3, 9), (1, 4), seed=0).requests
        assert {len(request.prompt) for request in requests} == set(range(3, 10))
        assert {request.params for request in requests} == {1, 2, 3, 4}
        assert [request.request_id for request in requests[:2]] == ["request-0", "request-1"]

    def test_gaps_are_exponential(self):
        found = gaps(poisson(4000, 5, 1, 1))
        assert mean(found) == pytest.approx(1 / 5, rel=0.05)
        assert stdev(found) == pytest.approx(1 / 5, rel=0.05)

    @pytest.mark.parametrize("burstiness", [0.25, 4.0])
    def test_burstiness_is_the_shape_of_the_gaps(self, burstiness):
        found = gaps(poisson(4000, 5, 1, 1, burstiness=burstiness))
        assert mean(found) == pytest.approx(1 / 5, rel=0.1)
        assert stdev(found) / mean(found) == pytest.approx(burstiness**-0.5, rel=0.1)

    def test_an_infinite_rate_is_all_at_once(self):
        assert {request.arrival for request in poisson(9, math.inf, 2, 2).requests} == {0.0}

    def test_prompts_begin_with_one_of_the_prefixes(self):
        requests = poisson(50, 5, 4, 1, prefix_tokens=30, num_prefixes=3).requests
        assert len({tuple(request.prompt[:30]) for request in requests}) == 3
        assert {len(request.prompt) for request in requests} == {34}

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            ((0, 5, 1, 1), "num_requests must be positive"),
            ((1, 0, 1, 1), "rate must be positive"),
            ((1, math.nan, 1, 1), "rate must be positive"),
            ((1, 5, 0, 1), "prompt_tokens must be 1 or more"),
            ((1, 5, 1, (5, 4)), "output_tokens must be 1 or more"),
            ((1, 5, 1, 1.5), "output_tokens must be an integer"),
        ],
    )
    def test_what_cannot_be_is_refused(self, arguments, why):
        assert why in error_of(poisson, *arguments)


class TestChats:
    def test_a_turn_brings_the_next_after_some_thinking(self):
        workload = chats(2, 3, 1.0, system_tokens=5, user_tokens=4, answer_tokens=7, seed=3)
        (first, other) = workload.requests
        assert first.prompt[:5] == other.prompt[:5] and first.prompt != other.prompt
        answer = RequestOutput(first.request_id, None, first.prompt, [CompletionOutput(0, "", [8] * 7)], True)
        second = workload.follow_up(answer, 10.0)
        assert second.prompt[: 9 + 7] == first.prompt + [8] * 7 and len(second.prompt) == 9 + 7 + 4
        assert second.arrival > 10.0 and second.params == 7
        third = workload.follow_up(RequestOutput(second.request_id, None, second.prompt, answer.outputs, True), 20.0)
        assert third is not None and third.request_id == "user-0/3"
        assert workload.follow_up(RequestOutput("user-0/3", None, [1], answer.outputs, True), 30.0) is None


class TestReplay:
    def test_a_trace_is_read(self, tmp_path):
        path = tmp_path / "trace.csv"
        path.write_text(
            "prompt_tokens,output_tokens,arrival_s,prefix_id,prefix_tokens,seen\n8,3,2.5,a,6,x\n10,4,0.5,a,9,y\n5,1,1,,,\n"
        )
        first, second, third = replay(path).requests
        assert [(len(r.prompt), r.params, r.arrival) for r in (first, second, third)] == [
            (10, 4, 0.5),
            (5, 1, 1.0),
            (8, 3, 2.5),
        ]
        assert first.prompt[:6] == third.prompt[:6] and first.prompt[6:8] != third.prompt[6:8]

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (
                "arrival_s,prompt_tokens\n1,2\n",
                "must have the columns arrival_s, prompt_tokens, output_tokens",
            ),
            ("arrival_s;prompt_tokens;output_tokens\n1;2;3\n", "parted by commas; it has ['arrival_s;prompt"),
            ("", "must have the columns"),
            ("arrival_s,prompt_tokens,output_tokens\n1,2\n", "line 2"),
            ("arrival_s,prompt_tokens,output_tokens\n1,2,3\n\n\n\n1,x,2\n", "line 6"),
            ('arrival_s,prompt_tokens,output_tokens,x\n1,2,3,"a\nb"\n1,x,2,\n', "line 4"),
            ("arrival_s,prompt_tokens,output_tokens\ninf,10,2\n", "line 2"),
            ("arrival_s,prompt_tokens,output_tokens\nnan,10,2\n", "line 2"),
            ("arrival_s,prompt_tokens,output_tokens\n1e300,10,2\n", "arrival must be 1e+12 s at most"),
            ('arrival_s,prompt_tokens,output_tokens\n1,2,"' + "x" * 2**18, "cannot be read as a CSV file"),
            ("arrival_s,prompt_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3"),
            ("arrival_s,prompt_tokens,output_tokens\n1,2,0\n", "at least one token"),
            ("arrival_s,prompt_tokens,output_tokens,prefix_tokens\n1,2,3,4\n", "no more shared ones"),
            ("arrival_s,prompt_tokens,output_tokens\n", "at least one request"),
            ("arrival_s,prompt_tokens,output_tokens\n-1,2,3\n", "arrival must be 0 s or later"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, text, why):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        assert why in error_of(replay, path)

    def test_a_missing_file_is_named(self, tmp_path):
        assert "none.csv cannot be read" in error_of(replay, tmp_path / "none.csv")


class TestRequests:
    def test_names_are_unique(self):
        twice = [TimedRequest(0, [1], 1, "a"), TimedRequest(1, [1], 1, "a")]
        assert "must be its own" in error_of(from_list, twice)

    def test_an_integer_is_an_exact_length(self):
        params = TimedRequest(0, [1], 5).own_params()
        assert (params.max_tokens, params.ignore_eos, params.detokenize) == (5, True, False)
        assert params.output_kind is RequestOutputKind.FINAL_ONLY

    def test_params_are_copied(self):
        params = SamplingParams(max_tokens=3, temperature=0.5)
        own = TimedRequest(0, [1], params).own_params()
        assert own.temperature == 0.5 and own.output_kind is RequestOutputKind.FINAL_ONLY
        assert params.output_kind is RequestOutputKind.CUMULATIVE
