"""Who runs in a step: first come, first served, within a budget, and who makes room."""

from __future__ import annotations

import pytest

from folovllm import SamplingParams, SchedulerConfig, Sequence, SequenceData, SequenceStatus
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler


def make(lens, num_blocks=64, num_swap_blocks=0, **config):
    """A scheduler with a sequence of each length waiting, named 0, 1, 2 …, blocks of four."""
    config = {"max_num_batched_tokens": 64, "max_model_len": 64, **config}
    scheduler = Scheduler(SchedulerConfig(**config), KVCacheManager(num_blocks, 4, False, num_swap_blocks))
    for i, length in enumerate(lens):
        scheduler.add(Sequence(str(i), str(i), SequenceData(list(range(length))), SamplingParams()))
    return scheduler


def step(scheduler):
    """Schedules, computes and gives a token to who is ready: ``{name: tokens computed}``."""
    work = scheduler.schedule()
    done = {}
    for seq, num_new in zip(work.seqs, work.num_new_tokens):
        done[seq.seq_id] = num_new
        seq.num_computed_tokens += num_new
        if seq.num_computed_tokens == seq.get_len():
            seq.add_token_id(1)
    return done


def test_prompts_first_then_a_token_each():
    scheduler = make([5, 3])
    assert step(scheduler) == {"0": 5, "1": 3}
    assert step(scheduler) == {"0": 1, "1": 1}


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


@pytest.mark.parametrize("mode, queue", [("recompute", "waiting"), ("swap", "swapped")])
def test_the_last_makes_room_and_the_first_comes_back_first(mode, queue):
    scheduler = make([4, 4, 4], num_blocks=3, num_swap_blocks=3, preemption_mode=mode)
    assert step(scheduler) == {"0": 4, "1": 4, "2": 4}
    work = scheduler.schedule()  # 0 needs a second block: 2 makes room; then 1 does, and has to go itself
    assert [seq.seq_id for seq in work.seqs] == ["0"] and [seq.seq_id for seq in work.preempted] == ["2", "1"]
    assert len(work.swap_out) == (2 if mode == "swap" else 0)
    waiting = getattr(scheduler, queue)
    assert [seq.seq_id for seq in waiting] == ["1", "2"] and all(not seq.block_ids for seq in waiting)
    assert all(seq.num_computed_tokens == (4 if mode == "swap" else 0) for seq in waiting)


def test_nobody_is_admitted_in_a_step_that_took_somebodys_blocks():
    scheduler = make([4, 4, 1], num_blocks=2, max_num_seqs=2)
    step(scheduler)
    work = scheduler.schedule()
    assert [s.seq_id for s in work.preempted] == ["1"] and [s.seq_id for s in work.seqs] == ["0"]
    assert [s.seq_id for s in scheduler.waiting] == ["1", "2"]


def test_finish_takes_it_out_of_whichever_queue():
    scheduler = make([4, 4, 4], max_num_seqs=1)
    step(scheduler)
    for seq in [*scheduler.waiting, *scheduler.running]:
        scheduler.finish(seq, SequenceStatus.FINISHED_ABORTED)
        assert seq.is_finished()
    assert not scheduler.has_unfinished() and scheduler.cache.pool.num_free == 64
