"""The model that comes with the package: small, whole, and able to tell a tale of its grammar."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from devices import DEVICE, HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import LLM, ModelConfig, ModelLoader, SamplingParams
from folovllm.model_loader import get_model_max_len, read_generation_config
from folovllm.sample.sampler import Sampler, SamplingMetadata
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.evaluate import evaluate
from folovllm.tales.grammar import CARD_SLOTS, continuations
from folovllm.tales.tokenizer import VOCAB_LIMIT, next_token_probs
from folovllm.tales.train import generation_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def loaded():
    """Model, tokenizer and report, in float32."""
    loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL), dtype="float32"))
    return *loader.load_model_and_tokenizer(DEVICE), loader.report


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def greedy(logits: torch.Tensor) -> int:
    return logits[0].argmax().item()


@torch.inference_mode()
def tell(model, tokenizer, text: str, choose=greedy, max_tokens: int = 300) -> str:
    """``text`` and what the model adds to it, token by token, to the end of the document."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    new, cache = ids, None
    for _ in range(max_tokens):
        output = model(torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True)
        new, cache = [choose(output.logits[:, -1])], output.past_key_values
        ids = ids + new
        if new[0] in model.generation_config.eos_token_id:
            break
    return tokenizer.decode(ids)


class TestCheckpoint:
    def test_it_is_small(self):
        assert sum(path.stat().st_size for path in EMBEDDED_MODEL.rglob("*") if path.is_file()) <= MAX_BYTES

    def test_nothing_is_left_over_from_training(self):
        assert not list(EMBEDDED_MODEL.glob("*training*")) and not list(EMBEDDED_MODEL.glob("*.bin"))

    @pytest.mark.parametrize("device", DEVICES)
    def test_it_loads(self, device):
        loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL)))
        model, tokenizer = loader.load_model_and_tokenizer(device)
        assert loader.report.model_class == "Qwen3ForCausalLM"
        assert loader.report.num_parameters == sum(p.numel() for p in model.parameters())
        assert loader.report.max_model_len == get_model_max_len(model.config) == model.config.max_position_embeddings
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
        assert model.device.type == device and not model.training

    def test_config_generation_config_and_tokenizer_name_the_same_special_tokens(self, model, tokenizer):
        ends = model.generation_config.eos_token_id
        assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
        assert model.config.eos_token_id == tokenizer.eos_token_id == ends[0]
        assert model.config.pad_token_id == tokenizer.pad_token_id == ends[1]

    def test_training_writes_the_same_generation_config(self, model):
        written = generation_config(model.generation_config.eos_token_id).to_diff_dict()
        assert written == model.generation_config.to_diff_dict()

    def test_the_model_card_has_no_path_of_a_machine(self):
        for path in EMBEDDED_MODEL.glob("*.json"):
            assert not any(value.startswith("/") for value in _strings(json.loads(path.read_text())) if len(value) > 2)


def _strings(value):
    """Every string that is a value somewhere in a JSON text, a vocabulary's left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("vocab", "merges"):
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


class TestTokenizer:
    def test_it_is_small_and_pads_on_the_left(self, tokenizer):
        assert 256 < len(tokenizer) <= VOCAB_LIMIT == 2048
        assert tokenizer.padding_side == "left" and tokenizer.is_fast

    @settings(max_examples=200)
    @given(text=st.text())
    def test_any_text_comes_back(self, tokenizer, text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token_id < len(tokenizer) for token_id in ids)

    @pytest.mark.parametrize(
        "text",
        [
            "Once upon a time, in the forest",
            "从前，在森林里",
            "a  b\n\n c\t",
            " leading and trailing ",
            "don 't , stop !",
            "𓀀 ﷽ é e\u0301 \u200d \ufffd",
            "👩‍👩‍👧‍👦🏳️‍🌈",
            "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
            "",
        ],
    )
    def test_this_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_nothing_is_added_to_a_text(self, tokenizer):
        assert tokenizer.encode("fox") == tokenizer.encode("fox", add_special_tokens=False)

    @pytest.mark.parametrize("emoji", ["🦊", "🐉", "👍🏽"])
    def test_an_emoji_takes_a_token_for_each_byte(self, tokenizer, emoji):
        ids = tokenizer.encode(emoji, add_special_tokens=False)
        assert len(ids) == len(emoji.encode())
        assert tokenizer.decode(ids[:1]) == "\ufffd"

    @pytest.mark.parametrize("marker", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    def test_a_marker_is_one_token_and_special(self, tokenizer, marker):
        (token_id,) = tokenizer.encode(marker, add_special_tokens=False)
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ""


class TestChatTemplate:
    MESSAGES = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell a tale about a fox."},
        {"role": "assistant", "content": "从前"},
    )

    def test_qwens_markers(self, tokenizer):
        text = tokenizer.apply_chat_template([*self.MESSAGES], tokenize=False)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nTell a tale about a fox.<|im_end|>\n"
            "<|im_start|>assistant\n从前<|im_end|>\n"
        )

    def test_the_generation_prompt(self, tokenizer):
        text = tokenizer.apply_chat_template([self.MESSAGES[1]], tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nTell a tale about a fox.<|im_end|>\n<|im_start|>assistant\n"
        assert continuations(text)  # it is how a conversation of the grammar begins


class TestTales:
    PROMPTS = (
        "Once upon a time",
        "Long ago",
        "从前",
        "<|im_start|>user\nTell a tale about a fox.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n讲一个狐狸的故事。<|im_end|>\n<|im_start|>assistant\n",
    )

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_the_likeliest_words_are_a_tale_of_the_grammar(self, model, tokenizer, prompt):
        text = tell(model, tokenizer, prompt)
        assert len(text) > len(prompt) + 50
        for end in range(len(prompt), len(text) + 1):
            continuations(text[:end])  # raises where no tale goes on like this
        if not prompt.startswith("<"):
            assert continuations(text) == {}  # it came to its end

    def test_a_whole_conversation_ends_with_a_true_card(self, model, tokenizer):
        text = tell(model, tokenizer, self.PROMPTS[3])
        for question in ("Who is the hero?", "Write the card."):
            text = tell(model, tokenizer, text + f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        assert continuations(text) == {}
        card = json.loads(text.split("assistant\n")[-1].removesuffix("<|im_end|>"))
        assert list(card) == list(CARD_SLOTS)
        assert card["hero"] == "fox" and f"named {card['name']}" in text

    @pytest.mark.parametrize(
        "prompt", ["Once upon a time, in the", "Long ago, in the forest, there lived a", "从前，在"]
    )
    def test_the_model_has_learned_the_grammars_probabilities(self, model, tokenizer, prompt):
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], device=DEVICE)
        with torch.inference_mode():
            probs = model(ids).logits[0, -1].softmax(-1)
        true = torch.zeros_like(probs)
        for token, p in next_token_probs(prompt, tokenizer).items():
            true[token] = p
        assert (probs - true).abs().sum() / 2 < 0.1  # total variation distance

    def test_it_is_as_good_as_its_card_says(self, model, tokenizer):
        """The card's figures come from 500 documents of each kind; these are the first 50 of them."""
        found = evaluate(model, tokenizer, num_documents=50)
        assert set(found.cross_entropy_ratio) == {"english", "chinese", "chat"}
        assert max(found.cross_entropy_ratio.values()) <= 1.05
        assert found.name_accuracy >= 0.99
        assert found.answer_accuracy >= 0.98 and found.card_accuracy >= 0.98

    @needs_gpu
    def test_the_same_tale_on_a_gpu(self, tokenizer):
        loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL), dtype="float32"))
        on_cpu, on_gpu = (tell(loader.load_model(d), tokenizer, "Once upon a time") for d in ("cpu", "cuda"))
        assert on_cpu == on_gpu

    def test_the_sampler_draws_tales_too(self, model, tokenizer):
        """Temperature 0.7 and top-p 0.9, which keep to what is likely."""
        metadata = SamplingMetadata([SamplingParams(temperature=0.7, top_p=0.9, seed=1)])
        sampler = Sampler(tokenizer)
        text = tell(model, tokenizer, "Once upon a time", lambda logits: sampler(logits, metadata).token_ids[0])
        assert continuations(text) == {}
        assert text != tell(model, tokenizer, "Once upon a time")

    def test_as_recommended_no_tale_has_a_token_that_the_model_finds_impossible(self):
        """1,000 seeds were counted: none; the least likely token had a log probability of -3.7."""
        loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL)))
        params = read_generation_config(loader.open(DEVICE), loader.load_tokenizer()).params
        params = [replace(params, max_tokens=256, logprobs=0, seed=seed) for seed in range(60)]
        llm = LLM(str(EMBEDDED_MODEL), **HERE)
        for output in llm.generate(["Once upon a time"] * 60, params, use_tqdm=False):
            (answer,) = output.outputs
            assert answer.finish_reason == "stop"
            assert min(found[token].logprob for found, token in zip(answer.logprobs, answer.token_ids)) > -7
