"""The tokenizer of the embedded model: byte-level BPE, trained on the tales themselves.

Its 256 byte tokens can spell any text, so nothing is ever unknown: a word of the tales is one token, while an
emoji it has never seen takes one token per byte. Each Chinese character is kept apart from its neighbours, so a
token never reaches across one of the grammar's choices and the grammar's probabilities are those of tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from folovllm.tales.grammar import END_OF_TEXT, IM_END, IM_START, continuations, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_LIMIT, NUM_DOCUMENTS = 2048, 20_000

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Qwen's markers, without its tools and thinking: a turn is ``<|im_start|>role``, a new line, text, ``<|im_end|>``."""


def train_tokenizer(directory: Path, seed: int = 0) -> None:
    """Trains the tokenizer on sampled documents and saves it in ``directory`` in the hub's layout."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sample(rng).text for _ in range(NUM_DOCUMENTS)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def next_token_probs(prefix: str, tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
    """True probability of each token that may follow ``prefix``: ``{token_id: probability}``, likeliest first.

    Raises:
        ValueError: if no document of the grammar begins with ``prefix``.
    """
    probs: dict[int, float] = {}
    for text, p in continuations(prefix).items():
        first = tokenizer.encode(text, add_special_tokens=False)[0]
        probs[first] = probs.get(first, 0.0) + p
    return dict(sorted(probs.items(), key=lambda item: -item[1]))
