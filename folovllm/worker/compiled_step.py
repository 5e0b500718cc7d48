"""Decode steps compiled for a CPU. Chapter 14.

A CPU launches nothing, but calling an operation from Python takes it some microseconds, and each operation reads its
numbers from memory and writes them back. torch's compiler, Inductor, writes C++ for what a layer does, and what stands
between two products becomes a loop or two. `folovllm.worker.traced` has what it is given for attention, and for
products of few rows. Other products stay what a kernel computes, one operation that the compiler does not look into
(`LinearBase.multiply`).

One layer is compiled, and serves all that are like it: its weights are arguments. So compiling takes seconds however
many layers there are, weights stay as they were packed, and what is compiled is kept on disk for all models of a shape.
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
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from folovllm.attention import AttentionBackend
from folovllm.attention.gather import GatherAttention
from folovllm.model.decoder import Decoder, DecoderLayer
from folovllm.model.layers import Linear, LinearBase, RMSNorm
from folovllm.sample.sampler import find_likeliest
from folovllm.worker.step_graph import Replay, StepInputs, StepOutputs
from folovllm.worker.traced import FEW_ROWS, TracedAttention, find_keys, multiply_few, weight_in_memory

logger = logging.getLogger(__name__)

TYPICAL_NUM_KEYS = 256
"""The length for which the compiler chooses how to split its loops; what it makes serves any other."""

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

    def pretend(self, *tensors: Tensor) -> list[Tensor]:
        """Examples of arguments of these shapes."""
        return [self._mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]

    def pretend_length(self, tensor: Tensor) -> Tensor:
        """An example of an argument ``[length]``, of any length but 1."""
        any_length: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        return self._mode.from_tensor(tensor, symbolic_context=any_length)

    def __call__(self, function: Function, examples: list[Tensor]) -> tuple[Function, list[Tensor]]:
        """The compiled function, and examples of what it returns."""
        with _COMPILING:
            with self._mode:
                graph = make_fx(function, _allow_non_fake_inputs=True)(*examples)
                outputs = graph(*examples)
            return torch._inductor.compile(graph, [*examples], options=COMPILER_OPTIONS), list(outputs)


class CompiledStep:
    """A decode step on certain inputs: how it begins, its layers, and how it ends.

    Args:
        decoder: the model.
        cache: as `AttentionBackend` lays it out.
        inputs: where each step finds its own.
    """

    def __init__(self, decoder: Decoder, cache: Tensor, inputs: StepInputs) -> None:
        self.decoder, self.num_rows, step = decoder, len(inputs.input_ids), inputs.metadata
        num_layers, _, num_kv_heads, num_blocks, self.block_size, head_dim = cache.shape
        starts = torch.arange(num_layers * 2 * num_kv_heads, device=cache.device) * num_blocks * self.block_size
        self.starts = starts.view(num_layers, 2, num_kv_heads).unbind()
        self.inputs = [inputs.input_ids, inputs.positions, step.seq_lens, step.block_table]
        self.slots = [cache.view(-1, head_dim), step.slot_mapping]
        self.own = Parts.of(decoder, self.num_rows)
        self.layers = [Parts.of(layer, self.num_rows) for layer in decoder.layers]
        self._compile(torch.arange(TYPICAL_NUM_KEYS, device=cache.device))

    def _compile(self, places: Tensor) -> None:
        compiler = Compiler()
        own, slots = compiler.pretend(*self.own.tensors), compiler.pretend(*self.slots)
        begins = [*compiler.pretend(*self.inputs), compiler.pretend_length(places)]
        self._run_begin, (x, *same) = compiler(self._begin, [*begins, *own])
        compiled: dict[tuple[object, ...], Function] = {}
        for layer, starts, parts in zip(self.decoder.layers, self.starts, self.layers):
            if parts.kind not in compiled:
                run, arguments = functools.partial(self._layer, layer), compiler.pretend(starts, *parts.tensors)
                compiled[parts.kind], _ = compiler(run, [x, *same, *slots, *arguments])
        self._run_layers = [compiled[parts.kind] for parts in self.layers]
        self._run_end, _ = compiler(self._end, [x, *own])

    def _begin(
        self, input_ids: Tensor, positions: Tensor, seq_lens: Tensor, block_table: Tensor, places: Tensor, *own: Tensor
    ) -> tuple[Tensor, ...]:
        embedded = self._with_tensors(self.decoder, own).embed(input_ids, positions)
        return *embedded, *find_keys(seq_lens, block_table, places, self.block_size)

    def _layer(
        self, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, key_slots: Tensor, mask: Tensor,
        rows: Tensor, slot_mapping: Tensor, starts: Tensor, *own: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        attend = TracedAttention(rows, starts, slot_mapping, key_slots, mask)
        return (self._with_tensors(layer, own)(x, cos, sin, attend),)

    def _end(self, x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        decoder = self._with_tensors(self.decoder, own)
        hidden = decoder.norm(x)
        logits = decoder.compute_logits(hidden)
        return hidden, logits, *find_likeliest(logits)

    def _with_tensors(self, owner: Owner, tensors: tuple[Tensor, ...]) -> Owner:
        given = iter(tensors)
        return replace_tensors(owner, lambda _: next(given), Parts(self.num_rows))

    def __call__(self, places: Tensor) -> StepOutputs:
        """Runs it on what its inputs hold now; ``places`` as in `find_keys`, at least two."""
        x, *same = self._run_begin(*self.inputs, places, *self.own.tensors)
        for run, starts, parts in zip(self._run_layers, self.starts, self.layers):
            _PRODUCTS.set(parts.products)
            (x,) = run(x, *same, *self.slots, starts, *parts.tensors)
        _PRODUCTS.set(self.own.products)
        outputs = StepOutputs(*self._run_end(x, *self.own.tensors))
        _PRODUCTS.set([])  # or the last model's head would be kept
        return outputs


class CompiledSteps:
    """Compiles decode steps for a CPU, each when it is first needed."""

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

    def __call__(self, decoder: Decoder, attention: AttentionBackend, inputs: StepInputs) -> Replay:
        """Compiles a step; it takes seconds, and less when it is on disk already."""
        start = time.perf_counter()
        run = CompiledStep(decoder, attention.kv_cache, inputs)
        took = time.perf_counter() - start
        logger.info("the decode step of %d rows was compiled in %.0f s", len(inputs.input_ids), took)
        places = torch.arange(inputs.max_model_len)
        single = places[:1].repeat(2)  # a dimension of 1 is a special case to a compiler; the second is masked

        def replay() -> StepOutputs:
            longest = inputs.metadata.max_seq_len
            return run(places[:longest] if longest > 1 else single)

        return replay
