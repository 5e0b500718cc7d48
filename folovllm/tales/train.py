"""Trains the embedded model: ``python -m folovllm.tales.train``, with ``--draft`` the smaller one that guesses for it.

The same seed on the same machine gives the same weights, also when the run is interrupted and started again: the
documents of a step depend on the seed and the step alone, and the state saved every `SAVE_EVERY` steps
(weights and both optimizers, as safetensors) is all that the next step needs.

Muon (Jordan et al. 2024, ``torch.optim.Muon``) trains the weight matrices of the layers, AdamW the embedding and the
norms. At this size Muon needs about a third of AdamW's steps.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from folovllm.tales import EMBEDDED_DRAFT, EMBEDDED_MODEL
from folovllm.tales.grammar import END_OF_TEXT, IM_END, Document, sample
from folovllm.tales.tokenizer import train_tokenizer

STEPS, DOCUMENTS_PER_STEP, DOCUMENTS_PER_PASS = 1600, 32, 8
MUON_LR, ADAMW_LR, WARMUP_STEPS, DECAY_SHARE = 0.02, 3e-3, 50, 0.5
RECALL_WEIGHT = 8.0
"""How much the loss counts where the text says an earlier choice again: the grammar leaves no choice there, so the
best model is the same, and it is found in a fraction of the steps. That a fact must be looked up is learned suddenly
and late; unweighted, 1,200 steps left some facts unlearned."""
SAVE_EVERY = 100
STATE_FILE = "training_state.safetensors"
MIN_P = 0.01
"""Recommended for sampling: at temperature 1 alone, one token in 4,000 is one that the model finds impossible."""


def model_config(vocab_size: int, width: int = 128, num_layers: int = 4) -> Qwen3Config:
    """The embedded model's shape: Qwen3, four layers of width 128, about a million parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        intermediate_size=3 * width,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_bias=False,
    )


def draft_config(vocab_size: int) -> Qwen3Config:
    """The draft model's shape: a fifth of the embedded model's parameters.

    Two layers are the least that copy a name: the first notes at each token which one came before it, so that the
    second can find the token that followed the last time.
    """
    return model_config(vocab_size, width=64, num_layers=2)


def generation_config(end_ids: list[int]) -> GenerationConfig:
    """How the embedded model is to be sampled; ``end_ids`` are those of `IM_END` and `END_OF_TEXT`."""
    return GenerationConfig(eos_token_id=end_ids, pad_token_id=end_ids[1], do_sample=True, temperature=1.0, min_p=MIN_P)


def encode(tokenizer: Any, document: Document) -> tuple[list[int], list[float]]:
    """A document's token ids, and how much each counts: more where an earlier choice must be recalled."""
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    weights = [1.0] * len(encoded["input_ids"])
    for recall_start, recall_end, _ in document.recalls:
        for i, (start, end) in enumerate(encoded["offset_mapping"]):
            if start < recall_end and end > recall_start:
                weights[i] = RECALL_WEIGHT
    return encoded["input_ids"], weights


def batches(tokenizer: Any, seed: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of one step, those of like length together.

    Yields:
        token ids and the weights of their losses, both ``[num_documents, num_tokens]``; padding has id -1, weight 0.
    """
    rng = random.Random(f"{seed}-{step}")
    documents = sorted((encode(tokenizer, sample(rng)) for _ in range(DOCUMENTS_PER_STEP)), key=lambda d: len(d[0]))
    for i in range(0, len(documents), DOCUMENTS_PER_PASS):
        chunk = documents[i : i + DOCUMENTS_PER_PASS]
        width = max(len(ids) for ids, _ in chunk)
        # Padding is on the right, where a causal model cannot see it from any real token.
        yield (
            torch.tensor([ids + [-1] * (width - len(ids)) for ids, _ in chunk]),
            torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in chunk]),
        )


def negative_log_likelihood(model: Qwen3ForCausalLM, batch: Tensor) -> Tensor:
    """``-log p`` of every token but the first, in nats: ``[num_documents, num_tokens - 1]``, 0 at padding."""
    logits = model(input_ids=batch.clamp_min(0), use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), batch[:, 1:], ignore_index=-1, reduction="none"
    )


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, a plateau, then linear decay to zero over the last `DECAY_SHARE` of the steps.

    What is learned suddenly and late would not be learned at a rate that has already decayed.
    """
    return min((step + 1) / WARMUP_STEPS, 1.0, (num_steps - step) / (DECAY_SHARE * num_steps))


def save_state(path: Path, step: int, model: Qwen3ForCausalLM, opts: list[torch.optim.Optimizer]) -> None:
    """Writes all that the next step needs, in one file that appears whole or not at all."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{key}": value for key, value in state.items()}
    unfinished = path.with_suffix(".unfinished")
    save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, metadata={"step": str(step)})
    unfinished.replace(path)


def load_state(path: Path, model: Qwen3ForCausalLM, opts: list[torch.optim.Optimizer]) -> int:
    """Restores what `save_state` wrote and returns the next step."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer" and rest.startswith(f"{i}."):
                _, j, key = rest.split(".")
                state.setdefault(int(j), {})[key] = tensor
        opt.load_state_dict({**opt.state_dict(), "state": state})
    return step


def make_tokenizer(directory: Path, seed: int, source: Path | None) -> Any:
    """The tokenizer in ``directory``; if there is none yet, the one of ``source``, or a new one."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "tokenizer.json").exists():
        if source is None:
            train_tokenizer(directory, seed=seed)
        else:
            for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
                shutil.copy(source / name, directory)
    return AutoTokenizer.from_pretrained(directory)


def train(
    directory: Path,
    seed: int = 0,
    num_steps: int = STEPS,
    make_config: Callable[[int], Qwen3Config] = model_config,
    tokenizer_of: Path | None = None,
) -> None:
    """Trains a model into ``directory``, going on where an interrupted run stopped.

    Args:
        directory: of the checkpoint.
        seed: of weights, documents and tokenizer.
        num_steps: how many.
        make_config: the model's shape, of the size of the vocabulary.
        tokenizer_of: another checkpoint, whose tokenizer is taken; None: one is trained.
    """
    tokenizer = make_tokenizer(directory, seed, tokenizer_of)
    state_file = directory / STATE_FILE
    # The order in which sums are taken, and so the weights, depends on the number of threads: one gives the same
    # weights however busy the machine is, and at this size a second would save little.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config(len(tokenizer)))
    opts = optimizers(model)
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    first = load_state(state_file, model, opts) if state_file.exists() else 0
    progress = tqdm(range(first, num_steps), initial=first, total=num_steps, unit="step")
    for step in progress:
        passes = list(batches(tokenizer, seed, step))
        num_tokens = sum(int((ids[:, 1:] >= 0).sum()) for ids, _ in passes)
        nats = 0.0
        for ids, weights in passes:
            losses = negative_log_likelihood(model, ids)
            ((losses * weights[:, 1:]).sum() / num_tokens).backward()
            nats += losses.detach().sum().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, rate in zip(opts, rates):
            opt.param_groups[0]["lr"] = rate * learning_rate_factor(step, num_steps)
            opt.step()
            opt.zero_grad()
        progress.set_postfix_str(f"{nats / num_tokens:.4f} nats per token")
        if (step + 1) % SAVE_EVERY == 0:
            save_state(state_file, step + 1, model, opts)
    save(directory, model, tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT]))


def save(directory: Path, model: Qwen3ForCausalLM, end_ids: list[int]) -> None:
    """Writes a trained model's files, in the place of the state of its training."""
    model.config.eos_token_id, model.config.pad_token_id = end_ids[0], end_ids[1]
    model.generation_config = generation_config(end_ids)
    model.save_pretrained(directory)
    (directory / STATE_FILE).unlink(missing_ok=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.tales.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--draft", action="store_true", help="the smaller model, with the tokenizer of the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    out = args.out or (EMBEDDED_DRAFT if args.draft else EMBEDDED_MODEL)
    if args.draft:
        train(out, args.seed, args.steps, draft_config, EMBEDDED_MODEL)
    else:
        train(out, args.seed, args.steps)
    print(json.dumps({"saved": str(out), "steps": args.steps, "seed": args.seed}))


if __name__ == "__main__":
    main()
