"""The report's arithmetic, on requests that were written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from unit_helpers import error_of

from folovllm.engine.stats import StepStats
from folovllm.simulator.cost import StepCost
from folovllm.simulator.report import METRICS, Report, RequestRecord, StepRecord, percentile


def record(name: str, arrival: float, *token_times: float) -> RequestRecord:
    return RequestRecord(name, 0, arrival, 1, arrival + 0.25, list(token_times))


def make_report() -> Report:
    requests = [record("a", 0.0, 1.0, 2.0, 4.0), record("b", 1.0, 1.5), record("c", 8.0, 9.0, 10.0)]
    stats = [StepStats(num_queried_tokens=30, num_cached_tokens=12, num_preempted=1), StepStats(num_queried_tokens=10)]
    steps = [StepRecord(0, start, start + 1, StepCost(1.0, 0.0), each) for start, each in zip((0.0, 8.0), stats)]
    tokens = sorted(time for request in requests for time in request.token_times)
    return Report(requests, steps, 0.0, 10.0, 3.6, tokens)


def test_the_times_of_a_request():
    request = record("a", 0.5, 1.0, 2.0, 4.0)
    assert (request.queue, request.ttft, request.tpot, request.e2e) == (0.25, 0.5, 1.5, 3.5)
    assert request.itl == [1.0, 2.0] and request.num_output_tokens == 3 and request.finished == 4.0


def test_one_token_has_no_time_per_further_token():
    assert record("a", 0.0, 1.0).tpot is None
    assert make_report().values("tpot") == [1.5, 1.0]


def test_a_report_counts():
    report = make_report()
    assert report.throughput == 0.6 and report.seconds == 10.0
    assert report.hit_rate == 0.3 and report.num_preemptions == 1
    assert report.dollars_per_million_tokens == pytest.approx(3.6 * 10 / 3600 / 6 * 1e6)
    assert report.values("ttft") == [1.0, 0.5, 1.0] and report.percentile("ttft", 50) == 1.0


def test_a_window_has_what_happens_in_it():
    window = make_report().steady(1.0, 9.5)
    assert [request.request_id for request in window.requests] == ["b", "c"]
    assert window.tokens == [1.0, 1.5, 2.0, 4.0, 9.0] and window.throughput == pytest.approx(5 / 8.5)
    assert [step.start for step in window.steps] == [8.0]
    assert "none from 20 s to 30 s" in error_of(make_report().steady, 20, 30)


def test_goodput_is_what_met_every_bound():
    report = make_report()
    assert report.attainment(ttft=0.6) == pytest.approx(1 / 3)
    assert report.attainment(itl=1.0) == pytest.approx(2 / 3)
    assert report.goodput(ttft=1.0, tpot=1.2) == pytest.approx(2 / 10)
    assert report.goodput() == pytest.approx(3 / 10)
    assert "metric must be" in error_of(report.goodput, latency=1)


@pytest.mark.parametrize("percent", [0, 1, 12.5, 50, 99, 100])
@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 1.5, 9.0]])
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_of_nothing_are_refused():
    assert "at least one number" in error_of(percentile, [], 50)
    assert "from 0 to 100" in error_of(percentile, [1.0], 101)


def test_a_report_prints_every_metric():
    text = str(make_report())
    assert all(f"\n{metric}" in text for metric in METRICS)
    assert "computed, not measured" in text and "per million output tokens" in text
