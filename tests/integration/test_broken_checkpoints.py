"""Checkpoints that are broken, or of a kind that is not run: each runs, or is refused in one sentence.

Every case goes through `ModelLoader.open`, `ModelLoader.load_model` and `load_decoder`, which say the same.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import config_of, quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from folovllm import ModelConfig, ModelLoader
from folovllm.model.checkpoint import ModelLoadError
from folovllm.model.decoder import load_decoder
from folovllm.model.quantization import TENSORS
from folovllm.model_loader import read_generation_config
from folovllm.tales import EMBEDDED_MODEL

SHAPE = {
    "vocab_size": 1294,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
}


def save(folder: Path, name: str, **kwargs) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **kwargs)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((EMBEDDED_MODEL / file).read_bytes())
    return folder


QUANTIZED = {
    "gptq": ("llama", {"method": "gptq", "group_size": 16, "desc_act": True}),
    "gptq_v2": ("qwen3", {"method": "gptq", "group_size": -1, "version": 2}),
    "compressed": ("qwen2", {"method": "compressed-tensors", "group_size": 16, "symmetric": False}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind; Qwen2's in several files."""
    root = tmp_path_factory.mktemp("whole")
    sharded = {"qwen2": {"max_shard_size": "100KB"}}
    folders = {name: save(root / name, name, **sharded.get(name, {})) for name in CONFIGS}
    made = {name: quantize(folders[source], root / name, **how) for name, (source, how) in QUANTIZED.items()}
    return folders | made


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A Llama to damage."""
    return Path(shutil.copytree(whole["llama"], tmp_path / "copy"))


def loader(folder) -> ModelLoader:
    return ModelLoader(ModelConfig(str(folder), dtype="float32"))


def open_checkpoint(folder):
    return loader(folder).open("cpu")


def load_model(folder):
    return loader(folder).load_model("cpu")


def decode(folder):
    return load_decoder(open_checkpoint(folder))


WAYS = (open_checkpoint, load_model, decode)


def outcome(way, folder) -> str | None:
    """The sentence that a checkpoint is refused with, or None if it is loaded."""
    try:
        way(folder)
    except (ModelLoadError, ValueError) as error:
        assert type(error) in (ModelLoadError, ValueError), repr(error)
        assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)
        assert str(error) and "\n" not in str(error)
        return str(error)
    return None


def refusal(folder, *parts, ways=WAYS) -> str:
    """The one sentence that all ways refuse a checkpoint with; it has ``parts`` in it."""
    (message,) = {outcome(way, folder) for way in ways}
    assert message is not None
    without_path = message.replace(str(folder), "")
    for part in parts:
        assert part in without_path, message
    return message


def edit(folder: Path, file: str = "config.json", **changes) -> None:
    path = folder / file
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


class TestFields:
    @pytest.mark.parametrize("value", [-1, 0, 2**31, 10**30, 2.5, 4.0, True, "four", {}])
    @pytest.mark.parametrize("name", SHAPE)
    def test_a_size_that_cannot_be(self, copy, name, value):
        edit(copy, **{name: value})
        refusal(copy, "config.json", name)

    def test_a_text_config_that_is_none(self, copy):
        edit(copy, text_config={})
        refusal(copy, "config.json", "text_config")

    def test_a_tokenizer_that_cannot_encode(self, copy):
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": None}))
        with pytest.raises(ModelLoadError, match="cannot encode a text"):
            ModelLoader(ModelConfig(str(copy))).load_tokenizer()

    def test_a_number_too_long_to_read(self, copy):
        path = copy / "config.json"
        path.write_text(path.read_text().replace('"vocab_size": 1294', '"vocab_size": 1' + "0" * 5000))
        refusal(copy, "config.json", "5001 digits")

    @pytest.mark.parametrize("name", [name for name in SHAPE if name != "max_position_embeddings"])
    @pytest.mark.parametrize("value", [2**31 - 1, 10**6])
    def test_a_size_that_the_files_cannot_hold(self, copy, name, value):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        edit(copy, **{name: value})
        refusal(copy, "config.json", name)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    def test_a_model_more_than_twice_as_large_as_its_files(self, copy):
        edit(copy, num_hidden_layers=20)
        refusal(copy, "config.json describes a model of", ways=(load_model, decode))

    @pytest.mark.parametrize("change", [{"vocab_size": 1300}, {"intermediate_size": 50}, {"vocab_size": 7}])
    def test_a_shape_that_differs_names_the_field(self, copy, change):
        ((name, value),) = change.items()
        edit(copy, **change)
        refusal(copy, f"{name}={value}", "config.json", "shape", ways=(load_model, decode))

    def test_more_positions_than_there_is_memory_for(self, copy, monkeypatch):
        """Tables have a row for each position that will be served, not for each that the model was made for."""
        edit(copy, max_position_embeddings=2**31 - 1)
        decoder = load_decoder(ModelLoader(ModelConfig(str(copy), max_model_len=20)).open("cpu"))
        assert decoder.cos.shape == decoder.sin.shape == (20, 1, 8)
        import psutil

        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 2**24}))
        refusal(copy, "rotary tables", "2,147,483,647 positions", "max_model_len", ways=[decode])

    @pytest.mark.parametrize("value", [-1e-6, 0, float("nan"), float("inf"), "1e-6", True, [1e-6]])
    @pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
    def test_a_number_that_cannot_be(self, copy, name, value):
        edit(copy, **{name: value})
        refusal(copy, "config.json", name)

    @pytest.mark.parametrize(
        "rope, part",
        [
            ("linear", "rope_parameters must be an object"),
            ([], "rope_parameters must be an object"),
            ({"rope_type": "no_such_rope"}, "rope_parameters.rope_type must be one of default"),
            ({"rope_type": None}, "rope_parameters.rope_type"),
            ({"rope_type": "linear"}, "factor"),
            ({"rope_type": "linear", "factor": 0}, "rope_parameters.factor must be positive, got 0"),
            ({"rope_type": "linear", "factor": float("nan")}, "rope_parameters.factor"),
            ({**LLAMA3, "factor": -8.0}, "rope_parameters.factor"),
            ({"rope_type": "linear", "factor": 2**70}, "rope_parameters.factor must be at most 1e+18"),
            ({"rope_type": "default", "rope_theta": 2**70}, "rope_parameters.rope_theta must be at most 1e+18"),
            ({**LLAMA3, "low_freq_factor": None}, "rope_parameters.low_freq_factor"),
            ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor (1.0) must be above low_freq_factor (1.0)"),
            ({**LLAMA3, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings"),
            ({**LLAMA3, "rope_theta": -1}, "rope_parameters.rope_theta"),
            ({key: LLAMA3[key] for key in LLAMA3 if key != "high_freq_factor"}, "high_freq_factor"),
        ],
    )
    def test_rotary_embeddings_that_cannot_be(self, copy, rope, part):
        edit(copy, rope_parameters=rope)
        refusal(copy, "config.json", part)

    def test_the_older_name_is_checked_too(self, copy):
        edit(copy, rope_parameters=..., rope_scaling={"type": "linear", "factor": -4})
        refusal(copy, "rope_scaling.factor must be positive, got -4")

    @pytest.mark.parametrize(
        "changes, part",
        [
            ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
            ({"num_attention_heads": 3, "num_key_value_heads": 1}, "attention heads (3)"),
            ({"head_dim": 7}, "head_dim"),
        ],
    )
    def test_heads_that_do_not_divide(self, copy, changes, part):
        edit(copy, **changes)
        refusal(copy, "config.json", part)

    def test_an_activation_function_that_is_none(self, copy):
        edit(copy, hidden_act="no_such_function")
        refusal(copy, "config.json", "hidden_act", "no_such_function")

    def test_transformers_own_reason_is_given_whole(self, copy):
        edit(copy, attention_bias="yes please")
        refusal(copy, "config.json", "attention_bias", "yes please")

    def test_another_model_under_the_name_of_ours(self, copy):
        edit(copy, model_type="gpt2", architectures=["LlamaForCausalLM"])
        assert "gpt2" in outcome(decode, copy)

    @pytest.mark.parametrize("value", ["LlamaForCausalLM", [3], {}, [""]])
    def test_architectures_that_are_none(self, copy, value):
        edit(copy, architectures=value)
        refusal(copy, "config.json", "architectures")

    @pytest.mark.parametrize("depth", [100, 100_000])
    def test_nested_json(self, copy, depth):
        for file in ("config.json", "generation_config.json"):
            kept = (copy / file).read_text()
            (copy / file).write_text('{"a": ' + "[" * depth + "]" * depth + f', "b": {kept}}}')
            refusal(copy, file if depth > 1000 else "config.json")
            (copy / file).write_text(kept)
            if depth <= 1000:
                break


class TestKinds:
    @pytest.mark.parametrize(
        "method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4", "torchao", "no such method"]
    )
    def test_a_quantized_checkpoint_names_its_method(self, copy, method):
        edit(copy, quantization_config={"quant_method": method, "bits": 4})
        refusal(copy, "quantized", method)

    @pytest.mark.parametrize("value", ["fp8", {"bits": 4}, [1]])
    def test_whatever_the_quantization_config_is(self, copy, value):
        edit(copy, quantization_config=value)
        refusal(copy, "quantized", "quantization_config")

    @pytest.mark.parametrize("value", [None, {}])
    def test_no_quantization_at_all(self, copy, value):
        edit(copy, quantization_config=value)
        assert outcome(decode, copy) is None and outcome(open_checkpoint, copy) is None

    @pytest.mark.parametrize("name", ["qweight", "weight_scale_inv", "weight_packed", "SCB"])
    def test_a_tensor_that_only_quantized_checkpoints_have(self, copy, name):
        weights = load_file(copy / "model.safetensors")
        weights[f"model.layers.0.self_attn.q_proj.{name}"] = torch.zeros(2, 2)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        refusal(copy, "quantized", name)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_weights_of_8_bits(self, copy, dtype):
        weights = load_file(copy / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(dtype)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        refusal(copy, "quantized", "model.layers.1.mlp.up_proj.weight", ways=(load_model, decode))

    def test_an_adapter(self, copy):
        (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base", "peft_type": "LORA"}')
        refusal(copy, "LoRA adapter", "merge")
        (copy / "config.json").unlink()
        (copy / "model.safetensors").unlink()
        refusal(copy, "LoRA adapter", "merge")

    @pytest.mark.parametrize(
        "file, part",
        [
            ("model-q4_0.gguf", "GGUF"),
            ("pytorch_model.bin", "pickle"),
            ("tf_model.h5", "TensorFlow"),
            ("flax_model.msgpack", "Flax"),
        ],
    )
    @pytest.mark.parametrize("with_config", [True, False])
    def test_weights_in_another_format(self, copy, file, part, with_config):
        (copy / "model.safetensors").rename(copy / file)
        if not with_config:
            (copy / "config.json").unlink()
        refusal(copy, file, part, "safetensors")

    def test_a_gguf_file(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF")
        refusal(path, "GGUF", "folder")

    def test_a_tokenizer_alone(self, copy):
        (copy / "config.json").unlink()
        (copy / "model.safetensors").unlink()
        refusal(copy, "config.json", "tokenizer")

    @pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"])
    def test_buffers_that_are_no_weights(self, copy, name, caplog):
        expected = decode(copy).embedding
        weights = load_file(copy / "model.safetensors")
        weights |= {f"model.layers.{i}.self_attn.{name}": torch.rand(4) for i in range(2)}
        weights |= {"model.layers.0.self_attn.masked_bias": torch.rand(1), "model.layers.0.attn.bias": torch.ones(9, 9)}
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(decode(copy).embedding, expected)
        load_model(copy)
        assert not caplog.text


LOADING = (load_model, decode)
"""The ways that compare the config with the weights; the third reads the files' headers alone."""


class TestQuantized:
    """Checkpoints in 4 bits, damaged in one place each."""

    MODULE = "model.layers.1.mlp.up_proj"

    @pytest.fixture
    def fresh(self, whole, tmp_path):
        """A copy of one to damage, as often as wanted."""

        def make(name: str) -> Path:
            return Path(shutil.copytree(whole[name], tmp_path / f"{name} {len(list(tmp_path.iterdir()))}"))

        return make

    def change(self, folder: Path, **changes) -> Path:
        """Replaces tensors of a module; ... takes one out."""
        weights = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            tensor = weights.pop(f"{self.MODULE}.{name}", None)
            if change is not ...:
                weights[f"{self.MODULE}.{name}"] = change(tensor).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    @pytest.mark.parametrize("name", QUANTIZED)
    def test_whole_ones_are_loaded(self, whole, name):
        assert [outcome(way, whole[name]) for way in WAYS] == [None] * 3

    @pytest.mark.parametrize(
        "name, tensor",
        [
            *(("gptq", tensor) for tensor in TENSORS["gptq"]),
            *(("compressed", tensor) for tensor in TENSORS["compressed-tensors"] if tensor != "weight_g_idx"),
        ],
    )
    def test_a_tensor_that_is_missing_or_cut_or_of_another_kind(self, fresh, name, tensor):
        missing = f"1 of the model's weights ({self.MODULE}.{tensor}) are missing"
        refusal(self.change(fresh(name), **{tensor: ...}), missing, ways=LOADING)
        folder = self.change(fresh(name), **{tensor: lambda whole: whole[:-1]})
        refusal(folder, f"{self.MODULE}.{tensor} has shape", "quantization_config", ways=LOADING)
        folder = self.change(fresh(name), **{tensor: lambda whole: whole.to(torch.int16)})
        refusal(folder, f"{self.MODULE}.{tensor} is stored as I16", ways=LOADING)

    @pytest.mark.parametrize("group_size", [8, 32, 64, -1])
    @pytest.mark.parametrize("name", ["gptq", "compressed"])
    def test_another_group_size_than_in_the_files(self, fresh, name, group_size):
        method, symmetric, desc_act = QUANTIZED[name][1]["method"], name == "gptq", name == "gptq"
        folder = fresh(name)
        edit(folder, quantization_config=config_of(method, group_size, symmetric, desc_act))
        refusal(folder, "has shape", "quantization_config", ways=LOADING)

    @pytest.mark.parametrize("group", [2, 2**31 - 1, -1, -(2**31)])
    def test_a_group_that_there_is_not(self, fresh, group):
        def change(g_idx):
            g_idx[3] = group
            return g_idx

        folder = self.change(fresh("gptq"), g_idx=change)
        refusal(folder, f"{self.MODULE} is wrong: g_idx must name groups from 0 to 1, got {group}", ways=LOADING)

    @pytest.mark.parametrize("shape", [[48, 31], [48, 40], [49, 32], [-1, -1], [0, 0], [2**40, 2**40]])
    def test_a_shape_that_its_numbers_do_not_have(self, fresh, shape):
        folder = self.change(fresh("compressed"), weight_shape=lambda _: torch.tensor(shape))
        refusal(folder, f"{self.MODULE} is wrong", ways=LOADING)

    @pytest.mark.parametrize("module", ["lm_head", "model.layers.2.mlp.up_proj"])
    def test_a_module_that_there_is_not(self, fresh, module):
        folder = fresh("gptq")
        edit(folder, tie_word_embeddings=True)
        weights = load_file(folder / "model.safetensors")
        weights |= {f"{module}.{name}": weights[f"{self.MODULE}.{name}"].clone() for name in TENSORS["gptq"]}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for way in LOADING:
            message = outcome(way, folder)
            assert message and module in message and "does not know" in message

    @pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
    def test_a_config_without_the_weights(self, copy, method):
        edit(copy, quantization_config=config_of(method))
        refusal(copy, f"quantized by {method!r}, but the files hold none")

    def test_what_autogptq_has_left_beside_a_config(self, copy):
        (copy / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
        refusal(copy, "quantize_config.json", "the files hold none")

    def test_weights_without_the_config(self, fresh):
        folder = fresh("gptq")
        edit(folder, quantization_config=...)
        refusal(folder, "quantized", "has a tensor model.layers.0.mlp.down_proj.g_idx")

    def test_weights_of_another_method(self, fresh):
        folder = fresh("gptq")
        edit(folder, quantization_config=config_of("compressed-tensors"))
        refusal(folder, "quantized", "has a tensor model.layers.0.mlp.down_proj.g_idx")

    def test_shards_that_cannot_be_one_product(self, whole, tmp_path):
        """The query's weight in 4 bits, the others' in floats."""
        folder = quantize(whole["llama"], tmp_path / "mixed", "gptq", which=re.compile(".*q_proj").match)
        refusal(folder, "self_attn.k_proj", "are one product", ways=LOADING)

    @pytest.mark.parametrize(
        "changes, part",
        [
            ({"bits": 3}, "bits must be 4, got 3"),
            ({"bits": 8}, "bits must be 4, got 8"),
            ({"bits": "4"}, "bits must be 4, got '4'"),
            ({"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'"),
            ({"checkpoint_format": []}, "got []"),
            ({"is_marlin_format": True}, "marlin"),
            ({"group_size": 0}, "group_size must be positive, or -1 for whole columns, got 0"),
            ({"group_size": None}, "group_size must be an integer, got None"),
            ({"sym": "yes"}, "sym must be True or False"),
            ({"desc_act": 1}, "desc_act must be True or False"),
            ({"dynamic": {"+:.*up_proj": {"bits": 8}}}, "bits must be 4, got 8"),
            ({"dynamic": {"-:(": {}}}, "dynamic has a pattern '('"),
            ({"dynamic": [1]}, "dynamic must be an object"),
            ({"dynamic": {"x": 3}}, "dynamic['x'] must be an object, got 3"),
        ],
    )
    def test_what_gptq_says_and_is_not_run(self, fresh, changes, part):
        folder = fresh("gptq")
        edit(folder, quantization_config=config_of("gptq", **changes))
        refusal(folder, "config.json", "'gptq'", part)

    @pytest.mark.parametrize(
        "changes, part",
        [
            ({"format": "float-quantized"}, "format must be 'pack-quantized', got 'float-quantized'"),
            ({"format": "marlin-24"}, "'marlin-24'"),
            ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be null"),
            ({"transform_config": {"config_groups": {}}}, "transform_config must be null"),
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config must be null or dense"),
            ({"ignore": "lm_head"}, "ignore must be a list of names"),
            ({"ignore": ["re:("]}, "ignore has a pattern '('"),
            ({"ignore": [None]}, "ignore must be a list of names, got an entry None"),
            ({"config_groups": {}}, "config_groups must name a group"),
            ({"config_groups": {"a": 1}}, "config_groups.a must be an object"),
        ],
    )
    def test_what_compressed_tensors_says_and_is_not_run(self, fresh, changes, part):
        folder = fresh("compressed")
        edit(folder, quantization_config=config_of("compressed-tensors", **changes))
        refusal(folder, "config.json", "'compressed-tensors'", part)

    @pytest.mark.parametrize(
        "name, value, part",
        [
            ("num_bits", 8, "weights.num_bits must be 4, got 8"),
            ("num_bits", 3, "weights.num_bits must be 4, got 3"),
            ("type", "float", "weights.type must be 'int', got 'float'"),
            ("strategy", "tensor", "weights.strategy must be 'group' or 'channel', got 'tensor'"),
            ("strategy", [], "got []"),
            ("group_size", "x", "weights.group_size must be an integer"),
            ("dynamic", True, "weights.dynamic must be false"),
            ("symmetric", None, "weights.symmetric must be True or False"),
        ],
    )
    def test_what_a_group_of_weights_says_and_is_not_run(self, fresh, name, value, part):
        folder, config = fresh("compressed"), config_of("compressed-tensors")
        config["config_groups"]["group_0"]["weights"][name] = value
        edit(folder, quantization_config=config)
        refusal(folder, "config.json", f"config_groups.group_0.{part}" if part.startswith("weights") else part)

    def test_activations_in_fewer_bits(self, fresh):
        folder, config = fresh("compressed"), config_of("compressed-tensors")
        config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
        edit(folder, quantization_config=config)
        refusal(folder, "config_groups.group_0.input_activations must be null")

    def test_what_was_asked_for_does_not_fit_the_checkpoint(self, whole):
        def message(name, asked):
            with pytest.raises(ValueError) as error:
                ModelLoader(ModelConfig(str(whole[name]), quantization=asked)).open("cpu")
            return str(error.value)

        assert "must be None or 'gptq'" in message("gptq", "int8") and "must be None or 'gptq'" in message(
            "gptq", "compressed-tensors"
        )
        assert "must be None or 'int8'" in message("llama", "gptq")

    def test_transformers_model_has_no_8_bits(self, whole):
        with pytest.raises(ValueError, match="for the engine alone"):
            ModelLoader(ModelConfig(str(whole["llama"]), quantization="int8")).load_model("cpu")

    @settings(max_examples=60)
    @given(data=st.data())
    def test_whatever_a_tensor_holds(self, whole, tmp_path_factory, data):
        """One or two tensors of a quantized module changed at random: it runs, or one sentence says why not."""
        name = data.draw(st.sampled_from(sorted(QUANTIZED)))
        folder = Path(shutil.copytree(whole[name], tmp_path_factory.mktemp("any") / "copy"))
        change = st.sampled_from(
            [
                ...,
                lambda tensor: tensor[:-1],
                lambda tensor: tensor.flatten(),
                lambda tensor: tensor.unsqueeze(0),
                lambda tensor: tensor.T if tensor.ndim == 2 else tensor,
                lambda tensor: torch.cat([tensor, tensor]),
                lambda tensor: tensor.new_zeros(0),
                lambda tensor: tensor.to(torch.float32),
                lambda tensor: tensor.to(torch.int64),
                lambda tensor: torch.full_like(tensor, 2**15),
                lambda tensor: torch.full_like(tensor, -1),
                lambda tensor: torch.zeros_like(tensor),
            ]
        )
        tensors = TENSORS[QUANTIZED[name][1]["method"]]
        there = [tensor for tensor in tensors if tensor not in ("weight_g_idx",)]
        self.change(folder, **data.draw(st.dictionaries(st.sampled_from(there), change, min_size=1, max_size=2)))
        first, second = (outcome(way, folder) for way in LOADING)
        assert (first is None) == (second is None)
        shutil.rmtree(folder)


class TestIndex:
    def test_a_whole_file_goes_before_an_index(self, copy):
        (copy / "model.safetensors.index.json").write_text(
            '{"weight_map": {"model.norm.weight": "missing.safetensors"}}'
        )
        assert [outcome(way, copy) for way in WAYS] == [None] * 3

    @pytest.mark.parametrize("target", ["../{}/model.safetensors", "{}/model.safetensors", "sub/../../{}/x"])
    def test_it_may_not_lead_out_of_the_folder(self, whole, copy, target):
        (copy / "model.safetensors").unlink()
        name = target.format(whole["llama"].name if target.startswith((".", "sub")) else whole["llama"])
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refusal(copy, "model.safetensors.index.json", "weight_map", "outside")

    def test_a_tensor_is_in_one_file(self, copy):
        shutil.copy(copy / "model.safetensors", copy / "a.safetensors")
        (copy / "model.safetensors").rename(copy / "b.safetensors")
        weight_map = {"model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refusal(copy, "that an earlier file has as well")

    def test_nor_by_a_link(self, whole, copy):
        (copy / "model.safetensors").unlink()
        (copy / "link.safetensors").symlink_to(whole["llama"] / "model.safetensors")
        (copy / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "link.safetensors"}}')
        refusal(copy, "link.safetensors", "outside")

    def test_the_links_of_the_hubs_cache_are_followed(self, whole, tmp_path):
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(whole["qwen2"].iterdir())):
            shutil.copy(path, blobs / str(number))
            (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
        assert [outcome(way, snapshot) for way in WAYS] == [None] * 3


class TestSafetensors:
    ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}  # noqa: RUF012

    @pytest.mark.parametrize(
        "header, part",
        [
            ({"a": {**ENTRY, "dtype": "X32"}}, "X32"),
            ({"a": {**ENTRY, "shape": [2**62, 8]}}, "overflow"),
            ({"a": {**ENTRY, "shape": [-2]}}, "-2"),
            ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "offset"),
            ({"a": ENTRY, "a2": ENTRY}, "offset"),
            ({"a": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "offset"),
            ({"a": {**ENTRY, "shape": [3]}}, "shape"),
            ([], "sequence"),
            ('{"a": ENTRY, "a": ENTRY}'.replace("ENTRY", json.dumps(ENTRY)), "twice"),
            ("[" * 5000, "recursion depth"),
            ('{"a":' * 5000, "recursion"),
            ("{}", "not fully covered"),
        ],
    )
    def test_what_safetensors_says_is_said(self, copy, header, part):
        content = (header if isinstance(header, str) else json.dumps(header)).encode()
        path = copy / "model.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
        refusal(
            copy, "model.safetensors", part, ways=[load_model]
        )  # it names one of several tensors, not always the same


class TestGenerationConfig:
    def read(self, folder):
        return read_generation_config(open_checkpoint(folder), AutoTokenizer.from_pretrained(folder))

    def write(self, folder, **fields):
        (folder / "generation_config.json").write_text(json.dumps(fields))

    @pytest.mark.parametrize("content", ["", "not JSON", "[]", "3", "null", "[" * 100_000])
    def test_it_is_no_object(self, copy, content):
        (copy / "generation_config.json").write_text(content)
        refusal(copy, "generation_config.json")

    @pytest.mark.parametrize(
        "name, value",
        [
            *(("eos_token_id", value) for value in (1.5, "2", [[2]], [2, None], -1, [True], {}, 10**30)),
            *(("max_new_tokens", value) for value in (0, -1, 2.5, "ten", [], True)),
            *(("temperature", value) for value in (-1, float("nan"), float("inf"), "warm", [1], True)),
            *(("top_k", value) for value in (-2, 1.5, "x", [3])),
            *(("top_p", value) for value in (-0.1, 0, 1.5, "x", float("nan"))),
            *(("min_p", value) for value in (-0.1, 1.5, {}, float("nan"))),
            *(("repetition_penalty", value) for value in (0, -1, "x", float("nan"))),
            *(("do_sample", value) for value in (1, "yes", [])),
        ],
    )
    def test_a_field_that_cannot_be(self, copy, name, value):
        self.write(copy, **{name: value})
        refusal(copy, "generation_config.json", name)

    def test_all_that_it_recommends(self, copy):
        self.write(copy, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, max_new_tokens=99)
        params = self.read(copy).params
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 20, 0.95, 0.05)
        assert (params.repetition_penalty, params.max_tokens) == (1.1, 99)

    @pytest.mark.parametrize(
        "fields, name, value",
        [
            ({"do_sample": False, "temperature": 0.7}, "temperature", 0.0),
            ({"do_sample": None, "temperature": None}, "temperature", 1.0),
            ({"top_k": 0}, "top_k", -1),
            ({}, "max_tokens", 16),
        ],
    )
    def test_what_it_leaves_to_us(self, copy, fields, name, value):
        self.write(copy, **fields)
        assert getattr(self.read(copy).params, name) == value

    @pytest.mark.parametrize(
        "ends, expected", [(7, [2, 7]), ([0, 2, 9], [2, 0, 9]), (2, [2]), ([], [2]), (None, [2]), ([5000], [2])]
    )
    def test_the_tokenizers_end_token_comes_first(self, copy, ends, expected):
        """And one that the model has no embedding for is left out."""
        self.write(copy, eos_token_id=ends)
        assert self.read(copy).eos_token_ids == expected

    def test_the_default_of_a_class_is_no_end_token_of_another_tokenizer(self, copy):
        """LlamaConfig's own 2 is a word here; a file that names another word means it."""
        words = {word: i for i, word in enumerate(["<eos>", "A", "C", "G"])}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<eos>").save_pretrained(copy)
        for named, expected in ((2, [0]), ([2, 3], [0, 3]), (0, [0])):
            self.write(copy, eos_token_id=named)
            assert self.read(copy).eos_token_ids == expected
        assert loader(copy).load_tokenizer().convert_tokens_to_ids("G") == 3  # no "a" is needed

    def test_without_one_the_config_says_it(self, copy):
        (copy / "generation_config.json").unlink()
        edit(copy, eos_token_id=[3, 4])
        assert self.read(copy).eos_token_ids == [2, 3, 4]
        edit(copy, eos_token_id=-1)
        refusal(copy, "config.json", "eos_token_id")


class TestAnything:
    """Values and bytes changed at random: the checkpoint is loaded, or one sentence says why not."""

    NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 10**12, 10**30, -0.5, 0.5, 4.0, 1e300, float("nan"), float("inf"))
    OTHERS = (None, True, False, "", "x", "4", [], [1], [None], ["x"], {}, {"a": 1}, {"rope_type": "linear"})
    ODD = st.sampled_from([*NUMBERS, *OTHERS])
    FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "safetensors")

    @staticmethod
    def places(value, path=()):
        """The way to every value in a JSON text."""
        yield path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            inner_path = (*path, key)
            if isinstance(inner, (dict, list)):
                yield from TestAnything.places(inner, inner_path)
            else:
                yield inner_path

    def change_value(self, data, content: bytes) -> bytes:
        raw = json.loads(content)
        *way, last = data.draw(st.sampled_from(list(self.places(raw))[1:]))
        target = raw
        for key in way:
            target = target[key]
        if data.draw(st.booleans()) and isinstance(target, dict):
            del target[last]
        else:
            target[last] = data.draw(self.ODD)
        return json.dumps(raw).encode()

    def change_bytes(self, data, content: bytes, end: int) -> bytes:
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    def damage(self, data, path: Path) -> None:
        content = path.read_bytes()
        if path.suffix == ".json":
            if data.draw(st.integers(0, 3)):
                path.write_bytes(self.change_value(data, content))
            else:
                path.write_bytes(self.change_bytes(data, content, len(content)))
            return
        end = 8 + int.from_bytes(content[:8], "little")
        if data.draw(st.booleans()):
            path.write_bytes(self.change_bytes(data, content, end))
        else:
            header = self.change_value(data, content[8:end])
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    @settings(max_examples=150)
    @given(data=st.data())
    def test_it_is_loaded_or_one_sentence_says_why(self, whole, tmp_path_factory, data):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        folder = tmp_path_factory.mktemp("any") / "copy"
        shutil.copytree(whole[data.draw(st.sampled_from(sorted(whole)))], folder)
        files = [p for p in sorted(folder.iterdir()) if p.name.endswith(self.FILES)]
        for index in data.draw(st.sets(st.integers(0, len(files) - 1), min_size=1, max_size=2)):
            self.damage(data, files[index])
        config = ModelConfig(str(folder), dtype="float32", max_model_len=data.draw(st.sampled_from([1, 64, 64, 1000])))
        for load in (lambda loader: loader.load_model("cpu"), lambda loader: load_decoder(loader.open("cpu"))):
            outcome(load, ModelLoader(config))
        shutil.rmtree(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB that stayed or were needed"
