"""A real model that is not ours, against transformers; only where ``FOLOVLLM_FOREIGN`` names its folder."""

from __future__ import annotations

import itertools
import os
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folovllm import LLM, BeamSearchParams, SamplingParams

FOLDER = os.environ.get("FOLOVLLM_FOREIGN", "")
pytestmark = pytest.mark.skipif(
    not FOLDER,
    reason="FOLOVLLM_FOREIGN is unset: `python tests/benchmarks/foreign_model.py FOLDER` makes a model, and then "
    "`FOLOVLLM_FOREIGN=FOLDER pytest tests/integration/test_foreign_model.py` runs it",
)

MAX_TOKENS = 32
NEAR_TIE = 1e-3  # logits: what two correct sums in float32 may differ by, after 30 layers
ENGLISH = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "My favourite book is",
    "List three colours:\n1.",
    "Q: What is 7 times 8?\nA:",
    "The opposite of hot is",
    "Dear Sir or Madam,\n\n",
    "In 1969, Neil Armstrong",
    "She said, \"I don't know what you're talking about,\"",
]
CODE = [
    "def fibonacci(n):\n",
    "for (int i = 0; i < n; i++) {\n    ",
    "SELECT name, age FROM users WHERE",
    '{"name": "Ada", "born": 1815, "languages": [',
    "<html>\n\t<body>\n\t\t<h1>",
    "import numpy as np\n\nx = np.",
    "git commit -m '",
    "#include <stdio.h>\n\nint main(void)\n{\n\t",
]
CHINESE_AND_OTHERS = [
    "从前，有一只小狐狸住在森林里。",
    "中国的首都是",
    "你好，世界！",
    "机器学习是",
    "日本の首都は",
    "Столица Франции —",
    "Der schnelle braune Fuchs",
    "مرحبا",
]
EMOJI = ["🦊", "I love pizza 🍕🍕 and", "👩‍👩‍👧‍👦 means", "🇫🇷 is the flag of", "naïve café, Zoë's 😀"]
NEARLY_EMPTY = [" ", "\n", ".", "a", "   \n\n  "]
LONG = [
    "The quick brown fox jumps over the lazy dog. " * 30,
    " ".join(str(n) for n in range(300)),
    "狐狸和小熊是好朋友。" * 20 + "Translate this:",
    "\n".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(25)),
]
PROMPTS = ENGLISH + CODE + CHINESE_AND_OTHERS + EMOJI + NEARLY_EMPTY + LONG
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def llm():
    return LLM(FOLDER, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.inference_mode()
def check_greedy(model, output):
    """The tokens are transformers' greedy ones: each is the likeliest by transformers' logits after those before it,
    and the answer ends where transformers ends it.

    A place where another token is likelier, by less than `NEAR_TIE`, is shown as a warning; what follows it is checked
    as well.
    """
    prompt, ours = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    logits = model(torch.tensor([prompt + ours]), logits_to_keep=len(ours) + 1).logits[0, :-1]
    best = logits.argmax(dim=-1).tolist()
    for i in range(len(ours)):
        if ours[i] != best[i]:
            gap = (logits[i, best[i]] - logits[i, ours[i]]).item()
            where = f"{output.prompt!r:.40}, token {i}: ours {ours[i]}, transformers' {best[i]}, logits {gap:.6f} apart"
            assert gap < NEAR_TIE, where
            warnings.warn(f"near tie at {where}", stacklevel=2)
    ends = model.generation_config.eos_token_id
    ended = [token in (ends if isinstance(ends, list) else [ends]) for token in ours]
    assert not any(ended[:-1]) and (ended[-1] or len(ours) == MAX_TOKENS)


def test_forty_prompts_of_many_kinds():
    assert len(PROMPTS) == len(set(PROMPTS)) == 40


def test_greedy_tokens(llm, model, tokenizer):
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs):
        assert list(output.prompt_token_ids) == tokenizer(prompt)["input_ids"]
        text = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert output.outputs[0].text == text.rstrip("\ufffd")  # bytes of an unfinished character are not shown
        check_greedy(model, output)


CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you? 🏴‍☠️"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "你好！"}],
]


def test_chat(llm, model, tokenizer):
    for messages, output in zip(CONVERSATIONS, llm.chat(CONVERSATIONS, GREEDY, use_tqdm=False)):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(output.prompt_token_ids) == expected
        check_greedy(model, output)


def test_streams(llm):
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY, use_tqdm=False)):
        pieces = list(llm.stream(prompt, GREEDY))
        text = output.outputs[0].text
        assert "".join(pieces) == text and all(pieces)
        # No piece is ever taken back: not even when it ends inside a character or before a space.
        assert all(text.startswith(shown) for shown in itertools.accumulate(pieces))


def test_prefix_caching(model):
    llm = LLM(FOLDER, device="cpu", dtype="float32", enable_prefix_caching=True)
    prompts = [LONG[0] + prompt for prompt in ENGLISH[:5]] + LONG
    first = llm.generate(prompts, GREEDY, use_tqdm=False)
    before = sum(step.num_cached_tokens for step in llm.engine.stats())
    again = llm.generate(prompts, GREEDY, use_tqdm=False)
    found = sum(step.num_cached_tokens for step in llm.engine.stats()) - before
    assert found > sum(len(output.prompt_token_ids) for output in again) / 2
    for output in [*first, *again]:
        check_greedy(model, output)


BEAM_CASES = [
    (ENGLISH[0], 8, 1.0),
    (CODE[0], 8, 1.0),
    (CHINESE_AND_OTHERS[1], 6, 1.0),
    *((CONVERSATIONS[0], 24, penalty) for penalty in (0.0, 1.0, 2.0)),
]
"""Prompts, ``max_tokens`` and ``length_penalty``; the conversation's answers end by themselves."""


@pytest.mark.parametrize("width", [2, 4, 8])
def test_beam_search(model, tokenizer, width):
    """All texts are those of transformers, in its order, unless two scores are so near that either may be first."""
    llm = LLM(FOLDER, device="cpu", dtype="float32", enable_prefix_caching=True)
    num_stopped = 0
    for prompt, max_tokens, penalty in BEAM_CASES:
        if not isinstance(prompt, str):
            prompt = llm.apply_chat_template(prompt)
        encoded = tokenizer(prompt)["input_ids"]
        params = BeamSearchParams(width, max_tokens, length_penalty=penalty)
        (output,) = llm.beam_search({"prompt_token_ids": encoded}, params, use_tqdm=False)
        found = model.generate(
            torch.tensor([encoded]),
            num_beams=width,
            num_return_sequences=width,
            early_stopping=True,
            length_penalty=penalty,
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for sequence, tokens, score in zip(output.sequences, found.sequences.tolist(), found.sequences_scores.tolist()):
            ours = sequence.cum_logprob / (len(sequence.tokens) - len(encoded)) ** penalty
            assert ours == pytest.approx(score, abs=NEAR_TIE)
            if sequence.tokens != tokens[: len(sequence.tokens)]:
                warnings.warn(f"near tie after {prompt!r:.40}: width {width}, penalty {penalty}", stacklevel=1)
            num_stopped += sequence.finish_reason == "stop"
    assert num_stopped
