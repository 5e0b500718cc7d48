"""Decode steps compiled into one function each, for a CPU. Chapter 14.

A CPU launches nothing, but calling an operation from Python takes it some microseconds, and each operation reads its
numbers from memory and writes them back. torch's compiler, Inductor, writes C++ for all of a step but its products:
whatever stands between two of them becomes a loop or two. What a kernel computes of a product stays one operation that
the compiler does not look into (`LinearBase.multiply`). So weights stay as they were packed, and are no part of what is
compiled and kept on disk.

Attention is written for the compiler here. It copies keys and values from their slots for all sequences at once, up to
the longest: that length alone may differ from step to step. Where `GatherAttention` knows better, since the copies
would not stay in the processor's cache or sequences share much, the step is left to it (`replays_well`).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from folovllm.attention import AttentionBackend
from folovllm.attention.gather import GatherAttention
from folovllm.model.decoder import Decoder
from folovllm.model.layers import LinearBase
from folovllm.sample.sampler import find_likeliest
from folovllm.worker.step_graph import Replay, StepInputs, StepOutputs

logger = logging.getLogger(__name__)

TYPICAL_NUM_KEYS = 256
"""The length for which the compiler chooses how to split its loops; what it makes serves any other."""

_PRODUCTS: ContextVar[list[LinearBase]] = ContextVar("products")
"""The products of the step that is running: compiled code knows them by number, so that it serves every such model."""
_library = torch.library.Library("folovllm", "FRAGMENT")
_library.define("product(Tensor x, int number, int num_out) -> Tensor")
_library.impl("product", lambda x, number, num_out: _PRODUCTS.get()[number].multiply(x), "CPU")
_library.impl("product", lambda x, number, num_out: x.new_empty(x.shape[0], num_out), "Meta")

Part = TypeVar("Part")


def hide_product(linear: LinearBase, products: list[LinearBase]) -> LinearBase:
    """A copy of a product whose kernel is one operation to a compiler; the product itself is put into a list."""
    number, made = len(products), copy.copy(linear)
    products.append(linear)
    multiply = torch.ops.folovllm.product
    made.multiply = lambda x: multiply(x, number, linear.num_out)  # type: ignore[method-assign]
    return made


def hide_products(part: Part, products: list[LinearBase]) -> Part:
    """A copy of a decoder or a layer, with the same weights, all products of which are hidden; see `hide_product`."""
    made = copy.copy(part)
    for name, value in vars(part).items():
        if isinstance(value, LinearBase):
            setattr(made, name, hide_product(value, products))
        elif isinstance(value, list):
            setattr(made, name, [hide_products(each, products) for each in value])
    return made


class TracedAttention:
    """Attention of a decode step in operations that a compiler can follow: `folovllm.model.decoder.Attend`.

    Args:
        shape: the cache's, as `AttentionBackend` lays it out.
        rows: the cache, one head of one slot after the other: ``[num_rows, head_dim]``.
        slot_mapping: as in `AttentionMetadata`, and so are the next two.
        seq_lens: of a step in which each sequence has one new token.
        block_table: its columns behind the longest sequence are not read.
        places: 0, 1, … up to the last token of the longest sequence, ``[num_keys]``.
    """

    def __init__(
        self,
        shape: torch.Size,
        rows: Tensor,
        slot_mapping: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        places: Tensor,
    ) -> None:
        num_layers, _, num_kv_heads, num_blocks, block_size, _ = shape
        self.rows, self.slot_mapping = rows, slot_mapping
        # Where the rows of each layer, of keys and of values, and of each head begin.
        starts = torch.arange(num_layers * 2 * num_kv_heads, device=rows.device) * num_blocks * block_size
        self.starts = starts.view(num_layers, 2, num_kv_heads)
        self.key_slots = block_table[:, places // block_size] * block_size + places % block_size
        is_unseen = torch.arange(places.shape[0], device=rows.device) >= seq_lens.unsqueeze(1)
        self.mask = torch.where(is_unseen, -math.inf, 0.0).view(len(seq_lens), 1, 1, -1)

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One layer's attention."""
        num_seqs, _, head_dim = q.shape
        starts = self.starts[layer]
        self.rows.index_put_((starts.flatten() + self.slot_mapping.unsqueeze(1),), kv)
        # [num_seqs, num_kv_heads, num_keys, head_dim]
        keys, values = (self.rows[start.unsqueeze(1) + self.key_slots.unsqueeze(1)] for start in starts)
        queries = q.reshape(num_seqs, starts.shape[1], -1, head_dim)
        if q.dtype is torch.float32:
            scores = queries @ keys.transpose(2, 3)
        else:  # a loop that reads the keys where they lie, instead of a copy of them in float32
            scores = (queries.float().unsqueeze(3) * keys.float().unsqueeze(2)).sum(dim=-1)
        scores = scores * head_dim**-0.5 + self.mask
        return (scores.softmax(dim=-1).to(q.dtype) @ values).reshape(num_seqs, -1)


def compile_step(decoder: Decoder, shape: torch.Size, arguments: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A decode step as one compiled function.

    Args:
        decoder: the model.
        shape: the cache's.
        arguments: examples of the function's: input ids, positions, and what `TracedAttention` takes after the shape.
            The function takes tensors of the same shapes, but for the last, which may have any length but 1.
    """
    products: list[LinearBase] = []
    decoder = hide_products(decoder, products)

    def step(input_ids: Tensor, positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        hidden = decoder(input_ids, positions, TracedAttention(shape, *tensors))
        logits = decoder.compute_logits(hidden)
        return hidden, logits, *find_likeliest(logits)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    examples = [mode.from_tensor(argument, static_shapes=True) for argument in arguments[:-1]]
    any_length: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    examples.append(mode.from_tensor(arguments[-1], symbolic_context=any_length))
    with mode:
        graph = make_fx(step, _allow_non_fake_inputs=True)(*examples)
    function = torch._inductor.compile(graph, [*examples])

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        _PRODUCTS.set(products)
        return function(*arguments)

    return run


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
        """Compiles a step; it takes seconds, or a minute for a large model, and less when it is on disk already."""
        start, step, cache = time.perf_counter(), inputs.metadata, attention.kv_cache
        places = torch.arange(inputs.max_model_len)
        tensors = [
            inputs.input_ids, inputs.positions, cache.view(-1, cache.shape[-1]),
            step.slot_mapping, step.seq_lens, step.block_table,
        ]  # fmt: skip
        function = compile_step(decoder, cache.shape, [*tensors, places[:TYPICAL_NUM_KEYS]])
        took = time.perf_counter() - start
        logger.info("the decode step of %d rows was compiled in %.0f s", len(inputs.input_ids), took)
        single = places[:1].repeat(2)  # a dimension of 1 is a special case to a compiler; the second is masked

        def replay() -> StepOutputs:
            longest = step.max_seq_len
            return StepOutputs(*function(*tensors, places[:longest] if longest > 1 else single))

        return replay
