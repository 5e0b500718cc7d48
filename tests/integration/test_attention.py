"""Attention backends: all within rounding of float64, which serves where, and what is said about it."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from attention_helpers import ROUNDING, make_step
from hypothesis import given
from hypothesis import strategies as st

from folovllm import ModelConfig
from folovllm.attention import BACKENDS, AttentionMetadata, choose_backend, load_backend
from folovllm.attention.flash import FlashAttention
from folovllm.attention.gather import GatherAttention
from folovllm.llm import LLM
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils.transfer import copy_to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = ("gather", "sdpa")
"""Backends that run on any machine."""
BLOCK_SIZES, HEAD_DIMS, DTYPES = (1, 3, 16, 256), (32, 64, 96, 128), tuple(ROUNDING)


@st.composite
def steps(draw):
    longest = draw(st.sampled_from([8, 64, 400]))
    sequences = st.tuples(st.integers(0, longest), st.one_of(st.just(1), st.integers(1, longest)))
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    return make_step(
        draw(st.integers(0, 10**6)),
        draw(st.lists(sequences, min_size=1, max_size=6)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=block_size,
        num_shared=draw(st.integers(0, longest)) // block_size,
        dtype=draw(st.sampled_from(DTYPES)),
    )


class TestNumbers:
    @pytest.mark.parametrize("name", HERE)
    @given(step=steps())
    def test_within_rounding_of_float64(self, name, step):
        error = (step.run(load_backend(name)).double() - step.expected()).abs().max()
        assert error <= ROUNDING[step.q.dtype], f"{error:.1e}"

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize(
        "lens", [[(1999, 1)], [(0, 2000)], [(1500, 500), (1999, 1), (0, 1)], [(0, 512), (0, 300), (0, 257)]]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_long_texts(self, name, lens, dtype):
        step = make_step(0, lens, group=8, head_dim=128, block_size=16, dtype=dtype)
        assert (step.run(load_backend(name)).double() - step.expected()).abs().max() <= ROUNDING[dtype]

    @given(step=steps(), gather_bytes=st.sampled_from([1, 2**24]))
    def test_a_prefix_that_all_share_is_computed_once(self, step, gather_bytes):
        """However little it saves, and in however many parts; from where on it pays is a matter of speed."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("folovllm.attention.gather.SHARED_TOKENS", 1)
            patch.setattr("folovllm.attention.gather.GATHER_BYTES", gather_bytes)
            error = (step.run(GatherAttention).double() - step.expected()).abs().max()
        assert error <= ROUNDING[step.q.dtype], f"{error:.1e}"

    @given(step=steps())
    def test_many_values_of_16_bits(self, step):
        """However few there are; from how many on they are multiplied as they are is a matter of speed."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("folovllm.attention.gather.FEW_NUMBERS", -1)
            error = (step.run(GatherAttention).double() - step.expected()).abs().max()
        assert error <= ROUNDING[step.q.dtype], f"{error:.1e}"

    def test_what_is_gathered_does_not_grow_with_those_who_share(self):
        step = make_step(0, [(5, 1)] * 40, block_size=16, num_shared=8)
        backend = GatherAttention(torch.zeros(GatherAttention.kv_cache_shape(1, 2, step.num_blocks, 16, 32)))
        backend.begin(step.metadata)
        heads = backend._num_heads_at_once
        assert (len(backend._shared_blocks), len(backend._own_blocks)) == (heads * 8, heads * 40)

    def test_a_block_that_a_sequence_writes_is_not_taken_for_shared(self):
        """As when all sequences have the same table, which no engine does, but the try-out of its largest batch."""
        step = make_step(0, [(31, 1)] * 200, block_size=16)
        step.metadata.block_table[:] = step.metadata.block_table[0]
        backend = GatherAttention(torch.zeros(GatherAttention.kv_cache_shape(1, 2, step.num_blocks, 16, 32)))
        backend.begin(step.metadata)
        assert backend._num_shared_tokens == 16

    @pytest.mark.parametrize("name", HERE)
    def test_large_scores(self, name):
        """Softmax must not overflow, and a token that wins by far must win alone."""
        step = make_step(1, [(40, 1), (0, 9)], head_dim=64)
        step.q *= 200
        assert (step.run(load_backend(name)).double() - step.expected()).abs().max() <= 1e-4


class TestChoice:
    def choose(self, name, device, dtype=torch.float32, head_dim=64, block_size=16):
        return choose_backend(name, device, dtype, head_dim, block_size)

    def test_auto_gathers_on_a_cpu(self):
        backend, why = self.choose("auto", CPU)
        assert (backend.__name__, why) == ("GatherAttention", "gather: the best that can serve on cpu")

    def test_auto_says_why_it_did_not_take_a_faster_one(self, monkeypatch):
        monkeypatch.setattr("folovllm.attention.PREFERRED", {"cuda": ("flash", "gather")})
        backend, why = self.choose("auto", CUDA)
        assert backend.__name__ == "GatherAttention"
        assert why == (
            "gather: the best that can serve on cuda; not flash, since FlashAttention computes in float16 and bfloat16 "
            "only, not in float32"
        )

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("device", [CPU, CUDA, torch.device("mps")])
    def test_these_serve_everywhere(self, name, device):
        assert load_backend(name).unsupported(device, torch.float32, 96, 3) is None
        assert self.choose(name, device)[1] == f"{name}: named by attention_backend"

    @pytest.mark.parametrize(
        ("device", "dtype", "head_dim", "block_size", "why"),
        [
            (CPU, torch.float16, 64, 256, "runs on CUDA only, not on cpu"),
            (CUDA, torch.float32, 64, 256, "computes in float16 and bfloat16 only, not in float32"),
            (CUDA, torch.float16, 64, 16, "needs a block_size that is a multiple of 256, got 16"),
            (CUDA, torch.float16, 512, 256, "needs heads of a multiple of 8 and at most 256 numbers, got 512"),
        ],
    )
    def test_flash_says_what_it_lacks(self, device, dtype, head_dim, block_size, why):
        assert FlashAttention.unsupported(device, dtype, head_dim, block_size) == f"FlashAttention {why}"
        with pytest.raises(ValueError, match="attention_backend='flash' cannot serve: FlashAttention"):
            self.choose("flash", device, dtype, head_dim, block_size)

    def test_flash_needs_a_torch_that_has_it(self, monkeypatch):
        monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn_out")
        why = FlashAttention.unsupported(CUDA, torch.float16, 64, 256)
        assert why is not None and "has no FlashAttention with block tables; 2.13 has" in why

    def test_flash_takes_no_block_tables_on_rocm(self, monkeypatch):
        """There torch ignores them, and says nothing."""
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert (
            FlashAttention.unsupported(CUDA, torch.float16, 64, 256) == "FlashAttention runs on CUDA only, not on ROCm"
        )

    def test_flash_needs_a_new_enough_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        why = FlashAttention.unsupported(CUDA, torch.float16, 64, 256)
        assert why == "FlashAttention needs a GPU of compute capability 8.0 or newer"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert FlashAttention.unsupported(CUDA, torch.float16, 64, 256) is None

    def test_flash_needs_the_version_that_torch_brings(self, monkeypatch):
        """Versions 3 and 4 want block tables otherwise, or not at all on some GPUs."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
        why = FlashAttention.unsupported(CUDA, torch.float16, 64, 256)
        assert why is not None and "has activated FA4: call torch.nn.attention.restore_flash_attention_impl()" in why

    def test_the_config_knows_all_names(self):
        for name in ("auto", *BACKENDS):
            assert ModelConfig("m", attention_backend=name).attention_backend == name
        with pytest.raises(ValueError, match=r"attention_backend must be 'auto' or 'gather' or .*, got 'paged'"):
            ModelConfig("m", attention_backend="paged")

    def test_the_engine_says_what_it_chose_in_the_log_and_in_its_description(self, caplog):
        with caplog.at_level(logging.INFO, "folovllm"):
            llm = LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=64, num_blocks=8)
        assert "attention backend gather: the best that can serve on cpu" in caplog.messages
        assert "ModelRunner(cpu, float32, attention backend gather: the best that can serve on cpu)" in repr(llm.engine)
        assert "8 blocks" in repr(llm.engine)

    def test_a_backend_that_cannot_serve_is_refused_when_the_engine_is_made(self):
        with pytest.raises(ValueError, match=r"attention_backend='flash' cannot serve: .* runs on CUDA only"):
            LLM(str(EMBEDDED_MODEL), device="cpu", max_model_len=64, attention_backend="flash")


class TestFlash:
    """What can be seen of it without a GPU: its layout, and what it hands to torch."""

    def test_what_it_hands_over_is_a_step(self, monkeypatch):
        step = make_step(3, [(300, 1), (0, 40), (100, 7)], head_dim=64, block_size=256, dtype=torch.float16)
        calls = []
        monkeypatch.setattr(
            "torch.nn.attention.varlen.varlen_attn_out", lambda *args, **kwargs: calls.append((args, kwargs))
        )
        step.run(FlashAttention)
        (out, q, keys, values, starts, key_starts, max_q, max_k), options = calls[0]
        assert q.shape == out.shape and keys.shape == values.shape == (step.num_blocks, 256, 2, 64)
        assert starts.tolist() == [0, 1, 41, 48] and key_starts.tolist() == [0, 301, 341, 448]
        assert (max_q, max_k) == (40, 301)
        assert starts.dtype == key_starts.dtype == options["seqused_k"].dtype == torch.int32
        assert options["window_size"] == (-1, 0) and options["num_splits"] == 1 and options["enable_gqa"]
        block, place = options["block_table"][0, 1], 300 % 256
        assert torch.equal(torch.cat([keys[block, place], values[block, place]]), step.kv[0])


class TestTransfer:
    def test_what_arrives_is_what_was_sent(self):
        rng = random.Random(0)
        for _ in range(20):
            arrays = [
                np.arange(rng.randrange(0, 9) * 2, dtype=rng.choice([np.int32, np.int64, np.float32, np.uint8]))
                for _ in range(rng.randrange(1, 6))
            ]
            arrays.append(np.arange(6).reshape(2, 3).T)
            there = copy_to_device(arrays, torch.device("meta"))
            assert [(t.shape, t.dtype) for t in there] == [(a.shape, torch.from_numpy(a[:0]).dtype) for a in arrays]

    def test_the_numbers_survive_the_packing(self, monkeypatch):
        """On a CPU nothing is packed, so a device is pretended that is one all the same."""

        class Pretended:
            type = "elsewhere"

        monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self.clone())
        arrays = [np.arange(3, dtype=np.int32), np.arange(5), np.arange(6, dtype=np.int32).reshape(2, 3).T]
        for sent, came in zip(arrays, copy_to_device(arrays, Pretended())):
            assert np.array_equal(sent, came.numpy())

    def test_metadata_knows_its_lengths(self):
        arrays = [np.array(x) for x in ([0, 1, 5], [9, 4], [8, 0, 1, 2, 3], [[2, 0], [0, 0]])]
        metadata = AttentionMetadata.from_arrays(*arrays)
        assert (metadata.max_query_len, metadata.max_seq_len) == (4, 9)
        assert metadata.block_table.dtype == metadata.seq_lens.dtype == metadata.query_start_loc.dtype == torch.int32
        assert metadata.slot_mapping.dtype == torch.int64
