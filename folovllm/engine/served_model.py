"""What an engine needs of a model: something that computes steps, and what is known about its tokens. Chapter 8.

`load_model` makes it of a checkpoint; the simulator makes one that computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from folovllm.config import EngineConfig
from folovllm.sampling_params import SamplingParams
from folovllm.validation import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from folovllm.model.checkpoint import Checkpoint
    from folovllm.model.decoder import Decoder
    from folovllm.model_loader import LoadReport
    from folovllm.worker.model_runner import Runner

DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
"""Tokens per step where the config does not say; at least ``max_model_len`` where prompts are not chunked."""


@dataclass
class ServedModel:
    """A runner, and what is known about the model behind it."""

    runner: Runner
    vocab_size: int
    """Token ids that the model has a logit for."""
    max_model_len: int
    """The most tokens the model was made for."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None: prompts must be token ids, and answers have no text."""
    eos_token_ids: list[int] = field(default_factory=list)
    """Every token that ends a text."""
    default_params: SamplingParams = field(default_factory=SamplingParams)
    """What a request without params gets."""
    decoder: Decoder | None = None
    """The network that the runner runs, if there is one."""
    load_report: LoadReport | None = None
    """What was loaded, if it was loaded here."""


def load_model(config: EngineConfig, device: str | torch.device | None = None) -> ServedModel:
    """Loads the checkpoint that a config names.

    Args:
        config: its lengths are settled on the way, so that a mistake is found before a weight is read.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.

    Raises:
        ModelLoadError: if the checkpoint, or that of the draft model, cannot be loaded.
        ValueError: if the budget of a step is too small, or the draft model has other tokens.
    """
    # Here, since torch takes seconds to import and a simulated engine does without.
    from folovllm.model.decoder import load_decoder
    from folovllm.model_loader import ModelLoader, read_generation_config
    from folovllm.sample.sampler import Sampler
    from folovllm.worker.draft_model import DraftModel
    from folovllm.worker.model_runner import ModelRunner

    checkpoint = (loader := ModelLoader(config.model_config)).open(device)
    settle_lengths(config, checkpoint.model_max_len)
    tokenizer = loader.load_tokenizer(add_pad_token=False)
    eos_token_ids, default_params = read_generation_config(checkpoint, tokenizer)
    draft_checkpoint = _open_draft(config, checkpoint, device)
    decoder, sampler = loader.load_decoder(checkpoint), Sampler(tokenizer, eos_token_ids)
    draft = None if draft_checkpoint is None else DraftModel(load_decoder(draft_checkpoint), sampler, config)
    runner = ModelRunner(decoder, sampler, config, draft)
    return ServedModel(
        runner,
        decoder.config.vocab_size,
        checkpoint.model_max_len,
        tokenizer,
        eos_token_ids,
        default_params,
        decoder,
        loader.report,
    )


def _open_draft(config: EngineConfig, checkpoint: Checkpoint, device: str | torch.device | None) -> Checkpoint | None:
    """The checkpoint of the draft model, if there is to be one, before a weight of either is read.

    Raises:
        ModelLoadError: if it cannot be loaded.
        ValueError: if it cannot guess for the model.
    """
    from folovllm.model_loader import ModelLoader

    speculative, model_config = config.speculative_config, config.model_config
    if speculative is None or speculative.method != "draft_model":
        return None
    name, longest = cast(str, speculative.model), checkpoint.max_model_len
    draft_config = replace(model_config, model=name, quantization=None, max_model_len=None, enforce_eager=True)
    draft = ModelLoader(draft_config).open(device)
    sizes = [opened.hf_config.get_text_config().vocab_size for opened in (draft, checkpoint)]
    require(
        sizes[0] == sizes[1],
        f"a draft model must have the model's tokens: {name} has {sizes[0]}, and {model_config.model} {sizes[1]}",
    )
    require(
        draft.model_max_len >= longest,
        f"max_model_len must be at most the {draft.model_max_len} tokens of the draft model {name}, got {longest}",
    )
    return replace(draft, max_model_len=longest)


def settle_lengths(config: EngineConfig, model_max_len: int) -> int:
    """Fills in ``max_model_len`` and ``max_num_batched_tokens``, the tokens per step, where they were left at None.

    Args:
        config: the settings.
        model_max_len: the most tokens the model was made for.

    Returns:
        ``max_model_len``.

    Raises:
        ValueError: if more was asked for than the model has, or if prompts are not chunked and the longest would not
            fit into one step.
    """
    longest, scheduler = config.resolve_max_model_len(model_max_len), config.scheduler_config
    if scheduler.max_num_batched_tokens is None:
        chunked = scheduler.enable_chunked_prefill
        scheduler.max_num_batched_tokens = max(DEFAULT_MAX_NUM_BATCHED_TOKENS, 0 if chunked else longest)
    budget = scheduler.max_num_batched_tokens
    require(
        scheduler.enable_chunked_prefill or budget >= longest,
        f"max_num_batched_tokens must be at least max_model_len ({longest}) where prompts are not chunked, got "
        f"{budget}; raise it or set enable_chunked_prefill=True",
    )
    return longest
