"""The decoder beside transformers: the same logits for each architecture, and a sentence for what it does not have."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE, default_dtype
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from folovllm import ModelConfig, ModelLoader
from folovllm.engine.llm_engine import LLMEngine
from folovllm.llm import make_engine_config
from folovllm.model.decoder import load_decoder
from folovllm.model_loader import ModelLoadError

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3 with a bias": Qwen3Config(**SHAPE, attention_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
    "llama, llama3 RoPE, tied": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama, linear RoPE": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    ),
}


def save(config, folder, max_shard_size="100KB"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2 if weight.ndim > 1 else 1.0)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load(folder):
    return load_decoder(ModelLoader(ModelConfig(str(folder), dtype="float32")).open(DEVICE))


def attend(layer, q, kv):
    """Causal attention of one sequence, without a cache."""
    q, (k, v) = q.transpose(0, 1), kv.transpose(0, 1).chunk(2)
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_logits_are_transformers(name, tmp_path):
    model = save(CONFIGS[name], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1  # sharded
    decoder = load(tmp_path)
    token_ids = torch.randint(0, 300, (200,))
    ours = decoder.compute_logits(decoder(token_ids.to(DEVICE), torch.arange(200, device=DEVICE), attend)).cpu()
    assert (ours - model(token_ids[None]).logits[0]).abs().max() < 1e-4
    assert ours.abs().max() > 1


@pytest.mark.parametrize("rows", [[199], [0, 63, 64, 199], [7, 2]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_some_rows_are_those_of_all(name, rows, tmp_path):
    save(CONFIGS[name], tmp_path)
    decoder, ids = load(tmp_path), torch.randint(0, 300, (200,), device=DEVICE)
    places, wanted = torch.arange(200, device=DEVICE), torch.tensor(rows, device=DEVICE)
    every, some = decoder(ids, places, attend), decoder(ids, places, attend, wanted)
    assert some.shape == (len(rows), decoder.config.hidden_size)
    assert (some - every[rows]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config, message",
    [
        (MistralConfig(**SHAPE), "no architecture MistralForCausalLM; it has Qwen3ForCausalLM, Qwen2ForCausalLM"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias=True"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act='gelu'"),
        (Qwen2Config(**SHAPE, use_sliding_window=True), "use_sliding_window=True"),
        (
            Qwen3Config(**SHAPE, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
            "no RoPE of type 'yarn'; it has default, linear and llama3",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "full_attention": {"rope_theta": 500.0}}),
            "has one RoPE for all layers, and the config has one for each of",
        ),
    ],
)
def test_what_it_does_not_have_is_a_sentence(config, message, tmp_path):
    save(config, tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.norm.weight"), "1 of the model's weights .model.norm.weight. are missing"),
        (
            lambda w: w.update(extra=torch.zeros(1)),
            "a weight extra, which the model that its config describes does not know",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \[3\], but its config says \[64\]",
        ),
    ],
)
def test_weights_that_do_not_belong_to_the_config(change, message, tmp_path):
    save(CONFIGS["qwen3"], tmp_path, max_shard_size="1GB")
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "llama, llama3 RoPE, tied"])
def test_the_engine_generates_what_transformers_does(name, tmp_path):
    from folovllm import SamplingParams
    from folovllm.tales import EMBEDDED_MODEL

    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), "vocab_size": 1294})
    model = save(config, tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((EMBEDDED_MODEL / file).read_bytes())
    config = make_engine_config(str(tmp_path), dtype="float32", max_model_len=128, block_size=4)
    engine = LLMEngine(config, DEVICE)
    prompts = {str(n): list(range(5, 5 + n)) for n in (1, 4, 30)}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=24))
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    for request_id, prompt in prompts.items():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0
        )
        assert finished[request_id] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "llama, llama3 RoPE, tied"])
@torch.inference_mode()
def test_torchs_default_dtype_changes_no_number(name, dtype, tmp_path):
    save(CONFIGS[name], tmp_path)

    def run():
        decoder, tokens = load(tmp_path), torch.arange(20, device=DEVICE)
        return decoder.compute_logits(decoder(tokens, tokens, attend)), decoder.cos, decoder.sin

    expected = run()
    with default_dtype(dtype):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_tables_have_a_row_for_each_position_that_is_served(tmp_path):
    save(CONFIGS["llama"], tmp_path)
    decoder = load_decoder(ModelLoader(ModelConfig(str(tmp_path), dtype="float32", max_model_len=7)).open(DEVICE))
    assert decoder.cos.shape == decoder.sin.shape == (7, 1, 16)
    assert torch.equal(decoder.cos, load(tmp_path).cos[:7])
