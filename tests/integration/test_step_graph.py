"""Recorded decode steps, replayed without a GPU: the same tokens, padding that leaves no trace, buffers that stay."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from graph_helpers import patch_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_helpers import (
    GREEDY,
    MAX_MODEL_LEN,
    MAX_TOKENS,
    Batches,
    arrivals,
    check,
    engine_settings,
    make_engine,
    prompts,
    recording,
    tell_alone,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folovllm import SamplingParams
from folovllm.attention import BACKENDS, AttentionMetadata
from folovllm.attention.sdpa import SdpaAttention
from folovllm.book import judges
from folovllm.book.counting import OperationCounter
from folovllm.book.exercises.verdict import NotYet
from folovllm.sample.sampler import find_likeliest
from folovllm.utils import cdiv
from folovllm.worker.prepared_steps import StepOutputs
from folovllm.worker.step_graph import (
    CudaGraphs,
    bucket_sizes,
    replay_eagerly,
)


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


@pytest.fixture(scope="module")
def tokens():
    return tell_alone()


class TestTokens:
    @settings(max_examples=40)
    @given(kwargs=engine_settings(), arrivals=arrivals())
    def test_the_same_whatever_the_settings(self, tokens, kwargs, arrivals):
        check(make_engine(**kwargs), arrivals, tokens)

    @settings(max_examples=10)
    @given(kwargs=engine_settings(), arrivals=arrivals())
    def test_the_same_from_pretended_cuda_graphs(self, tokens, kwargs, arrivals):
        with pretended_graphs() as pools:
            engine = make_engine(recording(CudaGraphs()), attention_backend="sdpa", **kwargs)
            check(engine, arrivals, tokens)
        assert pools[:1] in ([], [None]) and set(pools[1:]) <= {"a pool"}  # all share the first one's

    def test_the_pretended_graph_notices_what_is_planned_on_the_cpu(self, tokens):
        params = SamplingParams(**GREEDY, max_tokens=MAX_TOKENS)
        asked = [judges.Arrival("greedy 3 0", prompts()[3], params)]
        with pretended_graphs(), pytest.raises(NotYet, match="other tokens"):
            BACKENDS["sdpa"] = "folovllm.attention.sdpa.SdpaAttention"
            check(make_engine(recording(CudaGraphs()), attention_backend="sdpa"), asked, tokens)

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
        assert len(engine.runner.prepared_steps.replays) == 1


class TestTakes:
    """Which steps are replayed."""

    def test_decode_steps(self):
        work = Batches()
        assert work.steps.takes(work.make([5, 9, 1])[2])

    def test_no_prompts(self):
        metadata = AttentionMetadata.from_arrays(*map(np.array, ([0, 2, 3], [2, 5], [0, 1, 4], [[0, 0], [1, 2]])))
        assert not Batches().steps.takes(metadata)


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

        work = Batches(recording(recorder))
        for lens in ([3, 4, 5, 6, 7], [8, 8], [1]):
            work.check(lens)
        reserved_slot = work.num_blocks * work.block_size
        assert seen == [([0] * size, [1] * size, [reserved_slot]) for size in (7, 2, 1)]


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
        graphs = make_engine(max_num_seqs=11).runner.prepared_steps
        assert [graphs.bucket(n) for n in range(1, 12)] == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]

    def test_a_step_has_no_more_rows_than_its_budget_has_tokens(self):
        engine = make_engine(max_num_seqs=11, enable_chunked_prefill=True, max_num_batched_tokens=6)
        assert engine.runner.prepared_steps.sizes == [1, 2, 4, 6]

    def test_all_are_recorded_largest_first(self):
        sizes = []

        def recorder(decoder, attention, inputs):
            assert torch.is_inference_mode_enabled()
            sizes.append(len(inputs.input_ids))
            return replay_eagerly(decoder, attention, inputs)

        work = Batches(recording(recorder))
        work.steps.record_all()
        assert sizes == [7, 4, 2, 1] == list(work.steps.replays)
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

        work = Batches(recording(recorder))
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

        engine = make_engine(recording(recorder), max_num_seqs=4)
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

        engine = make_engine(recording(recorder))
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
