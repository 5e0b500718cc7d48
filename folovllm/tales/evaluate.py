"""Measures the embedded model on tales it never saw: ``python -m folovllm.tales.evaluate``.

With ``--card`` the figures are written into the model's card, the ``README.md`` beside its weights.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from folovllm.config import ModelConfig
from folovllm.model_loader import ModelLoader
from folovllm.tales import EMBEDDED_DRAFT, EMBEDDED_MODEL
from folovllm.tales.grammar import CARD_SLOTS, STARTS, Document, document_entropy, sample
from folovllm.tales.train import negative_log_likelihood

ASSISTANT = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    num_documents: int
    """Documents of each kind."""
    cross_entropy_ratio: dict[str, float]
    """Model's cross-entropy over the grammar's ``-log p`` of the same documents, by kind; 1 is perfect."""
    nats_per_token: dict[str, float]
    """Cross-entropy in nats per token, by kind."""
    name_accuracy: float
    """Share of the places where the hero's name is repeated at which it is the model's first choice."""
    answer_accuracy: float
    """Share of the questions answered as the grammar would, greedily."""
    card_accuracy: float
    """Share of the JSON cards that are valid and hold the tale's facts, greedily."""


def held_out(kind: str, num_documents: int) -> list[Document]:
    """Documents of one kind that training did not draw: their generator's seed is none of its steps."""
    rng = random.Random(f"held-out-{kind}")
    starts = STARTS[kind]
    return [sample(rng, start=starts[i % len(starts)]) for i in range(num_documents)]


def calibration(num_documents: int = 64) -> list[Document]:
    """Documents to calibrate a quantized model on: neither those of training nor those that it is measured on."""
    rng = random.Random("calibration")
    return [sample(rng) for _ in range(num_documents)]


@torch.inference_mode()
def score(model: Any, tokenizer: Any, documents: list[Document]) -> tuple[float, int, int, int]:
    """Nats, tokens, places where the hero's name is repeated, and those where the model knew it."""
    nats, tokens, places, known = 0.0, 0, 0, 0
    for document in documents:
        encoded = tokenizer(document.text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]], device=model.device)
        losses = negative_log_likelihood(model, ids)[0]
        nats += losses.sum().item()
        tokens += len(losses)
        guesses = model(input_ids=ids).logits[0, :-1].argmax(-1).tolist()
        spans = [(start, end) for start, end, slot in document.recalls if slot == "name"]
        for start, end in spans:
            covering = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
            places += 1
            known += all(guesses[i - 1] == encoded["input_ids"][i] for i in covering)
    return nats, tokens, places, known


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 32) -> list[str]:
    """The greedy reply to each prompt, without the marker that ends it."""
    texts = []
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[i : i + batch_size], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**batch, do_sample=False, max_new_tokens=128)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def is_right_card(text: str, document: Document) -> bool:
    """Whether ``text`` is valid JSON with exactly the facts of the document."""
    try:
        return json.loads(text) == {slot: document.slots[slot] for slot in CARD_SLOTS}
    except ValueError:
        return False


def evaluate(model: Any, tokenizer: Any, num_documents: int = 500) -> Evaluation:
    """Measures ``model`` on ``num_documents`` held-out documents of each kind."""
    ratio, per_token, places, known = {}, {}, 0, 0
    for kind in tqdm(STARTS, unit="kind"):
        documents = held_out(kind, num_documents)
        nats, tokens, kind_places, kind_known = score(model, tokenizer, documents)
        ratio[kind] = nats / -sum(document.logprob for document in documents)
        per_token[kind] = nats / tokens
        places, known = places + kind_places, known + kind_known
    chats = held_out("chat", num_documents)
    # A conversation has three turns of the assistant: the tale, the answer, the card.
    turns = [document.text.split(ASSISTANT) for document in chats]
    answers = replies(model, tokenizer, [ASSISTANT.join(turn[:2]) + ASSISTANT for turn in turns])
    cards = replies(model, tokenizer, [ASSISTANT.join(turn[:3]) + ASSISTANT for turn in turns])
    right_answers = [text == turn[2].split("<|im_end|>")[0] for text, turn in zip(answers, turns)]
    right_cards = [is_right_card(text, document) for text, document in zip(cards, chats)]
    return Evaluation(
        num_documents,
        ratio,
        per_token,
        name_accuracy=known / places,
        answer_accuracy=sum(right_answers) / len(chats),
        card_accuracy=sum(right_cards) / len(chats),
    )


CARD = """\
---
license: apache-2.0
language: [en, zh]
library_name: transformers
---
# FoloVLLM tales

A Qwen3 model of {num_parameters:,} parameters ({megabytes:.1f} MB of float32), trained from random weights on
short tales that the grammar in `folovllm/tales/grammar.py` writes, in English and in Chinese. It exists so that every
page of the book runs anywhere, and because the true probability of each of its tokens is known. It knows nothing
else: outside the tales its answers mean nothing.{purpose}

- **Made by** {made_by}
- **Trained on** documents of up to 290 tokens. `max_position_embeddings` is 2,048, but nothing longer was ever seen.
{advice}- **Measured by** `python -m folovllm.tales.evaluate` on {num_documents} held-out documents of each kind:

| | English tales | Chinese tales | conversations |
|---|---|---|---|
| entropy of the grammar (nats per document) | {entropy[english]:.2f} | {entropy[chinese]:.2f} | {entropy[chat]:.2f} |
| model's cross-entropy / grammar's, same documents | {ratio[english]:.3f} | {ratio[chinese]:.3f} | {ratio[chat]:.3f} |
| cross-entropy (nats per token) | {per_token[english]:.3f} | {per_token[chinese]:.3f} | {per_token[chat]:.3f} |

| | |
|---|---|
| hero's name the first choice where the tale repeats it | {name:.1%} |
| questions about the tale answered right (greedy) | {answer:.1%} |
| JSON cards valid and right (greedy) | {card:.1%} |
"""
ABOUT_MODEL = {
    "purpose": "",
    "made_by": (
        "`python -m folovllm.tales.train`: Muon and AdamW, 1,600 steps of 32 documents, seed 0; about 25 minutes\n"
        "  on one CPU core."
    ),
    "advice": (
        "- **Sample with** temperature 1 and `min_p` 0.01, as `generation_config.json` recommends: at temperature 1 "
        "alone, one\n  token in 4,000 is one that the model itself finds impossible, and it derails the tale.\n"
    ),
}
ABOUT_DRAFT = {
    "purpose": """ It guesses what the embedded
model will say (chapter 16), with the same tokenizer and less than a fifth of its parameters.""",
    "made_by": "`python -m folovllm.tales.train --draft`: the same documents and steps as the larger one, seed 0.",
    "advice": "",
}
"""What the cards say of each of the two models."""


def write_card(directory: Path, evaluation: Evaluation, num_parameters: int) -> None:
    """Writes the figures into the model's card."""
    text = CARD.format(
        **(ABOUT_DRAFT if directory.resolve() == EMBEDDED_DRAFT else ABOUT_MODEL),
        num_parameters=num_parameters,
        megabytes=(directory / "model.safetensors").stat().st_size / 1e6,
        num_documents=evaluation.num_documents,
        entropy={kind: document_entropy(kind) for kind in STARTS},
        ratio=evaluation.cross_entropy_ratio,
        per_token=evaluation.nats_per_token,
        name=evaluation.name_accuracy,
        answer=evaluation.answer_accuracy,
        card=evaluation.card_accuracy,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.tales.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="folder of the checkpoint")
    parser.add_argument("--documents", type=int, default=500, help="held-out documents of each kind")
    parser.add_argument("--card", action="store_true", help="write the figures into the model's card")
    args = parser.parse_args()
    loader = ModelLoader(ModelConfig(str(args.model), dtype="float32"))
    model, tokenizer = loader.load_model_and_tokenizer()
    evaluation = evaluate(model, tokenizer, args.documents)
    print(json.dumps(asdict(evaluation), indent=2))
    if args.card:
        write_card(args.model, evaluation, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
