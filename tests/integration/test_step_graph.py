"""Recorded decode steps, replayed without a GPU: the same tokens, padding that leaves no trace, buffers that stay."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import logging
import math
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from attention_helpers import ROUNDING, make_step
from graph_helpers import patch_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folovllm import LLMEngine, ModelConfig, SamplingParams
from folovllm.attention import BACKENDS, AttentionMetadata
from folovllm.attention.flash import FlashAttention
from folovllm.attention.gather import GatherAttention
from folovllm.attention.sdpa import SdpaAttention
from folovllm.book import judges
from folovllm.book.counting import OperationCounter
from folovllm.book.exercises.verdict import NotYet
from folovllm.llm import make_engine_config
from folovllm.model.layers import Linear, LinearMethod
from folovllm.model.quantized_layers import Int8Linear
from folovllm.sample.sampler import find_likeliest
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils import cdiv
from folovllm.worker import model_runner
from folovllm.worker.compiled_step import _PRODUCTS, CompiledSteps, Compiler, Parts, hide_product
from folovllm.worker.recorders import choose_recorder
from folovllm.worker.step_graph import (
    CudaGraphs,
    StepGraphs,
    StepOutputs,
    bucket_sizes,
    replay_eagerly,
)
from folovllm.worker.traced import (
    FEW_ROWS,
    PACKED_OUTPUTS,
    TracedAttention,
    find_keys,
    multiply_few,
    weight_in_memory,
)

MAX_MODEL_LEN, MAX_TOKENS, NUM_PROMPTS = 64, 12, 8
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True, "seed": 5}
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}  # steps with guesses run eagerly


class PretendedGraph(TorchDispatchMode):
    """A CUDA graph without CUDA: what is called while it is captured is called again, on the same memory.

    As there, nothing that Python has decided on the way is decided again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> str:
        return "a pool"


@contextlib.contextmanager
def pretended_graphs():
    """CUDA graphs that run on a CPU; yields the pools that they are captured with."""
    pools = []

    def capture(graph, pool, stream):
        pools.append(pool)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch_graphs(patch, PretendedGraph, capture)
        patch.setitem(BACKENDS, "sdpa", f"{__name__}.DeviceAttention")
        yield pools


class DeviceAttention(SdpaAttention):
    """Reads all that differs between decode steps from the device, so that it can be recorded."""

    capturable = True

    def __call__(self, layer, q, kv):
        step = self.metadata
        if step.max_query_len > 1:
            return super().__call__(layer, q, kv)
        self.write(layer, kv, step.slot_mapping)
        blocks = step.block_table[
            :, : cdiv(step.max_seq_len, self.block_size)
        ]  # planned by Python, as a kernel's grid is
        keys, values = self.kv_cache[layer][:, :, blocks].flatten(3, 4).transpose(1, 2)
        seen = torch.arange(keys.shape[2]) < step.seq_lens.unsqueeze(1)
        found = scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )
        return found.flatten(1)


def make_engine(recorder=replay_eagerly, **kwargs) -> LLMEngine:
    """An engine that records decode steps on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "choose_recorder", lambda is_eager, *_: None if is_eager else lambda: recorder)
        config = make_engine_config(
            str(EMBEDDED_MODEL), **{"max_model_len": MAX_MODEL_LEN, "enforce_eager": False, **kwargs}
        )
        return LLMEngine(config, "cpu")


def prompts() -> list[list[int]]:
    """Some begin alike, at lengths around blocks."""
    rng = random.Random(0)
    common = [rng.randrange(2, 1000) for _ in range(MAX_MODEL_LEN)]
    lens = (1, 2, 16, 17, 31, 33, 40, 48)[:NUM_PROMPTS]
    return [(common if i % 2 else [rng.randrange(2, 1000) for _ in range(n)])[:n] for i, n in enumerate(lens)]


@pytest.fixture(scope="module")
def tokens():
    """What an eager engine gives to each prompt alone, greedy and seeded, three answers each."""
    engine = LLMEngine(make_engine_config(str(EMBEDDED_MODEL), max_model_len=MAX_MODEL_LEN), "cpu")
    found = {}
    for kind, params in (("greedy", GREEDY), ("seeded", SEEDED)):
        for i, prompt in enumerate(prompts()):
            asked = [judges.Arrival("only", prompt, SamplingParams(**params, max_tokens=MAX_TOKENS, n=3))]
            answers = judges.drive(engine, asked)["only"].outputs
            found[kind, i] = [answer.token_ids for answer in answers]
    return found


@st.composite
def arrivals(draw):
    """Up to eight requests; a name is the kind of sampling, the prompt's number, and the request's."""
    made = []
    for i in range(draw(st.integers(1, 8))):
        kind, prompt = draw(st.sampled_from(["greedy", "seeded"])), draw(st.integers(0, NUM_PROMPTS - 1))
        params = SamplingParams(
            **(GREEDY if kind == "greedy" else SEEDED),
            max_tokens=draw(st.integers(1, MAX_TOKENS)),
            n=draw(st.integers(1, 3)),
        )
        abort_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 10)))
        name = f"{kind} {prompt} {i}"
        made.append(judges.Arrival(name, prompts()[prompt], params, draw(st.integers(0, 10)), 0, None, abort_after))
    return sorted(made, key=lambda a: a.step)


@st.composite
def engine_settings(draw):
    block_size = draw(st.sampled_from([1, 3, 16, 256]))
    fits_one, chunked = cdiv(MAX_MODEL_LEN, block_size), draw(st.booleans())
    return {
        "block_size": block_size,
        "num_blocks": fits_one + draw(st.integers(0, 2 * fits_one)),
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": draw(st.integers(1, 80) if chunked else st.integers(MAX_MODEL_LEN, 200)),
        "enable_prefix_caching": draw(st.booleans()),
        "max_num_seqs": draw(st.integers(1, 9)),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap"])),
        "swap_space": draw(st.sampled_from([0.0, 1e-4, 0.01])),
        "speculative_config": draw(st.sampled_from([None, LOOKUP])),
    }


def check(engine, arrivals, tokens) -> None:
    def expected(a, index):
        kind, prompt, _ = a.name.split()
        return tokens[kind, int(prompt)][index]

    judges.Watch(engine)
    judges.check_outputs(arrivals, judges.drive(engine, arrivals, max_steps=20_000), expected)


class TestTokens:
    @settings(max_examples=40)
    @given(kwargs=engine_settings(), arrivals=arrivals())
    def test_the_same_whatever_the_settings(self, tokens, kwargs, arrivals):
        check(make_engine(**kwargs), arrivals, tokens)

    @settings(max_examples=10)
    @given(kwargs=engine_settings(), arrivals=arrivals())
    def test_the_same_from_pretended_cuda_graphs(self, tokens, kwargs, arrivals):
        with pretended_graphs() as pools:
            engine = make_engine(CudaGraphs(), attention_backend="sdpa", **kwargs)
            check(engine, arrivals, tokens)
        assert pools[:1] in ([], [None]) and set(pools[1:]) <= {"a pool"}  # all share the first one's

    def test_the_pretended_graph_notices_what_is_planned_on_the_cpu(self, tokens):
        params = SamplingParams(**GREEDY, max_tokens=MAX_TOKENS)
        asked = [judges.Arrival("greedy 3 0", prompts()[3], params)]
        with pretended_graphs(), pytest.raises(NotYet, match="other tokens"):
            BACKENDS["sdpa"] = "folovllm.attention.sdpa.SdpaAttention"
            check(make_engine(CudaGraphs(), attention_backend="sdpa"), asked, tokens)

    def test_prompt_logprobs_of_single_tokens(self):
        """With one token a step, the steps of a prompt look like decode steps."""
        params = SamplingParams(**GREEDY, max_tokens=3, prompt_logprobs=0, logprobs=1)
        found = []
        for eager in (True, False):
            engine = make_engine(enforce_eager=eager, enable_chunked_prefill=True, max_num_batched_tokens=1)
            engine.add_request("only", prompts()[2], params)
            while engine.has_unfinished_requests():
                (output,) = engine.step() or [None]
            logprobs = output.prompt_logprobs[1:] + output.outputs[0].logprobs
            found.append([entry.logprob for each in logprobs for entry in each.values()])
        assert found[0] == pytest.approx(found[1], abs=1e-4)
        assert len(engine.runner.step_graphs.replays) == 1


class Batches:
    """Random decode steps over a cache of its own, beside what a decoder gives for each without buckets."""

    def __init__(self, recorder=replay_eagerly, num_layers: int = 4, tolerance: float = 1e-4, **settings) -> None:
        block_size, self.tolerance = 4, tolerance
        engine = make_engine(block_size=block_size, num_blocks=16, **{"max_num_seqs": 7, **settings})
        engine.decoder.layers = engine.decoder.layers[:num_layers]
        self.decoder, self.num_blocks, self.block_size = engine.decoder, 16, block_size
        self.cache = engine.runner.kv_cache
        self.cache.copy_(torch.randn(self.cache.shape, generator=torch.Generator().manual_seed(0)))
        self.plain = GatherAttention(self.cache.clone())
        self.graphs = StepGraphs(self.decoder, GatherAttention(self.cache), engine.config, self.num_blocks, recorder)

    def make(self, lens: list[int], seed: int = 0):
        """A step of sequences of these lengths, each with blocks of its own."""
        rng = np.random.default_rng(seed)
        widths, order = [cdiv(n, self.block_size) for n in lens], rng.permutation(self.num_blocks)
        ends = np.cumsum(widths)
        tables = [[*order[e - w : e], *[order[e - 1]] * (max(widths) - w)] for w, e in zip(widths, ends)]
        last = np.array(lens) - 1
        slots = [table[n // self.block_size] * self.block_size + n % self.block_size for table, n in zip(tables, last)]
        metadata = AttentionMetadata.from_arrays(
            np.arange(len(lens) + 1), np.array(lens), np.array(slots), np.array(tables)
        )
        return torch.from_numpy(rng.integers(0, 1000, len(lens))), torch.from_numpy(last), metadata

    def check(self, lens: list[int], seed: int = 0) -> None:
        """The outputs are right, and nothing changes in the cache but the new slots and the reserved block."""
        ids, positions, metadata = self.make(lens, seed)
        self.plain.begin(metadata)
        expected = self.decoder(ids, positions, self.plain)
        before = self.cache.clone()
        hidden, logits, token_ids, largest = self.graphs.run(ids, positions, metadata)
        near, logits_near = ({"atol": atol, "rtol": self.tolerance} for atol in (self.tolerance, 10 * self.tolerance))
        torch.testing.assert_close(hidden, expected, **near)
        torch.testing.assert_close(logits, self.decoder.compute_logits(expected), **logits_near)
        assert torch.equal(token_ids, logits.argmax(dim=-1)) and torch.equal(largest, logits.amax(dim=-1))
        changed = (self.cache != before).flatten(3, 4).any(dim=-1).flatten(0, 2).any(dim=0).nonzero().flatten().tolist()
        reserved_slot = self.num_blocks * self.block_size
        assert {*changed} <= {*metadata.slot_mapping.tolist(), reserved_slot}
        torch.testing.assert_close(self.cache[:, :, :, :-1], self.plain.kv_cache[:, :, :, :-1], **near)


class TestTakes:
    """Which steps are replayed."""

    def test_decode_steps(self):
        work = Batches()
        assert work.graphs.takes(work.make([5, 9, 1])[2])

    def test_no_prompts(self):
        metadata = AttentionMetadata.from_arrays(*map(np.array, ([0, 2, 3], [2, 5], [0, 1, 4], [[0, 0], [1, 2]])))
        assert not Batches().graphs.takes(metadata)

    @pytest.mark.parametrize("num_rows, is_taken", [(4, True), (5, False)])  # which are filled up to 4 and 7
    def test_no_more_keys_than_there_is_memory_for(self, num_rows, is_taken, monkeypatch):
        work = Batches()
        longest, key_bytes = 8, work.cache.shape[2] * work.cache.shape[-1] * 4
        monkeypatch.setattr("folovllm.attention.gather.COMPILED_BYTES", 4 * longest * key_bytes)
        assert work.graphs.takes(work.make([longest] * num_rows)[2]) is is_taken


class TestPadding:
    @settings(max_examples=30)
    @given(batches=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=7), min_size=1, max_size=5))
    def test_it_leaves_no_trace(self, batches):
        work = Batches()
        for seed, lens in enumerate(batches):
            work.check(lens, seed)

    def test_it_writes_to_the_reserved_block_and_nowhere_else(self):
        work = Batches()
        reserved = work.cache[:, :, :, -1]
        before = reserved.clone()
        work.check([5, 6, 7])
        assert (reserved != before).flatten(0, 2).any(dim=2).any(dim=0).tolist() == [True, False, False, False]
        before = reserved.clone()
        work.check([5, 6, 7, 8], seed=1)  # a full bucket has no padding
        assert torch.equal(reserved, before)

    def test_the_scheduler_does_not_know_of_the_reserved_block(self):
        engine = make_engine(num_blocks=5)
        assert engine.cache.pool.num_blocks == 5 and engine.runner.kv_cache.shape[3] == 6
        assert make_engine(num_blocks=5, enforce_eager=True).runner.kv_cache.shape[3] == 5

    def test_a_recording_sees_nothing_but_padding(self):
        seen = []

        def recorder(decoder, attention, inputs):
            step = inputs.metadata
            seen.append((inputs.input_ids.tolist(), step.seq_lens.tolist(), step.slot_mapping.unique().tolist()))
            assert step.block_table.unique().tolist() == [work.num_blocks]
            assert step.seq_lens_cpu.tolist() == step.seq_lens.tolist() and inputs.max_model_len == MAX_MODEL_LEN
            return replay_eagerly(decoder, attention, inputs)

        work = Batches(recorder)
        for lens in ([3, 4, 5, 6, 7], [8, 8], [1]):
            work.check(lens)
        reserved_slot = work.num_blocks * work.block_size
        assert seen == [([0] * size, [1] * size, [reserved_slot]) for size in (7, 2, 1)]


def hide(linear):
    """A product as a compiler sees it where it has many rows."""
    return hide_product(linear, lambda tensor: tensor, Parts(FEW_ROWS + 1))


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16", "quantization": "int8"}])
def test_a_compiler_is_told_what_comes_out_of_a_product(settings) -> None:
    """A head of 8 bits gives float32 logits whatever it is given; taken for bfloat16, they would be other numbers."""
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=4, **settings)
    decoder = LLMEngine(config, "cpu").decoder
    for linear in (decoder.layers[0].qkv_proj, decoder.head):
        x = torch.zeros(2, decoder.config.hidden_size, dtype=decoder.dtype)
        told, given = hide(linear)(x.to("meta")), linear(x)
        assert (told.dtype, told.shape) == (given.dtype, given.shape)


@pytest.fixture
def _path_is_given_back(monkeypatch):
    """torch's compiler puts folders of its own on it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("_path_is_given_back")
@pytest.mark.parametrize(
    "num_rows, dtype, tolerance", [(2, "float32", 1e-4), (3, "float32", 1e-4), (2, "bfloat16", 0.1)]
)
def test_a_compiled_step(num_rows, dtype, tolerance, caplog) -> None:
    """Of two layers, which are compiled once; any length, whatever was written behind it, and full blocks."""
    if (why_not := CompiledSteps.unsupported(GatherAttention)) is not None:
        pytest.skip(why_not)
    work = Batches(CompiledSteps(), 2, tolerance, dtype=dtype, max_num_seqs=num_rows)
    padding = [1] * (num_rows - 2)
    with caplog.at_level(logging.INFO, "folovllm"):
        for seed, lens in enumerate([[5, 9], [1, 1], [2, 1], [16, 3], [4, 4], [1, 1], [30, 20]]):
            work.check(lens + padding, seed)
    with OperationCounter() as counter:
        work.graphs.run(*work.make([7, 30, *padding]))
    operations = Counter(operation.name for operation in counter.operations)
    assert operations["product"] == (0 if num_rows <= FEW_ROWS else 9) and not operations["_softmax"]
    said = [record.message for record in caplog.records if record.name.startswith("folovllm")]
    assert len(said) == 1 and said[0].startswith(f"the decode step of {num_rows} rows was compiled in ")


@pytest.mark.usefixtures("_path_is_given_back")
def test_threads_compile_one_after_the_other() -> None:
    """Each engine has a thread of its own, and tracing changes what all of them see."""
    if (why_not := CompiledSteps.unsupported(GatherAttention)) is not None:
        pytest.skip(why_not)

    def compile_one(number: int) -> bool:
        compiler, x = Compiler(), torch.ones(64)
        run, _ = compiler(lambda x: (x * number + 1,), compiler.pretend(x))
        return torch.equal(run(x)[0], x * number + 1)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compile_one, range(4)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [32, 40])  # which vectors divide, and which they do not
def test_attention_as_the_compiler_sees_it(dtype, head_dim) -> None:
    step = make_step(0, [(4, 1), (29, 1), (0, 1)], group=3, dtype=dtype, head_dim=head_dim)
    cache, block_size = step.make_backend(GatherAttention).kv_cache, step.block_size
    places = torch.arange(step.metadata.max_seq_len)
    found = find_keys(step.metadata.seq_lens, step.metadata.block_table, places, block_size)
    starts = torch.arange(2 * cache.shape[2]).view(2, -1) * cache.shape[3] * block_size
    traced = TracedAttention(cache.view(-1, head_dim), starts, step.metadata.slot_mapping, *found)
    assert (traced(0, step.q, step.kv).double() - step.expected()).abs().max() <= ROUNDING[dtype]


@given(
    num_rows=st.integers(1, FEW_ROWS),
    num_out=st.integers(1, 200),
    num_in=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_product_of_few_rows_reads_the_weight_as_it_lies_in_memory(num_rows, num_out, num_in, dtype) -> None:
    linear = Linear(torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_out)).to(dtype))
    weight = linear.weight.double()
    linear.process_weights_after_loading()
    x = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_in)).to(dtype)
    memory = weight_in_memory(linear)
    if memory is None:  # filled up otherwise, so oneDNN's kernel serves
        assert num_out % PACKED_OUTPUTS or num_in % 2
    else:
        found, exact = multiply_few(x, memory, num_out), x.double() @ weight.T
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=4 * torch.finfo(dtype).eps)


def test_layers_that_differ_are_not_served_by_the_same_function() -> None:
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=4)
    first, second, *others = LLMEngine(config, "cpu").decoder.layers
    kind = Parts.of(first, 1).kind
    assert all(Parts.of(layer, 1).kind == kind for layer in (second, *others))
    for name, other in (
        ("qk_norm", None),
        ("down_proj", first.o_proj),
        ("qkv_proj", Int8Linear(LinearMethod(torch.float32, torch.device("cpu")), {"m": 8}, 8)),
    ):
        changed = copy.copy(first)
        setattr(changed, name, other)
        assert Parts.of(changed, 1).kind != kind, name


@pytest.mark.usefixtures("_path_is_given_back")
def test_a_compiled_product_of_8_bits() -> None:
    """What is around its kernel is compiled: rotations, scales of rows, a bias, and what is not a number."""
    if (why_not := CompiledSteps.unsupported(GatherAttention)) is not None:
        pytest.skip(why_not)
    linear = Int8Linear(LinearMethod(torch.float32, torch.device("cpu")), {"m": 32}, 96, bias=True)
    for place in linear.places().values():
        place.copy_(torch.randn(place.shape, generator=torch.Generator().manual_seed(0)))
    linear.process_weights_after_loading()
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    x[1], x[2, 5], x[3] = 0, math.nan, 1e4 * x[3]

    def run() -> torch.Tensor:
        _PRODUCTS.set([linear])
        compiled = torch._inductor.compile(make_fx(hide(linear))(x), [x])
        with OperationCounter() as counter:
            compiled(x)
        assert {"amax", "nan_to_num_"}.isdisjoint(operation.name for operation in counter.operations)
        return compiled(x)

    with torch.inference_mode():
        found, expected = contextvars.copy_context().run(run), linear(x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert expected[2].isnan().all() and expected[[0, 1, 3]].isfinite().all() and torch.equal(expected[1], linear.bias)


class TestBuckets:
    @pytest.mark.parametrize(
        "most, sizes",
        [
            (1, [1]),
            (2, [1, 2]),
            (3, [1, 2, 3]),
            (8, [1, 2, 4, 8]),
            (9, [1, 2, 4, 8, 9]),
            (40, [1, 2, 4, 8, 16, 32, 40]),
        ],
    )
    def test_sizes_double_up_to_the_most(self, most, sizes):
        assert bucket_sizes(most) == sizes

    def test_a_batch_takes_the_next_size(self):
        graphs = make_engine(max_num_seqs=11).runner.step_graphs
        assert [graphs.bucket(n) for n in range(1, 12)] == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]

    def test_a_step_has_no_more_rows_than_its_budget_has_tokens(self):
        engine = make_engine(max_num_seqs=11, enable_chunked_prefill=True, max_num_batched_tokens=6)
        assert engine.runner.step_graphs.sizes == [1, 2, 4, 6]

    def test_all_are_recorded_largest_first(self):
        sizes = []

        def recorder(decoder, attention, inputs):
            assert torch.is_inference_mode_enabled()
            sizes.append(len(inputs.input_ids))
            return replay_eagerly(decoder, attention, inputs)

        work = Batches(recorder)
        work.graphs.record_all()
        assert sizes == [7, 4, 2, 1] == list(work.graphs.replays)
        work.check([1, 2, 3])
        assert len(sizes) == 4

    def test_buffers_stay_where_they_are(self):
        read = {}

        def recorder(decoder, attention, inputs):
            def note(ids, positions, attend):
                step = attention.metadata
                tensors = (ids, positions, step.seq_lens, step.slot_mapping, step.block_table, step.query_start_loc)
                read.setdefault(len(ids), set()).add(tuple((t.data_ptr(), t.shape) for t in tensors))
                return decoder(ids, positions, attend)

            def replay():
                attention.begin(inputs.metadata)
                hidden = note(inputs.input_ids, inputs.positions, attention)
                logits = decoder.compute_logits(hidden)
                return StepOutputs(hidden, logits, *find_likeliest(logits))

            return replay

        work = Batches(recorder)
        for seed, lens in enumerate([[3, 4], [1], [5] * 7, [8, 1], [2, 2, 2], [9], [1, 2, 3, 4]]):
            work.check(lens, seed)
        assert {size: len(places) for size, places in read.items()} == {1: 1, 2: 1, 4: 1, 7: 1}
        starts = {size: [address for address, _ in next(iter(places))] for size, places in read.items()}
        assert all(addresses == starts[1] for addresses in starts.values())


class TestWhichSteps:
    def test_decode_steps_are_replayed_and_mixed_ones_are_not(self):
        replayed, num_new = [], []

        def recorder(decoder, attention, inputs):
            replay = replay_eagerly(decoder, attention, inputs)

            def count():
                replayed.append(engine.runner.attention is attention and len(inputs.input_ids))
                return replay()

            return count

        engine = make_engine(recorder, max_num_seqs=4)
        engine.step_hooks.append(lambda output, *_: num_new.append(output.num_new_tokens))
        params = SamplingParams(**GREEDY, max_tokens=5)
        arrivals = [judges.Arrival(str(i), prompts()[2 + i], params, i * 2) for i in range(3)]
        judges.drive(engine, arrivals)
        assert [n for n in num_new if max(n) > 1] and replayed
        assert replayed == [{1: 1, 2: 2, 3: 4}[len(n)] for n in num_new if max(n) == 1]


class TestLikeliest:
    """The head's largest logit and its token are found inside a recorded step."""

    ASKED = (
        {},
        {"logit_bias": {7: 100.0}},
        {"allowed_token_ids": [5, 6]},
        {"min_tokens": 3},
        {"repetition_penalty": 1.3},
        {"temperature": 0.9, "seed": 1},
        {"logprobs": 2},
    )

    @staticmethod
    def count_beside_the_replay(**asked) -> int:
        """Operations in a step of four, but for those that are recorded."""
        recorded, counter = [], OperationCounter()

        def recorder(*args):
            replay = replay_eagerly(*args)

            def count():
                before = len(counter.operations)
                outputs = replay()
                recorded.append(len(counter.operations) - before)
                return outputs

            return count

        engine = make_engine(recorder)
        for i in range(4):
            engine.add_request(str(i), [5 + i], SamplingParams(**{**GREEDY, "max_tokens": 9, **asked}))
        for _ in range(2):
            engine.step()
        with counter:
            engine.step()
        return len(counter.operations) - recorded[-1]

    def test_a_step_of_greedy_rows_needs_nothing_else(self):
        found = [self.count_beside_the_replay(**asked) for asked in self.ASKED]
        assert found[0] == 5 < min(found[1:])  # the copies into buffers

    def test_the_tokens_whatever_is_asked(self):
        told = []
        for eager in (True, False):
            engine = make_engine(enforce_eager=eager)
            params = [SamplingParams(**{**GREEDY, "max_tokens": 6, "n": 2, **asked}) for asked in self.ASKED]
            requests = [judges.Arrival(str(i), [5, 6], p) for i, p in enumerate(params)]
            outputs = judges.drive(engine, requests)
            told.append([[answer.token_ids for answer in outputs[r.name].outputs] for r in requests])
        assert told[0] == told[1]


class TestRefusals:
    def test_recorded_on_a_gpu_unless_asked(self):
        gpu, cpu = torch.device("cuda"), torch.device("cpu")
        assert choose_recorder(None, cpu, GatherAttention) is None
        assert choose_recorder(None, torch.device("mps"), GatherAttention) is None
        assert choose_recorder(None, gpu, FlashAttention) is CudaGraphs
        assert choose_recorder(None, gpu, GatherAttention) is choose_recorder(True, gpu, FlashAttention) is None
        with pytest.raises(ValueError, match="enforce_eager must be"):
            ModelConfig("m", enforce_eager=0)

    def test_another_backend_has_its_own_recorder(self):
        runner = make_engine().runner
        runner.config.model_config.enforce_eager = None
        runner.set_attention_backend(SdpaAttention)  # as `replace_part` does, on a CPU
        runner.initialize_kv_cache(5, 0)
        assert runner.step_graphs is None and runner.kv_cache.shape[3] == 5

    def test_a_device_without_recording(self):
        with pytest.raises(ValueError, match=r"on cuda and cpu, and the model is on mps: set enforce_eager=True"):
            choose_recorder(False, torch.device("mps"), GatherAttention)

    def test_attention_that_plans_on_the_cpu(self):
        with pytest.raises(ValueError, match=r"which GatherAttention does not: set attention_backend"):
            choose_recorder(False, torch.device("cuda"), GatherAttention)
        assert choose_recorder(False, torch.device("cuda"), FlashAttention) is CudaGraphs

    def test_attention_that_is_not_compiled(self):
        with pytest.raises(ValueError, match=r"attention_backend='gather' keeps, and the engine has SdpaAttention"):
            choose_recorder(False, torch.device("cpu"), SdpaAttention)

    @pytest.mark.usefixtures("_path_is_given_back")
    def test_a_machine_without_a_cpp_compiler(self, monkeypatch):
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
        config = make_engine_config(str(EMBEDDED_MODEL), enforce_eager=False)
        with pytest.raises(ValueError, match=r"there is none: install g\+\+ .* or set enforce_eager=True"):
            LLMEngine(config, "cpu")

    def test_the_engine_says_that_it_records(self):
        assert "recorded decode steps" in repr(make_engine())
        assert "recorded" not in repr(make_engine(enforce_eager=True))
