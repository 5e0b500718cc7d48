"""Products with weights of 4 and 8 bits. Chapter 15 is about this module.

With few rows a product takes as long as reading its weight, so fewer bits are fewer microseconds. There are three ways
to compute one:

- *packed*: 4 bits, by torch's own kernels (`folovllm.model.int4_kernels`), on a CPU with AVX2 or AVX-512 or a GPU of
  compute capability 8.0 or newer, with activations in bfloat16;
- *dynamic*: 8 bits, and the activations are rounded to 8 bits as well, with a scale for each row, so that whole
  numbers are multiplied; on a CPU (`folovllm.model.int8_kernels`). Compiled steps of one or two rows do not round them
  (`folovllm.worker.traced.multiply_few`);
- *plain*: the weight is turned into floats anew for each product. It runs everywhere and is what the others are
  compared with. On a GPU 8 bits take it (torch's kernel for such weights needs 55 to 2,400 us there where bfloat16
  needs 9 to 14), on an ARM CPU 4 bits, since torch has no kernel for them there, and 8 bits are dynamic by QNNPACK.

With 8 bits, on both of the last two ways, weights and activations are rotated first (`rotate`), so that no number is
much larger than others. The plain path gives a text the same tokens alone and in any batch, as nearly as floats do. The
other two round otherwise for other numbers of rows, so that a near tie may fall the other way.

As in vLLM (``vllm/model_executor/layers/quantization/base_config.py`` and ``kernels/linear/mixed_precision``, 0.33.0).
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from folovllm.model import int4_kernels
from folovllm.model.checkpoint import Checkpoint, ModelLoadError, iterate_weights
from folovllm.model.int4_kernels import has_int4_kernel
from folovllm.model.int8_kernels import DynamicInt8, OneDnnInt8, has_int8_kernel, int8_max, round_to_bytes
from folovllm.model.layers import Linear, LinearBase, LinearMethod, Place
from folovllm.model.packing import (
    SYMMETRIC_ZERO,
    QuantizedWeight,
    dequantize,
    is_mislabelled,
    pack_int4,
    unpack_compressed,
    unpack_gptq,
    unpack_int4,
)
from folovllm.model.quantization import TENSORS, QuantizationConfig, Scheme
from folovllm.utils import cdiv
from folovllm.validation import require

logger = logging.getLogger(__name__)

WHOLE = 2.0**7
"""What weights of 8 bits are divided by to be at most 1, which changes no digit of a float."""
MAX_ROTATED = 64
"""Inputs that are rotated together, at most; a power of two. With 32 SmolLM2-135M loses 0.007 nats per token, with 64
0.002, and the cost grows with it."""
ROWS_AT_ONCE = 512
"""Outputs whose weights are rounded to 8 bits at once; it bounds the memory that a large head needs meanwhile."""


@functools.cache  # which loading fills, so that no compiler's pretended matrix is kept
@torch.inference_mode(False)  # what is kept must serve elsewhere, too
def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Sylvester's matrix of a power of two: float32 ``[size, size]``, symmetric, and its own inverse.

    It is the same tensor each time, which must stay as it is.
    """
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def rotate(x: Tensor) -> Tensor:
    """Blocks of `MAX_ROTATED` neighbours in the last dimension, or of what divides it, times `hadamard`; float32.

    ``rotate(x) @ rotate(weight).T`` is ``x @ weight.T``. But a number that is much larger than the others, which would
    make the grid coarse for all numbers that share its scale, is shared out among its block: SmolLM2-135M loses 0.037
    nats per token without it, and 0.002 with it (QuaRot, Ashkboos et al. 2024).
    """
    size = math.gcd(x.shape[-1], MAX_ROTATED)
    return (x.float().unflatten(-1, (-1, size)) @ hadamard(size, x.device)).flatten(-2)


def find_largest(rows: Tensor) -> Tensor:
    """The size of each row's largest number, ``[num_rows, 1]``."""
    return rows.abs().amax(-1, keepdim=True)  # for 16 rows of 3,072 vector_norm takes eight times as long


class Int8Rows:
    """Where some rows of a weight of floats go that is kept in 8 bits, rotated; each row has a scale of its own.

    Args:
        values: int8 ``[num_out, num_in]``, a view of the whole weight's.
        scales: float32 ``[num_out]``, likewise.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.values.shape

    def copy_(self, weight: Tensor) -> None:
        """Rounds a weight of floats to 8 bits."""
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            floats = rotate(weight[rows].to(self.scales.device))
            scales = floats.abs().amax(-1) / int8_max()
            scales = scales.where(scales != 0, 1)  # a row of zeros; one that is not a number stays that
            self.scales[rows] = scales
            self.values[rows].copy_((floats / scales.unsqueeze(-1)).round_())


class Int8Linear(LinearBase):
    """A product whose weight has 8 bits, with a scale for each output.

    Args:
        method: what makes it.
        shards: see `LinearBase`.
        num_in: input columns.
        bias: whether it has one.
        tied: the embedding, if its weight is the head's as well; it is rounded when all weights are loaded.
        is_head: its logits are float32, since no product follows for which they would have to be anything else.
    """

    kernel = "8 bits, plain"

    def __init__(
        self,
        method: LinearMethod,
        shards: Mapping[str, int],
        num_in: int,
        bias: bool = False,
        tied: Tensor | None = None,
        is_head: bool = False,
    ) -> None:
        num_out = sum(shards.values())
        weight = torch.empty(num_out, num_in, dtype=torch.int8, device=method.device)
        super().__init__(weight, method.create_bias(shards, bias), {} if tied is not None else shards)
        self.scales = torch.empty(num_out, dtype=torch.float32, device=method.device)
        self.tied, self.is_head, self.dtype = tied, is_head, method.dtype
        self.product: OneDnnInt8 | DynamicInt8 | None = None
        self._is_given_bytes = method.has_compiled_steps and OneDnnInt8.is_available()

    def places(self) -> dict[str, Place]:
        """Where each tensor of a checkpoint goes; a weight is rounded on the way."""
        values, scales = self.split("weight", self.weight), self.split("weight", self.scales)
        return {**super().places(), **{name: Int8Rows(values[name], scales[name]) for name in values}}

    @property
    def num_bytes(self) -> int:
        """See `LinearBase`."""
        return super().num_bytes + self.scales.nbytes

    @property
    def num_bytes_meanwhile(self) -> int:
        """See `LinearBase`; `DynamicInt8` makes a tensor of the weight with its scales, and packs that. Before, some
        rows at a time are floats twice, rotated and rounded."""
        rounding = 2 * torch.float32.itemsize * min(len(self.weight), ROWS_AT_ONCE) * self.weight.shape[1]
        return max((1 if self._is_given_bytes else 2) * self.weight.nbytes, rounding)

    def process_weights_after_loading(self) -> None:
        """Stores the weight in the order of torch's kernel, where there is one."""
        if self.tied is not None:
            Int8Rows(self.weight, self.scales).copy_(self.tied)
        if has_int8_kernel(self.weight.device):
            self.product = (OneDnnInt8 if self._is_given_bytes else DynamicInt8)(self.weight, self.scales)
            self.kernel, self.weight = "8 bits, dynamic", self.weight.to("meta")  # its size is all that is left

    @property
    def takes_bytes(self) -> bool:
        """Whether its kernel takes rows as `round_to_bytes` gives them, and not as floats."""
        return isinstance(self.product, OneDnnInt8)

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` of rows as `normalize` gives them; float32."""
        if self.product is not None:
            return self.product(x)
        # As whole numbers they would make sums that float16 has no room for.
        weight = self.weight.to(self.dtype).div_(WHOLE)
        return F.linear(x.to(self.dtype), weight).float().mul_(self.scales * WHOLE)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each row, rotated, divided by its largest number; and that, ``[num_tokens, 1]``.

        In floats, in which what is no number becomes 0, or in bytes, as the kernel takes them. So a row with large
        numbers costs the others no precision. Some tokens, the first of a text above all, have a few activations that
        are a thousand times as large as all others (Sun et al. 2024). With one scale for all rows, SmolLM2-135M loses
        0.15 nats per token of a prompt of 512, and without `rotate` 0.38. Nor do the scales of `DynamicInt8` become
        small at will: numbers of 1e-4 would lose 18 percent.
        """
        rows = rotate(x)
        largest = find_largest(rows)
        return round_to_bytes(rows, largest) if self.takes_bytes else (rows / largest).nan_to_num_(), largest

    def __call__(self, x: Tensor) -> Tensor:
        """See `LinearBase`."""
        rows, largest = self.normalize(x)
        # A row of zeros, 0 / 0, comes out as zeros; one with what is no number, or too large for one, as no numbers,
        # and alone.
        out = self.multiply(rows).mul_(largest)
        return (out if self.bias is None else out.add_(self.bias)).to(torch.float32 if self.is_head else self.dtype)


class PlainInt4:
    """A weight of 4 bits that is turned into floats anew for each product."""

    kernel = "4 bits, plain"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.num_in, self.packed = weight.values.shape[1], pack_int4(weight.values)
        self.scales, self.zeros = weight.scales, weight.zeros
        self.g_idx = None if weight.is_in_order else weight.g_idx
        self.num_bytes = sum(part.nbytes for part in (self.packed, self.scales, self.zeros))
        self.num_bytes += 0 if self.g_idx is None else self.g_idx.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `LinearBase`."""
        values = unpack_int4(self.packed, self.num_in)
        return Linear(dequantize(values, self.scales, self.zeros, self.g_idx, x.dtype))(x)


class PackedInt4:
    """A weight of 4 bits in the order of torch's kernel, which multiplies it by rows of bfloat16.

    Args:
        weight: `kernel_group_size` must have one for it.
    """

    kernel = "4 bits, packed"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.product, self.group_size = int4_kernels.KERNELS[weight.values.device.type], kernel_group_size(weight)
        order = weight.g_idx.argsort(stable=True)
        in_order = bool((weight.g_idx.diff() >= 0).all())
        self.order = None if in_order else order
        values = weight.values if in_order else weight.values[:, order]
        self.packed = self.product.pack(values)
        # The kernel computes (value - 8) * scale + zero, in groups that may be parts of ours.
        scales = weight.scales.to(torch.bfloat16)
        zeros = scales * (SYMMETRIC_ZERO - weight.zeros.to(torch.bfloat16))
        repeats = values.shape[1] // scales.shape[1] // self.group_size
        pairs = torch.stack([scales, zeros], dim=-1).transpose(0, 1)
        self.scales_and_zeros = pairs.repeat_interleave(repeats, dim=0).contiguous()
        self.num_bytes = self.packed.nbytes + self.scales_and_zeros.nbytes + (0 if in_order else order.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """See `LinearBase`."""
        x = x.contiguous() if self.order is None else x[:, self.order]
        if len(x) >= self.product.rows_for_floats and (values := self.product.unpack(self.packed)) is not None:
            return (x.to(self.product.floats) @ self.dequantize(values, self.product.floats)).to(x.dtype)
        return self.product.multiply(x, self.packed, self.group_size, self.scales_and_zeros)

    def dequantize(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight as the kernel has it, in floats: ``[num_in, num_out]``, and so are its values."""
        steps = values.to(dtype).sub_(SYMMETRIC_ZERO)
        # Every second number of a row is read six times as slowly as a row of its own.
        scales, zeros = (part.to(dtype).contiguous().unsqueeze(1) for part in self.scales_and_zeros.unbind(-1))
        return steps.unflatten(0, (-1, self.group_size)).mul_(scales).add_(zeros).flatten(0, 1)


def kernel_group_size(weight: QuantizedWeight) -> int:
    """The input columns that share a scale in torch's kernel; 0: it cannot have this weight."""
    num_out, num_groups = weight.scales.shape
    sizes = weight.g_idx.bincount(minlength=num_groups)
    if num_out % int4_kernels.OUTPUTS or bool((sizes != sizes[0]).any()):
        return 0
    return next((size for size in int4_kernels.GROUP_SIZES if sizes[0] % size == 0), 0)


class Int4Linear(LinearBase):
    """A product whose weight comes in 4 bits.

    Args:
        method: what makes it.
        shards: see `LinearBase`.
        num_in: input columns.
        scheme: how the weight is quantized.
        bias: whether it has one.
    """

    def __init__(
        self, method: QuantizedLinearMethod, shards: Mapping[str, int], num_in: int, scheme: Scheme, bias: bool
    ) -> None:
        super().__init__(method.empty(0), method.create_bias(shards, bias), shards)
        self.method, self.num_in = method, num_in
        self.products: list[PackedInt4 | PlainInt4] = []
        self.tensors = {
            module: {
                name: torch.empty(shape, dtype=dtype, device=method.device)
                for name, (shape, dtype) in tensors_of_a_weight(method.config, scheme, size, num_in).items()
                if is_needed(name, scheme) or f"{module}.{name}" in method.stored
            }
            for module, size in shards.items()
        }

    @property
    def num_bytes(self) -> int:
        """See `LinearBase`; until they are unpacked the tensors as the files have them."""
        held = (tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())
        return super().num_bytes + sum(held) + sum(product.num_bytes for product in self.products)

    @property
    def num_bytes_meanwhile(self) -> int:
        """See `LinearBase`; values are unpacked to bytes, fused, and for a CPU made int32 to be packed anew."""
        return (1 + 1 + 2 * torch.int32.itemsize) * self.num_in * self.num_out

    def places(self) -> dict[str, Place]:
        """Where each tensor of a checkpoint goes."""
        places: dict[str, Place] = {
            f"{module}.{name}": tensor for module, tensors in self.tensors.items() for name, tensor in tensors.items()
        }
        return {**places, **self.split("bias", self.bias)}

    def process_weights_after_loading(self) -> None:
        """Fuses the shards, where their columns are grouped alike, and stores them in the order of the kernel."""
        weights = [
            unpack_weight(self.method.config, module, tensors, (self.shards[module], self.num_in))
            for module, tensors in self.tensors.items()
        ]
        self.tensors = {}
        if all(bool((weight.g_idx == weights[0].g_idx).all()) for weight in weights):
            values, scales, zeros = map(torch.cat, zip(*((w.values, w.scales, w.zeros) for w in weights)))
            weights = [QuantizedWeight(values, scales, zeros, weights[0].g_idx)]
        packs = has_int4_kernel(self.method.dtype, self.method.target) and all(map(kernel_group_size, weights))
        self.products = [(PackedInt4 if packs else PlainInt4)(weight) for weight in weights]
        self.kernel = self.products[0].kernel

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        first, *others = self.products
        out = torch.cat([first(x), *(product(x) for product in others)], dim=-1) if others else first(x)
        return out if self.bias is None else out.add_(self.bias)


def tensors_of_a_weight(
    config: QuantizationConfig, scheme: Scheme, num_out: int, num_in: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of a weight of 4 bits in a checkpoint, as name -> shape and dtype; see `folovllm.model.packing`."""
    num_groups, floats, ints = scheme.num_groups(num_in), torch.float32, torch.int32
    if config.method == "gptq":
        return {
            "qweight": ((cdiv(num_in, 8), num_out), ints),
            "qzeros": ((num_groups, cdiv(num_out, 8)), ints),
            "scales": ((num_groups, num_out), floats),
            "g_idx": ((num_in,), ints),
        }
    return {
        "weight_zero_point": ((cdiv(num_out, 8), num_groups), ints),
        "weight_packed": ((num_out, cdiv(num_in, 8)), ints),
        "weight_scale": ((num_out, num_groups), floats),
        "weight_shape": ((2,), torch.int64),
        "weight_g_idx": ((num_in,), ints),
    }


def is_needed(name: str, scheme: Scheme) -> bool:
    """Whether a weight of 4 bits must have a tensor of this name; others are read where they are stored."""
    optional = {"g_idx": scheme.desc_act, "weight_g_idx": scheme.desc_act, "weight_zero_point": not scheme.symmetric}
    return optional.get(name, True)


def unpack_weight(
    config: QuantizationConfig, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> QuantizedWeight:
    """The weight of a checkpoint's module.

    Raises:
        ModelLoadError: if its tensors do not belong together; the message names the module.
    """
    try:
        scheme, g_idx = config.scheme(module), tensors.get("g_idx", tensors.get("weight_g_idx"))
        if scheme is not None and scheme.group_size > 0 and (g_idx is None or bool((g_idx == -1).all())):
            fits = shape[1] % scheme.group_size == 0
            require(fits, f"its {shape[1]} input columns cannot be shared out among groups of {scheme.group_size}")
        weight = unpack_gptq(tensors, config.version) if config.method == "gptq" else unpack_compressed(tensors)
        found = tuple(weight.values.shape)
        require(found == shape, f"its shape must be {list(shape)}, got {list(found)}")
        return weight
    except ValueError as error:
        raise ModelLoadError(
            f"the quantized weight of {module} is wrong: {error}; copy or download the checkpoint again"
        ) from None


class QuantizedLinearMethod(LinearMethod):
    """Makes the products of a quantized model.

    Args:
        checkpoint: whose config says how they are quantized.
        device: where they are; "meta" only tells their shapes and bytes.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        super().__init__(checkpoint.dtype, device, checkpoint.device, checkpoint.has_compiled_steps)
        assert checkpoint.quantization is not None
        self.config, self.stored = checkpoint.quantization, checkpoint.headers.keys()

    def create(self, shards: Mapping[str, int], num_in: int, bias: bool = False) -> LinearBase:
        """A product as the files have it, or in 8 bits if that was asked for.

        Raises:
            ModelLoadError: if the shards are not quantized alike.
        """
        if self.config.method == "int8":
            return Int8Linear(self, shards, num_in, bias)
        scheme, *others = dict.fromkeys(self._scheme(module) for module in shards)
        if others:
            raise ModelLoadError(
                f"{', '.join(shards)} are one product here, which needs one group size and one number of bits, but the "
                "checkpoint quantizes them in different ways; take one that quantizes them alike"
            )
        if scheme is None:
            return super().create(shards, num_in, bias)
        return Int4Linear(self, shards, num_in, scheme, bias)

    def create_head(self, shards: Mapping[str, int], embedding: Tensor, tied: bool) -> LinearBase:
        """The head; in 8 bits too where a CPU has the others packed, since in 16 it would take longer than they."""
        num_in, is_int4 = embedding.shape[1], not tied and any(self._scheme(module) for module in shards)
        cpu_packs = self.target.type == "cpu" and has_int4_kernel(self.dtype, self.target)
        if self.config.method == "int8" or (cpu_packs and not is_int4):
            return Int8Linear(self, shards, num_in, tied=embedding if tied else None, is_head=True)
        return super().create_head(shards, embedding, tied)

    def _scheme(self, module: str) -> Scheme | None:
        """How a module's weight is stored in 4 bits; None: it is stored in floats."""
        return None if f"{module}.weight" in self.stored else self.config.scheme(module)


def linear_method(checkpoint: Checkpoint, device: torch.device) -> LinearMethod:
    """What makes a checkpoint's products on a device."""
    if checkpoint.quantization is None:
        return LinearMethod(checkpoint.dtype, device, checkpoint.device)
    return QuantizedLinearMethod(checkpoint, device)


def settle_version(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the version in which GPTQ's zeros are stored, whatever the config says.

    Files that say 1 and are symmetric with zeros of 8 are about (vLLM's issue 38966): read as version 1, every weight
    would be one step off.
    """
    config = checkpoint.quantization
    if config is None or config.method != "gptq":
        return checkpoint
    zeros = {
        name: entry
        for name, entry in checkpoint.headers.items()
        if name.endswith(".qzeros") and (scheme := config.scheme(name.removesuffix(".qzeros"))) and scheme.symmetric
    }
    stored = iterate_weights(replace(checkpoint, headers=zeros))
    if not zeros or not all(is_mislabelled(tensor, config.version) for _, tensor in stored):
        return checkpoint
    other = 3 - config.version
    logger.warning(
        "the config of %s says that its zeros are stored as in version %d of GPTQ's format, but they are symmetric as "
        "in version %d, and are read so",
        checkpoint.folder,
        config.version,
        other,
    )
    return replace(checkpoint, quantization=replace(config, version=other))


def iterate_dequantized(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The name and tensor of every weight, in floats, of a checkpoint that is quantized in its files.

    Args:
        checkpoint: where they are.
        shapes: of the weights in floats, by their names.

    Raises:
        ModelLoadError: if a weight is unknown, or its tensors do not belong together; the message names the module.
    """
    config = checkpoint.quantization
    assert config is not None
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in iterate_weights(checkpoint):
        module, _, last = name.rpartition(".")
        if last in TENSORS[config.method]:
            modules.setdefault(module, {})[last] = tensor
        else:
            yield name, tensor
    for module, tensors in modules.items():
        name = f"{module}.weight"
        if name not in shapes or name in checkpoint.headers:
            raise ModelLoadError(f"the checkpoint has a quantized weight {module}, which the model does not know")
        num_out, num_in = shapes[name]
        yield name, unpack_weight(config, module, tensors, (num_out, num_in)).dequantize(checkpoint.dtype)


def describe_products(linears: Sequence[LinearBase]) -> str:
    """How a model's products are computed, the head, which comes last, by itself: "16 x 4 bits, packed; head in …"."""
    *layers, head = (linear.kernel for linear in linears)
    return "; ".join([*(f"{count} x {kernel}" for kernel, count in Counter(layers).items()), f"head in {head}"])
