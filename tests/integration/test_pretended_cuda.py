"""Runner, decoder, attention and sampler on a pretended GPU: no tensor on a wrong device, and nobody waits in vain."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import patch_graphs
from pretended_cuda import pretended_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm import EngineConfig, ModelConfig, SamplingParams
from folovllm.attention import BACKENDS, load_backend
from folovllm.book.counting import FREE
from folovllm.book.few_bits import TruthMeter
from folovllm.book.tracing import trace_pass
from folovllm.config import CacheConfig, SchedulerConfig
from folovllm.core.scheduler import SchedulerOutput
from folovllm.model import fused, quantized_layers
from folovllm.model.checkpoint import Checkpoint
from folovllm.model.decoder import Decoder, DecoderConfig
from folovllm.model.int4_kernels import CudaKernel
from folovllm.model.quantization import QuantizationConfig, read_quantization
from folovllm.model.quantized_layers import QuantizedLinearMethod
from folovllm.model_loader import ModelLoader
from folovllm.request import Sequence, SequenceData, StructuredOutputGrammar
from folovllm.sample import sampler as sampler_module
from folovllm.sample.sampler import (
    TOP_P_FIRST_TRY,
    Sampler,
    apply_allowed_token_ids,
    apply_logit_bias,
    apply_penalties,
    ban_tokens,
    draw,
    gather_logprobs,
    truncate,
)
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils.transfer import copy_to_device, copy_to_host
from folovllm.worker.draft_model import DraftModel
from folovllm.worker.model_runner import PROMPT_LOGPROBS_ROWS, ModelRunner

CUDA = torch.device("cuda:0")
SHAPE = DecoderConfig(
    vocab_size=2 * TOP_P_FIRST_TRY,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling={"rope_type": "default"},
    qkv_bias=False,
    output_bias=False,
    qk_norm=True,
    tie_word_embeddings=True,
)
BLOCK_SIZES = {"flash": 256}
NUM_BLOCKS = 32


class AsciiTokenizer:
    """A character is a token, and its ASCII code the token's id."""

    eos_token_id = 0

    is_fast = True

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [ord(character) for character in text]

    def decode(self, token_ids, **kwargs):
        return "".join(map(chr, token_ids))


def make_runner(
    backend: str = "gather", num_layers: int = 1, enforce_eager: bool = True, has_draft: bool = False
) -> ModelRunner:
    """A runner on the pretended GPU, to be made inside it."""
    dtype, block_size = torch.bfloat16, BLOCK_SIZES.get(backend, 16)
    config = EngineConfig(
        ModelConfig(
            "pretended", dtype=dtype, max_model_len=2048, attention_backend=backend, enforce_eager=enforce_eager
        ),
        CacheConfig(block_size=block_size, num_blocks=NUM_BLOCKS),
        SchedulerConfig(max_num_batched_tokens=2048, max_num_seqs=16, max_model_len=2048),
    )
    decoder = Decoder(replace(SHAPE, num_layers=num_layers), 2048, dtype, CUDA)
    decoder.process_weights_after_loading()
    sampler = Sampler(AsciiTokenizer())
    runner = ModelRunner(decoder, sampler, config, DraftModel(decoder, sampler, config) if has_draft else None)
    runner.initialize_kv_cache(NUM_BLOCKS, 4)
    return runner


GREEDY = SamplingParams(temperature=0)
SOME = {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5}
EVERYTHING = {
    **SOME,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.1,
    "logit_bias": {3: 1.5},
    "allowed_token_ids": list(range(200)),
    "bad_words": ["ab", "c"],
    "min_tokens": 9,
}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.9},
    "top_k and top_p": {"top_k": 20, "top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "penalties": SOME,
    "greedy with penalties": {**SOME, "temperature": 0},
    "bad words": {"bad_words": ["ab", "c"]},
    "logit_bias": {"logit_bias": {3: 1.5, 9: -100.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": [7]},
    "allowed ids": {"allowed_token_ids": [1, 2, 3]},
    "everything": EVERYTHING,
}


def make_seq(index: int, num_tokens: int, num_computed: int, params: SamplingParams, block_size: int = 16) -> Sequence:
    """A sequence of ``num_tokens`` tokens, the last of which are its output if all but one are computed."""
    num_outputs = 3 if num_tokens - num_computed == 1 < num_computed - 2 else 0
    tokens = [97 + i % 3 for i in range(num_tokens)]
    data = SequenceData(tokens[: num_tokens - num_outputs], tokens[num_tokens - num_outputs :])
    blocks = [(index + i) % NUM_BLOCKS for i in range(-(-num_tokens // block_size))]
    return Sequence(str(index), str(index), data, params, block_ids=blocks, num_computed_tokens=num_computed)


def make_step(shape: list[tuple[int, int, int]], params: list[SamplingParams], block_size: int = 16) -> SchedulerOutput:
    """A step for sequences of so many tokens in all, computed, and new; params are taken in turn."""
    output, end = SchedulerOutput(), 0
    for i, (num_tokens, num_computed, num_new) in enumerate(shape):
        seq = make_seq(i, num_tokens, num_computed, params[i % len(params)], block_size)
        output.add(seq, num_new)
        end += num_new
        if num_computed + num_new == num_tokens:
            output.sampled.append((seq, end - 1))
    return output


SHAPES = {
    "decodes": [(40, 39, 1), (17, 16, 1), (300, 299, 1)],
    "one decode": [(40, 39, 1)],
    "whole prompts": [(5, 0, 5), (33, 0, 33), (9, 0, 9), (1, 0, 1)],
    "a chunk that ends in the prompt": [(300, 64, 100)],
    "chunks with a past": [(300, 0, 64), (80, 30, 50), (90, 64, 26)],
    "all kinds": [(40, 39, 1), (17, 16, 1), (33, 0, 33), (9, 0, 9), (300, 64, 100), (90, 64, 26)],
    "after a cached prefix": [(48, 32, 16), (33, 32, 1), (64, 48, 16)],
}


def moving(output: SchedulerOutput, **moves: list[tuple[int, int]]) -> SchedulerOutput:
    for name, pairs in moves.items():
        setattr(output, name, pairs)
    return output


def forking(output: SchedulerOutput) -> SchedulerOutput:
    """Two more answers to each prompt that the step completes, each with a block of its own."""
    for seq, row in list(output.sampled):
        output.sampled += [(seq.fork(f"{seq.seq_id}-{i}"), row) for i in range(2)]
    return moving(output, copies=[(0, 20), (0, 21)])


class Kernels(TorchDispatchMode):
    """Notes the operations that compute something, each of which launches a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in (*FREE, "device"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def run(runner: ModelRunner, step: SchedulerOutput, counts: Counter[str]) -> Counter[str]:
    """What a step counts."""
    counts.clear()
    output = runner.run(step)
    assert len(output.sampled_token_ids) == len(output.logprobs) == len(step.sampled)
    assert all(0 <= token < SHAPE.vocab_size for (token,) in output.sampled_token_ids) and not output.errors
    for (seq, _), logprobs in zip(step.sampled, output.logprobs):
        assert (logprobs is None) == (seq.sampling_params.logprobs is None)
    return Counter(counts)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend that can compute here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    name = request.param
    try:
        cls = load_backend(name)
    except ImportError as error:
        pytest.skip(str(error))
    # Operators are pretended, so they work without Triton.
    monkeypatch.setattr(fused, "is_available", lambda device: True)
    if name == "triton":
        monkeypatch.setattr(cls, "unsupported", lambda *args: None)
    why_not = cls.unsupported(CUDA, torch.bfloat16, SHAPE.head_dim, BLOCK_SIZES.get(name, 16))
    if why_not is not None:
        pytest.skip(why_not)
    return name


@pytest.fixture
def recording(monkeypatch):
    """CUDA graphs of which every replay is the capture; gives the sizes that were captured."""
    sizes: list[int] = []

    class Graph:
        def pool(self):
            return "a pool"

        def replay(self):
            pass

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert (pool, stream) == ("a pool" if sizes else None, "a stream")
        forward = Decoder.__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "__call__", lambda *args: sizes.append(len(args[1])) or forward(*args))
            yield

    patch_graphs(monkeypatch, Graph, capture)
    return sizes


class TestSteps:
    @pytest.mark.parametrize(
        "params", [[GREEDY], [SamplingParams(**EVERYTHING, logprobs=2), GREEDY]], ids=["greedy", "everything"]
    )
    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_backend_takes_every_batch(self, backend, shape, params):
        step = make_step(SHAPES[shape], params, BLOCK_SIZES.get(backend, 16))
        with pretended_cuda() as counts:
            found = run(make_runner(backend), step, counts)
        assert found["waits"] == bool(step.sampled) and found["loose"] == 0
        # The step's and the sampler's, and one where a block begins; with prompts one for the rows that are sampled and
        # one for how attention takes them.
        assert found["packed"] <= (3 if max(step.num_new_tokens) == 1 else 5)

    @pytest.mark.parametrize("shape", ["whole prompts", "all kinds"])
    def test_answers_that_fork(self, backend, shape):
        with pretended_cuda() as counts:
            runner = make_runner(backend)
            found = run(
                runner, forking(make_step(SHAPES[shape], [SamplingParams(n=3)], BLOCK_SIZES.get(backend, 16))), counts
            )
        assert found["waits"] == 1 and found["loose"] == 0

    @pytest.mark.parametrize(("is_available", "num_kernels"), [(True, 9), (False, 19)])
    def test_kernels_per_layer(self, monkeypatch, is_available, num_kernels):
        """Four products, attention, and what is around them."""
        monkeypatch.setattr(fused, "is_available", lambda device: is_available)
        monkeypatch.setattr(load_backend("triton"), "unsupported", lambda *args: None)
        found = []
        for num_layers in (1, 3):
            with pretended_cuda() as counts:
                runner = make_runner("triton", num_layers)
                with Kernels() as kernels:
                    run(runner, make_step(SHAPES["decodes"], [GREEDY]), counts)
            found.append(Counter(kernels.names))
        assert (found[1] - found[0]).total() == 2 * num_kernels, found[1] - found[0]

    @pytest.mark.parametrize("longest", [40, 500, 2048])
    def test_the_largest_batch(self, backend, longest, monkeypatch):
        """By which the runner measures the memory that is left for the cache."""
        num_rows, forward = [], Decoder.__call__
        monkeypatch.setattr(Decoder, "__call__", lambda *args: num_rows.append(len(args[1])) or forward(*args))
        with pretended_cuda() as counts:
            runner = make_runner(backend)
            runner.config.model_config.max_model_len = longest
            counts.clear()
            runner._run_largest_batch()
        assert num_rows == [min(2048, 16 * longest)]  # the budget of a step, or all of its sequences
        assert counts["waits"] <= 2 and counts["loose"] == 0

    def test_a_callers_autocast_does_not_touch_the_largest_batch(self, backend, monkeypatch):
        """Its queries would have another dtype than the cache."""
        for name in ("reset_peak_memory_stats", "empty_cache", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
        found, forward = [], Decoder.__call__
        monkeypatch.setattr(
            Decoder, "__call__", lambda *args: found.append(torch.is_autocast_enabled("cpu")) or forward(*args)
        )
        with pretended_cuda():
            runner = make_runner(backend)
            runner.config.cache_config.num_blocks = None
            with torch.autocast("cpu", dtype=torch.float16):
                runner.count_blocks()
        assert found == [False]

    @pytest.mark.parametrize("is_recorded", [False, True])
    def test_the_memory_that_is_left_for_the_cache(self, backend, is_recorded, recording, monkeypatch):
        if is_recorded and not load_backend(backend).capturable:
            pytest.skip("it plans on the CPU")
        peak, free, total = 1000, 500_000, 1_000_000
        for name, value in (
            ("reset_peak_memory_stats", None),
            ("memory_allocated", 0),
            ("max_memory_allocated", peak),
            ("empty_cache", None),
            ("mem_get_info", (free, total)),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        with pretended_cuda():
            runner = make_runner(backend, enforce_eager=not is_recorded)
            runner.config.cache_config.num_blocks, runner.config.cache_config.gpu_memory_utilization = None, 0.75
            recording.clear()  # other graphs have another pool
            num_blocks, _ = runner.count_blocks()
        block_bytes = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * torch.bfloat16.itemsize * runner.block_size
        assert num_blocks == (free - total // 4 - peak) // block_bytes - is_recorded > 0  # one for padding

    @pytest.mark.parametrize("shape", ["decodes", "one decode"])
    @pytest.mark.parametrize("params", [GREEDY, SamplingParams(**EVERYTHING, logprobs=2)], ids=["greedy", "everything"])
    def test_recorded_steps(self, backend, shape, params, recording):
        if not load_backend(backend).capturable:
            pytest.skip("it plans on the CPU")
        with pretended_cuda() as counts:
            runner = make_runner(backend, enforce_eager=False)
            assert recording == [16, 8, 4, 2, 1]
            found = run(runner, make_step(SHAPES[shape], [params], runner.block_size), counts)
        assert (found["waits"], found["loose"]) == (1, 0) and found["packed"] <= 3

    @pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=20)], ids=["greedy", "sampled"])
    def test_guesses_of_a_draft_model(self, params):
        """A pass of guesses waits twice: to know whether its logits are numbers, and for the guesses."""
        with pretended_cuda() as counts:
            runner = make_runner(has_draft=True)
            step = make_step(SHAPES["decodes"], [params])
            step.num_new_tokens = [2] * 3
            step.scheduled_spec_token_ids = {seq.seq_id: [-1] for seq in step.seqs}
            step.sampled = [(seq, 2 * i) for i, seq in enumerate(step.seqs)]
            runner.draft._num_filled = [runner.block_size] * NUM_BLOCKS  # it has read what comes before
            counts.clear()
            output = runner.run(step)
        assert [len(tokens) for tokens in output.sampled_token_ids] == [2] * 3 and not output.errors
        assert (counts["waits"], counts["loose"]) == (2 + 1, 0)

    def test_swapping(self, backend):
        with pretended_cuda() as counts:
            runner = make_runner(backend)
            for moves, waits, loose in (
                ({"swap_out": [(0, 1), (2, 0)]}, 2, 0),  # the CPU has to have the blocks
                ({"swap_in": [(1, 5)]}, 1, 1),
                ({"swap_out": [(3, 2)], "swap_in": [(0, 3)], "copies": [(5, 6)]}, 2, 1),
            ):
                found = run(runner, moving(make_step(SHAPES["decodes"], [GREEDY]), **moves), counts)
                assert (found["waits"], found["loose"]) == (waits, loose)


def waits_of(params: SamplingParams) -> int:
    """How often a step of such rows waits: for what it finds, and where top-p must know if its first try is enough."""
    return 1 + (params.temperature > 0 and params.top_p < 1 and params.top_k == -1)


class TestSampling:
    """Settings one by one, since the first to be wrong hides the others."""

    @pytest.mark.parametrize("logprobs", [[None], [0], [None, 3, -1, 3]], ids=str)
    @pytest.mark.parametrize("asked", ASKED)
    def test_one_copy_there_and_one_back(self, asked, logprobs):
        params = [SamplingParams(**ASKED[asked], logprobs=n) for n in logprobs]
        with pretended_cuda() as counts:
            runner = make_runner()
            new, again = (make_step([(40, 39, 1)] * 4, params) for _ in range(2))
            again.sampled, again.seqs = new.sampled, new.seqs
            found = [run(runner, step, counts) for step in (new, again)]
        for counted in found:
            assert counted["waits"] == waits_of(params[0]) and counted["loose"] == 0
            assert counted["packed"] <= 2  # the runner's and the sampler's

    @pytest.mark.parametrize("logprobs", [None, 2])
    def test_rows_that_ask_for_different_things(self, logprobs):
        params = [SamplingParams(**fields, logprobs=logprobs) for fields in ASKED.values()]
        with pretended_cuda() as counts:
            runner = make_runner()
            for shape in ([(40, 39, 1)] * len(params), [(9, 0, 9)] * len(params)):
                found = run(runner, make_step(shape, params), counts)
                assert found["waits"] == 2 and found["loose"] == 0
                # The rows that are sampled, and how attention pads prompts, take a copy each.
                assert found["packed"] <= (2 if shape[0][2] == 1 else 5)

    def test_masks_travel_with_the_rest(self):
        class Odd(StructuredOutputGrammar):
            vocab_size = SHAPE.vocab_size

            def accept_tokens(self, token_ids):
                return True

            def fill_bitmask(self, bitmask, row):
                bitmask[row] = 0x2AAAAAAA

            def copy(self):
                return self

        with pretended_cuda() as counts:
            runner = make_runner()
            for some in ([0], [0, 1, 2], [0, 1, 2, 3]):
                step = make_step([(40, 39, 1)] * 4, [GREEDY, SamplingParams(**SOME, temperature=0.5)])
                for row in some:
                    step.seqs[row].grammar = Odd()
                found = run(runner, step, counts)
                assert (found["waits"], found["loose"]) == (1, 0) and found["packed"] <= 2

    def test_a_first_try_of_top_p_that_must_be_enough_is_not_asked_about(self):
        params = [SamplingParams(top_k=20, top_p=0.9), SamplingParams(), GREEDY]
        with pretended_cuda() as counts:
            found = run(make_runner(), make_step([(40, 39, 1)] * 3, params), counts)
        assert found["waits"] == 1

    @pytest.mark.parametrize("length", [2, 100, PROMPT_LOGPROBS_ROWS + 1, 2 * PROMPT_LOGPROBS_ROWS])
    @pytest.mark.parametrize("num_logprobs", [0, 3])
    def test_a_prompts_log_probabilities_wait_once_for_each_piece(self, length, num_logprobs):
        params = [SamplingParams(temperature=0, prompt_logprobs=num_logprobs)]
        with pretended_cuda() as counts:
            found = run(make_runner(), make_step([(length, 0, length)], params), counts)
        pieces = -(-(length - 1) // PROMPT_LOGPROBS_ROWS)
        assert found["waits"] == 1 + pieces and found["loose"] == 0

    def test_a_row_whose_params_cannot_be_followed(self):
        params = [GREEDY, SamplingParams(allowed_token_ids=[SHAPE.vocab_size]), SamplingParams(top_k=3, logprobs=1)]
        with pretended_cuda() as counts:
            runner = make_runner()
            counts.clear()
            output = runner.run(make_step([(40, 39, 1)] * 3, params))
        assert [*output.errors] == [1]
        assert (counts["waits"], counts["loose"]) == (1, 0)

    def test_stages_given_lists(self):
        params = [SamplingParams(top_k=3, top_p=0.9, min_p=0.1), SamplingParams(temperature=0.5)]
        with pretended_cuda() as counts:
            logits = torch.zeros(2, SHAPE.vocab_size, device=CUDA)
            logits = ban_tokens(apply_allowed_token_ids(logits, [[1, 2], None]), [[1], []])
            logits = apply_penalties(
                apply_logit_bias(logits, [{3: 1.0}, None]), [[1], []], [[], [2]], *[[1.1, 0.5]] * 3
            )
            found = draw(truncate(logits, params).softmax(dim=-1), [0.5, 0.5])
            gather_logprobs(logits, [1, 2], [0, 5])
        assert found.device == CUDA and counts["waits"] == 1 and counts["loose"] == 0


class TestFewerBits:
    @pytest.mark.parametrize(
        "config",
        [
            read_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}),
            QuantizationConfig("int8"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(("is_packed", "num_rows"), [(False, 5), (True, 5), (True, 300)])
    def test_a_product_brings_nothing_there_and_waits_for_nothing(self, config, is_packed, num_rows, monkeypatch):
        monkeypatch.setattr(CudaKernel, "is_available", lambda device: is_packed)
        monkeypatch.setattr(quantized_layers, "kernel_group_size", lambda weight: 32)  # which asks what the groups are
        kind = "packed" if is_packed and config.method != "int8" else "plain"
        with pretended_cuda() as counts:
            checkpoint = Checkpoint(Path(), None, [], {}, 0, torch.bfloat16, CUDA, 64, 64, config)
            decoder = Decoder(SHAPE, 64, torch.bfloat16, CUDA, QuantizedLinearMethod(checkpoint, CUDA))
            decoder.process_weights_after_loading()
            counts.clear()
            rows = {size: torch.zeros(num_rows, size, dtype=torch.bfloat16, device=CUDA) for size in (64, 96, 128)}
            for linear, size in zip(decoder.linears, (64, 128, 64, 96, 64)):
                is_head = linear is decoder.head  # of 4 bits it stays as it is, but on a CPU
                assert (
                    linear.kernel == "floats" if is_head and config.method != "int8" else linear.kernel.endswith(kind)
                )
                assert linear(rows[size]).device == CUDA
            assert not counts


class TestTheBook:
    """What pages do with the decoder of an engine that may be on a GPU."""

    @pytest.fixture
    def tokenizer(self):
        return ModelLoader(ModelConfig(str(EMBEDDED_MODEL))).load_tokenizer()

    def test_how_far_a_model_is_from_the_grammar(self, tokenizer):
        meter = TruthMeter(tokenizer, 1)
        with pretended_cuda():
            meter.measure(make_runner().decoder)

    def test_what_a_pass_makes(self, tokenizer):
        token_ids = tokenizer.encode("Once upon a time")
        with pretended_cuda():
            trace = trace_pass(make_runner().decoder, token_ids)
        assert trace.stream.device == trace.probs.device == CUDA


class TestWhatItFinds:
    """The test itself: what is planted shows."""

    def test_a_tensor_on_the_wrong_device(self, monkeypatch):
        monkeypatch.setattr(
            sampler_module, "copy_to_device", lambda arrays, device: copy_to_device(arrays, torch.device("cpu"))
        )
        with pretended_cuda() as counts, pytest.raises(Exception, match="device"):
            run(make_runner(), make_step(SHAPES["decodes"], [SamplingParams(temperature=0.5)]), counts)

    @pytest.mark.parametrize(
        "plant", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[0].tolist()]
    )
    def test_a_wait(self, plant, monkeypatch):
        monkeypatch.setattr(sampler_module, "draw", lambda probs, uniforms: (plant(probs), draw(probs, uniforms))[1])
        with pretended_cuda() as counts:
            found = run(make_runner(), make_step(SHAPES["decodes"], [SamplingParams()]), counts)
        assert found["waits"] == 2

    @pytest.mark.parametrize(
        "plant",
        [
            lambda x: torch.tensor([0, 1], device=x.device),
            lambda x: torch.arange(2).to(x.device),
            lambda x: x[[0, 1]],
            lambda x: x.index_select(0, torch.from_numpy(np.array([0, 1])).to(x.device)),
        ],
    )
    def test_a_list_that_goes_there_by_itself(self, plant, monkeypatch):
        monkeypatch.setattr(sampler_module, "draw", lambda probs, uniforms: (plant(probs), draw(probs, uniforms))[1])
        with pretended_cuda() as counts:
            found = run(make_runner(), make_step(SHAPES["decodes"], [SamplingParams()]), counts)
        assert found["loose"] == 1


class TestCopyToHost:
    TENSORS = (torch.arange(3), torch.tensor([[0.5], [-1.5]]), torch.zeros(0), torch.arange(8).view(2, 4).T)

    def test_one_copy_for_all(self):
        with pretended_cuda() as counts:
            there = [tensor.to(CUDA) for tensor in self.TENSORS]
            counts.clear()
            found = copy_to_host(there)
        assert found == [torch.zeros_like(tensor).tolist() for tensor in self.TENSORS]
        assert counts == {"waits": 1}

    def test_the_numbers_survive_the_packing(self, monkeypatch):
        """On a CPU nothing is packed, so these say that they are elsewhere."""
        expected = [tensor.tolist() for tensor in self.TENSORS]
        monkeypatch.setattr(torch.Tensor, "device", CUDA, raising=False)
        assert copy_to_host(self.TENSORS) == expected
