"""Recorded decode steps on a CPU, and random ones over a cache of its own, for the tests of what records them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from folovllm import LLMEngine
from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import GatherAttention
from folovllm.llm import make_engine_config
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils import cdiv
from folovllm.worker import model_runner
from folovllm.worker.recorded_steps import RecordedSteps
from folovllm.worker.step_graph import Recorder, StepGraphs, replay_eagerly

MAX_MODEL_LEN = 64


def recording(recorder: Recorder) -> type[StepGraphs]:
    """Graphs whose sizes are recorded when they are first needed, without a GPU."""

    class Recording(StepGraphs):
        def __init__(self, decoder, attention, config) -> None:
            super().__init__(decoder, attention, config, recorder)

    return Recording


EAGER = recording(replay_eagerly)


def make_engine(steps_cls: type[RecordedSteps] = EAGER, **kwargs) -> LLMEngine:
    """An engine that records decode steps on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "choose_recorded_steps", lambda is_eager, *_: None if is_eager else steps_cls)
        config = make_engine_config(
            str(EMBEDDED_MODEL), **{"max_model_len": MAX_MODEL_LEN, "enforce_eager": False, **kwargs}
        )
        return LLMEngine(config, "cpu")


class Batches:
    """Random decode steps over a cache of its own, beside what a decoder gives for each without them."""

    def __init__(
        self,
        steps_cls: type[RecordedSteps] = EAGER,
        num_layers: int = 4,
        tolerance: float = 1e-4,
        num_shared: int = 0,
        **settings,
    ) -> None:
        block_size, self.tolerance, self.num_shared = 4, tolerance, num_shared
        engine = make_engine(block_size=block_size, num_blocks=16, **{"max_num_seqs": 7, **settings})
        engine.decoder.layers = engine.decoder.layers[:num_layers]
        self.decoder, self.num_blocks, self.block_size = engine.decoder, 16, block_size
        self.cache = engine.runner.kv_cache
        self.cache.copy_(torch.randn(self.cache.shape, generator=torch.Generator().manual_seed(0)))
        self.plain = GatherAttention(self.cache.clone())
        self.steps = steps_cls(self.decoder, GatherAttention(self.cache), engine.config)

    def make(self, lens: list[int], seed: int = 0):
        """A step of sequences of these lengths, each with blocks of its own after those that they share."""
        rng = np.random.default_rng(seed)
        shared, order = np.split(rng.permutation(self.num_blocks), [self.num_shared])
        widths = [cdiv(n, self.block_size) - self.num_shared for n in lens]
        ends = np.cumsum(widths)
        tables = [[*shared, *order[e - w : e], *[order[e - 1]] * (max(widths) - w)] for w, e in zip(widths, ends)]
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
        hidden, logits, token_ids, largest = self.steps.run(ids, positions, metadata)
        near, logits_near = ({"atol": atol, "rtol": self.tolerance} for atol in (self.tolerance, 10 * self.tolerance))
        torch.testing.assert_close(hidden, expected, **near)
        torch.testing.assert_close(logits, self.decoder.compute_logits(expected), **logits_near)
        assert torch.equal(token_ids, logits.argmax(dim=-1)) and torch.equal(largest, logits.amax(dim=-1))
        changed = (self.cache != before).flatten(3, 4).any(dim=-1).flatten(0, 2).any(dim=0).nonzero().flatten().tolist()
        reserved_slot = self.num_blocks * self.block_size
        assert {*changed} <= {*metadata.slot_mapping.tolist(), reserved_slot}
        torch.testing.assert_close(self.cache[:, :, :, :-1], self.plain.kv_cache[:, :, :, :-1], **near)
