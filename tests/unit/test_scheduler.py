"""Who runs in a step: first come, first served, within a budget, and who makes room."""

from __future__ import annotations

import pytest

from folovllm import Request, SamplingParams, SchedulerConfig, SequenceStatus
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.logprobs import Logprob
from folovllm.outputs import RunnerOutput


def make_request(name, length, n=1, max_tokens=None, **kwargs):
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return Request(name, None, list(range(2, 2 + length)), params, num_pending=n, **kwargs)


def make(lens, num_blocks=64, num_swap_blocks=0, priorities=None, caching=False, **config):
    """A scheduler with a request of each length waiting, named 0, 1, 2 …, blocks of four."""
    config = {"max_num_batched_tokens": 64, "max_model_len": 64, **config}
    scheduler = Scheduler(SchedulerConfig(**config), KVCacheManager(num_blocks, 4, caching, num_swap_blocks))
    for i, length in enumerate(lens):
        priority = 0 if priorities is None else priorities[i]
        scheduler.add_request(make_request(str(i), length, priority=priority))
    return scheduler


def step(scheduler):
    """Schedules, computes and gives a token to each sequence that is ready: ``{request: tokens computed}``."""
    output = scheduler.schedule()
    num_sampled = len(output.sampled)
    scheduler.update_from_output(output, RunnerOutput([[1] for _ in range(num_sampled)], [None] * num_sampled))
    return {seq.request_id: num_new for seq, num_new in zip(output.seqs, output.num_new_tokens)}


def names(seqs):
    return [seq.request_id for seq in seqs]


def test_a_prompt_at_once_then_one_token_per_step():
    scheduler = make([5, 3])
    assert step(scheduler) == {"0": 5, "1": 3}
    assert step(scheduler) == {"0": 1, "1": 1}


def test_a_request_that_has_all_its_answers_already():
    scheduler = make([])
    scheduler.add_request(Request("0", None, [2, 3, 4], SamplingParams(n=2, max_tokens=2)))
    assert names(scheduler.waiting) == ["0", "0"]
    while scheduler.has_unfinished():
        step(scheduler)
    assert not scheduler.requests


def test_a_place_must_be_free():
    scheduler = make([5, 3, 2], max_num_seqs=2)
    assert step(scheduler) == {"0": 5, "1": 3}
    scheduler.finish(scheduler.running[0], SequenceStatus.FINISHED_STOPPED)
    assert step(scheduler) == {"1": 1, "2": 2}


def test_a_prompt_that_does_not_fit_the_budget_waits_and_nobody_overtakes_it():
    scheduler = make([40, 40, 2])
    assert step(scheduler) == {"0": 40}
    assert step(scheduler) == {"0": 1, "1": 40, "2": 2}


def test_chunks_fill_the_budget():
    scheduler = make([10, 3], max_num_batched_tokens=6, enable_chunked_prefill=True)
    assert [step(scheduler) for _ in range(4)] == [{"0": 6}, {"0": 4, "1": 2}, {"0": 1, "1": 1}, {"0": 1, "1": 1}]


def test_static_batching_admits_nobody_until_all_are_done():
    scheduler = make([40, 40, 2], batching="static", max_num_seqs=2)
    assert [step(scheduler) for _ in range(3)] == [{"0": 40}, {"0": 1, "1": 40}, {"0": 1, "1": 1}]
    scheduler.finish(scheduler.running[0], SequenceStatus.FINISHED_STOPPED)
    assert step(scheduler) == {"1": 1}
    scheduler.finish(scheduler.running[0], SequenceStatus.FINISHED_STOPPED)
    assert step(scheduler) == {"2": 2}


def test_a_static_batch_that_was_full_takes_nobody_into_a_place_that_is_free_again():
    scheduler = make([5, 3, 2], batching="static", max_num_seqs=2)
    assert step(scheduler) == {"0": 5, "1": 3}
    scheduler.finish(scheduler.running[1], SequenceStatus.FINISHED_STOPPED)
    assert step(scheduler) == {"0": 1}


def test_a_static_batch_that_holds_all_who_waited_takes_nobody_who_comes_later():
    scheduler = make([5], batching="static")
    assert step(scheduler) == {"0": 5}
    scheduler.add_request(make_request("late", 2))
    assert step(scheduler) == {"0": 1}


def test_a_static_batch_that_nobody_joined_for_want_of_room_is_closed():
    scheduler = make([16, 40], num_blocks=12, batching="static")
    assert [step(scheduler) for _ in range(2)] == [{"0": 16}, {"0": 1}]
    scheduler.forget("1")
    scheduler.add_request(make_request("late", 2))
    assert step(scheduler) == {"0": 1}


@pytest.mark.parametrize("mode, queue", [("recompute", "waiting"), ("swap", "swapped")])
def test_the_last_makes_room_and_the_first_comes_back_first(mode, queue):
    scheduler = make([4, 4, 4], num_blocks=3, num_swap_blocks=3, preemption_mode=mode)
    assert step(scheduler) == {"0": 4, "1": 4, "2": 4}
    output = scheduler.schedule()  # 0 needs a second block: 2 makes room; then 1 does, and has to go itself
    assert names(output.seqs) == ["0"] and names(output.preempted) == ["2", "1"]
    assert len(output.swap_out) == (2 if mode == "swap" else 0)
    waiting = getattr(scheduler, queue)
    assert names(waiting) == ["1", "2"] and all(not seq.block_ids for seq in waiting)
    assert all(seq.num_computed_tokens == (4 if mode == "swap" else 0) for seq in waiting)


def test_nobody_is_admitted_in_a_step_that_took_somebodys_blocks():
    scheduler = make([4, 4, 1], num_blocks=2, max_num_seqs=2)
    step(scheduler)
    output = scheduler.schedule()
    assert names(output.preempted) == ["1"] and names(output.seqs) == ["0"]
    assert names(scheduler.waiting) == ["1", "2"]


def test_finish_takes_it_out_of_whichever_queue():
    scheduler = make([4, 4, 4], max_num_seqs=1)
    step(scheduler)
    for seq in [*scheduler.waiting, *scheduler.running]:
        scheduler.finish(seq, SequenceStatus.FINISHED_ABORTED)
        assert seq.is_finished()
    assert not scheduler.has_unfinished() and scheduler.cache.pool.num_free == 64


def test_the_lowest_priority_is_served_first_and_the_highest_makes_room():
    scheduler = make([4, 4, 4], num_blocks=3, priorities=[5, 1, 3], policy="priority")
    assert list(step(scheduler)) == ["1", "2", "0"]
    assert names(scheduler.schedule().preempted) == ["0", "2"] and names(scheduler.waiting) == ["2", "0"]


def test_priorities_mean_nothing_to_first_come_first_served():
    scheduler = make([4, 4, 4], max_num_seqs=2, priorities=[5, 1, 3])
    assert list(step(scheduler)) == ["0", "1"]


def test_first_come_is_who_was_added_first():
    scheduler = make([], max_num_seqs=1)
    for name, arrival in (("late", 9.0), ("early", 1.0)):
        scheduler.add_request(make_request(name, 4, arrival_time=arrival))
    assert list(step(scheduler)) == ["late"]


def test_who_came_first_among_equals():
    scheduler = make([], policy="priority", max_num_seqs=2)
    for name, arrival in (("late", 2.0), ("early", 1.0), ("later", 3.0)):
        scheduler.add_request(make_request(name, 4, arrival_time=arrival))
    assert list(step(scheduler)) == ["early", "late"]


def test_a_chunked_prompt_is_admitted_only_when_the_whole_of_it_fits():
    for reserve, admitted in ((True, {"0": 1}), (False, {"0": 1, "1": 7})):
        scheduler = make(
            [8],
            num_blocks=5,
            max_num_batched_tokens=8,
            enable_chunked_prefill=True,
            scheduler_reserve_full_isl=reserve,
        )
        step(scheduler)
        scheduler.add_request(make_request("1", 16))
        assert step(scheduler) == admitted


def test_a_chunked_prompt_that_begins_too_early_is_computed_twice():
    """Four prompts of 103 tokens, six tokens of output each, in a cache of 48: the last token needs no pass."""
    computed = {}
    for reserve in (True, False):
        scheduler = make(
            [],
            num_blocks=12,
            max_num_batched_tokens=16,
            enable_chunked_prefill=True,
            scheduler_reserve_full_isl=reserve,
        )
        for i, length in enumerate([20, 30, 25, 28]):
            scheduler.add_request(make_request(str(i), length, max_tokens=6))
        computed[reserve] = 0
        while scheduler.has_unfinished():
            computed[reserve] += sum(step(scheduler).values())
    assert computed == {True: 103 + 4 * 5, False: 219}


def test_requests_of_one_step_share_the_prefix_they_have_in_common():
    scheduler = make([9, 9, 9], caching=True)
    assert step(scheduler) == {"0": 9, "1": 1, "2": 1}
    assert [seq.block_ids[:2] for seq in scheduler.running] == [[0, 1]] * 3


class TestAnswers:
    def test_they_start_when_the_prompt_is_complete_and_there_is_a_place(self):
        scheduler = make([], max_num_seqs=3)
        scheduler.add_request(make_request("0", 6, n=5, max_tokens=2))
        output = scheduler.schedule()
        assert [seq.seq_id for seq, _ in output.sampled] == ["0-0", "0-1", "0-2"]
        assert {row for _, row in output.sampled} == {5} and len(output.forks) == 2
        assert [seq.seq_id for seq in scheduler.waiting] == ["0-3"]
        scheduler.update_from_output(output, RunnerOutput([[1], [1], [1]], [None] * 3))
        assert all(seq.num_computed_tokens == 6 for seq in scheduler.running)
        step(scheduler)  # their second and last tokens
        output = scheduler.schedule()
        assert [seq.seq_id for seq, _ in output.sampled] == ["0-3", "0-4"] and not scheduler.waiting

    def test_ten_thousand_answers_cost_nothing_before_they_start(self):
        scheduler = make([], max_num_seqs=2)
        request = make_request("0", 6, n=10_000)
        scheduler.add_request(request)
        step(scheduler)
        assert len(request.sequences) == 3 and request.num_pending == 9_997

    def test_a_request_that_is_ended_has_all_its_answers(self):
        scheduler = make([], max_num_seqs=2)
        request = make_request("0", 6, n=5)
        scheduler.add_request(request)
        step(scheduler)
        scheduler.finish_request("0", SequenceStatus.FINISHED_ABORTED, "why not")
        assert len(request.sequences) == 5 and request.is_finished() and not scheduler.requests
        assert {seq.stop_reason for seq in request.get_seqs()} == {"why not"}
        assert not scheduler.has_unfinished() and scheduler.cache.pool.num_free == 64


class TestEnds:
    @pytest.mark.parametrize(
        "token_ids, params, status, reason",
        [
            ([3, 1], {}, SequenceStatus.FINISHED_STOPPED, None),
            ([3, 4], {"stop_token_ids": [4]}, SequenceStatus.FINISHED_STOPPED, 4),
            ([3, 3, 3, 3, 3], {}, SequenceStatus.FINISHED_LENGTH_CAPPED, None),
            ([3, 3, 3, 3, 1], {}, SequenceStatus.FINISHED_STOPPED, None),  # its last token, and an end
            ([1, 1, 1, 1, 3], {"ignore_eos": True}, SequenceStatus.FINISHED_LENGTH_CAPPED, None),
            ([1, 1], {"min_tokens": 2}, SequenceStatus.FINISHED_STOPPED, None),
        ],
    )
    def test_how_and_why(self, token_ids, params, status, reason):
        scheduler = make([])
        request = Request(
            "0", None, [7, 8], SamplingParams(**{"max_tokens": 5, **params}), num_pending=1, eos_token_id=1
        )
        scheduler.add_request(request)
        (seq,) = request.get_seqs()
        for token_id in token_ids:
            assert not seq.is_finished()
            scheduler.update_from_output(scheduler.schedule(), RunnerOutput([[token_id]], [None]))
        assert (seq.status, seq.stop_reason) == (status, reason) and not scheduler.has_unfinished()

    @pytest.mark.parametrize(
        "params, kept, reason",
        [
            ({}, [3, 1], None),
            ({"stop_token_ids": [3]}, [3], 3),
            ({"ignore_eos": True, "max_tokens": 3}, [3, 1, 4], None),
        ],
    )
    def test_what_a_step_gives_behind_the_end_is_dropped(self, params, kept, reason):
        scheduler = make([])
        request = Request("0", None, [7, 8], SamplingParams(**params), num_pending=1, eos_token_id=1)
        scheduler.add_request(request)
        (seq,) = request.get_seqs()
        logprobs = [{token_id: Logprob(-0.5, 1)} for token_id in (3, 1, 4, 9)]
        output = RunnerOutput([[3, 1, 4, 9]], [logprobs])
        scheduler.update_from_output(scheduler.schedule(), output)
        assert seq.data.output_token_ids == kept == output.sampled_token_ids[0]
        assert seq.logprobs == logprobs[: len(kept)] and seq.data.cumulative_logprob == -0.5 * len(kept)
        assert seq.stop_reason == reason and seq.is_finished() and not scheduler.has_unfinished()

    def test_a_row_without_a_token_ends_alone(self):
        scheduler = make([4, 4])
        output = scheduler.schedule()
        (bad, _), (good, _) = output.sampled
        scheduler.update_from_output(output, RunnerOutput([[], [9]], [None, None], errors={0: "no token left"}))
        assert (bad.status, bad.stop_reason) == (SequenceStatus.FINISHED_ABORTED, "no token left")
        assert good.data.output_token_ids == [9] and bad.data.output_token_ids == []

    @pytest.mark.parametrize("not_finite", [set(), {1}])
    def test_only_what_is_no_number_makes_it_begin_anew_and_its_blocks_unfindable(self, not_finite):
        scheduler = make([9, 9], caching=True)
        output = scheduler.schedule()
        bad, _ = output.sampled[1]
        scheduler.update_from_output(output, RunnerOutput([[9], []], [None] * 2, {1: "a reason"}, not_finite))
        assert bad.is_finished() != bool(not_finite)
        if not_finite:
            scheduler.finish_request("1", SequenceStatus.FINISHED_ABORTED)
        scheduler.add_request(make_request("2", 9))
        (found,) = (num_cached for seq, num_cached in scheduler.schedule().admitted if seq.request_id == "2")
        assert found == (0 if not_finite else 8)
