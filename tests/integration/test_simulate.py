"""The simulator drives the real engine: its counts are exact, and its times depend on nothing but its input."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from folovllm.__main__ import main
from folovllm.llm import LLM, make_engine_config
from folovllm.sampling_params import SamplingParams
from folovllm.simulator.cluster import MIN_IMBALANCE, ROUTERS, Replica, prefix_aware, serve, simulate
from folovllm.simulator.cost import Efficiency, Roofline, StepCost
from folovllm.simulator.presets import GPUS, MODELS
from folovllm.simulator.runner import charge, make_engine, record_steps
from folovllm.simulator.workload import TimedRequest, chats, from_list, poisson
from folovllm.tales import default_model

H100 = Roofline(MODELS["qwen3-8b"], GPUS["h100"])
CONFIGS = {
    "plain": {},
    "one at a time": {"max_num_seqs": 1},
    "static": {"max_num_seqs": 4, "batching": "static"},
    "chunked": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64},
    "cached": {"enable_prefix_caching": True},
    "preempted": {"num_blocks": 24, "max_num_seqs": 16},
    "swapped": {"num_blocks": 24, "max_num_seqs": 16, "preemption_mode": "swap"},
}


def small(**kwargs):
    return poisson(**{"num_requests": 24, "rate": 20, "prompt_tokens": (5, 150), "output_tokens": (1, 60), **kwargs})


def times(report) -> list[object]:
    return [(r.request_id, r.replica, r.admitted, r.token_times) for r in report.requests]


def crowded(**kwargs):
    """Three requests in a cache that has no room for them all."""
    workload = from_list(TimedRequest(0.0, [i] * 16, 40) for i in range(3))
    report = simulate(workload, num_blocks=7, max_model_len=64, **kwargs)
    assert report.num_preemptions > 0
    return report


class Noisy(Roofline):
    """A roofline whose steps are off by a billionth."""

    def step(self, *args, **kwargs) -> StepCost:
        cost = super().step(*args, **kwargs)
        return replace(cost, linear=cost.linear * (1 + 1e-9), host=cost.host * (1 - 1e-9))


class TestCounts:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
    def test_every_request_gets_exactly_its_tokens(self, config):
        workload = small(prefix_tokens=40)
        report = simulate(workload, **config)
        assert [r.request_id for r in report.requests] == [r.request_id for r in workload.requests]
        for asked, got in zip(workload.requests, report.requests):
            assert got.num_output_tokens == asked.params == len(got.output.outputs[0].token_ids)
            assert got.num_prompt_tokens == len(asked.prompt)
            assert got.output.outputs[0].finish_reason == "length"

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
    def test_no_token_is_lost_or_computed_for_nobody(self, config):
        """The last token of an answer is never computed; without preemption each other one is, or was cached."""
        report = simulate(small(prefix_tokens=40), **config)
        bills = [r.bill for r in report.requests]
        needed = sum(r.num_prompt_tokens + r.num_output_tokens - 1 for r in report.requests)
        spent = sum(bill.computed_tokens + bill.cached_tokens for bill in bills)
        assert spent == needed if report.num_preemptions == 0 or "preemption_mode" in config else spent > needed
        by_step = sum(step.stats.num_prefill_tokens + step.stats.num_decode_tokens for step in report.steps)
        assert sum(bill.computed_tokens for bill in bills) == by_step
        assert (report.num_preemptions > 0) == ("num_blocks" in config)
        assert (report.hit_rate > 0.2) == ("enable_prefix_caching" in config)

    def test_bills_add_up(self):
        report = simulate(small(), max_num_seqs=4)
        busy = sum(step.end - step.start for step in report.steps)
        bills = [r.bill for r in report.requests]
        assert sum(bill.gpu_seconds for bill in bills) == pytest.approx(busy)
        assert sum(bill.dollars for bill in bills) == pytest.approx(busy * H100.dollars_per_hour / 3600)
        assert all(bill.kv_bytes_read > 0 and bill.block_steps > 0 for bill in bills)
        assert max(bill.steps_waited for bill in bills) > 0

    def test_a_request_waits_in_each_step_that_gives_it_no_token(self):
        report = crowded()
        for request in report.requests:
            took_part = sum(request.arrival <= step.start < request.finished for step in report.steps)
            assert request.bill.steps_waited == took_part - request.num_output_tokens

    def test_there_are_as_many_blocks_as_are_asked_for(self):
        """Also more than fit into the usual share of the memory."""
        num_blocks = H100.num_blocks(16, 0.9, 2048) + 1
        stats = simulate(from_list([TimedRequest(0.0, [1, 2], 2)]), num_blocks=num_blocks).steps[0].stats
        assert stats.num_used_blocks + stats.num_free_blocks == num_blocks

    def test_littles_law(self):
        """Requests in the system on average = arrivals per second times seconds in it, counted in two ways."""
        report = simulate(small(num_requests=100))
        ends = sorted({step.end for step in report.steps})
        span = report.end - report.start
        inside = sum(sum(r.arrival < end <= r.finished for r in report.requests) for end in ends) / len(ends)
        mean_e2e = sum(report.values("e2e")) / len(report.requests)
        law = len(report.requests) / span * mean_e2e
        exact = sum(min(r.finished, report.end) - r.arrival for r in report.requests) / span
        assert law == pytest.approx(exact)
        assert inside == pytest.approx(law, rel=0.25)  # sampled at the ends of steps, which are denser under load

    def test_the_engine_is_left_whole(self):
        engine = make_engine(make_engine_config("qwen3-8b", num_blocks=24, max_num_seqs=16), H100)
        serve([engine], small())
        engine.check_integrity()
        assert engine.cache.pool.num_free == 24 and not engine.step_hooks


class TestTime:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
    def test_the_same_input_gives_the_same_microseconds(self, config):
        assert times(simulate(small(), **config)) == times(simulate(small(), **config))

    def test_noise_of_a_billionth_changes_nothing(self):
        noisy = Noisy(MODELS["qwen3-8b"], GPUS["h100"])
        assert times(simulate(small(), cost=noisy)) == times(simulate(small()))

    def test_one_request_alone_takes_its_steps(self):
        report = simulate(from_list([TimedRequest(1.0, [5] * 100, 3)]))
        costs = [H100.step([100], [0]), H100.step([1], [100]), H100.step([1], [101])]
        (request,) = report.requests
        ends = list(itertools.accumulate((round(cost.total * 1e6) for cost in costs), initial=1_000_000))
        assert request.token_times == [end / 1e6 for end in ends[1:]]
        assert request.queue == 0 and [step.cost for step in report.steps] == costs

    def test_who_arrives_together_starts_together(self):
        report = simulate(from_list(TimedRequest(1.0, [7] * 20, 3) for _ in range(4)))
        assert [request.queue for request in report.requests] == [0.0] * 4

    def test_the_way_back_from_the_cpu_costs_too(self):
        report = crowded(preemption_mode="swap")
        assert any(step.cost.swap > 0 and not step.stats.num_preempted for step in report.steps)

    def test_steps_of_a_replica_do_not_overlap(self):
        for replica in range(2):
            report = simulate(small(), replicas=2)
            steps = [step for step in report.steps if step.replica == replica]
            assert all(before.end <= after.start for before, after in itertools.pairwise(steps))

    def test_nobody_is_served_before_they_come(self):
        report = simulate(chats(6, 3, 2.0, 30, (5, 40), (5, 30), think=0.2), replicas=2, router="least_loaded")
        assert len(report.requests) == 18
        assert all(r.arrival <= r.admitted < r.token_times[0] for r in report.requests)
        by_name = {r.request_id: r for r in report.requests}
        assert all(by_name[f"user-{i}/2"].arrival > by_name[f"user-{i}/1"].finished for i in range(6))

    def test_waiting_is_in_the_metrics_of_the_engine_too(self):
        for request in simulate(small(), max_num_seqs=2).requests:
            metrics = request.output.metrics
            assert metrics.arrival_time == request.arrival
            assert metrics.first_token_time == request.token_times[0]
            assert metrics.finished_time == request.finished


class TestSwitches:
    """What chapters show: each switch moves the numbers the way that it should."""

    def test_static_batching_makes_strangers_wait(self):
        workload = small(num_requests=60, rate=8, output_tokens=(10, 200))
        static, continuous = (simulate(workload, max_num_seqs=8, batching=b) for b in ("static", "continuous"))
        assert static.percentile("ttft", 50) > 3 * continuous.percentile("ttft", 50)
        assert continuous.throughput > static.throughput

    def test_chunks_shorten_the_worst_gap(self):
        long = [TimedRequest(0.3, [7] * 12_000, 2, "long")]
        workload = from_list([*small(output_tokens=80, rate=100).requests, *long])
        whole, chunked = (
            simulate(workload, enable_chunked_prefill=on, max_num_batched_tokens=budget, max_model_len=16_384)
            for on, budget in ((False, 16_384), (True, 512))
        )
        assert whole.percentile("itl", 100) > 5 * chunked.percentile("itl", 100)

    def test_prefixes_that_are_found_need_not_be_computed(self):
        workload = small(prefix_tokens=2000)
        off, on = (simulate(workload, enable_prefix_caching=on) for on in (False, True))
        assert off.hit_rate == 0 and on.hit_rate > 0.85
        assert on.percentile("ttft", 50) < 0.5 * off.percentile("ttft", 50)

    def test_a_router_that_knows_prefixes_finds_more(self):
        workload = small(num_requests=60, prefix_tokens=800, num_prefixes=12)
        found = {
            router: simulate(workload, replicas=4, router=router, enable_prefix_caching=True, num_blocks=300)
            for router in ROUTERS
        }
        assert found["prefix_aware"].hit_rate > found["round_robin"].hit_rate + 0.1
        assert {r.replica for r in found["prefix_aware"].requests} == set(range(4))

    @pytest.mark.parametrize("num_more, chosen", [(MIN_IMBALANCE, 1), (MIN_IMBALANCE + 1, 0)])
    def test_a_prefix_is_followed_until_the_requests_are_too_unevenly_shared_out(self, num_more, chosen):
        replicas = [
            SimpleNamespace(index=i, num_unfinished=num, count_cached_tokens=lambda ids, num=num: 100 * (num > 0))
            for i, num in enumerate((0, num_more))
        ]
        assert prefix_aware(TimedRequest(0.0, [1, 2], 3), replicas) == chosen

    def test_a_router_is_told_of_all_blocks_of_a_prompt(self):
        """The last token is computed again in any case; the block that holds it is there all the same."""
        engine = make_engine(make_engine_config("qwen3-8b", enable_prefix_caching=True), H100)
        serve([engine], from_list([TimedRequest(0.0, list(range(64)), 2)]))
        assert Replica(0, engine, None).count_cached_tokens(list(range(64))) == 64

    def test_a_router_may_be_a_function(self):
        report = simulate(small(), replicas=3, router=lambda request, replicas: 2)
        assert {r.replica for r in report.requests} == {2}

    def test_more_cards_are_faster_and_dearer(self):
        one, four = (simulate(small(), tensor_parallel_size=size) for size in (1, 4))
        assert four.percentile("tpot", 50) < one.percentile("tpot", 50)
        assert four.dollars_per_hour == 4 * one.dollars_per_hour


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "why"),
        [
            ({"gpu": "h1000"}, "the nearest is 'h100'"),
            ({"model": "qwen"}, "the nearest is 'qwen3"),
            ({"model": "llama-3.1-70b"}, "leaves no room"),
            ({"replicas": 0}, "replicas must be positive"),
            ({"router": "random"}, "router must be"),
            ({"block_sice": 16}, "the nearest is 'block_size'"),
            ({"tensor_parallel_size": 3}, "must divide"),
            ({"num_blocks": 4}, "lower max_tokens or raise num_blocks"),
            ({"num_blocks": 10**6}, "num_blocks must be at most"),
            ({"model": "llama-3.1-70b", "gpu": "l4", "num_blocks": 1000}, "leaves no room"),
            ({"block_size": 10**8}, "leaves no room for a KV block of 100000000 tokens"),
            ({"max_model_len": 50_000}, "at most the model's own"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, kwargs, why):
        with pytest.raises(ValueError, match=why):
            simulate(small(), **kwargs)

    def test_an_answer_that_does_not_fit_is_not_cut(self):
        for wanted in (500, 2**63):
            workload = from_list([TimedRequest(0.0, [1] * 50, 50), TimedRequest(0.1, [1] * 50, wanted)])
            with pytest.raises(ValueError, match=f"request-1 asks for {wanted} tokens after 50, and"):
                simulate(workload, max_model_len=100)

    def test_an_engine_without_a_tokenizer_takes_tokens_only(self):
        engine = make_engine(make_engine_config("qwen3-8b"), H100)
        with pytest.raises(ValueError, match="prompt must be token ids where there is no tokenizer"):
            engine.add_request("a", "text")
        with pytest.raises(ValueError, match="detokenize must be False"):
            engine.add_request("a", [1], SamplingParams())
        assert not engine.has_unfinished_requests()

    def test_an_engine_on_the_wall_clock_is_refused(self):
        engine = LLM(default_model(), device="cpu").engine
        with pytest.raises(ValueError, match="must be on a virtual clock"):
            serve([engine], small())


class TestRealModel:
    """The embedded model computes its own tokens, and each step takes what another model's would."""

    PROMPTS = ("Once upon a time", "A small fox", "In the evening the old bear")

    def test_tokens_stay_and_times_are_the_other_models(self):
        params = SamplingParams(temperature=0, max_tokens=12)
        llm = LLM(default_model(), device="cpu")
        before = [output.outputs[0].token_ids for output in llm.generate(self.PROMPTS, params, use_tqdm=False)]
        clock = charge(llm.engine, H100)
        outputs = llm.generate(self.PROMPTS, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == before
        metrics = outputs[0].metrics
        assert metrics.arrival_time == 0 and clock.now_us() > 0
        assert metrics.first_token_time == pytest.approx(H100.step([5] * 3, [0] * 3).total, rel=0.02)

    def test_a_workload_of_texts(self):
        llm = LLM(default_model(), device="cpu", max_num_seqs=2)
        charge(llm.engine, H100)
        params = SamplingParams(temperature=0, max_tokens=12)
        workload = from_list(TimedRequest(0.005 * i, text, params) for i, text in enumerate(self.PROMPTS))
        report = serve([llm.engine], workload)
        texts = [output.outputs[0].text for output in llm.generate(self.PROMPTS, params, use_tqdm=False)]
        assert [r.output.outputs[0].text for r in report.requests] == texts
        assert [r.arrival for r in report.requests] == [0.0, 0.005, 0.01]
        assert report.requests[2].queue > 0.01
        with pytest.raises(ValueError, match="must stand at 0 s"):
            serve([llm.engine], workload)

    def test_steps_can_be_recorded_for_a_fit(self):
        llm = LLM(default_model(), device="cpu")
        steps = record_steps(llm.engine)
        llm.generate([[5] * 9, [6] * 4], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert [(step.new_tokens, step.past_tokens, step.rows) for step in steps] == [
            ([9, 4], [0, 0], 2),
            ([1, 1], [9, 4], 2),
            ([1, 1], [10, 5], 2),
        ]
        assert all(step.seconds > 0 for step in steps)

    def test_a_clock_is_not_exchanged_under_a_request(self):
        engine = LLM(default_model(), device="cpu").engine
        engine.add_request("a", [5], SamplingParams(max_tokens=2))
        with pytest.raises(ValueError, match="no unfinished requests"):
            charge(engine, H100)


def test_a_perfect_card_is_a_bound():
    real, bound = simulate(small()), simulate(small(), efficiency=Efficiency.data_sheet())
    assert all(fast.e2e < slow.e2e for fast, slow in zip(bound.requests, real.requests))


def test_the_page_has_the_numbers_of_today():
    """The rows of ``book/simulator.md`` that take no time to compute again."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("benchmark", root / "tests" / "benchmarks" / "simulator.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = (root / "book" / "simulator.md").read_text(encoding="utf-8")
    for name, figure, source, run in benchmark.PUBLISHED[4:]:
        assert benchmark.published_row(name, figure, source, run()) in page


class TestCommand:
    def test_it_prints_a_report(self, capsys):
        options = ["--workload", "burst", "--num-requests", "20", "--replicas", "2", "--max-num-seqs", "8"]
        assert main(["simulate", "--gpu", "a100", "--model", "qwen3-0.6b", *options]) == 0
        out = capsys.readouterr().out
        assert "qwen3-0.6b, 16 bits, on a100; burst; replicas: 2" in out
        assert "20 requests in" in out and "ttft" in out

    def test_the_same_seed_prints_the_same_report(self, capsys):
        printed = []
        for seed in ("1", "1", "2"):
            assert main(["simulate", "--num-requests", "8", "--seed", seed]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] != printed[2]

    def test_a_trace_and_a_checkpoints_folder(self, tmp_path, capsys):
        path = tmp_path / "trace.csv"
        path.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,20,3\n0.7,30,4\n")
        assert main(["simulate", "--model", default_model(), "--workload", str(path), "--weight-bits", "4"]) == 0
        out = capsys.readouterr().out
        assert "4 bits" in out and "2 requests in" in out

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            (["--gpu", "h1000"], "the nearest is 'h100'"),
            (["--workload", "none.csv"], "workload must be chat, poisson, burst or a CSV file"),
            (["--rate", "0"], "rate must be positive"),
            (["--num-requests", "0"], "num_requests must be positive"),
            (["--weight-bits", "0"], "weight_bits must be 1 to 16"),
            (["--router", "x"], "router must be"),
        ],
    )
    def test_a_mistake_is_one_line(self, options, why, capsys):
        assert main(["simulate", *options]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and why in captured.err
        assert captured.err.count("\n") == 1
