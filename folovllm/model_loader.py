"""Checkpoints in, model and tokenizer out. Chapter 4 is about this module.

A checkpoint is a folder: ``config.json`` says what to build, ``*.safetensors`` hold the numbers, ``tokenizer.json``
the vocabulary. A name that is no folder is fetched from the hub, and is a folder from then on. Everything that can
be wrong with the folder is looked for before the weights are read, so that it is said in one sentence. vLLM does the
same with its own model classes (``vllm/model_executor/model_loader/``, 0.33.0); here the classes are transformers'.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from folovllm.config import ModelConfig
from folovllm.utils import get_device

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 2048
"""Tokens, for a checkpoint that does not say how long its sequences may be."""
PROGRESS_BAR_BYTES = 2**30
"""A checkpoint of at least this size (1 GiB) is worth a progress bar."""
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelLoadError(RuntimeError):
    """A checkpoint could not be loaded; the message says what was tried and what to do."""


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
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items())

    __repr__ = __str__  # what a notebook shows


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole and fits its device, and none of whose weights has been read."""

    folder: Path
    hf_config: Any
    """transformers' config of the model."""
    weight_files: list[Path]
    num_bytes: int
    """Bytes of all its tensors in ``dtype``."""
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Longest sequence in tokens that will be served."""
    model_max_len: int
    """Longest sequence in tokens that it was made for."""


def iterate_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and tensor of every weight, one file after the other, on the CPU."""
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def read_safetensors_header(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, without reading its weights: name -> ``dtype``, ``shape``, ``data_offsets``.

    The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors' bytes.

    Raises:
        ModelLoadError: if the file is shorter than its header says, or is no safetensors file.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"it has {size:,} bytes and says that its header alone has {length:,}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
            [math.prod(map(int, entry["shape"])) for entry in tensors.values()]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise _damaged(path, "its header is none") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _damaged(path, f"it has {size:,} bytes where its header promises {expected:,}")
    return tensors


def _damaged(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(f"{path} is not a whole safetensors file: {why}; copy or download it again")


def get_model_max_len(hf_config: Any) -> int:
    """The most tokens a checkpoint was made for, wherever its architecture keeps that number; else 2048."""
    text_config = hf_config.get_text_config()
    found = (getattr(text_config, key, None) for key in _LENGTH_KEYS)
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

        Settles ``model_config.max_model_len`` when it was None, and leaves a `LoadReport` in ``report``.

        Args:
            device: "cpu", "cuda", "cuda:1"; None takes CUDA if there is one, else the CPU.

        Raises:
            ModelLoadError: if there is no such checkpoint, or it cannot be read, or does not fit the GPU.
            RuntimeError: if the device is not there.
            ValueError: if ``max_model_len`` is above what the model was made for.
        """
        checkpoint = self.open(device)
        code = self.model_config.trust_remote_code
        with _transformers_progress_bar(checkpoint.num_bytes >= PROGRESS_BAR_BYTES):
            model = _load_weights(checkpoint.folder, checkpoint.hf_config, checkpoint.dtype, code)
        if model.device != checkpoint.device:  # a walk over all modules, a millisecond for a small model
            model = model.to(checkpoint.device)  # type: ignore[arg-type]
        parameters = list(model.parameters())
        self.report = LoadReport(
            model=self.model_config.model,
            model_class=type(model).__name__,
            dtype=model.dtype,
            device=model.device,
            num_parameters=sum(p.numel() for p in parameters),
            num_bytes=sum(p.nbytes for p in parameters),
            max_model_len=checkpoint.max_model_len,
            model_max_len=checkpoint.model_max_len,
        )
        logger.info("loaded\n%s", self.report)
        return model

    def open(self, device: str | torch.device | None = None) -> Checkpoint:
        """Finds the checkpoint and everything that can be wrong with it, before a weight is read.

        Settles ``model_config.max_model_len`` when it was None. Arguments and errors are those of `load_model`.
        """
        target = get_device(device)
        folder = _find_folder(self.model_config.model)
        hf_config = _load_hf_config(folder, self.model_config.trust_remote_code)
        model_max_len = get_model_max_len(hf_config)
        max_model_len = self.model_config.resolve_max_model_len(model_max_len)
        dtype = self._pick_dtype(hf_config, target)
        files = _find_weight_files(folder)
        headers = [read_safetensors_header(path) for path in files]
        num_elements = sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())
        num_bytes = num_elements * dtype.itemsize
        _check_room(folder, num_bytes, target)
        return Checkpoint(folder, hf_config, files, num_bytes, dtype, target, max_model_len, model_max_len)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left, with a pad token.

        A missing pad token becomes the end-of-sequence token; where there is none either, ``[PAD]`` is added.

        Raises:
            ModelLoadError: if there is no such tokenizer, or it cannot be read.
        """
        config = self.model_config
        folder = _find_folder(config.tokenizer or config.model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                use_fast=config.tokenizer_mode == "auto",
                trust_remote_code=config.trust_remote_code,
                padding_side="left",
            )
        except Exception as error:
            raise ModelLoadError(f"no tokenizer could be read from {folder} ({_first_line(error)})") from None
        if not tokenizer.encode("a", add_special_tokens=False):
            raise ModelLoadError(f"no tokenizer could be read from {folder}: there is no vocabulary in it")
        if config.tokenizer_mode == "slow" and tokenizer.is_fast:
            logger.warning("tokenizer_mode is 'slow', but %s has only the fast tokenizer, which was loaded", folder)
        if tokenizer.pad_token_id is None:
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

    def _pick_dtype(self, hf_config: Any, device: torch.device) -> torch.dtype:
        """The dtype that was asked for; for "auto" float32 on a CPU, a 16-bit type on a GPU."""
        if self.model_config.torch_dtype is not None:
            return self.model_config.torch_dtype
        if device.type == "cpu":
            return torch.float32
        own = getattr(hf_config.get_text_config(), "dtype", None)
        return torch.bfloat16 if own == torch.bfloat16 and torch.cuda.is_bf16_supported() else torch.float16


def get_model_and_tokenizer(
    model_config: ModelConfig, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`ModelLoader.load_model_and_tokenizer` for those who need no report."""
    return ModelLoader(model_config).load_model_and_tokenizer(device)


def _first_line(error: BaseException) -> str:
    """An error of somebody else's in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _find_folder(name: str) -> Path:
    """The checkpoint's folder, fetched from the hub if ``name`` is not one already."""
    try:
        folder = Path(name).expanduser()
        is_dir, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{name!r} is no name of a folder or model ({_first_line(error)})") from None
    if is_dir:
        return folder
    if exists:
        raise ModelLoadError(f"{name} is a file; give the folder of a checkpoint, which holds its config.json")
    if folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2:
        raise ModelLoadError(
            f"there is no folder {name}; give the folder of a checkpoint or a hub name like 'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} is no folder here and could not be fetched from the hub ({_first_line(error)}); "
            "check the name and the network, or give the folder of a checkpoint"
        ) from None


def _load_hf_config(folder: Path, trust_remote_code: bool) -> Any:
    """``config.json`` as an object of transformers, once it is clear that it names a model to build."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no config.json, so it is no checkpoint; give the folder that holds one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({_first_line(error)}); copy or download it again") from None
    if not isinstance(raw, dict) or not raw.get("architectures"):
        raise ModelLoadError(
            f'{path} names no architecture; add its model class, as in "architectures": ["Qwen3ForCausalLM"]'
        )
    try:
        if raw.get("model_type") in CONFIG_MAPPING and "auto_map" not in raw:
            return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)  # AutoConfig would look for and read the file again
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelLoadError(
            f"transformers cannot build the architecture {raw['architectures']} of {folder} "
            f"({_first_line(error)}); a newer transformers may know it, "
            "and a checkpoint with code of its own needs trust_remote_code=True"
        ) from None


def _find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a file name is no string")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{index} is not a checkpoint's index ({_first_line(error)}); copy or download it again"
            ) from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelLoadError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files ({', '.join(missing[:3])}); "
                "copy or download them"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which is refused because reading one can run any "
            "code; take a safetensors version of the checkpoint, or convert it where you trust it"
        )
    raise ModelLoadError(
        f"{folder} has no model.safetensors (or model.safetensors.index.json); copy or download the weights "
        "(a pickle checkpoint, *.bin, is refused, because reading one can run any code)"
    )


def _check_room(folder: Path, num_bytes: int, device: torch.device) -> None:
    """Refuses weights larger than what the GPU has free, before any of them is read."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise ModelLoadError(
            f"the weights of {folder} take {num_bytes / 2**30:.2f} GiB and {device} has {free / 2**30:.2f} GiB free; "
            "end what else runs there, choose a 16-bit dtype, a smaller model, or device='cpu'"
        )


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
            f"transformers could not load {folder} ({_first_line(error)}); "
            "its config and its weights may not belong together"
        ) from None
    # transformers would fill what is missing or misshapen with random numbers, and only warn.
    misshapen = {key for key, *_ in info["mismatched_keys"]}
    for keys, how in ((info["missing_keys"], "missing"), (misshapen, "of another shape than config.json says")):
        if keys:
            raise ModelLoadError(
                f"{len(keys)} of the model's weights ({', '.join(sorted(keys)[:3])}) are {how} in {folder}; "
                "take config and weights from the same checkpoint"
            )
    if info["unexpected_keys"]:
        logger.warning("%s has weights that its model does not use: %s", folder, sorted(info["unexpected_keys"]))
    return model


@contextlib.contextmanager
def _transformers_progress_bar(shown: bool) -> Iterator[None]:
    """Lets transformers show its progress bar, or not; its warnings are kept back, since we turn them into errors."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    was_shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_disabled = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_shown:
            transformers_logging.enable_progress_bar()
        if hub_disabled:
            disable_progress_bars()
