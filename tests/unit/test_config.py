"""The four configs: defaults, both sides of every bound, and what each mistake is answered with."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass

import pytest
import torch
from hypothesis import given
from unit_helpers import ANYTHING, error_of

from folovllm import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculativeConfig

DTYPE_NAMES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
NOT_INTEGERS = [True, False, 1.0, "1", None, math.nan, math.inf, b"1", [1], {}]
NOT_NUMBERS = [True, False, "1", None, math.nan, math.inf, -math.inf, b"1", [1.0], {}, 10**400]


def defaults(config_class: type) -> dict:
    """Field -> default, with the factory called where there is one, and MISSING where the field is required."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config_class)}


class TestModelConfig:
    def test_fields_and_defaults(self):
        assert is_dataclass(ModelConfig)
        assert defaults(ModelConfig) == {
            "model": MISSING,
            "tokenizer": None,
            "tokenizer_mode": "auto",
            "trust_remote_code": False,
            "dtype": "auto",
            "max_model_len": None,
            "seed": 0,
            "max_logprobs": 20,
            "attention_backend": "auto",
            "enforce_eager": None,
            "quantization": None,
        }

    def test_model_is_required(self):
        with pytest.raises(TypeError):
            ModelConfig()

    def test_tokenizer_is_the_models_unless_named(self):
        assert ModelConfig("m").tokenizer == "m"
        assert ModelConfig("m", tokenizer="t").tokenizer == "t"

    @pytest.mark.parametrize("name, dtype", DTYPE_NAMES.items())
    def test_dtype_by_name(self, name, dtype):
        assert ModelConfig("m", dtype=name).torch_dtype is dtype

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtype_as_torch_dtype(self, dtype):
        assert ModelConfig("m", dtype=dtype).torch_dtype is dtype

    def test_auto_dtype_is_settled_later(self):
        assert ModelConfig("m").torch_dtype is None

    @pytest.mark.parametrize(
        "dtype", ["", "float64", "FLOAT16", "torch.float16", "fp16", torch.float64, torch.int8, None, 16, [], float]
    )
    def test_unknown_dtype_names_field_value_and_choices(self, dtype):
        message = error_of(ModelConfig, "m", dtype=dtype)
        assert message.startswith("dtype must be")
        assert repr(dtype) in message
        assert all(name in message for name in ["auto", *DTYPE_NAMES])

    @pytest.mark.parametrize("field", ["model", "tokenizer"])
    @pytest.mark.parametrize("value", ["", b"m", 1, True, ["m"]])
    def test_names_must_be_non_empty_strings(self, field, value):
        message = error_of(ModelConfig, **{"model": "m", field: value})
        assert message.startswith(field)
        assert repr(value) in message
        assert "non-empty string" in message

    def test_model_none(self):
        assert error_of(ModelConfig, None).startswith("model")

    @pytest.mark.parametrize("mode", ["auto", "slow"])
    def test_tokenizer_modes(self, mode):
        assert ModelConfig("m", tokenizer_mode=mode).tokenizer_mode == mode

    @pytest.mark.parametrize("mode", ["fast", "", "Auto", None, True, ["auto"]])
    def test_unknown_tokenizer_mode(self, mode):
        message = error_of(ModelConfig, "m", tokenizer_mode=mode)
        assert message.startswith("tokenizer_mode must be")
        assert "auto" in message and "slow" in message and repr(mode) in message

    @pytest.mark.parametrize("value", [1, 0, "yes", None])
    def test_trust_remote_code_is_a_bool(self, value):
        assert "trust_remote_code" in error_of(ModelConfig, "m", trust_remote_code=value)

    @pytest.mark.parametrize("length", [None, 1, 2048, 2**40])
    def test_max_model_len(self, length):
        assert ModelConfig("m", max_model_len=length).max_model_len == length

    @pytest.mark.parametrize("length", [0, -1])
    def test_max_model_len_must_be_positive(self, length):
        message = error_of(ModelConfig, "m", max_model_len=length)
        assert "max_model_len must be positive" in message and str(length) in message

    @pytest.mark.parametrize("field", ["max_model_len", "seed", "max_logprobs"])
    @pytest.mark.parametrize("value", NOT_INTEGERS)
    def test_integers_are_integers(self, field, value):
        if field == "max_model_len" and value is None:
            return
        assert field in error_of(ModelConfig, "m", **{field: value})

    @pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
    def test_seed(self, seed):
        assert ModelConfig("m", seed=seed).seed == seed

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seed_must_suit_every_generator(self, seed):
        message = error_of(ModelConfig, "m", seed=seed)
        assert "seed" in message and str(seed) in message

    @pytest.mark.parametrize("limit", [-1, 0, 1, 2**20])
    def test_max_logprobs(self, limit):
        assert ModelConfig("m", max_logprobs=limit).max_logprobs == limit

    def test_max_logprobs_may_not_be_less_than_none(self):
        message = error_of(ModelConfig, "m", max_logprobs=-2)
        assert message == "max_logprobs must be 0 or more, or -1 for no limit, got -2"

    def test_resolve_takes_the_models_length(self):
        config = ModelConfig("m")
        assert config.resolve_max_model_len(512) == 512
        assert config.max_model_len == 512

    @pytest.mark.parametrize("asked", [1, 511, 512])
    def test_resolve_keeps_what_was_asked_for(self, asked):
        config = ModelConfig("m", max_model_len=asked)
        assert config.resolve_max_model_len(512) == asked
        assert config.max_model_len == asked

    def test_resolve_refuses_more_than_the_model_has(self):
        message = error_of(ModelConfig("m", max_model_len=513).resolve_max_model_len, 512)
        assert "max_model_len" in message and "513" in message and "512" in message


class TestCacheConfig:
    def test_fields_and_defaults(self):
        assert is_dataclass(CacheConfig)
        assert defaults(CacheConfig) == {
            "block_size": 16,
            "gpu_memory_utilization": 0.9,
            "swap_space": 4.0,
            "enable_prefix_caching": False,
            "num_blocks": None,
            "kv_cache_manager_cls": None,
        }

    @pytest.mark.parametrize(
        "field, value",
        [
            ("block_size", 1),
            ("block_size", 17),
            ("gpu_memory_utilization", 5e-324),
            ("gpu_memory_utilization", 1),
            ("gpu_memory_utilization", 1.0),
            ("swap_space", 0),
            ("swap_space", 1e9),
            ("enable_prefix_caching", True),
        ],
    )
    def test_accepts(self, field, value):
        assert getattr(CacheConfig(**{field: value}), field) == value

    @pytest.mark.parametrize(
        "field, value, message",
        [
            ("block_size", 0, "block_size must be positive, got 0"),
            ("block_size", -16, "block_size must be positive, got -16"),
            ("gpu_memory_utilization", 0.0, "gpu_memory_utilization must be in (0, 1], got 0.0"),
            ("gpu_memory_utilization", -0.1, "gpu_memory_utilization must be in (0, 1], got -0.1"),
            ("gpu_memory_utilization", 1.5, "gpu_memory_utilization must be in (0, 1], got 1.5"),
            (
                "gpu_memory_utilization",
                math.nextafter(1, 2),
                "gpu_memory_utilization must be in (0, 1], got 1.0000000000000002",
            ),
            ("swap_space", -5e-324, "swap_space must not be negative, got -5e-324"),
        ],
    )
    def test_out_of_bounds(self, field, value, message):
        assert error_of(CacheConfig, **{field: value}) == message

    @pytest.mark.parametrize("value", NOT_INTEGERS)
    def test_block_size_is_an_integer(self, value):
        assert error_of(CacheConfig, block_size=value).startswith("block_size")

    @pytest.mark.parametrize("field", ["gpu_memory_utilization", "swap_space"])
    @pytest.mark.parametrize("value", NOT_NUMBERS)
    def test_numbers_are_finite_numbers(self, field, value):
        assert error_of(CacheConfig, **{field: value}).startswith(field)

    @pytest.mark.parametrize("value", [1, 0, "no", None])
    def test_enable_prefix_caching_is_a_bool(self, value):
        assert "enable_prefix_caching" in error_of(CacheConfig, enable_prefix_caching=value)


class TestSchedulerConfig:
    def test_fields_and_defaults(self):
        assert is_dataclass(SchedulerConfig)
        assert defaults(SchedulerConfig) == {
            "max_num_batched_tokens": None,
            "max_num_seqs": 256,
            "max_model_len": None,
            "enable_chunked_prefill": False,
            "policy": "fcfs",
            "batching": "continuous",
            "preemption_mode": "recompute",
            "scheduler_reserve_full_isl": True,
            "scheduler_cls": None,
        }

    @pytest.mark.parametrize(
        "field, good", [("policy", "priority"), ("batching", "static"), ("preemption_mode", "swap")]
    )
    def test_choices(self, field, good):
        assert getattr(SchedulerConfig(**{field: good}), field) == good
        for value in ("", "Static", None, 1, [good]):
            message = error_of(SchedulerConfig, **{field: value})
            assert message.startswith(f"{field} must be ") and message.endswith(f"got {value!r}")

    @pytest.mark.parametrize("field", ["max_num_batched_tokens", "max_num_seqs", "max_model_len"])
    def test_counts_are_positive_integers(self, field):
        assert getattr(SchedulerConfig(**{field: 1}), field) == 1
        for value in (0, -1):
            message = error_of(SchedulerConfig, **{field: value})
            assert message.startswith(f"{field} must be positive") and message.endswith(f"got {value}")
        for value in NOT_INTEGERS:
            if value is not None or field == "max_num_seqs":
                assert error_of(SchedulerConfig, **{field: value}).startswith(field)

    @pytest.mark.parametrize("field", ["enable_chunked_prefill", "scheduler_reserve_full_isl"])
    @pytest.mark.parametrize("value", [1, 0, "no", None])
    def test_switches_are_bools(self, field, value):
        assert field in error_of(SchedulerConfig, **{field: value})

    @pytest.mark.parametrize("make, field", [(SchedulerConfig, "scheduler_cls"), (CacheConfig, "kv_cache_manager_cls")])
    def test_parts_of_the_readers_own_are_classes(self, make, field):
        assert getattr(make(**{field: dict}), field) is dict
        for value in (1, "Scheduler", dict()):
            assert error_of(make, **{field: value}).startswith(f"{field} must be a class or None, got ")


class TestEngineConfig:
    def test_only_the_model_is_required(self):
        assert is_dataclass(EngineConfig)
        model = ModelConfig("m")
        engine = EngineConfig(model)
        assert engine.model_config is model
        assert engine.cache_config == CacheConfig()
        assert engine.scheduler_config == SchedulerConfig()
        with pytest.raises(TypeError):
            EngineConfig()

    def test_two_engines_share_no_default(self):
        a, b = EngineConfig(ModelConfig("a")), EngineConfig(ModelConfig("b"))
        assert a.cache_config is not b.cache_config
        assert a.scheduler_config is not b.scheduler_config

    @pytest.mark.parametrize(
        "field, kind",
        [("model_config", ModelConfig), ("cache_config", CacheConfig), ("scheduler_config", SchedulerConfig)],
    )
    @pytest.mark.parametrize("value", [None, "m", {}, 1])
    def test_each_part_is_a_config(self, field, kind, value):
        message = error_of(EngineConfig, **{"model_config": ModelConfig("m"), field: value})
        assert field in message and kind.__name__ in message

    @pytest.mark.parametrize(
        "model_len, scheduler_len, both",
        [(None, None, None), (100, None, 100), (None, 100, 100), (100, 100, 100)],
    )
    def test_model_and_scheduler_agree_from_the_start(self, model_len, scheduler_len, both):
        engine = EngineConfig(
            ModelConfig("m", max_model_len=model_len),
            scheduler_config=SchedulerConfig(max_model_len=scheduler_len),
        )
        assert engine.model_config.max_model_len == engine.scheduler_config.max_model_len == both

    def test_disagreement_names_both_numbers(self):
        model, scheduler = ModelConfig("m", max_model_len=100), SchedulerConfig(max_model_len=200)
        message = error_of(EngineConfig, model, scheduler_config=scheduler)
        assert "max_model_len" in message and "100" in message and "200" in message

    @pytest.mark.parametrize("asked, settled", [(None, 512), (100, 100), (512, 512)])
    def test_resolve_leaves_no_scheduler_at_none(self, asked, settled):
        engine = EngineConfig(ModelConfig("m", max_model_len=asked))
        for _ in range(2):  # the second time changes nothing
            assert engine.resolve_max_model_len(512) == settled
            assert engine.model_config.max_model_len == engine.scheduler_config.max_model_len == settled

    def test_resolve_after_the_model_config_was_settled_by_a_loader(self):
        engine = EngineConfig(ModelConfig("m"))
        engine.model_config.resolve_max_model_len(512)
        engine.resolve_max_model_len(512)
        assert engine.scheduler_config.max_model_len == 512

    def test_resolve_refuses_more_than_the_model_has(self):
        engine = EngineConfig(ModelConfig("m", max_model_len=513))
        message = error_of(engine.resolve_max_model_len, 512)
        assert "513" in message and "512" in message


class TestSpeculativeConfig:
    def test_fields_and_defaults(self):
        assert is_dataclass(SpeculativeConfig)
        assert defaults(SpeculativeConfig) == {
            "num_speculative_tokens": MISSING,
            "method": None,
            "model": None,
            "prompt_lookup_min": None,
            "prompt_lookup_max": None,
        }

    @pytest.mark.parametrize(
        "least, most, settled",
        [(None, None, (5, 5)), (None, 3, (3, 3)), (2, None, (2, 2)), (2, 4, (2, 4)), (1, 1, (1, 1))],
    )
    def test_what_is_left_out_of_a_lookup_is_as_the_other(self, least, most, settled):
        config = SpeculativeConfig(4, "ngram", prompt_lookup_min=least, prompt_lookup_max=most)
        assert (config.prompt_lookup_min, config.prompt_lookup_max) == settled

    def test_a_model_that_is_named_is_asked(self):
        assert SpeculativeConfig(4, model="m").method == "draft_model"

    @pytest.mark.parametrize(
        "kwargs, words",
        [
            ({"num_speculative_tokens": 0, "method": "ngram"}, "num_speculative_tokens must be positive, got 0"),
            ({"num_speculative_tokens": True, "method": "ngram"}, "num_speculative_tokens"),
            ({"num_speculative_tokens": 4}, "method must be"),
            ({"num_speculative_tokens": 4, "method": "eagle"}, "method must be"),
            ({"num_speculative_tokens": 4, "method": "draft_model"}, "model must be"),
            ({"num_speculative_tokens": 4, "method": "ngram", "model": "m"}, "uses no model, got model='m'"),
            ({"num_speculative_tokens": 4, "method": "ngram", "prompt_lookup_min": 0}, "prompt_lookup_min must be"),
            (
                {"num_speculative_tokens": 4, "method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 2},
                "prompt_lookup_min must be at most prompt_lookup_max, got 3 and 2",
            ),
        ],
    )
    def test_what_cannot_be(self, kwargs, words):
        assert words in error_of(SpeculativeConfig, **kwargs)

    def test_an_engine_takes_a_dict_of_its_fields(self):
        asked = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
        config = EngineConfig(ModelConfig("m"), speculative_config=asked)
        assert config.speculative_config == SpeculativeConfig(4, "ngram", None, 3, 3)
        assert "prompt_lookup_max" in config._repr_html_()
        assert EngineConfig(ModelConfig("m"), speculative_config=config.speculative_config).speculative_config == (
            config.speculative_config
        )
        assert EngineConfig(ModelConfig("m")).speculative_config is None

    @pytest.mark.parametrize(
        "value, words",
        [
            (4, "speculative_config must be a SpeculativeConfig or a dict, got 4"),
            ({"method": "ngram"}, "speculative_config must have num_speculative_tokens"),
            (
                {"num_speculative_tokens": 4, "methode": "ngram", 5: 1},
                "has no field methode, 5: its fields are num_spec",
            ),
        ],
    )
    def test_an_engine_takes_nothing_else(self, value, words):
        assert words in error_of(EngineConfig, model_config=ModelConfig("m"), speculative_config=value)


INT, FLOAT, TEXT, BOOL, NONE = int, float, str, bool, type(None)
TYPES = {
    ModelConfig: {
        "model": (TEXT,),
        "tokenizer": (TEXT,),
        "tokenizer_mode": (TEXT,),
        "trust_remote_code": (BOOL,),
        "dtype": (TEXT, torch.dtype),
        "max_model_len": (INT, NONE),
        "seed": (INT,),
    },
    CacheConfig: {
        "block_size": (INT,),
        "gpu_memory_utilization": (FLOAT,),
        "swap_space": (FLOAT,),
        "enable_prefix_caching": (BOOL,),
    },
    SchedulerConfig: {
        "max_num_batched_tokens": (INT, NONE),
        "max_num_seqs": (INT,),
        "max_model_len": (INT, NONE),
        "enable_chunked_prefill": (BOOL,),
    },
}


@pytest.mark.parametrize("config_class, field", [(kind, field) for kind, types in TYPES.items() for field in types])
@given(value=ANYTHING)
def test_any_value_at_all_is_of_the_fields_type_or_refused_by_the_fields_name(config_class, field, value):
    required = {"model": "m"} if config_class is ModelConfig else {}
    try:
        config = config_class(**{**required, field: value})
    except ValueError as error:
        assert field in str(error)
    else:
        held = getattr(config, field)
        assert isinstance(held, TYPES[config_class][field])
        assert isinstance(held, bool) == (TYPES[config_class][field] == (BOOL,))


@pytest.mark.parametrize("field", ["model_config", "cache_config", "scheduler_config"])
@given(value=ANYTHING)
def test_an_engine_is_made_of_configs_only(field, value):
    assert field in error_of(EngineConfig, **{"model_config": ModelConfig("m"), field: value})
