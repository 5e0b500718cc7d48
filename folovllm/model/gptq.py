"""Few bits per weight, chosen so that a layer's outputs change least: GPTQ. Chapter 15 is about this module.

Rounding a weight to 4 bits makes an error. GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one input column after
the other, and after each changes the columns that are still to come, so that together they make up for the error on the
inputs that the layer really sees. What it knows of these inputs is their Hessian, ``2/n sum x x^T``; its diagonal says
how much a column counts when a scale is chosen. Without a Hessian, `quantize_weight` is plain rounding.

`quantize_layers` walks through a model with a few texts, the calibration. Each product quantizes its weight for the
inputs that come out of the already quantized ones before it, which are those that it will really get. One layer at a
time is in memory.

All of it is computed in float64. One number that is rounded up instead of down changes all columns after it, and so
all layers after it: in float32 two machines, which add up in different orders, would get different weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.model.checkpoint import Checkpoint, check_room, iterate_weights
from folovllm.model.decoder import Attend, Decoder, DecoderLayer, make_empty_decoder
from folovllm.model.layers import Linear
from folovllm.model.packing import QuantizedWeight, column_groups
from folovllm.validation import check_int, require

BLOCK_SIZE = 128
"""Columns that hand their errors on among themselves, before the rest of the weight gets those of all of them."""
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
"""Shares of its mean that are added to a Hessian's diagonal: the first with which it can be inverted."""
DTYPE = torch.float64
"""Of weights and activations while a model is quantized."""
NUM_ROWS = 64
"""Places whose logits are computed at a time."""
SMALLEST_SCALE = 2.0**-24
"""The smallest number of float16, for a group of zeros, which any scale serves."""

Quantize = Callable[[Tensor, Tensor], QuantizedWeight]
"""Weight ``[num_out, num_in]`` and Hessian ``[num_in, num_in]`` -> the weight in few bits."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of the scale that reaches the largest number, among which the best is taken."""
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The products of a layer, in the order in which it computes them."""


def compute_hessian(x: Tensor) -> Tensor:
    """Second derivative of a product's squared error by its weights: ``2/n sum x x^T``, ``[num_in, num_in]``.

    Args:
        x: the product's inputs, ``[num_tokens, num_in]``.
    """
    return x.T @ x * (2 / len(x))


def quantize_weight(
    weight: Tensor, hessian: Tensor | None = None, bits: int = 4, group_size: int = 128
) -> QuantizedWeight:
    """A weight in few bits, symmetric, with scales in float16.

    Args:
        weight: ``[num_out, num_in]``, float32 or float64; it is left as it is.
        hessian: of its inputs, ``[num_in, num_in]``; None: each number is rounded for itself.
        bits: of a value, 2 to 8.
        group_size: input columns that share a scale; -1: all of them.

    Raises:
        ValueError: if the columns cannot be divided into such groups, or a number is not finite.
    """
    num_out, num_in = weight.shape
    group_size = check_group_size(num_in, group_size)
    require(2 <= bits <= 8, f"bits must be from 2 to 8, got {bits}")
    require(bool(weight.isfinite().all()), "the weight has a number that is not finite")
    weight, zero = weight.clone(), 2 ** (bits - 1)
    values = torch.empty(num_out, num_in, dtype=torch.uint8)
    scales = torch.empty(num_out, num_in // group_size, dtype=torch.float16)
    factor = importance = None
    if hessian is not None:
        importance, factor = hessian.diagonal().to(weight.dtype), factor_inverse(hessian).to(weight.dtype)
        weight[:, importance == 0] = 0  # of a dead column, whose input is always 0, nothing depends
    width = _block_width(group_size)
    for start in range(0, num_in, width):
        end = min(start + width, num_in)
        block, errors = weight[:, start:end], []
        for column in range(start, end):
            group = column // group_size
            if column % group_size == 0:
                columns = slice(column, column + group_size)
                costs = None if importance is None else importance[columns]
                scales[:, group] = find_scales(weight[:, columns], bits, costs)
            scale = scales[:, group].to(weight.dtype)
            steps = (weight[:, column] / scale).round_().clamp_(-zero, zero - 1)
            values[:, column] = steps + zero
            if factor is not None:
                errors.append(carry_error(block, column - start, steps * scale, factor[start:end, start:end]))
        if factor is not None:
            weight[:, end:] -= torch.stack(errors, dim=1) @ factor[start:end, end:]
    zeros = torch.full(scales.shape, zero, dtype=torch.uint8)
    return QuantizedWeight(values, scales, zeros, column_groups(num_in, scales.shape[1]))


def _block_width(group_size: int) -> int:
    """Columns of a block. No group begins inside of one and ends outside, so that all errors before it have arrived."""
    is_small = group_size <= BLOCK_SIZE
    return group_size * (BLOCK_SIZE // group_size) if is_small else math.gcd(group_size, BLOCK_SIZE)


def check_group_size(num_in: int, group_size: int) -> int:
    """The columns of a group, all of them for -1; refuses what cannot be."""
    size = num_in if group_size == -1 else group_size
    require(
        size > 0 and num_in % size == 0,
        f"group_size must be -1 or divide the {num_in} input columns of each weight, got {group_size}",
    )
    return size


def find_scales(group: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """How far apart the values of each row are, so that its largest number is half a step beyond the last: float16.

    Args:
        group: ``[num_out, group_size]``.
        bits: of a value.
        importance: of each column's squared error, ``[group_size]``. With it the scale may be smaller, so that the
            largest numbers are cut off and all others are nearer to a value: that of `SHRINKS` with the least error.
    """
    largest, zero = 2 * group.abs().amax(dim=1) / (2**bits - 1), 2 ** (bits - 1)
    shrinks = torch.tensor(SHRINKS if importance is not None else SHRINKS[:1], dtype=group.dtype)
    scales = (shrinks[:, None] * largest).to(torch.float16).clamp_min_(SMALLEST_SCALE)
    require(bool(scales.isfinite().all()), "the weight has a number that is too large for a scale in float16")
    if importance is None:
        return scales[0]
    errors = []
    for scale in scales.to(group.dtype).unsqueeze(-1):  # one by one: a group may be a whole weight
        rounded = (group / scale).round_().clamp_(-zero, zero - 1).mul_(scale)
        errors.append(rounded.sub_(group).square_() @ importance)
    return scales.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]


def carry_error(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Tensor:
    """Changes the columns after one that was rounded, so that they make up for its error; one step of GPTQ.

    Args:
        block: ``[num_out, num_columns]``, changed in place.
        column: number of the one that was rounded.
        rounded: what became of it, ``[num_out]``.
        factor: upper factor of the inverse Hessian, for these columns: ``[num_columns, num_columns]``.

    Returns:
        its error in units of ``factor[column, column]``, ``[num_out]``, for the columns beyond the block.
    """
    error = (block[:, column] - rounded) / factor[column, column]
    block[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
    return error


def factor_inverse(hessian: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U`` the inverse of a damped Hessian, in float64.

    Row i of it has what the textbook finds there when it inverts the Hessian anew for the columns from i on.

    Raises:
        ValueError: if the Hessian has a number that is not finite.
    """
    require(bool(hessian.isfinite().all()), "the inputs of a weight have a number that is not finite")
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    is_live = diagonal > 0
    mean = float(diagonal[is_live].mean()) if is_live.any() else 1.0
    diagonal[~is_live] = mean
    for damping in DAMPINGS:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64)
        lower, has_failed = torch.linalg.cholesky_ex(damped)
        if not has_failed:
            break
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Squared error of a product's outputs over their square, on the inputs of the Hessian."""
    lost = quantized.dequantize(weight.dtype) - weight
    return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30))


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of one layer."""

    weights: dict[str, QuantizedWeight]
    """Name in the checkpoint, without its ``.weight`` -> the weight in few bits."""
    output_errors: dict[str, float]
    """Product -> `output_error`."""
    error: float
    """Squared distance of the residual stream after it from that of the unquantized model, over its square."""


class Calibration:
    """The same texts through a model as it was and as it becomes, side by side, layer after layer.

    Args:
        checkpoint: the model; its layers are read one at a time.
        sequences: token ids of each text.

    Raises:
        ValueError: if there is no token, or the model has no embedding for one.
        ModelLoadError: if the engine has no such architecture, config and weights do not belong together, or there is
            not enough memory.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> None:
        require(any(sequences), "the calibration must have at least one token")
        empty, lengths = make_empty_decoder(checkpoint), [len(sequence) for sequence in sequences]
        self.checkpoint, self.config = checkpoint, empty.config
        check_room(
            f"the layers of {checkpoint.folder}, one at a time, and what {sum(lengths):,} tokens of calibration become "
            "in them",
            estimate_bytes(empty, sum(lengths)),
            torch.device("cpu"),
            "or give a shorter calibration or a smaller model",
        )
        input_ids = torch.tensor([token_id for sequence in sequences for token_id in sequence])
        vocab_size = self.config.vocab_size
        unknown = input_ids[(input_ids < 0) | (input_ids >= vocab_size)].tolist()
        require(
            not unknown,
            f"the calibration has tokens {unknown[:3]}, but the model has embeddings for {vocab_size:,}; take model "
            "and tokenizer from the same checkpoint",
        )
        tables = Decoder(replace(self.config, num_layers=0, vocab_size=0), max(lengths), DTYPE)
        positions = torch.cat([torch.arange(length) for length in lengths])
        self.cos, self.sin = tables.cos[positions], tables.sin[positions]
        self.attend = attend_within(lengths)
        (_, embedding) = next(iterate_weights(checkpoint, "model.embed_tokens.weight"))
        self.hidden = self.reference = F.embedding(input_ids, embedding).to(DTYPE)

    @functools.cached_property
    def head(self) -> Decoder:
        """The model without its layers: norm and head, for when all layers have had their turn."""
        decoder = Decoder(replace(self.config, num_layers=0), 0, DTYPE)
        for name in decoder.weight_shapes():
            decoder.load_weights(iterate_weights(self.checkpoint, name))
        return decoder

    @torch.inference_mode()
    def quantize_layer(self, index: int, quantize: Quantize) -> QuantizedLayer:
        """Quantizes one layer; all before it must have had their turn."""
        layer = self._load_layer(index)
        self.reference = layer(self.reference, self.cos, self.sin, self.attend)
        products = {name: _Calibrated(getattr(layer, name), quantize) for name in PRODUCTS}
        for name, product in products.items():
            setattr(layer, name, product)
        self.hidden = layer(self.hidden, self.cos, self.sin, self.attend)
        weights = {
            f"model.layers.{index}.{part.removeprefix('model.layers.0.')}": weight
            for product in products.values()
            for part, weight in product.split().items()
        }
        difference, square = (self.hidden - self.reference).square().sum(), self.reference.square().sum()
        output_errors = {name: product.error for name, product in products.items()}
        return QuantizedLayer(weights, output_errors, float(difference / square))

    @torch.inference_mode()
    def compute_kl(self, num_rows: int = NUM_ROWS) -> float:
        """KL(before || after) of the next token, in nats, the mean over all places; after the last layer.

        Args:
            num_rows: places that are computed at a time.
        """
        total = 0.0
        for rows in zip(self.reference.split(num_rows), self.hidden.split(num_rows), strict=True):
            before, after = (self.head.compute_logits(self.head.norm(x)).log_softmax(-1) for x in rows)
            total += float(F.kl_div(after, before, reduction="sum", log_target=True))
        return total / len(self.hidden)

    def _load_layer(self, index: int) -> DecoderLayer:
        prefix, decoder = f"model.layers.{index}.", Decoder(replace(self.config, num_layers=1, vocab_size=0), 0, DTYPE)
        weights = iterate_weights(self.checkpoint, prefix)
        decoder.load_weights((f"model.layers.0.{name.removeprefix(prefix)}", tensor) for name, tensor in weights)
        return decoder.layers[0]


def estimate_bytes(decoder: Decoder, num_tokens: int) -> int:
    """About how many bytes a `Calibration` of so many tokens takes at most.

    Args:
        decoder: the model, which may be without its numbers.
        num_tokens: of all texts.
    """
    config, shapes = decoder.config, [linear.weight.shape for linear in decoder.layers[0].linears]
    streams = 2 * config.hidden_size * num_tokens
    # A layer with its activations, and the weight or the Hessian that is worked on, with what is made of it.
    activations = (3 * config.intermediate_size + 4 * config.hidden_size) * num_tokens
    at_work = max(9 * num_in**2 + 4 * num_out * num_in for num_out, num_in in shapes)
    layer = sum(map(math.prod, shapes)) + activations + at_work
    head = config.vocab_size * (config.hidden_size * (1 if config.tie_word_embeddings else 2) + 9 * NUM_ROWS)
    return DTYPE.itemsize * (streams + max(layer, head))


class _Calibrated:
    """A product that quantizes its weight for the first inputs it is given, and computes with what came of it."""

    def __init__(self, linear: Linear, quantize: Quantize) -> None:
        self.weight, self.bias, self.shards, self.quantize = linear.weight, linear.bias, linear.shards, quantize

    def __call__(self, x: Tensor) -> Tensor:
        hessian = compute_hessian(x)
        try:
            self.quantized = self.quantize(self.weight, hessian)
        except ValueError as error:
            parts = ", ".join(name.removeprefix("model.layers.0.") for name in self.shards)
            raise ValueError(f"{parts} cannot be quantized: {error}") from None
        self.error = output_error(self.weight, self.quantized, hessian)
        return F.linear(x, self.quantized.dequantize(x.dtype), self.bias)

    def split(self) -> dict[str, QuantizedWeight]:
        """The weights of the checkpoint that are fused in it, by their modules."""
        sizes, whole = list(self.shards.values()), self.quantized
        parts = zip(whole.values.split(sizes), whole.scales.split(sizes), whole.zeros.split(sizes), strict=True)
        return {
            module: QuantizedWeight(values, scales, zeros, whole.g_idx)
            for module, (values, scales, zeros) in zip(self.shards, parts, strict=True)
        }


def attend_within(lengths: Sequence[int]) -> Attend:
    """Causal attention of whole texts that stand in one row, without a cache.

    Args:
        lengths: tokens of each text.
    """

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        outputs = []
        for queries, keys_values in zip(q.split([*lengths]), kv.split([*lengths]), strict=True):
            keys, values = keys_values.transpose(0, 1).chunk(2)
            queries = queries.transpose(0, 1)
            found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            outputs.append(found.transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    return attend


def choose_method(method: str, bits: int = 4, group_size: int = 128) -> Quantize:
    """How to quantize a weight, by name: "gptq", or "rtn", which rounds each number to the nearest.

    Raises:
        ValueError: if there is no such method, or the size is no whole number.
    """
    require(method in ("gptq", "rtn"), f"method must be gptq or rtn, got {method!r}")
    check_int("group_size", group_size)

    def quantize(weight: Tensor, hessian: Tensor) -> QuantizedWeight:
        return quantize_weight(weight, hessian if method == "gptq" else None, bits, group_size)

    return quantize


def quantize_layers(calibration: Calibration, quantize: Quantize) -> Iterator[QuantizedLayer]:
    """Quantizes all layers of a model, from the first to the last.

    Args:
        calibration: at its beginning.
        quantize: how; see `choose_method`.

    Raises:
        ValueError: if a weight or its inputs have a number that is not finite; the message names layer and weight.
    """
    for index in range(calibration.config.num_layers):
        try:
            layer = calibration.quantize_layer(index, quantize)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        yield layer
