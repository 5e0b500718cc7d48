"""Steps compiled for a CPU. Chapter 14.

A CPU launches nothing, but calling an operation from Python takes it some microseconds, and each operation reads its
numbers from memory and writes them back. torch's compiler, Inductor, writes C++ for what a layer does, and what stands
between two products becomes a loop or two. `folovllm.worker.traced` has what it is given for the attention of decode
steps, and for products of few rows. Other products and the attention of prompts stay what a kernel computes, one
operation that the compiler does not look into (`LinearBase.multiply`, `GatherAttention`).

One layer is compiled, and serves all that are like it: its weights are arguments. So compiling takes seconds however
many layers there are, weights stay as they were packed, and what is compiled is kept on disk for all models of a shape.
One loop also serves any number of rows and of keys, so that a batch needs no padding.
"""

from __future__ import annotations

import copy
import functools
import itertools
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
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.attention.gather import GatherAttention, count_shared_blocks
from folovllm.config import EngineConfig
from folovllm.model.checkpoint import one_line
from folovllm.model.decoder import Attend, Decoder, DecoderLayer
from folovllm.model.layers import LinearBase, RMSNorm
from folovllm.model.quantized_layers import Int8Linear
from folovllm.sample.sampler import find_likeliest
from folovllm.validation import shorten
from folovllm.worker.prepared_steps import PreparedSteps, StepOutputs
from folovllm.worker.traced import FEW_ROWS, TracedAttention, locate, multiply_few, normalize, rotate, weight_in_memory

logger = logging.getLogger(__name__)

TYPICAL_NUM_ROWS = 16
"""The rows of a step for which the compiler chooses how to split its loops; what it makes serves any other number."""
TYPICAL_NUM_KEYS = 256
"""The keys of a sequence, likewise."""
TYPICAL_NUM_CACHED = 2**16
"""The rows of a layer's keys in the cache, likewise. It is not their real number, since that is another at each start,
and what was compiled at the last one shall be found on disk."""

COMPILED_BYTES = 2**28
"""Most bytes of keys, counted as floats, that a compiled step reads (256 MiB), filled up to the longest sequence: 16 of
4,096 tokens of Qwen3-0.6B's shape. More has not been measured, and is left to `GatherAttention`."""

OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast", "size_asserts": False, "alignment_asserts": False}
"""What Inductor is told: to multiply and add in one instruction, which makes attention a tenth faster; and not to check
at each call the sizes, strides and addresses of what it is given and of what those operations return that it does not
look into, which makes a step of SmolLM2-135M two percent faster. Tests compare them."""

_COMPILING = threading.Lock()
"""Tracing changes what all threads see, and two engines may need a step at the same time."""


class Called(NamedTuple):
    """What compiled code calls without looking into it, and so serves every layer that is alike."""

    products: list[LinearBase]
    """Of the layer that is running; it knows them by number."""
    attend: Callable[[Tensor, Tensor], Tensor] | None = None
    """The layer's attention, if that is not compiled: of queries, and of new keys and values."""


_CALLED: ContextVar[Called] = ContextVar("called")
_library = torch.library.Library("folovllm", "FRAGMENT")
_library.define("multiply_by_number(Tensor x, int number, int num_out) -> Tensor")
_library.impl(
    "multiply_by_number",
    lambda x, _, num_out: x.new_empty(x.shape[0], num_out, dtype=x.dtype if x.is_floating_point() else torch.float32),
    "Meta",
)
# It writes the new keys and values as well, and does not say so: the compiler sees the cache nowhere else.
_library.define("attention(Tensor q, Tensor kv) -> Tensor")
_library.impl("attention", lambda q, kv: cast(Function, _CALLED.get().attend)(q, kv), "CPU")
_library.impl("attention", lambda q, kv: q.new_empty(q.shape[0], q.shape[1] * q.shape[2]), "Meta")

Owner = TypeVar("Owner", bound=Decoder | DecoderLayer | RMSNorm)
Made = TypeVar("Made")
Function = Callable[..., Any]
Compiled = Callable[[list[Tensor]], tuple[Tensor, ...]]
"""What a compiler makes: it is given a list, which it empties."""


@dataclass
class Parts:
    """What a decoder or a layer owns, itself or through its norms and products."""

    has_few_rows: bool
    """Whether it is compiled for no more rows than `FEW_ROWS`."""
    tensors: list[Tensor] = field(default_factory=list)
    """The arguments of compiled code, in the order in which `replace_tensors` comes upon them."""
    products: list[LinearBase] = field(default_factory=list)
    """Its products: compiled code calls them by number, or reads the memory of their weights."""

    def take(self, tensor: Tensor) -> Tensor:
        """Adds a tensor."""
        self.tensors.append(tensor)
        return tensor

    @classmethod
    def of(cls, owner: Decoder | DecoderLayer, has_few_rows: bool) -> Parts:
        """Those of a decoder, without its layers, or of a layer."""
        parts = cls(has_few_rows)
        replace_tensors(owner, parts.take, parts)
        return parts

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for all that one compiled function serves."""
        shapes = ((tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.tensors)
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
    """A copy of a product as a compiler shall see it: its kernel is one operation, or sums (`multiply_few`)."""
    number, num_out, made = len(parts.products), linear.num_out, copy.copy(linear)
    parts.products.append(linear)
    bias = made.bias = None if linear.bias is None else replace(linear.bias)
    found = weight_in_memory(linear) if parts.has_few_rows else None
    if found is None:
        made.multiply = lambda x: torch.ops.folovllm.multiply_by_number(x, number, num_out)  # type: ignore[method-assign]
        if isinstance(made, Int8Linear):
            made.normalize = functools.partial(normalize, to_bytes=made.takes_bytes)  # type: ignore[method-assign]
        return made
    weight = replace(found)
    if isinstance(made, Int8Linear):
        # Floats need not be divided by their largest number; what is to be multiplied later is the weight's scales.
        scales = replace(made.scales)
        made.normalize = lambda x: (rotate(x), scales)  # type: ignore[method-assign]
        bias = None  # which it adds by itself

    def multiply(x: Tensor) -> Tensor:
        out = multiply_few(x, weight, num_out)
        return out if bias is None else out + bias

    made.multiply = multiply  # type: ignore[method-assign]
    return made


def multiply_by_number(x: Tensor, number: int, num_out: int) -> Tensor:
    """The product of this number of the layer that is running; only a compiler asks how many outputs it has."""
    return _CALLED.get().products[number].multiply(x)


_library.impl("multiply_by_number", multiply_by_number, "CPU")


@functools.cache
def call_products_directly() -> None:
    """Has compiled code call `multiply_by_number` itself, not an operation that calls it; `_COMPILING` must be held.

    Through torch's dispatcher a call takes 5 us more, and 10 or 15 after a weight has been read, when nothing of
    Python is left in the processor's cache: 3 to 5 percent of a step of SmolLM2-135M, which has 121 products.

    What is on disk is asked for by the operation's name and not by what is done here, so that whoever changes this must
    give it another name.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.select_algorithm import extern_kernels

    names: Any = extern_kernels  # which the code that Inductor writes imports
    names.multiply_by_number = multiply_by_number
    call_operation = fallback_handler(torch.ops.folovllm.multiply_by_number.default, add_to_fallback_set=False)

    @register_lowering(torch.ops.folovllm.multiply_by_number.default, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        made = call_operation(*args)
        for node in made.data.data.inputs:
            if isinstance(node, ir.FallbackKernel):
                node.python_kernel_name = "extern_kernels.multiply_by_number"
        return made


class Compiler:
    """Compiles functions of tensors, for the dtypes and, where it is not told otherwise, the shapes of examples."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def pretend(self, tensor: Tensor, *dims: DimDynamic) -> Tensor:
        """An example of an argument, at least 2 long where its length may be another.

        Args:
            tensor: has its shape and dtype.
            dims: of its first dimensions. STATIC: it has this length. DYNAMIC: any. DUCK: any, but the same as all
                with which it shares its length here. The compiler takes it for at least 2; the loops made here run for
                1 as well.
        """
        sizes = [*dims, *[DimDynamic.STATIC] * (tensor.dim() - len(dims))]
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self._mode.from_tensor(tensor, symbolic_context=context)

    def __call__(self, function: Function, examples: list[Tensor]) -> tuple[Compiled, list[Tensor]]:
        """The compiled function, and examples of what it returns."""
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner
        from torch._inductor.cpu_vec_isa import pick_vec_isa  # see `CompiledSteps.unsupported`

        found: list[tuple[Compiled, list[Tensor]]] = []

        def compile_inner(graph: Any, *args: Any, **kwargs: Any) -> Any:
            (returned,) = graph.graph.output_node().args
            code: Any = compile_fx_inner(graph, *args, **kwargs)
            found.append((code.current_callable, [node.meta["val"] for node in returned]))
            return code

        module = torch.nn.Module()
        module.forward = function
        with _COMPILING:
            call_products_directly()
            # Nobody checks what the compiler takes for granted of lengths. Of attention it is one thing: that no more
            # than 4,096 keys are summed up, since it would sum up more in pieces. The sums of 5,000 are as exact.
            # What is on disk is asked for by its options, not by the processor: loops for other vectors give rubbish.
            # Told to use as many threads as there are processors, loops would have room for their sums and run with as
            # many as torch has later: with more they would write beyond it.
            options = {**OPTIONS, "cpp.simdlen": pick_vec_isa().bit_width(), "cpp.threads": torch.get_num_threads()}
            # Around what Inductor writes torch puts a function of its own, which minds gradients, autocast and aliases.
            # There are none here (`ModelRunner.run` sees to the first two), and it takes 17 us a call, and more after a
            # weight has been read. So what is inside is called.
            compile_fx(module, [*examples], inner_compile=compile_inner, config_patches=options)  # type: ignore[arg-type]
        (made,) = found
        return made


class CompiledPass:
    """A model's way from tokens through its layers, compiled: what passes of all kinds have in common.

    Args:
        decoder: the model.
        num_rows: how many tokens it has, `FEW_ROWS` at most; None: any number.
    """

    def __init__(self, decoder: Decoder, num_rows: int | None) -> None:
        self.decoder, self.num_rows = decoder, num_rows or TYPICAL_NUM_ROWS
        self.own = Parts.of(decoder, has_few_rows=num_rows is not None)
        self.layers = [Parts.of(layer, has_few_rows=num_rows is not None) for layer in decoder.layers]
        self.per_layer: list[list[Tensor]] = [[] for _ in decoder.layers]
        """What the attention of each layer is given beside what is the same for all."""
        self._row_dim = DimDynamic.DUCK if num_rows is None else DimDynamic.STATIC

    def _pretend_rows(self, compiler: Compiler, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """An example of what there is for each row, with any numbers of ``shape`` for it."""
        tensor = torch.zeros(self.num_rows, *shape, dtype=dtype, device="cpu")
        return compiler.pretend(tensor, self._row_dim, *[DimDynamic.DYNAMIC] * len(shape))

    def _compile(
        self,
        compiler: Compiler,
        begin: Function,
        begins: list[Tensor],
        make_attend: Callable[..., Attend],
        lasts: list[Tensor],
    ) -> Tensor:
        """Compiles the beginning and each kind of layer; returns an example of what the last of them gives.

        Args:
            compiler: of this pass.
            begin: gives what a layer is given but for its attention, ``x, cos, sin``, and what ``make_attend`` is given
                first. Its arguments are a decoder and ``begins``.
            begins: examples.
            make_attend: gives a layer's attention.
            lasts: examples of what that is given last, which differs from layer to layer.
        """
        run = self._with_own_first(self.decoder, self.own, begin)
        self._run_begin, (x, *same) = compiler(run, [*map(compiler.pretend, self.own.tensors), *begins])

        def run_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, *given: Tensor) -> tuple[Tensor]:
            # For any number of rows torch cannot trace an addcmul that broadcasts.
            sin = sin.expand(-1, layer.num_heads + layer.num_kv_heads, -1)
            return (layer(x, cos, sin, make_attend(*given)),)

        compiled: dict[tuple[object, ...], Compiled] = {}
        for layer, parts in zip(self.decoder.layers, self.layers):
            if parts.kind not in compiled:
                run, own = self._with_own_first(layer, parts, run_layer), map(compiler.pretend, parts.tensors)
                compiled[parts.kind], _ = compiler(run, [*own, x, *same, *lasts])
        self._run_layers = [compiled[parts.kind] for parts in self.layers]
        return x

    @staticmethod
    def _with_own_first(owner: Decoder | DecoderLayer, parts: Parts, function: Function) -> Function:
        """A function of an owner and others as one of its tensors and others."""
        num_own = len(parts.tensors)

        def run(*tensors: Tensor) -> Any:
            own = iter(tensors[:num_own])
            made = replace_tensors(owner, lambda _: next(own), Parts(parts.has_few_rows))
            return function(made, *tensors[num_own:])

        return run

    def _run(
        self, begins: list[Tensor], end: Function, attend: Attend | None = None, num_layers: int | None = None
    ) -> Any:
        """What ``end`` makes of what the layers give.

        Args:
            begins: those of `_compile`.
            end: called while compiled code may call the decoder's own products, with what a further layer would be
                given.
            attend: attention, if that is not compiled.
            num_layers: of the first ones, if not all are run.
        """
        before = _CALLED.set(Called(self.own.products))
        try:
            x, *same = self._run_begin([*self.own.tensors, *begins])
            layers = zip(self._run_layers, self.decoder.layers, self.layers, self.per_layer)
            for run, layer, parts, last in itertools.islice(layers, num_layers):
                _CALLED.set(Called(parts.products, attend and functools.partial(attend, layer.index)))
                (x,) = run([*parts.tensors, x, *same, *last])
            _CALLED.set(Called(self.own.products))
            return end(x, *same)
        finally:
            _CALLED.reset(before)  # or a model and its cache would be kept


class CompiledDecoder(CompiledPass):
    """The pass of any step, as `Decoder` has it, but for attention, which stays the backend's."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder, None)
        compiler = Compiler()
        begins = [self._pretend_rows(compiler), self._pretend_rows(compiler)]
        self._compile(compiler, Decoder.embed, begins, lambda: _call_attention, [])

    def __call__(self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """The last hidden state of every token, or of some: `Decoder.__call__`."""
        begins = [input_ids, positions]
        if rows is None:
            return self._run(begins, lambda x, *_: self.decoder.norm(x), attend)
        end = functools.partial(self.decoder.finish, attend=attend, rows=rows)
        return self._run(begins, end, attend, num_layers=len(self.layers) - 1)


def _call_attention(layer: int, q: Tensor, kv: Tensor) -> Tensor:
    return torch.ops.folovllm.attention(q, kv)


class StepKind(NamedTuple):
    """What one compiled decode step serves."""

    num_rows: int | None
    """Sequences of a step; None: any number above `FEW_ROWS`."""
    shares_keys: bool
    """Whether they begin with the same blocks, which are multiplied once for all."""

    def __str__(self) -> str:
        return f"{self.num_rows or f'more than {FEW_ROWS}'}{' that share keys' if self.shares_keys else ''}"


class CompiledStep(CompiledPass):
    """A decode step over a cache, its attention and its head included.

    Args:
        decoder: the model.
        attention: over the cache.
        kind: the steps that it serves.
    """

    def __init__(self, decoder: Decoder, attention: GatherAttention, kind: StepKind) -> None:
        super().__init__(decoder, kind.num_rows)
        cache, any_length = attention.kv_cache, DimDynamic.DYNAMIC
        num_kv_heads, num_blocks, self.block_size = cache.shape[2:5]
        self.per_layer = [list(layer.view(2, -1, cache.shape[-1])) for layer in cache]
        self.head_starts = torch.arange(num_kv_heads, device=cache.device) * num_blocks * self.block_size
        compiler = Compiler()
        head_starts = compiler.pretend(self.head_starts)
        ids, positions, slots = (self._pretend_rows(compiler) for _ in range(3))
        lens = self._pretend_rows(compiler, dtype=torch.int32)
        table = self._pretend_rows(compiler, max(TYPICAL_NUM_KEYS // self.block_size, 2), dtype=torch.int32)
        places = [
            compiler.pretend(torch.arange(TYPICAL_NUM_KEYS, device="cpu"), any_length)
            for _ in range(1 + kind.shares_keys)
        ]
        keys, values = (cache.new_zeros(TYPICAL_NUM_CACHED, cache.shape[-1]) for _ in range(2))
        lasts = [compiler.pretend(keys, any_length), compiler.pretend(values, any_length)]
        begins = [ids, positions, slots, lens, table, head_starts, *places]
        x = self._compile(compiler, self._begin, begins, self._make_attend, lasts)
        run = self._with_own_first(decoder, self.own, self._end)
        self._run_end, _ = compiler(run, [*map(compiler.pretend, self.own.tensors), x])

    def _begin(
        self, decoder: Decoder, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor, seq_lens: Tensor,
        block_table: Tensor, head_starts: Tensor, *places: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found = locate(slot_mapping, seq_lens, block_table, head_starts, self.block_size, *places)
        return *decoder.embed(input_ids, positions), *found

    @staticmethod
    def _make_attend(*given: Tensor) -> Attend:
        *found, keys, values = given
        return TracedAttention(keys, values, *found)

    @staticmethod
    def _end(decoder: Decoder, x: Tensor) -> tuple[Tensor, ...]:
        hidden = decoder.norm(x)
        logits = decoder.compute_logits(hidden)
        return hidden, logits, *find_likeliest(logits)

    def __call__(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, places: list[Tensor]
    ) -> StepOutputs:
        """Runs it.

        Args:
            input_ids: ``[num_rows]``.
            positions: ``[num_rows]``.
            metadata: of a decode step.
            places: 0, 1, … up to the last token of the longest sequence, without those that all share, which come next.
        """
        slots, lens, table = metadata.slot_mapping, metadata.seq_lens, metadata.block_table
        begins = [input_ids, positions, slots, lens, table, self.head_starts, *places]
        return StepOutputs(*self._run(begins, lambda x, *_: self._run_end([*self.own.tensors, x])))


class CompiledSteps(PreparedSteps):
    """Runs steps that are compiled for a CPU, each kind when it is first needed.

    Args:
        decoder: the model, its head included.
        attention: over the cache. It computes the attention of prompts, and of decode steps with very many keys.
        config: with ``max_model_len`` filled in.
    """

    how = "compiled"

    @classmethod
    def unsupported(cls, backend_cls: type[AttentionBackend]) -> str | None:
        """A sentence that says why steps cannot be compiled; None if they can."""
        if backend_cls is not GatherAttention:  # what a subclass does otherwise would not be asked for
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

    def __init__(self, decoder: Decoder, attention: AttentionBackend, config: EngineConfig) -> None:
        self._eager, self.attention = decoder, cast(GatherAttention, attention)
        self.steps: dict[StepKind, CompiledStep | None] = {}
        """The decode steps that are compiled so far; None: the compiler failed."""
        self._key_bytes = attention.num_kv_heads * attention.kv_cache.shape[-1] * torch.float32.itemsize
        self._places = torch.arange(cast(int, config.scheduler_config.max_model_len), device="cpu")

    @functools.cached_property
    def decoder(self) -> CompiledDecoder | Decoder:  # type: ignore[override]
        """Computes all steps that `run` does not."""
        made = compile_or_warn("the pass of steps with prompts", functools.partial(CompiledDecoder, self._eager))
        return made or self._eager

    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether a step is a decode step, and its keys are not too many."""
        if metadata.max_query_len > 1:
            return False
        return self._are_few(metadata, 0) or self._are_few(metadata, self._count_shared(metadata))

    def _are_few(self, metadata: AttentionMetadata, num_shared: int) -> bool:
        num_keys = len(metadata.seq_lens_cpu) * (metadata.max_seq_len - num_shared) + num_shared
        return num_keys * self._key_bytes <= COMPILED_BYTES

    def _count_shared(self, metadata: AttentionMetadata) -> int:
        """Tokens that all sequences begin with, if they are worth a product of their own."""
        block_size = self.attention.block_size
        return count_shared_blocks(metadata.block_table, int(metadata.seq_lens_cpu.min()), block_size) * block_size

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> StepOutputs:
        """A step with one new token for each sequence."""
        num_rows, num_shared = len(input_ids), self._count_shared(metadata)
        kind = StepKind(num_rows if num_rows <= FEW_ROWS else None, num_shared > 0)
        if kind not in self.steps:
            make = functools.partial(CompiledStep, self._eager, self.attention, kind)
            self.steps[kind] = compile_or_warn(f"the decode step for a batch of {kind}", make)
        if (step := self.steps[kind]) is None:
            self.attention.begin(metadata)
            hidden = self._eager(input_ids, positions, self.attention)
            logits = self._eager.compute_logits(hidden)
            return StepOutputs(hidden, logits, *find_likeliest(logits))
        shared, own = self._places[: metadata.max_seq_len].tensor_split([num_shared])
        return step(input_ids, positions, metadata, [own, shared] if kind.shares_keys else [own])


def compile_or_warn(what: str, make: Callable[[], Made]) -> Made | None:
    """What is compiled; None if that fails, since requests are running that eager steps can serve.

    It takes seconds, and less when it is on disk already, and how long is logged.
    """
    start = time.perf_counter()
    try:
        made = make()
    except Exception as error:  # of the compiler, of the C++ compiler that it calls, or of the disk
        logger.warning(
            "%s is eager from now on, since it could not be compiled; start again, or set enforce_eager=True (%s)",
            what,
            shorten(one_line(error)),
        )
        return None
    logger.info("%s was compiled in %.0f s", what, time.perf_counter() - start)
    return made
