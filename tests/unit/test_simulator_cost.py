"""The simulator's formula, clock and presets: numbers that can be worked out by hand."""

from __future__ import annotations

import json
import random

import pytest
from unit_helpers import error_of

from folovllm.simulator.clock import VirtualClock, to_us
from folovllm.simulator.cost import Efficiency, FittedCost, Gpu, ModelShape, Roofline, TimedStep
from folovllm.simulator.presets import GPUS, MODELS, get_gpu, get_model
from folovllm.tales import EMBEDDED_MODEL

SHEET = Efficiency.data_sheet()
QWEN = MODELS["qwen3-8b"]
H100 = Roofline(QWEN, GPUS["h100"])


class TestClock:
    def test_it_stands_still_until_it_is_moved(self):
        clock = VirtualClock()
        assert clock.now_us() == clock.now_us() == 0
        clock.advance(7)
        clock.advance_to(20)
        clock.advance_to(3)
        assert clock.now_us() == 20

    @pytest.mark.parametrize("duration", [-1, 0.5, "1"])
    def test_it_takes_whole_microseconds_forwards(self, duration):
        assert "duration_us must" in error_of(VirtualClock().advance, duration)

    def test_seconds_are_rounded(self):
        assert [to_us(0.0), to_us(1.4e-6), to_us(1.6e-6), to_us(0.25)] == [0, 1, 2, 250_000]


class TestShape:
    @pytest.mark.parametrize(
        ("name", "billions"),
        [
            ("qwen3-0.6b", 0.596),
            ("qwen3-1.7b", 1.72),
            ("qwen3-4b", 4.02),
            ("qwen3-8b", 8.19),
            ("qwen3-14b", 14.8),
            ("qwen3-32b", 32.8),
            ("llama-2-7b", 6.74),
            ("llama-3.1-8b", 8.03),
            ("llama-3.1-70b", 70.6),
            ("smollm2-135m", 0.1345),
        ],
    )
    def test_parameters_are_as_many_as_the_model_cards_say(self, name, billions):
        assert MODELS[name].num_params / 1e9 == pytest.approx(billions, rel=0.003)

    def test_a_token_of_qwen3_8b_keeps_144_kib(self):
        assert QWEN.kv_token_bytes == 144 * 1024

    def test_4_bits_are_a_quarter_and_their_scales_but_for_embedding_and_head(self):
        four = QWEN.with_bits(4)
        assert four.layer_bytes == QWEN.num_layer_params * 4.125 / 8
        assert four.head_bytes == QWEN.head_bytes == QWEN.num_head_params * 2
        assert four.num_bytes == four.layer_bytes + 2 * four.head_bytes

    @pytest.mark.parametrize("bits", [0, 17, 4.0])
    def test_bits_are_1_to_16(self, bits):
        assert error_of(QWEN.with_bits, bits).startswith("weight_bits must be")

    def test_the_embedded_model_is_read_from_its_folder(self):
        shape = get_model(str(EMBEDDED_MODEL))
        raw = json.loads((EMBEDDED_MODEL / "config.json").read_text())
        assert (shape.num_layers, shape.hidden_size) == (raw["num_hidden_layers"], raw["hidden_size"])
        assert (shape.vocab_size, shape.tie_word_embeddings) == (raw["vocab_size"], raw["tie_word_embeddings"])
        assert shape.name == EMBEDDED_MODEL.name and shape.max_model_len == raw["max_position_embeddings"]

    def test_what_a_config_leaves_out_has_transformers_defaults(self, tmp_path):
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        (tmp_path / "config.json").write_text(json.dumps({**sizes, "vocab_size": 100, "head_dim": None}))
        shape = ModelShape.from_config(tmp_path)
        assert (shape.num_kv_heads, shape.head_dim, shape.tie_word_embeddings) == (4, 16, False)

    def test_files_of_4_bits_say_so(self, tmp_path):
        raw = json.loads((EMBEDDED_MODEL / "config.json").read_text())
        raw["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert ModelShape.from_config(EMBEDDED_MODEL).weight_bits == 16
        assert ModelShape.from_config(tmp_path).weight_bits == 4

    def test_one_expert_is_no_mixture(self, tmp_path):
        raw = json.loads((EMBEDDED_MODEL / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, "num_local_experts": 1}))
        assert ModelShape.from_config(tmp_path).num_params == ModelShape.from_config(EMBEDDED_MODEL).num_params

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "cannot be read as JSON"),
            ("[]", "num_attention_heads"),
            ('{"num_attention_heads": 0}', "must be positive"),
            ('{"text_config": null}', "num_attention_heads"),
            ("[" * 100_000, "cannot be read as JSON"),
            ('{"num_local_experts": 0}', "num_attention_heads"),
            ('{"quantization_config": {"quant_method": "awq"}}', "no formula: its quantization_config says 'awq'"),
            ('{"num_local_experts": 8}', "a mixture of experts (num_local_experts is 8)"),
            ('{"text_config": {"n_routed_experts": 64}}', "a mixture of experts"),
            ('{"num_attention_heads": 4, "num_hidden_layers": "2"}', "must be an integer"),
        ],
    )
    def test_a_broken_config_is_named(self, tmp_path, text, why):
        (tmp_path / "config.json").write_text(text)
        message = error_of(get_model, str(tmp_path))
        assert why in message and "config.json" in message


class TestRoofline:
    def test_one_token_reads_all_weights_and_its_own_keys(self):
        roofline = Roofline(QWEN, GPUS["h100"], SHEET)
        cost = roofline.step([1], [1000])
        assert cost.linear == pytest.approx((QWEN.num_layer_params + QWEN.num_head_params) * 2 / 3.35e12)
        assert cost.attention == pytest.approx(1001 * 144 * 1024 / 3.35e12)
        assert cost.total == cost.linear + cost.attention

    def test_the_ridge_of_a_data_sheet_is_flops_over_bandwidth(self):
        assert Roofline(QWEN, GPUS["h100"], SHEET).ridge == pytest.approx(989.4 / 3.35)

    def test_below_the_ridge_tokens_cost_nothing_and_above_it_they_do(self):
        below, ridge = int(H100.ridge) - 1, H100.ridge
        alone = H100.step([1], [0]).linear
        assert H100.step([1] * below, [0] * below).linear == alone
        many = [1] * round(2 * ridge)
        assert H100.step(many, [0] * len(many)).linear == pytest.approx(2 * alone, rel=0.01)

    def test_only_rows_that_are_sampled_get_logits(self):
        prompt = H100.step([4000], [0], rows=1).linear
        assert H100.step([4000], [0], rows=4000).linear > 1.08 * prompt

    def test_a_prompts_attention_is_arithmetic_and_grows_with_its_square(self):
        short, long = (H100.step([n], [0]).attention for n in (8000, 16000))
        assert long == pytest.approx(4 * short, rel=0.01)
        flops = 4 * 36 * 32 * 128 * 8000 * 8001 / 2
        assert short == pytest.approx(flops / (989.4e12 * 0.65))

    def test_chunks_cost_as_much_attention_as_the_whole_prompt(self):
        whole = H100.step([8192], [0]).attention
        assert sum(H100.step([2048], [past]).attention for past in range(0, 8192, 2048)) == pytest.approx(whole)

    def test_few_tokens_cannot_go_below_the_floor(self):
        assert H100.step([1], [10]).attention == pytest.approx(36 * 12e-6)

    def test_several_cards_share_the_work_and_pay_for_their_sums(self):
        four = Roofline(QWEN, GPUS["h100"], tensor_parallel_size=4)
        one_card, cost = H100.step([1] * 64, [4000] * 64), four.step([1] * 64, [4000] * 64)
        assert cost.linear == pytest.approx(one_card.linear / 4)
        assert cost.attention == pytest.approx(one_card.attention / 4)
        assert one_card.comm == 0 and cost.comm > 72 * 10e-6
        assert four.dollars_per_hour == 4 * H100.dollars_per_hour

    def test_quantized_weights_are_read_faster_but_for_the_head(self):
        cost = Roofline(QWEN.with_bits(4), GPUS["h100"]).step([1], [0])
        layers, head = QWEN.num_layer_params * 4.125 / 8, QWEN.num_head_params * 2
        assert cost.linear == pytest.approx((layers / 0.8 + head) / (3.35e12 * 0.85))

    def test_blocks_fill_what_weights_and_activations_leave(self):
        num_blocks = H100.num_blocks(16, 0.9, 2048)
        room = GPUS["h100"].memory * 0.9 - QWEN.num_bytes
        assert 0.95 * room < num_blocks * 16 * 144 * 1024 < room
        assert H100.num_blocks(32, 0.9, 2048) == num_blocks // 2
        assert H100.num_blocks(16, 0.9, 40_960) < num_blocks
        assert Roofline(MODELS["llama-3.1-70b"], GPUS["h100"]).num_blocks() == 0

    def test_swapping_is_bytes_over_the_way_to_the_cpu(self):
        assert H100.swap_seconds(1000) == pytest.approx(1000 * 144 * 1024 / (64e9 * 0.8))
        assert H100.step([1], [0], swapped_tokens=1000).swap == H100.swap_seconds(1000)

    def test_the_cards_must_divide_the_key_heads(self):
        assert "divide the model's 8 key heads" in error_of(Roofline, QWEN, GPUS["h100"], Efficiency(), 3)

    @pytest.mark.parametrize(("name", "value"), [("weights", 0), ("kv", 1.1), ("host_s", -1), ("arithmetic", "1")])
    def test_factors_are_shares_and_times_are_not_negative(self, name, value):
        assert error_of(Efficiency, **{name: value}).startswith(f"{name} must be")


class TestFittedCost:
    def test_it_finds_what_the_steps_were_made_with(self):
        true = FittedCost(1e-3, 2e-5, 3e-5, 4e-8, 5e-9)
        rng = random.Random(0)
        steps = []
        for _ in range(60):
            size = rng.randint(1, 20)
            new, past = [rng.choice([1, 1, 40]) for _ in range(size)], [rng.randint(0, 900) for _ in range(size)]
            rows = rng.randint(0, size)
            steps.append(TimedStep(new, past, rows, true.step(new, past, rows).total))
        found = FittedCost.fit(steps)
        for step in steps:
            assert found.step(step.new_tokens, step.past_tokens, step.rows).total == pytest.approx(step.seconds)

    def test_no_part_of_it_is_negative(self):
        rng = random.Random(1)
        steps = [TimedStep([n], [rng.randint(0, 99)], 1, 1e-3 + rng.random() * 1e-3) for n in range(1, 40)]
        fitted = FittedCost.fit(steps)
        assert min(fitted.host, fitted.token, fitted.row, fitted.read, fitted.product) >= 0

    def test_too_few_steps_are_refused(self):
        assert "at least 5, got 1" in error_of(FittedCost.fit, [TimedStep([1], [0], 1, 1.0)])


class TestPresets:
    def test_names_are_those_of_the_tables(self):
        assert all(get_gpu(name).name == name for name in GPUS)
        assert all(get_model(name).name == name for name in MODELS)

    @pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
    def test_every_card_has_a_source_and_numbers_of_the_right_size(self, gpu: Gpu):
        assert "NVIDIA" in gpu.source
        assert 1e12 < gpu.flops < 1e16 and 1e11 < gpu.bandwidth < 1e13 and 5e9 < gpu.memory < 3e11
        assert 1e9 < gpu.host_bandwidth <= gpu.link_bandwidth < 1e12 and 0 < gpu.dollars_per_hour < 20

    def test_an_unknown_name_is_told_the_nearest(self):
        assert "the nearest is 'h100'" in error_of(get_gpu, "h1000")
        assert "the nearest is 'qwen3-8b'" in error_of(get_model, "Qwen/Qwen3-8B")
