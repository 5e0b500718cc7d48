"""What a checkpoint's ``config.json`` says, checked field by field. Chapter 4 names this module.

A config is checked three times, each time with more knowledge: as JSON, before transformers sees it (whose errors often
do not name the field); against the weight files, since no size can be larger than all that they hold; and as
transformers' object, which knows the defaults. No tensor is made meanwhile, so a wrong size costs no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from folovllm.model.checkpoint import ModelLoadError, describe_other_kind, one_line
from folovllm.validation import check_int, check_number, require, show

MAX_NUMBER = 1e18
"""The largest number that a config may have where nothing is counted."""
MAX_SIZE = 2**31 - 1
"""The largest size that a config may have; a larger one is always a mistake."""


def _check_size(name: str, value: Any) -> None:
    """Something that is counted: layers, heads, numbers in a row."""
    require(1 <= check_int(name, value) <= MAX_SIZE, f"{name} must be from 1 to {MAX_SIZE:,}, got {value}")


def _check_positive(name: str, value: Any) -> None:
    require(check_number(name, value) > 0, f"{name} must be positive, got {value}")
    require(value <= MAX_NUMBER, f"{name} must be at most {MAX_NUMBER:g}, got {show(value)}")


def _check_activation(name: str, value: Any) -> None:
    require(isinstance(value, str) and value in ACT2FN, f"{name} names no activation function, got {show(value)}")


def _check_rope_type(name: str, value: Any) -> None:
    known = ("default", *ROPE_INIT_FUNCTIONS)
    require(isinstance(value, str) and value in known, f"{name} must be one of {', '.join(known)}, got {show(value)}")


def _check_object(name: str, value: Any) -> None:
    require(isinstance(value, dict), f"{name} must be an object or null, got {show(value)}")


_SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "d_model",
    "d_ff",
    "ffn_dim",
    "num_layers",
    "num_heads",
]
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
"""The fields that say how long sequences may be, of which the first that is there counts."""
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys((*_SIZES, *LENGTHS), _check_size),
    **dict.fromkeys(
        ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta"], _check_positive
    ),
    **dict.fromkeys(["hidden_act", "hidden_activation", "activation_function"], _check_activation),
    **dict.fromkeys(["text_config", "rope_scaling", "rope_parameters"], _check_object),
}
"""How each field of ``config.json`` and of its ``text_config`` is checked."""
_ROPE_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(["rope_theta", "factor", "low_freq_factor", "high_freq_factor"], _check_positive),
    **dict.fromkeys(("rope_type", "type"), _check_rope_type),
    "original_max_position_embeddings": _check_size,
}
"""The same for the object that describes the rotary embeddings, where no field may be null."""


def _fields(raw: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any, Callable[[str, Any], None]]]:
    """Every field that has a check: its name, the same with the objects it is in, its value, and the check."""
    in_rope = "rope_" in prefix
    for name, value in raw.items():
        check = (_ROPE_CHECKS if in_rope else _CHECKS).get(name)
        # null is transformers' way to leave a field out; a list gives one size for each layer.
        if check and (in_rope or value is not None) and not (name in _SIZES and isinstance(value, list)):
            yield name, prefix + name, value, check
        if isinstance(value, dict) and (in_rope or check is _check_object):
            yield from _fields(value, f"{prefix}{name}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelLoadError: if it holds none.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({one_line(error)}); see who may read it") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({one_line(error)}); copy or download it again") from None
    if not isinstance(raw, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, but holds {show(raw)[:60]}; copy or download it again")
    return raw


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` and checks every field that can be checked by itself.

    Raises:
        ModelLoadError: if there is none, or it names no model, or a value that cannot be.
    """
    path = folder / "config.json"
    if not path.is_file():
        others = describe_other_kind(folder) or (
            "; it holds a tokenizer alone: give the folder that holds the model's config.json and weights as well"
            if any(folder.glob("tokenizer*"))
            else "; give the folder that holds one"
        )
        raise ModelLoadError(f"{folder} has no config.json, so it is no checkpoint{others}")
    raw = read_json(path)
    names = raw.get("architectures")
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        raise ModelLoadError(
            f"{path} names no architecture (architectures is {show(names)}); "
            'add its model class, as in "architectures": ["Qwen3ForCausalLM"]'
        )
    for _, full_name, value, check in _fields(raw):
        try:
            check(full_name, value)
        except ValueError as error:
            raise ModelLoadError(f"{path} is wrong: {error}; take it from the checkpoint again") from None
    return raw


def check_sizes(folder: Path, raw: dict[str, Any], num_elements: int, num_tensors: int) -> None:
    """Refuses a size that the weight files cannot hold: whatever a size counts, all weights together have more.

    Args:
        folder: the checkpoint.
        raw: its ``config.json``.
        num_elements: of all its tensors.
        num_tensors: in its files.
    """
    for name, full_name, value, _ in _fields(raw):
        most = num_tensors if name in _LAYER_COUNTS else num_elements
        if name in _SIZES and value > most:
            what = "tensors" if name in _LAYER_COUNTS else "numbers"
            raise ModelLoadError(
                f"{folder / 'config.json'} is wrong: {full_name} is {value}, but all weights of the checkpoint are "
                f"{most} {what}; take config and weights from the same checkpoint"
            )


def load_hf_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """transformers' object of a config that `read_config` has read.

    Raises:
        ModelLoadError: if transformers refuses it, or its numbers of heads do not belong together.
    """
    path = folder / "config.json"
    try:
        if raw.get("model_type") in CONFIG_MAPPING and "auto_map" not in raw:
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)  # AutoConfig would look for and read it again
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text_config = config.get_text_config()
        if isinstance(text_config, dict):
            raise TypeError(f"its text_config is no config of a model: {show(text_config)}")
    except Exception as error:
        raise ModelLoadError(
            f"transformers cannot build the architecture {', '.join(raw['architectures'])} from {path} "
            f"({one_line(error)}); a newer transformers may know it, "
            "and a checkpoint with code of its own needs trust_remote_code=True"
        ) from None
    _check_heads(path, text_config)
    return config


def _check_heads(path: Path, config: Any) -> None:
    """Refuses heads that cannot share their keys, or be cut from a row, or be turned in pairs."""
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    found = [getattr(config, name, None) for name in names]
    num_heads, num_kv_heads, hidden_size, head_dim = (value if isinstance(value, int) else 0 for value in found)
    rope = getattr(config, "rope_parameters", None)
    why = None
    if num_heads and num_kv_heads and num_heads % num_kv_heads:
        why = f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
    elif num_heads and hidden_size and not head_dim and hidden_size % num_heads:
        why = f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})"
    elif isinstance(rope, dict) and "partial_rotary_factor" not in rope and head_dim and head_dim % 2:
        why = f"head_dim ({head_dim}) must be even, because rotary embeddings turn its numbers in pairs"
    elif isinstance(rope, dict) and rope.get("rope_type") == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if not low < high:
            why = f"high_freq_factor ({high}) must be above low_freq_factor ({low})"
    if why:
        raise ModelLoadError(f"{path} is wrong: {why}; take it from the checkpoint again")
