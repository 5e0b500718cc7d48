"""Decode steps compiled for a CPU. Chapter 14.

A CPU launches nothing, but calling an operation from Python takes it some microseconds, and each operation reads its
numbers from memory and writes them back. torch's compiler, Inductor, writes C++ for what a layer does, and what stands
between two products becomes a loop or two. `folovllm.worker.traced` has what it is given for attention, and for
products of few rows. Other products stay what a kernel computes, one operation that the compiler does not look into
(`LinearBase.multiply`).

One layer is compiled, and serves all that are like it: its weights are arguments. So compiling takes seconds however
many layers there are, weights stay as they were packed, and what is compiled is kept on disk for all models of a shape.
One loop also serves any number of rows and of keys, so that a batch needs no padding.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.attention.gather import GatherAttention, count_shared_blocks
from folovllm.config import EngineConfig
from folovllm.model.decoder import Decoder, DecoderLayer
from folovllm.model.layers import Linear, LinearBase, RMSNorm
from folovllm.sample.sampler import find_likeliest
from folovllm.utils import cdiv
from folovllm.worker.step_graph import StepOutputs
from folovllm.worker.traced import (
    FEW_ROWS,
    TracedAttention,
    find_slots,
    mask_places,
    multiply_few,
    weight_in_memory,
)

logger = logging.getLogger(__name__)

TYPICAL_NUM_KEYS, TYPICAL_NUM_ROWS = 256, 16
"""The lengths for which the compiler chooses how to split its loops; what it makes serves any others."""

COMPILED_BYTES = 2**28
"""Most bytes of keys that a compiled step may have in memory at once, as floats (256 MiB); of values it has as many.
Filled up to the longest, 16 sequences of 4,096 tokens of Qwen3-0.6B's shape have as much. Longer ones stay eager."""

COMPILER_OPTIONS = {"realize_reads_threshold": 1, "realize_opcount_threshold": 8, "realize_acc_reads_threshold": 2}
"""Inductor computes what is made of a few numbers anew wherever it is read: a query would be rotated for each of its
keys, and a key turned into floats for each of its queries. With these, such things are kept. Attention of 16 sequences
of 96 tokens takes 115 us a layer instead of 317 (SmolLM2-135M in bfloat16)."""

_COMPILING = threading.Lock()
"""Tracing changes what all threads see, and two engines may need a step at the same time."""

_PRODUCTS: ContextVar[list[LinearBase]] = ContextVar("products")
"""The products of the layer that is running: compiled code knows them by number, so that it serves every such layer."""
_library = torch.library.Library("folovllm", "FRAGMENT")
_library.define("product(Tensor x, int number, int num_out) -> Tensor")
_library.impl("product", lambda x, number, num_out: _PRODUCTS.get()[number].multiply(x), "CPU")
_library.impl("product", lambda x, number, num_out: x.new_empty(x.shape[0], num_out), "Meta")

Owner = TypeVar("Owner", bound=Decoder | DecoderLayer | RMSNorm)
Function = Callable[..., Any]


@dataclass
class Parts:
    """What a decoder or a layer owns, itself or through its norms and products."""

    num_rows: int
    """The rows of the steps that it is compiled for."""
    tensors: list[Tensor] = field(default_factory=list)
    """The arguments of compiled code, in the order in which `replace_tensors` comes upon them."""
    products: list[LinearBase] = field(default_factory=list)
    """Its products: compiled code calls them by number, or reads the memory of their weights."""

    def take(self, tensor: Tensor) -> Tensor:
        """Adds a tensor."""
        self.tensors.append(tensor)
        return tensor

    @classmethod
    def of(cls, owner: Decoder | DecoderLayer, num_rows: int) -> Parts:
        """Those of a decoder, without its layers, or of a layer."""
        parts = cls(num_rows)
        replace_tensors(owner, parts.take, parts)
        return parts

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for all that one compiled function serves."""
        shapes = ((tensor.shape, tensor.dtype) for tensor in self.tensors)
        return *shapes, *((type(product), product.num_out) for product in self.products)


def replace_tensors(owner: Owner, replace: Callable[[Tensor], Tensor], parts: Parts) -> Owner:
    """A copy of what owns norms and products, as a compiler shall see it.

    Args:
        owner: stays as it is.
        replace: gives the tensor that each of its tensors becomes. The order of the calls is the same for all that are
            alike, so that the tensors of one can be taken for those of another.
        parts: gets the products.
    """
    made = copy.copy(owner)
    for name, value in vars(owner).items():
        if isinstance(value, LinearBase):
            setattr(made, name, hide_product(value, replace, parts))
        elif isinstance(value, RMSNorm):
            setattr(made, name, replace_tensors(value, replace, parts))
        elif isinstance(value, Tensor):
            setattr(made, name, replace(value))
    return made


def hide_product(linear: LinearBase, replace: Callable[[Tensor], Tensor], parts: Parts) -> LinearBase:
    """A copy of a product whose kernel is one operation to a compiler, or which `multiply_few` computes."""
    number, num_out, made = len(parts.products), linear.num_out, copy.copy(linear)
    parts.products.append(linear)
    bias = made.bias = None if linear.bias is None else replace(linear.bias)
    found = weight_in_memory(linear) if isinstance(linear, Linear) and parts.num_rows <= FEW_ROWS else None
    if found is not None:
        weight = replace(found)

        def multiply(x: Tensor) -> Tensor:
            out = multiply_few(x, weight, num_out)
            return out if bias is None else out + bias
    else:

        def multiply(x: Tensor) -> Tensor:
            return torch.ops.folovllm.product(x, number, num_out)

    made.multiply = multiply  # type: ignore[method-assign]
    return made


class Compiler:
    """Compiles functions of tensors, each for certain shapes."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def pretend(self, tensor: Tensor, *dims: DimDynamic) -> Tensor:
        """An example of an argument: of its first dimensions some may have any length but 1, as ``dims`` says.

        STATIC: it has this length. DYNAMIC: any. DUCK: any, but always as many as all that were given the same length.
        """
        sizes = [*dims, *[DimDynamic.STATIC] * (tensor.dim() - len(dims))]
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self._mode.from_tensor(tensor, symbolic_context=context)

    def __call__(self, function: Function, examples: list[Tensor]) -> tuple[Function, list[Tensor]]:
        """The compiled function, and examples of what it returns."""
        from torch._inductor.cpu_vec_isa import pick_vec_isa  # see `CompiledSteps.unsupported`

        with _COMPILING:
            with self._mode:
                graph = make_fx(function, _allow_non_fake_inputs=True)(*examples)
                outputs = graph(*examples)
            # What is on disk is asked for by its options, not by the processor: loops for other vectors give rubbish.
            options = {**COMPILER_OPTIONS, "cpp.simdlen": pick_vec_isa().bit_width()}
            return torch._inductor.compile(graph, [*examples], options=options), list(outputs)


class StepKind(NamedTuple):
    """What one compiled step serves."""

    num_rows: int | None
    """Sequences of a step; None: any number above `FEW_ROWS`."""
    shares_keys: bool
    """Whether they begin with the same blocks, which are multiplied once for all."""


class CompiledStep:
    """A decode step of a model over a cache: how it begins, its layers, and how it ends.

    Args:
        decoder: the model.
        attention: over the cache.
        kind: the steps that it serves.
    """

    def __init__(self, decoder: Decoder, attention: GatherAttention, kind: StepKind) -> None:
        self.decoder, self.shares_keys, cache = decoder, kind.shares_keys, attention.kv_cache
        self.num_rows = kind.num_rows or TYPICAL_NUM_ROWS
        num_layers, _, num_kv_heads, num_blocks, self.block_size, head_dim = cache.shape
        starts = torch.arange(num_layers * 2 * num_kv_heads, device=cache.device) * num_blocks * self.block_size
        self.starts = starts.view(num_layers, 2, num_kv_heads).unbind()
        self.rows = cache.view(-1, head_dim)
        self.own = Parts.of(decoder, self.num_rows)
        self.layers = [Parts.of(layer, self.num_rows) for layer in decoder.layers]
        self._compile(DimDynamic.DUCK if kind.num_rows is None else DimDynamic.STATIC)

    def _compile(self, rows: DimDynamic) -> None:
        compiler, any_length = Compiler(), DimDynamic.DYNAMIC
        ids, positions, slots = (compiler.pretend(torch.zeros(self.num_rows, dtype=torch.int64), rows) for _ in "123")
        lens = compiler.pretend(torch.zeros(self.num_rows, dtype=torch.int32), rows)
        table = torch.zeros(self.num_rows, cdiv(TYPICAL_NUM_KEYS, self.block_size) + 1, dtype=torch.int32)
        places, shared = (compiler.pretend(torch.arange(TYPICAL_NUM_KEYS), any_length) for _ in "12")
        begins = [ids, positions, lens, compiler.pretend(table, rows, any_length), places, shared]
        own = list(map(compiler.pretend, self.own.tensors))
        self._run_begin, (x, *same) = compiler(self._begin, [*begins, *own])
        same += [compiler.pretend(self.rows, any_length), slots]
        compiled: dict[tuple[object, ...], Function] = {}
        for layer, starts, parts in zip(self.decoder.layers, self.starts, self.layers):
            if parts.kind not in compiled:
                run, arguments = functools.partial(self._layer, layer), map(compiler.pretend, [starts, *parts.tensors])
                compiled[parts.kind], _ = compiler(run, [x, *same, *arguments])
        self._run_layers = [compiled[parts.kind] for parts in self.layers]
        self._run_end, _ = compiler(self._end, [x, *own])

    def _begin(
        self, input_ids: Tensor, positions: Tensor, seq_lens: Tensor, block_table: Tensor,
        places: Tensor, shared_places: Tensor, *own: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        embedded = self._with_tensors(self.decoder, own).embed(input_ids, positions)
        own_slots = find_slots(block_table, places, self.block_size)
        shared_slots = find_slots(block_table[:1], shared_places, self.block_size).flatten()
        return *embedded, own_slots, mask_places(places, seq_lens), shared_slots

    def _layer(
        self, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, key_slots: Tensor, mask: Tensor,
        shared_slots: Tensor, rows: Tensor, slot_mapping: Tensor, starts: Tensor, *own: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        shared = shared_slots if self.shares_keys else None
        attend = TracedAttention(rows, starts, slot_mapping, key_slots, mask, shared)
        # For any number of rows torch cannot trace an addcmul that broadcasts.
        sin = sin.expand(-1, layer.num_heads + layer.num_kv_heads, -1)
        return (self._with_tensors(layer, own)(x, cos, sin, attend),)

    def _end(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        decoder = self._with_tensors(self.decoder, own)
        hidden = decoder.norm(x)
        logits = decoder.compute_logits(hidden)
        return hidden, logits, *find_likeliest(logits)

    def _with_tensors(self, owner: Owner, tensors: tuple[Tensor, ...]) -> Owner:
        given = iter(tensors)
        return replace_tensors(owner, lambda _: next(given), Parts(self.num_rows))

    def __call__(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, places: Tensor, num_shared: int
    ) -> StepOutputs:
        """Runs it.

        Args:
            input_ids: ``[num_rows]``.
            positions: ``[num_rows]``.
            metadata: of a decode step.
            places: 0, 1, … up to the last token of the longest sequence.
            num_shared: tokens that all sequences begin with, if the step is of that kind.
        """
        begins = [input_ids, positions, metadata.seq_lens, metadata.block_table]
        x, *same = self._run_begin(*begins, places[num_shared:], places[:num_shared], *self.own.tensors)
        same += [self.rows, metadata.slot_mapping]
        for run, starts, parts in zip(self._run_layers, self.starts, self.layers):
            _PRODUCTS.set(parts.products)
            (x,) = run(x, *same, starts, *parts.tensors)
        _PRODUCTS.set(self.own.products)
        outputs = StepOutputs(*self._run_end(x, *self.own.tensors))
        _PRODUCTS.set([])  # or the last model's head would be kept
        return outputs


class CompiledSteps:
    """Runs decode steps that are compiled for a CPU, when the first of its kind is needed.

    Args:
        decoder: the model, its head included.
        attention: over the cache that will be read; where it would need less memory, it serves instead.
        config: with ``max_model_len`` filled in.
    """

    num_reserved_blocks = 0
    """Blocks at the end of the cache that no sequence may have."""

    @classmethod
    def unsupported(cls, backend_cls: type[AttentionBackend]) -> str | None:
        """A sentence that says why steps cannot be compiled; None if they can."""
        if not issubclass(backend_cls, GatherAttention):
            return (
                "what is compiled on a CPU has an attention of its own, which reads what attention_backend='gather' "
                f"keeps, and the engine has {backend_cls.__name__}"
            )
        # Inductor changes os.environ and sys.path when it is imported, so it is when it is needed.
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "on a CPU steps are compiled by a C++ compiler, and there is none: install g++ (on macOS, clang++)"
        return None

    def __init__(self, decoder: Decoder, attention: GatherAttention, config: EngineConfig) -> None:
        self.decoder, self.attention = decoder, attention
        self.steps: dict[StepKind, CompiledStep] = {}
        """What is compiled so far."""
        self._key_bytes = attention.num_kv_heads * attention.kv_cache.shape[-1] * torch.float32.itemsize
        self._places = torch.arange(cast(int, config.scheduler_config.max_model_len))

    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether a step is a decode step, and its keys have room in memory."""
        keys = len(metadata.seq_lens_cpu) * metadata.max_seq_len * self._key_bytes
        return metadata.max_query_len == 1 and keys <= COMPILED_BYTES

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> StepOutputs:
        """A step with one new token for each sequence."""
        num_rows, lens, block_size = len(input_ids), metadata.seq_lens_cpu, self.attention.block_size
        num_shared = count_shared_blocks(metadata.block_table, int(lens.min()), block_size) * block_size
        kind = StepKind(num_rows if num_rows <= FEW_ROWS else None, num_shared > 0)
        if kind not in self.steps:
            self.steps[kind] = self._compile(kind)
        return self.steps[kind](input_ids, positions, metadata, self._places[: metadata.max_seq_len], num_shared)

    def _compile(self, kind: StepKind) -> CompiledStep:
        """Compiles a step; it takes seconds, and less when it is on disk already."""
        start = time.perf_counter()
        step = CompiledStep(self.decoder, self.attention, kind)
        what = f"{kind.num_rows or f'more than {FEW_ROWS}'}{' that share keys' if kind.shares_keys else ''}"
        logger.info("the decode step for a batch of %s was compiled in %.0f s", what, time.perf_counter() - start)
        return step
