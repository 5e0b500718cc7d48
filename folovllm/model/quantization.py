"""What a checkpoint's config says of its quantized weights, and what of it can be run. Chapter 15 is about this module.

Two kinds of files are read, both with weights of 4 bits: GPTQ's (AutoGPTQ, GPTQModel) and the layout ``pack-quantized``
of compressed-tensors (llm-compressor). A third kind needs no file of its own: ``int8`` quantizes a checkpoint in
floats while it is loaded. As in vLLM (``vllm/model_executor/layers/quantization/auto_gptq.py`` and
``compressed_tensors/compressed_tensors.py``, 0.33.0), which knows more kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from folovllm.utils import cdiv
from folovllm.validation import check_bool, check_int, require, show

NUM_BITS = 4
"""Bits of a weight in the files that are read."""
PACK_FACTOR = 32 // NUM_BITS
"""Weights in an int32."""
MAX_GROUP_SIZE = 2**31 - 1
"""The largest group of columns; no weight has so many."""
INTEGER_TENSORS = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "g_idx": ("I32", "I64"),
    "weight_packed": ("I32",),
    "weight_zero_point": ("I32",),
    "weight_g_idx": ("I32", "I64"),
    "weight_shape": ("I64", "I32"),
}
"""The tensors of a quantized weight that are no floats, and what safetensors calls the dtypes that they may have."""
TENSORS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "int8": (),
}
"""What each kind of file calls the tensors of a quantized weight."""


@dataclass(frozen=True)
class Scheme:
    """How one weight of 4 bits is quantized."""

    group_size: int
    """Input columns that share a scale; -1: all of them."""
    symmetric: bool
    """Whether the zero is 8 everywhere."""
    desc_act: bool
    """Whether columns are grouped by the size of their activations, so that each must say which group it is in."""

    def num_groups(self, num_in: int) -> int:
        """Groups of a weight with so many input columns; the last one may be smaller."""
        return 1 if self.group_size == -1 else cdiv(num_in, self.group_size)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model's weights are quantized: in its files already, or while they are loaded."""

    method: str
    """"int8", "gptq" or "compressed-tensors", as in ``ModelConfig.quantization``."""
    rules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()
    """How the module is quantized whose name a pattern matches, the first that does; None: it is not."""
    version: int = 2
    """Of GPTQ's format: 1 stores each zero less one."""

    def scheme(self, module: str) -> Scheme | None:
        """How the weight of a module (as "model.layers.0.mlp.up_proj") is stored in 4 bits; None: it is not."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(module)), None)

    def __str__(self) -> str:
        sizes = {scheme.group_size for _, scheme in self.rules if scheme}
        groups = " or ".join("whole columns" if size == -1 else f"groups of {size}" for size in sorted(sizes))
        return f"{self.method}, {NUM_BITS} bits in {groups}" if groups else self.method


def read_quantization(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """What a ``config.json`` says about quantized weights; None: there are none.

    Raises:
        ValueError: if they cannot be run; the message names the method and the field.
    """
    text_config = raw.get("text_config")
    for config in (raw, text_config if isinstance(text_config, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            if (found := config.get(name)) is not None and found != {}:
                require(isinstance(found, dict), f"its {name} says {show(found)}")
                return _read_method(name, found)
    return None


def _read_method(name: str, found: dict[str, Any]) -> QuantizationConfig:
    """The object called ``name`` in a config."""
    method = found.get("quant_method")
    require(method is not None and method != "", f"it has a {name} without a quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(f"its {name} says {show(method)}")
    try:
        return _READERS[method](found)
    except ValueError as error:
        raise ValueError(f"its {name} says {show(method)}, and {error}") from None


def _read_gptq(found: dict[str, Any]) -> QuantizationConfig:
    """AutoGPTQ's and GPTQModel's fields."""
    version = {"gptq": 1, "gptq_v2": 2}
    named = next((found[name] for name in ("checkpoint_format", "format") if found.get(name) is not None), "gptq")
    named = "marlin" if found.get("is_marlin_format") is True else named
    require(
        isinstance(named, str) and named in version,
        f"checkpoint_format must be one of {', '.join(version)}, got {show(named)}",
    )
    found = {"bits": None, "group_size": None, "sym": True, "desc_act": False, **found}
    scheme = _gptq_scheme(found)
    rules = [_gptq_rule(pattern, changes, found) for pattern, changes in _items(found, "dynamic")]
    return QuantizationConfig("gptq", (*rules, (re.compile(""), scheme)), version[named])


def _gptq_scheme(found: Mapping[str, Any]) -> Scheme:
    """The scheme that some fields describe."""
    _check_bits("bits", found["bits"])
    group_size, symmetric = _check_group_size("group_size", found["group_size"]), check_bool("sym", found["sym"])
    return Scheme(group_size, symmetric, check_bool("desc_act", found["desc_act"]) and group_size != -1)


def _gptq_rule(pattern: str, changes: Any, found: Mapping[str, Any]) -> tuple[re.Pattern[str], Scheme | None]:
    """An entry of GPTQModel's ``dynamic``: "-:…" names modules that are left as they are, "+:…" other settings."""
    compiled = _compile("dynamic", re.sub(r"^[+-]:", "", pattern))
    if pattern.startswith("-:"):
        return compiled, None
    require(isinstance(changes, dict), f"dynamic[{pattern!r}] must be an object, got {show(changes)}")
    return compiled, _gptq_scheme({**found, **changes})


def _read_compressed(found: dict[str, Any]) -> QuantizationConfig:
    """compressed-tensors' fields."""
    named = found.get("format", "dense")
    for name in ("kv_cache_scheme", "transform_config"):
        require(not found.get(name), f"{name} must be null, got {show(found.get(name))}")
    sparsity = found.get("sparsity_config") or {}
    require(
        isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense",
        f"sparsity_config must be null or dense, got {show(sparsity)}",
    )
    ignored = found.get("ignore") or []
    require(isinstance(ignored, list), f"ignore must be a list of names, got {show(ignored)}")
    ignoring: list[tuple[re.Pattern[str], Scheme | None]] = [(_target("ignore", name), None) for name in ignored]
    rules: list[tuple[str, re.Pattern[str], Scheme]] = []
    groups = list(_items(found, "config_groups"))
    require(bool(groups), "config_groups must name a group")
    for group_name, group in groups:
        where = f"config_groups.{group_name}"
        require(isinstance(group, dict), f"{where} must be an object, got {show(group)}")
        form = group.get("format") or named
        require(form == "pack-quantized", f"format must be 'pack-quantized', got {show(form)}")
        targets = group.get("targets")
        require(isinstance(targets, list), f"{where}.targets must be a list of names, got {show(targets)}")
        scheme = _compressed_scheme(where, group)
        rules += [(target, _target(f"{where}.targets", target), scheme) for target in targets]
    # As in its library a name goes before a pattern, and a pattern before "Linear", wherever they stand.
    rules.sort(key=lambda rule: (rule[0] == "Linear", rule[0].startswith("re:")))
    return QuantizationConfig("compressed-tensors", (*ignoring, *(rule[1:] for rule in rules)))


def _compressed_scheme(where: str, group: Mapping[str, Any]) -> Scheme:
    """The scheme of one of ``config_groups``."""
    for name in ("input_activations", "output_activations"):
        require(group.get(name) is None, f"{where}.{name} must be null, got {show(group.get(name))}")
    weights, where = group.get("weights"), f"{where}.weights"
    require(isinstance(weights, dict), f"{where} must be an object, got {show(weights)}")
    assert isinstance(weights, dict)
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    require(kind == "int", f"{where}.type must be 'int', got {show(kind)}")
    _check_bits(f"{where}.num_bits", weights.get("num_bits"))
    require(not weights.get("dynamic"), f"{where}.dynamic must be false, got {show(weights.get('dynamic'))}")
    whole = strategy == "channel"
    require(whole or strategy == "group", f"{where}.strategy must be 'group' or 'channel', got {show(strategy)}")
    group_size = -1 if whole else _check_group_size(f"{where}.group_size", weights.get("group_size"))
    symmetric = check_bool(f"{where}.symmetric", weights.get("symmetric", True))
    order = weights.get("actorder")
    name = "false" if order is None else str(order).lower()
    require(name in _ACTORDERS, f"{where}.actorder must be null or one of {', '.join(_ACTORDERS)}, got {show(order)}")
    return Scheme(group_size, symmetric, _ACTORDERS[name])


def _target(where: str, name: Any) -> re.Pattern[str]:
    """Which modules one of ``targets`` or ``ignore`` means: a name, "re:…", or "Linear" for all."""
    require(isinstance(name, str), f"{where} must be a list of names, got an entry {show(name)}")
    if name == "Linear":
        return re.compile("")
    if name.startswith("re:"):
        return _compile(where, name.removeprefix("re:"))
    return re.compile(rf"{re.escape(name)}$")


def _compile(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} has a pattern {show(pattern)} that is none ({error})") from None


def _items(found: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """The fields of an object in a config; none where it is null."""
    inner = found.get(name) or {}
    require(isinstance(inner, dict), f"{name} must be an object, got {show(inner)}")
    yield from inner.items()


def _check_bits(name: str, value: Any) -> None:
    require(type(value) is int and value == NUM_BITS, f"{name} must be {NUM_BITS}, got {show(value)}")


def _check_group_size(name: str, value: Any) -> int:
    size = check_int(name, value)
    require(size == -1 or 0 < size <= MAX_GROUP_SIZE, f"{name} must be positive, or -1 for whole columns, got {size}")
    return size


_ACTORDERS = {"group": True, "dynamic": True, "true": True, "weight": False, "static": False, "false": False}
"""What compressed-tensors calls the order of columns, and whether each must say which group it is in."""

_READERS: dict[str, Callable[[dict[str, Any]], QuantizationConfig]] = {
    "gptq": _read_gptq,
    "compressed-tensors": _read_compressed,
}
"""How each ``quant_method`` that can be run is read."""


def settle_quantization(asked: str | None, found: QuantizationConfig | None, where: str) -> QuantizationConfig | None:
    """What ``ModelConfig.quantization`` comes to with a checkpoint; None leaves it to the checkpoint.

    Args:
        asked: the setting.
        found: what the checkpoint's config says.
        where: the checkpoint, for the error.

    Raises:
        ValueError: if the two do not go together.
    """
    if asked is None or (found is not None and found.method == asked):
        return found
    if found is not None:
        raise ValueError(
            f"quantization must be None or {found.method!r} for {where}, which is quantized already, got {asked!r}"
        )
    if asked == "int8":
        return QuantizationConfig("int8")
    raise ValueError(f"quantization must be None or 'int8' for {where}, whose weights are floats, got {asked!r}")
