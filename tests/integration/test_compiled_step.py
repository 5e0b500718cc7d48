"""Decode steps that are compiled for a CPU, and products and attention as the compiler sees them."""

from __future__ import annotations

import contextvars
import copy
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from attention_helpers import ROUNDING, make_step
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_helpers import (
    GREEDY,
    LOOKUP,
    SEEDED,
    Batches,
    arrivals,
    check,
    engine_settings,
    make_engine,
    prompts,
    tell_alone,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from folovllm import LLMEngine, SamplingParams
from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import GatherAttention
from folovllm.book import judges
from folovllm.book.counting import OperationCounter
from folovllm.llm import LLM, make_engine_config
from folovllm.model.int8_kernels import OneDnnInt8
from folovllm.model.layers import Linear, LinearMethod
from folovllm.model.quantized_layers import Int8Linear
from folovllm.tales import EMBEDDED_MODEL
from folovllm.worker import compiled_step
from folovllm.worker.compiled_step import (
    _CALLED,
    TYPICAL_NUM_KEYS,
    TYPICAL_NUM_ROWS,
    Called,
    CompiledDecoder,
    CompiledSteps,
    Compiler,
    Parts,
    StepKind,
    hide_product,
)
from folovllm.worker.traced import (
    FEW_ROWS,
    TracedAttention,
    locate,
    multiply_few,
    weight_in_memory,
)

INT8 = {"quantization": "int8", "enforce_eager": False}
COMPILED = LinearMethod(torch.float32, torch.device("cpu"), has_compiled_steps=True)


def hide(linear):
    """A product as a compiler sees it where it has many rows."""
    return hide_product(linear, lambda tensor: tensor, Parts(has_few_rows=False))


@pytest.mark.parametrize("kwargs", [{"dtype": "float32"}, {"dtype": "bfloat16", **INT8}])
def test_a_compiler_is_told_what_comes_out_of_a_product(kwargs) -> None:
    """A head of 8 bits gives float32 logits whatever it is given; taken for bfloat16, they would be other numbers."""
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=4, **kwargs)
    decoder = LLMEngine(config, "cpu").decoder
    for linear in (decoder.layers[0].qkv_proj, decoder.head):
        x = torch.zeros(2, decoder.config.hidden_size, dtype=decoder.dtype)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            told = hide(linear)(mode.from_tensor(x))
        given = linear(x)
        assert (told.dtype, told.shape, told.stride()) == (given.dtype, given.shape, given.stride())


@pytest.fixture
def _compiler(monkeypatch):
    """There is one; torch's puts folders of its own on the path, which is given back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    if (why_not := CompiledSteps.unsupported(GatherAttention)) is not None:
        pytest.skip(why_not)

    def fail(*words: object) -> None:
        raise AssertionError(words)

    monkeypatch.setattr(compiled_step.logger, "warning", fail)  # or an eager step would stand in for what is tested


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_compiled_step(dtype, tolerance, caplog) -> None:
    """Any number of rows, any length, whatever was written behind it, and full blocks; two layers are compiled once."""
    work = Batches(CompiledSteps, 2, tolerance, num_blocks=100, dtype=dtype, max_model_len=400)
    pairs = [[5, 9], [1, 1], [2, 1], [16, 3], [4, 4], [1, 1], [30, 20]]
    others = [[5, 9, 1], [1] * 7, [1, 2, 3, 4], [16, 3, 8], [8] * 7, [1, 1, 1], [30, 20, 4], [4] * 5]
    beyond = [[5] * (2 * TYPICAL_NUM_ROWS), [TYPICAL_NUM_KEYS + 30, 1, 40]]  # what the compiler had in mind
    with caplog.at_level(logging.INFO, "folovllm"):
        for seed, lens in enumerate([*pairs, *others, *beyond]):
            work.check(lens, seed)
    for num_rows, num_products in ((2, 0), (3, 9), (7, 9)):
        with OperationCounter() as counter:
            work.steps.run(*work.make([7] * num_rows))
        operations = Counter(operation.name for operation in counter.operations)
        # Products are called, by Python's function itself, and all else is compiled.
        # oneDNN's, or torch's own of 16 bits where the CPU has none.
        assert operations["_linear_pointwise"] + operations["mm"] == num_products
        assert operations.keys().isdisjoint({"multiply_by_number", "exp", "amax", "index_put_"})
    said = [record.message for record in caplog.records if record.name.startswith("folovllm")]
    assert [message.partition(" was compiled in ")[0] for message in said] == [
        "the decode step for a batch of 2", f"the decode step for a batch of more than {FEW_ROWS}"
    ]  # fmt: skip


@pytest.mark.usefixtures("_compiler")
def test_a_compiled_step_with_weights_of_8_bits(int8_kernel) -> None:
    """Loops for few rows do not round what they multiply."""
    work = Batches(CompiledSteps, 2, 0.1, num_blocks=100, max_model_len=400, **INT8)
    assert {linear.takes_bytes for linear in work.decoder.linears} == {int8_kernel == "oneDNN"}
    for seed, lens in enumerate([[5, 9], [30], [1], [5, 9, 1], [30, 20, 4], [4] * 5]):
        work.check(lens, seed)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_compiled_step_whose_sequences_begin_alike(dtype, tolerance, monkeypatch) -> None:
    """With any number of blocks of their own, one token in the last one at least."""
    monkeypatch.setattr("folovllm.attention.gather.SHARED_TOKENS", 8)
    batches = {
        2: [[9, 10, 12], [9, 9, 9], [9, 20, 13, 14, 9], [30, 9, 11], [9] * (2 * TYPICAL_NUM_ROWS)],
        70: [[281, 290, 283]],  # more than the compiler had in mind
    }
    for num_shared, found in batches.items():
        work = Batches(CompiledSteps, 2, tolerance, num_shared, num_blocks=100, dtype=dtype, max_model_len=400)
        for seed, lens in enumerate(found):
            work.check(lens, seed)
        assert [*work.steps.steps] == [StepKind(None, True)]


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("kwargs, tolerance", [({"dtype": "float32"}, 1e-4), ({"dtype": "bfloat16"}, 0.1), (INT8, 0.1)])
def test_the_pass_of_any_step(kwargs, tolerance) -> None:
    """Hidden states and what is written are those of the decoder, whatever lies in the cache already."""
    work = Batches(CompiledSteps, 2, **kwargs)
    for seed, (past, new) in enumerate([([0], [20]), ([0, 5, 9], [3, 1, 4]), ([7], [1]), ([0, 0], [1, 1]), ([3], [2])]):
        starts, lens = np.concatenate([[0], np.cumsum(new)]), np.add(past, new)
        tables = np.random.default_rng(seed).permutation(16)[: 5 * len(lens)].reshape(len(lens), 5)
        places = [np.arange(first, end) for first, end in zip(past, lens)]
        slots = np.concatenate([table[of // 4] * 4 + of % 4 for table, of in zip(tables, places)])
        metadata = AttentionMetadata.from_arrays(starts, lens, slots, tables)
        given = torch.arange(len(slots)) + 3, torch.from_numpy(np.concatenate(places))
        for rows in (None, torch.tensor([len(slots) - 1, 0])):
            found = []
            for decoder, attention in ((work.decoder, work.plain), (work.steps.decoder, work.steps.attention)):
                attention.begin(metadata)
                found.append((decoder(*given, attention, rows), attention.kv_cache))
            torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)
    assert isinstance(work.steps.decoder, CompiledDecoder)


@pytest.mark.usefixtures("_compiler")
def test_nothing_is_kept_of_a_step_that_fails(monkeypatch) -> None:
    def fail(x):
        raise OSError("no memory")

    work = Batches(CompiledSteps, 2)
    step = work.make([3, 4, 5])
    work.steps.run(*step)
    monkeypatch.setattr(work.decoder.layers[1].down_proj, "multiply", fail)
    with pytest.raises(OSError, match="no memory"):
        work.steps.run(*step)
    assert _CALLED not in contextvars.copy_context()


def interpret(compiler, function, examples):
    """Stands in for `Compiler.__call__`, and compiles nothing."""
    with compiler._mode:
        return lambda tensors: function(*tensors), list(function(*examples))


@pytest.fixture(scope="module")
def tokens():
    return tell_alone()


class TestTokens:
    @settings(max_examples=25)
    @given(kwargs=engine_settings(), asked=arrivals(), shared=st.sampled_from([4, 2048]), room=st.integers(15, 30))
    def test_the_same_whatever_the_settings(self, tokens, kwargs, asked, shared, room):
        """Interpreted: which step is of which kind, and what it is given."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Compiler, "__call__", interpret)
            patch.setattr("folovllm.attention.gather.SHARED_TOKENS", shared)
            patch.setattr("folovllm.worker.compiled_step.COMPILED_BYTES", 2**room)
            check(make_engine(CompiledSteps, **kwargs), asked, tokens)

    def test_steps_are_of_the_kinds_that_they_should_be(self, tokens, monkeypatch):
        monkeypatch.setattr(Compiler, "__call__", interpret)
        monkeypatch.setattr("folovllm.attention.gather.SHARED_TOKENS", 8)
        engine = make_engine(CompiledSteps, block_size=4, enable_prefix_caching=True)
        asked = [
            judges.Arrival(f"greedy 3 {i}", prompts()[3], SamplingParams(**GREEDY, max_tokens=4 + i), step)
            for i, step in enumerate([0, 4, 4, 6])
        ]
        check(engine, asked, tokens)
        kinds = {*engine.runner.prepared_steps.steps}
        assert kinds >= {StepKind(1, False), StepKind(2, True), StepKind(None, True)}

    @pytest.mark.usefixtures("_compiler")
    def test_the_same_compiled(self, tokens):
        """Whole prompts, chunks beside decode steps, guesses, and batches of all sizes."""
        asked = [
            judges.Arrival(
                f"{kind} {i % 8} {i}", prompts()[i % 8], SamplingParams(**params, max_tokens=1 + i, n=1 + i % 2), i // 3
            )
            for i in range(9)
            for kind, params in [("greedy", GREEDY) if i % 3 else ("seeded", SEEDED)]
        ]
        chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 20, "enable_prefix_caching": True}
        for kwargs in ({}, {**chunks, "speculative_config": LOOKUP}):
            check(make_engine(CompiledSteps, max_num_seqs=7, **kwargs), asked, tokens)


@pytest.mark.parametrize("num_rows, is_taken", [(4, True), (5, False)])
def test_no_more_keys_than_there_is_memory_for(num_rows, is_taken, monkeypatch) -> None:
    work = Batches(CompiledSteps)
    longest, key_bytes = 8, work.cache.shape[2] * work.cache.shape[-1] * 4
    monkeypatch.setattr("folovllm.worker.compiled_step.COMPILED_BYTES", 4 * longest * key_bytes)
    assert work.steps.takes(work.make([longest] * num_rows)[2]) is is_taken


def is_right_compiled(number: int) -> bool:
    """Whether a compiled function gives what it should."""
    compiler, x = Compiler(), torch.arange(64.0)
    run, _ = compiler(lambda x: (x * number + 1,), [compiler.pretend(x)])
    return torch.equal(run([x])[0], x * number + 1)


@pytest.mark.usefixtures("_compiler")
def test_nothing_of_torch_is_called_around_what_the_compiler_wrote() -> None:
    compiler, x, called = Compiler(), torch.arange(64.0), []
    run, _ = compiler(lambda x: (x + 1,), [compiler.pretend(x)])
    given, before = [x], sys.getprofile()
    sys.setprofile(lambda frame, event, _: event == "call" and called.append(frame.f_code.co_filename))
    try:
        run(given)
    finally:
        sys.setprofile(before)
    assert len(called) == 1 and os.sep + "torch" + os.sep not in called[0] and not given


@pytest.mark.usefixtures("_compiler")
def test_threads_compile_one_after_the_other() -> None:
    """Each engine has a thread of its own, and tracing changes what all of them see."""

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right_compiled, range(4)))


@pytest.mark.usefixtures("_compiler")
def test_loops_of_another_processor_are_not_taken_from_disk(monkeypatch, tmp_path) -> None:
    """Machines may share a folder, and what is compiled for AVX-512 gives other numbers with the vectors of AVX2."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert is_right_compiled(3)
    for capability in "avx2", "default":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        assert is_right_compiled(3)


@pytest.mark.usefixtures("_compiler")
def test_what_is_compiled_is_found_on_disk_whatever_the_size_of_the_cache(monkeypatch, tmp_path) -> None:
    """Which is another at each start, since it is what memory is left."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    missed = []
    for num_blocks in 16, 100:
        counters.clear()
        Batches(CompiledSteps, 2, num_blocks=num_blocks).check([5, 9, 3])
        missed.append(counters["inductor"]["fxgraph_cache_miss"])
    assert missed == [3, 0]  # what comes before the layers, a layer, and what comes behind


def trace_attention(step, num_shared=0):
    """`TracedAttention`, and what it is made of, for a step whose sequences begin with so many shared blocks."""
    cache, block_size, table = step.make_backend(GatherAttention).kv_cache, step.block_size, step.metadata.block_table
    shared, own = torch.arange(step.metadata.max_seq_len).tensor_split([num_shared * block_size])
    head_starts = torch.arange(cache.shape[2]) * cache.shape[3] * block_size
    slots, lens = step.metadata.slot_mapping, step.metadata.seq_lens
    found = locate(slots, lens, table, head_starts, block_size, own, *([shared] if num_shared else []))
    given = [*cache[0].flatten(1, 3), *found]
    return lambda q, kv, *given: (TracedAttention(*given)(0, q, kv),), [step.q, step.kv, *given]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [32, 40])  # which vectors divide, and which they do not
@pytest.mark.parametrize("num_shared", [0, 2])
def test_attention_as_the_compiler_sees_it(dtype, head_dim, num_shared) -> None:
    step = make_step(0, [(4, 1), (29, 1), (0, 1)], group=3, dtype=dtype, head_dim=head_dim, num_shared=num_shared)
    attend, given = trace_attention(step, num_shared)
    assert (attend(*given)[0].double() - step.expected()).abs().max() <= ROUNDING[dtype]


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    "num_kv_heads, group, head_dim, num_seqs, dtype",
    [(1, 1, 40, 1, "float16"), (1, 3, 64, 3, "bfloat16"), (3, 1, 24, 2, "float32"), (2, 7, 128, 3, "float16")],
)
def test_attention_as_it_is_compiled(num_kv_heads, group, head_dim, num_seqs, dtype) -> None:
    """The book's model has two key heads, four heads and 32 numbers in each."""
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "dtype": getattr(torch, dtype)}
    step = make_step(0, [(29, 1), (4, 1), (0, 1)][:num_seqs], **shape)
    attend, given = trace_attention(step)
    compiler = Compiler()
    run, _ = compiler(attend, [compiler.pretend(tensor) for tensor in given])
    assert (run([*given])[0].double() - step.expected()).abs().max() <= ROUNDING[shape["dtype"]]


FEW = {"num_rows": st.integers(1, FEW_ROWS), "num_out": st.integers(1, 200), "num_in": st.integers(1, 100)}


@given(**FEW, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_product_of_few_rows_reads_the_weight_as_it_lies_in_memory(num_rows, num_out, num_in, dtype) -> None:
    linear = Linear(torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_out)).to(dtype))
    weight = linear.weight.double()
    linear.process_weights_after_loading()
    x = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_in)).to(dtype)
    memory = weight_in_memory(linear)
    if memory is None:  # so oneDNN's kernel serves
        has_other_order = torch.backends.cpu.get_cpu_capability() != "AVX512"
        assert has_other_order or num_out == 1 or (dtype is torch.bfloat16 and num_in % 2)
    else:
        found, exact = multiply_few(x, memory, num_out), x.double() @ weight.T
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(not OneDnnInt8.is_available(), reason="torch has no product of bytes by oneDNN here")
@given(**FEW)
def test_a_product_of_few_rows_reads_bytes(num_rows, num_out, num_in) -> None:
    linear = Int8Linear(COMPILED, {"m": num_out}, num_in)
    (place,) = linear.places().values()
    place.copy_(torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_out)))
    weight = linear.weight.double()
    linear.process_weights_after_loading()
    x = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_in))
    if (memory := weight_in_memory(linear)) is None:  # as above
        assert num_in % 4
    else:
        exact = x.double() @ weight.T
        torch.testing.assert_close(multiply_few(x, memory, num_out).double(), exact, atol=0.01, rtol=1e-5)


def test_layers_that_differ_are_not_served_by_the_same_function() -> None:
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=4)
    first, second, *others = LLMEngine(config, "cpu").decoder.layers
    kind = Parts.of(first, True).kind
    assert all(Parts.of(layer, True).kind == kind for layer in (second, *others))
    for name, other in (
        ("qk_norm", None),
        ("down_proj", first.o_proj),
        ("qkv_proj", Int8Linear(COMPILED, {"m": 8}, 8)),
    ):
        changed = copy.copy(first)
        setattr(changed, name, other)
        assert Parts.of(changed, True).kind != kind, name


@given(
    num_in=st.integers(1, 300) | st.integers(1, 40).map(lambda n: 64 * n),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_rows_of_8_bits_are_normalized_alike(num_in, is_packed, seed) -> None:
    linear = Int8Linear(COMPILED, {"m": 8}, num_in)
    if is_packed:
        linear.process_weights_after_loading()
    x = torch.randn(5, num_in, generator=torch.Generator().manual_seed(seed))
    x[1], x[2, -1], x[3, 0] = 0, math.nan, -math.inf
    (found, found_largest), (expected, largest) = hide(linear).normalize(x), linear.normalize(x)
    torch.testing.assert_close(found_largest, largest, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert found.dtype is expected.dtype
    if linear.takes_bytes:  # of rows that are multiplied by no finite number they may be any
        found, expected = (
            rows.float()[largest.isfinite().squeeze(1) & (largest > 0).squeeze(1)] for rows in (found, expected)
        )
        assert (found - expected).abs().max() <= 1  # sums in another order may make one of half a step
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_compiler_that_fails_ends_nobodys_request(monkeypatch, caplog) -> None:
    """It may be killed, or the disk full, in the middle of serving."""

    def fail(*args: object) -> None:
        raise OSError("No space left on device: " + "folder/" * 200)

    params = SamplingParams(temperature=0, max_tokens=6)
    texts = ["Once upon a time", "Long ago", "Mira"]
    found = []
    for eager in (True, False):
        llm = LLM(str(EMBEDDED_MODEL), device="cpu", enforce_eager=eager, max_model_len=64)
        monkeypatch.setattr(compiled_step.Compiler, "__call__", fail)
        with caplog.at_level(logging.WARNING, "folovllm"):
            found.append([output.outputs[0].token_ids for output in llm.generate(texts, params, use_tqdm=False)])
    assert found[0] == found[1]
    said = [record.message for record in caplog.records if "could not be compiled" in record.message]
    assert len(said) == 2 and all("OSError: No space left" in line and len(line) < 700 for line in said)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("num_in", [96, 1088])
def test_a_compiled_product_of_8_bits(num_in) -> None:
    """What is around its kernel is compiled: rotations, scales of rows, a bias, and what is not a number."""
    linear = Int8Linear(COMPILED, {"m": 32}, num_in, bias=True)
    for place in linear.places().values():
        place.copy_(torch.randn(place.shape, generator=torch.Generator().manual_seed(0)))
    linear.process_weights_after_loading()
    x = torch.randn(4, num_in, generator=torch.Generator().manual_seed(1))
    x[1], x[2, 5], x[3] = 0, math.nan, 1e4 * x[3]

    def run() -> torch.Tensor:
        _CALLED.set(Called([linear]))
        compiler = Compiler()
        compiled, _ = compiler(lambda x: (hide(linear)(x),), [compiler.pretend(x)])
        with OperationCounter() as counter:
            (out,) = compiled([x])
        names = {operation.name for operation in counter.operations}
        assert {"amax", "div", "nan_to_num", "multiply_by_number"}.isdisjoint(names)
        return out

    with torch.inference_mode():
        found, expected = contextvars.copy_context().run(run), linear(x)
    # In units of a row's largest number, since sums in another order may round one of its numbers otherwise.
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(found / largest, expected / largest, equal_nan=True, atol=0.1, rtol=0)
    assert expected[2].isnan().all() and expected[[0, 1, 3]].isfinite().all() and torch.equal(expected[1], linear.bias)


def test_what_a_subclass_of_an_attention_does_is_not_compiled() -> None:
    class Other(GatherAttention):
        pass

    assert "the engine has Other" in CompiledSteps.unsupported(Other)


@pytest.mark.usefixtures("_compiler")
def test_a_machine_without_a_cpp_compiler():
    config = make_engine_config(str(EMBEDDED_MODEL), enforce_eager=False)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # a monkeypatch would leave none behind
    with without, pytest.raises(ValueError, match=r"there is none: install g\+\+ .* or set enforce_eager=True"):
        LLMEngine(config, "cpu")


MORE_THREADS = """
import torch
from folovllm import LLM, SamplingParams
from folovllm.tales import EMBEDDED_MODEL

llm = LLM(str(EMBEDDED_MODEL), device="cpu", enforce_eager=False, max_model_len=128, num_blocks=32)


def tell():
    params = SamplingParams(temperature=0, max_tokens=30)
    return llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].token_ids


before = tell()
torch.set_num_threads(4 * torch.get_num_threads())
assert tell() == before
assert all(llm.engine.runner.prepared_steps.steps.values())
"""


@pytest.mark.usefixtures("_compiler")
def test_more_threads_than_there_were_when_it_was_compiled():
    """In a process of its own: loops that wrote beyond their sums would end it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", MORE_THREADS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
