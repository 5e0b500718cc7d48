"""What runs an engine's decode steps on which kind of device, and what is refused."""

from __future__ import annotations

import pytest
import torch
from prepared_helpers import make_engine

from folovllm import ModelConfig
from folovllm.attention.flash import FlashAttention
from folovllm.attention.gather import GatherAttention
from folovllm.attention.sdpa import SdpaAttention
from folovllm.worker.prepared_steps import choose_prepared_steps
from folovllm.worker.step_graph import RecordedSteps


def test_recorded_on_a_gpu_unless_asked():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_prepared_steps(None, cpu, GatherAttention) is None
    assert choose_prepared_steps(None, torch.device("mps"), GatherAttention) is None
    assert choose_prepared_steps(None, gpu, FlashAttention) is RecordedSteps
    assert choose_prepared_steps(None, gpu, GatherAttention) is choose_prepared_steps(True, gpu, FlashAttention) is None
    with pytest.raises(ValueError, match="enforce_eager must be"):
        ModelConfig("m", enforce_eager=0)


def test_another_backend_may_have_none():
    runner = make_engine().runner
    runner.config.model_config.enforce_eager = None
    runner.set_attention_backend(SdpaAttention)  # as `replace_part` does, on a CPU
    runner.initialize_kv_cache(5, 0)
    assert runner.prepared_steps is None and runner.kv_cache.shape[3] == 5


def test_a_device_without_any():
    with pytest.raises(ValueError, match=r"on cuda and cpu, and the model is on mps: set enforce_eager=True"):
        choose_prepared_steps(False, torch.device("mps"), GatherAttention)


def test_attention_that_plans_on_the_cpu():
    with pytest.raises(ValueError, match=r"which GatherAttention does not: set attention_backend"):
        choose_prepared_steps(False, torch.device("cuda"), GatherAttention)
    assert choose_prepared_steps(False, torch.device("cuda"), FlashAttention) is RecordedSteps


def test_attention_that_is_not_compiled():
    with pytest.raises(ValueError, match=r"attention_backend='gather' keeps, and the engine has SdpaAttention"):
        choose_prepared_steps(False, torch.device("cpu"), SdpaAttention)


def test_the_engine_says_what_was_done_to_its_steps():
    assert "recorded steps" in repr(make_engine())
    assert "recorded" not in repr(make_engine(enforce_eager=True))
