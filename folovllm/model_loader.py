"""Checkpoints in, model and tokenizer out. Chapter 4 is about this module.

What can be wrong with a checkpoint's files is found by `folovllm.model.checkpoint`; here a model and a tokenizer are
made of them. vLLM does the same with its own model classes (``vllm/model_executor/model_loader/``, 0.33.0); here the
classes are transformers'.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from folovllm.config import ModelConfig
from folovllm.model.checkpoint import (
    Checkpoint,
    ModelLoadError,
    check_room,
    check_shapes,
    count_numbers,
    find_folder,
    find_weight_files,
    is_buffer,
    missing_weights,
    one_line,
    quantized,
    read_headers,
)
from folovllm.model.decoder import Decoder, load_decoder, make_empty_decoder
from folovllm.model.hf_config import LENGTHS, check_sizes, load_hf_config, read_config, read_json
from folovllm.model.int4_kernels import has_int4_kernel
from folovllm.model.quantization import QuantizationConfig, read_quantization, settle_quantization
from folovllm.model.quantized_layers import describe_products, iterate_dequantized, settle_version
from folovllm.sampling_params import SamplingParams
from folovllm.utils import get_device
from folovllm.validation import check_bool, check_token_ids

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 2048
"""Tokens, for a checkpoint that does not say how long its sequences may be."""
PROGRESS_BAR_BYTES = 2**30
"""A checkpoint of at least this size (1 GiB) is worth a progress bar."""
_ADVICE = "choose a 16-bit dtype or a smaller model"


@dataclass(frozen=True)
class LoadReport:
    """What was loaded."""

    model: str
    """The name or path that was asked for."""
    model_class: str
    dtype: torch.dtype
    device: torch.device
    num_parameters: int
    """Weights, tied ones counted once."""
    num_bytes: int
    """Bytes those weights take."""
    max_model_len: int
    """Longest sequence in tokens that will be served."""
    model_max_len: int
    """Longest sequence in tokens that the checkpoint was made for."""
    quantization: str | None = None
    """How the weights are quantized, and how the products with them are computed."""

    def __str__(self) -> str:
        rows = {
            "model": "/".join(Path(self.model).parts[-2:]),  # a hub name whole, the end of a path
            "class": self.model_class,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "parameters": f"{self.num_parameters:,}",
            "bytes": f"{self.num_bytes:,} ({self.num_bytes / 2**20:.1f} MiB)",
            "max_model_len": f"{self.max_model_len:,} tokens (the model has {self.model_max_len:,})",
        }
        if self.quantization is not None:
            rows["quantization"] = self.quantization
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items())

    __repr__ = __str__  # what a notebook shows


def get_model_max_len(hf_config: Any) -> int:
    """The most tokens a checkpoint was made for, wherever its architecture keeps that number; else 2048."""
    text_config = hf_config.get_text_config()
    found = (getattr(text_config, key, None) for key in LENGTHS)
    return next((value for value in found if isinstance(value, int) and value > 0), DEFAULT_MAX_MODEL_LEN)


def kv_cache_bytes_per_token(hf_config: Any, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence keeps in the KV cache: a key and a value for each layer and KV head."""
    config = hf_config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return 2 * config.num_hidden_layers * num_kv_heads * head_dim * dtype.itemsize


class ModelLoader:
    """Loads the model and the tokenizer that a `ModelConfig` names."""

    def __init__(self, model_config: ModelConfig) -> None:
        self.model_config = model_config
        self.report: LoadReport | None = None
        """What `load_model` loaded last."""

    def load_model(self, device: str | torch.device | None = None) -> PreTrainedModel:
        """The model in eval mode on ``device``, in the dtype that was asked for.

        Weights that are quantized in the files are turned into floats.

        Settles ``model_config.max_model_len`` when it was None, and leaves a `LoadReport` in ``report``.

        Args:
            device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.

        Raises:
            ModelLoadError: if there is no such checkpoint, or it cannot be read, or does not fit the GPU.
            RuntimeError: if the device is not there.
            ValueError: if ``max_model_len`` is above what the model was made for, or ``quantization`` is "int8", in
                which transformers' model cannot compute.
        """
        checkpoint = self.open(device)
        if checkpoint.quantization is None:
            _check_model(checkpoint)
            num_bytes, code = checkpoint.num_elements * checkpoint.dtype.itemsize, self.model_config.trust_remote_code
            check_room(f"the weights of {checkpoint.folder}", num_bytes, checkpoint.device, _ADVICE)
            with _transformers_progress_bar(num_bytes >= PROGRESS_BAR_BYTES):
                model = _load_weights(checkpoint.folder, checkpoint.hf_config, checkpoint.dtype, code)
        else:
            model = _load_dequantized(checkpoint)
        if model.device != checkpoint.device:  # a walk over all modules, a millisecond for a small model
            model = model.to(checkpoint.device)  # type: ignore[arg-type]
        parameters = list(model.parameters())
        self.report = self._make_report(
            checkpoint,
            model_class=type(model).__name__,
            dtype=model.dtype,
            device=model.device,
            num_parameters=sum(p.numel() for p in parameters),
            num_bytes=sum(p.nbytes for p in parameters),
        )
        return model

    def load_decoder(self, checkpoint: Checkpoint) -> Decoder:
        """The engine's own model of a checkpoint that was opened, as `folovllm.model.decoder.load_decoder` loads it.

        Leaves a `LoadReport` in ``report``.
        """
        decoder, config = load_decoder(checkpoint), checkpoint.quantization
        self.report = self._make_report(
            checkpoint,
            model_class=checkpoint.hf_config.architectures[0],
            dtype=decoder.dtype,
            device=decoder.device,
            num_parameters=decoder.num_parameters,
            num_bytes=decoder.num_bytes,
            quantization=None if config is None else f"{config}; {describe_products(decoder.linears)}",
        )
        return decoder

    def _make_report(self, checkpoint: Checkpoint, **loaded: Any) -> LoadReport:
        """A report of what was loaded from a checkpoint, which is logged as well."""
        report = LoadReport(
            model=self.model_config.model,
            max_model_len=checkpoint.max_model_len,
            model_max_len=checkpoint.model_max_len,
            **loaded,
        )
        logger.info("loaded\n%s", report)
        return report

    def open(self, device: str | torch.device | None = None) -> Checkpoint:
        """Finds the checkpoint and checks all of it, before a weight is read.

        Settles ``model_config.max_model_len`` when it was None. Arguments and errors are those of `load_model`.
        """
        target = get_device(device)
        folder = find_folder(self.model_config.model)
        raw = read_config(folder)
        quantization = _read_quantization(folder, raw, self.model_config.quantization)
        files = find_weight_files(folder)
        headers = read_headers(files, quantization)
        num_elements = sum(count_numbers(name, tensor) for name, tensor in headers.items())
        check_sizes(folder, raw, num_elements, len(headers))
        hf_config = load_hf_config(folder, raw, self.model_config.trust_remote_code)
        _recommendations(folder, hf_config)
        model_max_len = get_model_max_len(hf_config)
        max_model_len = self.model_config.resolve_max_model_len(model_max_len)
        dtype = self._pick_dtype(hf_config, target, quantization)
        found = folder, hf_config, files, headers, num_elements, dtype, target, max_model_len, model_max_len
        # As `choose_prepared_steps` has it.
        has_compiled_steps = self.model_config.enforce_eager is False and target.type == "cpu"
        return settle_version(Checkpoint(*found, quantization, has_compiled_steps))

    def load_tokenizer(self, add_pad_token: bool = True) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left, with a pad token.

        A missing pad token becomes the end-of-sequence token; where there is none either, ``[PAD]`` is added.

        Args:
            add_pad_token: False leaves a missing pad token missing, for callers that never pad. A ``[PAD]`` that is
                added is also found in texts, and has an id for which the model may have no embedding.

        Raises:
            ModelLoadError: if there is no such tokenizer, or it cannot be read.
        """
        config = self.model_config
        folder = find_folder(config.tokenizer or config.model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                use_fast=config.tokenizer_mode == "auto",
                trust_remote_code=config.trust_remote_code,
                padding_side="left",
            )
        except Exception as error:
            raise ModelLoadError(f"no tokenizer could be read from {folder} ({one_line(error)})") from None
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ModelLoadError(
                f"the tokenizer of {folder} has a model_max_length that is no number: {tokenizer.model_max_length!r}"
            )
        try:
            tokenizer("")["input_ids"]  # or the first request would find what is broken
        except Exception as error:
            raise ModelLoadError(f"the tokenizer of {folder} cannot encode a text ({one_line(error)})") from None
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise ModelLoadError(f"no tokenizer could be read from {folder}: there is no vocabulary in it")
        if config.tokenizer_mode == "slow" and tokenizer.is_fast:
            logger.warning("tokenizer_mode is 'slow', but %s has only the fast tokenizer, which was loaded", folder)
        if tokenizer.pad_token_id is None and add_pad_token:
            if tokenizer.eos_token is not None:
                tokenizer.pad_token = tokenizer.eos_token
            else:
                tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer

    def load_model_and_tokenizer(
        self, device: str | torch.device | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Both; a ``[PAD]`` that the tokenizer had to add gets a row in the model's embedding.

        Raises: what `load_model` and `load_tokenizer` raise.
        """
        model = self.load_model(device)
        tokenizer = self.load_tokenizer()
        old = model.get_input_embeddings().num_embeddings
        if (tokenizer.pad_token_id or 0) >= old:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.eval()
            with torch.no_grad():
                for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                    layer.weight[old:] = 0
            parameters = list(model.parameters())
            assert self.report is not None  # load_model has left one
            self.report = replace(
                self.report,
                num_parameters=sum(p.numel() for p in parameters),
                num_bytes=sum(p.nbytes for p in parameters),
            )
        return model, tokenizer

    def _pick_dtype(self, hf_config: Any, device: torch.device, quantization: QuantizationConfig | None) -> torch.dtype:
        """The dtype that was asked for; for "auto" float32 on a CPU, a 16-bit type on a GPU.

        With weights of 4 bits it is bfloat16 wherever the kernel for them wants that.
        """
        if self.model_config.torch_dtype is not None:
            return self.model_config.torch_dtype
        is_int4 = quantization is not None and quantization.method != "int8"
        if is_int4 and has_int4_kernel(torch.bfloat16, device):
            return torch.bfloat16
        if device.type == "cpu":
            return torch.float32
        own = getattr(hf_config.get_text_config(), "dtype", None)
        return torch.bfloat16 if own == torch.bfloat16 and torch.cuda.is_bf16_supported() else torch.float16


def get_model_and_tokenizer(
    model_config: ModelConfig, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`ModelLoader.load_model_and_tokenizer`, without the report."""
    return ModelLoader(model_config).load_model_and_tokenizer(device)


class GenerationDefaults(NamedTuple):
    """What a checkpoint says about generating."""

    eos_token_ids: list[int]
    """Every token that ends a text, the tokenizer's own first."""
    params: SamplingParams
    """How to sample where a request does not say."""


def read_generation_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> GenerationDefaults:
    """What ``generation_config.json`` says about generating; where there is none, ``config.json`` has the end tokens.

    The end tokens are the tokenizer's own and those of the file, as in vLLM (``config/model.py``,
    ``try_get_generation_config``, and ``SamplingParams.update_from_generation_config``, 0.33.0). Left out are
    those for which the model has no embedding, since it can never say them, and the default of transformers' class
    (Llama's 2) where it is an ordinary word of the tokenizer, since the checkpoint did not ask for it.

    Raises:
        ModelLoadError: if the file is broken; the message names the field.
    """
    config = checkpoint.hf_config.get_text_config()
    ends, params = _recommendations(checkpoint.folder, checkpoint.hf_config)
    own = tokenizer.eos_token_id
    if own is not None:
        default = getattr(type(config), "eos_token_id", None)
        ends = [own, *(end for end in ends if end != default or end in tokenizer.added_tokens_decoder)]
    return GenerationDefaults([end for end in dict.fromkeys(ends) if end < config.vocab_size], params)


_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _recommendations(folder: Path, hf_config: Any) -> tuple[list[int], SamplingParams]:
    """The end tokens and the sampling that a checkpoint's files name."""
    path = folder / "generation_config.json"
    if path.is_file():
        raw = read_json(path)
    else:
        path, raw = folder / "config.json", {"eos_token_id": getattr(hf_config.get_text_config(), "eos_token_id", None)}
    given = {name: raw[name] for name in _RECOMMENDED if raw.get(name) is not None}
    ends, length = raw.get("eos_token_id"), raw.get("max_new_tokens")
    try:
        if given.get("top_k") == 0:
            given["top_k"] = -1  # transformers' way to say "off"
        if length is not None:
            given["max_tokens"] = length
        if raw.get("do_sample") is not None and not check_bool("do_sample", raw["do_sample"]):
            given["temperature"] = 0.0
        ends = [] if ends is None else check_token_ids("eos_token_id", ends if isinstance(ends, list) else [ends])
        return ends, SamplingParams(**given)
    except ValueError as error:
        sentence = str(error).replace("max_tokens", "max_new_tokens")
        raise ModelLoadError(f"{path} is wrong: {sentence}; correct the file, or remove the field from it") from None


def _read_quantization(folder: Path, raw: dict[str, Any], asked: str | None) -> QuantizationConfig | None:
    """How the weights are or shall be quantized; the fields that say so are taken out of ``raw``.

    Raises:
        ModelLoadError: if the checkpoint is quantized in a way that the engine does not have.
        ValueError: if another way was asked for than the checkpoint's.
    """
    path, beside = folder / "config.json", folder / "quantize_config.json"  # where AutoGPTQ wrote it
    if all(raw.get(name) is None for name in ("quantization_config", "compression_config")) and beside.is_file():
        path, raw["quantization_config"] = beside, {"quant_method": "gptq", **read_json(beside)}
    try:
        found = read_quantization(raw)
    except ValueError as error:
        raise quantized(path, str(error)) from None
    for name in ("quantization_config", "compression_config"):
        raw.pop(name, None)  # or transformers would want to load it its own way
    return settle_quantization(asked, found, str(folder))


def _load_dequantized(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint that is quantized in its files, on the CPU, with weights of floats."""
    assert checkpoint.quantization is not None
    if checkpoint.quantization.method == "int8":
        raise ValueError("quantization='int8' is for the engine alone: transformers' model has no products of 8 bits")
    decoder = Decoder(make_empty_decoder(checkpoint).config, 0, checkpoint.dtype, "meta")
    shapes, what = decoder.weight_shapes(), f"the weights of {checkpoint.folder} in floats"
    check_room(what, decoder.num_bytes, torch.device("cpu"), _ADVICE)
    with torch.random.fork_rng(devices=[]):  # its first weights are random, and replaced
        model = AutoModelForCausalLM.from_config(checkpoint.hf_config, dtype=checkpoint.dtype).eval()
    with torch.no_grad():
        for name, tensor in iterate_dequantized(checkpoint, shapes):
            if name in shapes:
                model.get_parameter(name).copy_(tensor)
            else:
                decoder.leave_out(name, tensor)
    return model


def _check_model(checkpoint: Checkpoint) -> None:
    """Builds the model of transformers without its numbers, and compares its shapes with those in the files."""
    config, path = checkpoint.hf_config, checkpoint.folder / "config.json"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if getattr(config, "auto_map", None):
            return  # its class is code of the checkpoint's own
        raise ModelLoadError(
            f"{path} describes a {config.architectures[0]}, which transformers does not know as a model that continues "
            "a text; give the folder of a causal language model"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelLoadError(
            f"transformers cannot build the architecture {config.architectures[0]} from {path} ({one_line(error)}); "
            "take the config from the checkpoint again"
        ) from None
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_shapes(checkpoint, shapes, sum(shape.numel() for shape in shapes.values()))


def _load_weights(folder: Path, hf_config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the CPU, with every one of its weights from the checkpoint."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported in info, and an error below
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelLoadError(
            f"transformers could not load {folder} ({one_line(error)}); "
            "its config and its weights may not belong together"
        ) from None
    # transformers would fill what is missing with random numbers, and only warn.
    if info["missing_keys"]:
        raise missing_weights(folder, list(info["missing_keys"]))
    if info["mismatched_keys"]:  # names that transformers has translated; `check_shapes` knows the others
        names = sorted({key for key, *_ in info["mismatched_keys"]})
        raise ModelLoadError(
            f"{len(names)} of the model's weights ({', '.join(names[:3])}) have another shape than the config in "
            f"{folder} says; take config and weights from the same checkpoint"
        )
    if unused := sorted(name for name in info["unexpected_keys"] if not is_buffer(name)):
        logger.warning("%s has weights that its model does not use: %s", folder, unused)
    return model


@contextlib.contextmanager
def _transformers_progress_bar(shown: bool) -> Iterator[None]:
    """Switches transformers' progress bars on or off and silences its warnings, which become errors here."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_disabled = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        # transformers switches the hub's bars along with its own, so theirs come second.
        if not shown and was_shown:
            transformers_logging.enable_progress_bar()
        if are_progress_bars_disabled() != hub_disabled:
            (disable_progress_bars if hub_disabled else enable_progress_bars)()
