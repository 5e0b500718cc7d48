"""What ``import folovllm`` gives, and what it does not cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import folovllm

CONTRACT = {
    "__version__",
    "ModelConfig",
    "CacheConfig",
    "SchedulerConfig",
    "SpeculativeConfig",
    "EngineConfig",
    "SamplingParams",
    "SamplingType",
    "StructuredOutputsParams",
    "Request",
    "RequestStatus",
    "Sequence",
    "SequenceData",
    "SequenceStatus",
    "RequestOutput",
    "RequestOutputKind",
    "CompletionOutput",
    "BeamSearchParams",
    "BeamSearchOutput",
    "LLM",
    "LLMEngine",
    "ModelLoader",
    "get_model_and_tokenizer",
    "generate_request_id",
    "set_random_seed",
    "get_device",
    "is_cuda_available",
    "get_gpu_memory_info",
}
LAZY = {"LLM", "LLMEngine", "ModelLoader", "get_model_and_tokenizer"}
HEAVY = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "psutil", "tqdm", "llguidance"]


def loaded_by(code: str) -> list[str]:
    """Which of the heavy packages a fresh Python has loaded after ``code``."""
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


class TestNames:
    def test_all_is_the_contract(self):
        assert set(folovllm.__all__) == CONTRACT
        assert len(folovllm.__all__) == len(CONTRACT)

    @pytest.mark.parametrize("name", sorted(CONTRACT))
    def test_every_name_can_be_got(self, name):
        assert getattr(folovllm, name) is not None

    def test_dir_shows_them_all(self):
        assert set(dir(folovllm)) >= CONTRACT

    def test_star_import(self):
        names: dict = {}
        exec("from folovllm import *", names)
        assert set(names) >= CONTRACT

    @pytest.mark.parametrize("name", ["no_such_name", "modelloader", "_no_such_name", "__no_such_name__"])
    def test_an_unknown_name_is_an_attribute_error(self, name):
        with pytest.raises(AttributeError, match=name):
            getattr(folovllm, name)
        assert not hasattr(folovllm, name)

    def test_an_unknown_name_cannot_be_imported(self):
        with pytest.raises(ImportError):
            exec("from folovllm import no_such_name")

    def test_the_version_is_one(self):
        assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", folovllm.__version__)

    def test_the_lazy_names_are_the_loaders_own(self):
        from folovllm import model_loader

        assert folovllm.ModelLoader is model_loader.ModelLoader
        assert folovllm.get_model_and_tokenizer is model_loader.get_model_and_tokenizer


class TestCost:
    @pytest.mark.parametrize(
        "code",
        [
            "import folovllm",
            "import folovllm.config, folovllm.sampling_params, folovllm.request, folovllm.outputs, folovllm.utils",
            f"from folovllm import {', '.join(sorted(CONTRACT - LAZY))}",
            "import folovllm as f; f.EngineConfig(f.ModelConfig('m', dtype='half')); f.CacheConfig()",
            "import folovllm as f; f.Request(f.generate_request_id(), 'text', [1, 2], f.SamplingParams(n=2))",
            "import folovllm as f; f.CompletionOutput(0, 'text', [1]); repr(f.RequestOutput('r', 'p', [1], [], True))",
            "import folovllm.tales.grammar as g, random; g.continuations(g.sample(random.Random(0)).text[:50])",
        ],
    )
    def test_plain_objects_load_nothing_heavy(self, code):
        assert loaded_by(code) == []

    def test_a_wrong_dtype_is_refused_without_torch(self):
        code = "import folovllm\ntry: folovllm.ModelConfig('m', dtype='float64')\nexcept ValueError: pass"
        assert loaded_by(code) == []

    def test_torch_dtype_loads_torch_when_it_is_asked_for(self):
        code = "import folovllm; config = folovllm.ModelConfig('m', dtype='half')"
        assert "torch" not in loaded_by(code)
        loaded = loaded_by(code + "; assert str(config.torch_dtype) == 'torch.float16'")
        assert "torch" in loaded and "transformers" not in loaded
