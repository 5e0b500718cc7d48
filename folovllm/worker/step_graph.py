"""Decode steps of a few sizes, in memory that never moves, which a GPU records once and replays. Chapter 14.

A decode step has one new token for each sequence, and much of its short time goes into calling operations one by one.
Recorded, they are all started by one call. But a recording always reads the same addresses, in the same shapes. So the
inputs are copied into buffers that never move, and a batch is filled up to the next of a few sizes. A row of padding is
a sequence of one token in a block that no request has: it must write its key and value somewhere. As in vLLM
(``v1/worker/gpu_model_runner.py``, ``compilation/cuda_graph.py``, 0.33.0).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from folovllm.attention import AttentionBackend, AttentionMetadata
from folovllm.config import EngineConfig
from folovllm.model.decoder import Decoder
from folovllm.sample.sampler import find_likeliest
from folovllm.utils import cdiv
from folovllm.worker.prepared_steps import PreparedSteps, StepOutputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepInputs:
    """What a decode step reads: one row for each sequence."""

    input_ids: Tensor
    """int64 ``[num_rows]``."""
    positions: Tensor
    """int64 ``[num_rows]``."""
    metadata: AttentionMetadata
    max_model_len: int
    """The longest that a sequence of a later step may be."""

    def rows(self, end: int, start: int = 0) -> StepInputs:
        """The rows from ``start`` to ``end``, in the same memory; ``query_start_loc`` is right only from row 0."""
        step, rows = self.metadata, slice(start, end)
        metadata = AttentionMetadata(
            step.query_start_loc[: end + 1],
            step.seq_lens[rows],
            step.slot_mapping[rows],
            step.block_table[rows],
            step.query_start_loc_cpu[: end + 1],
            step.seq_lens_cpu[rows],
        )
        return StepInputs(self.input_ids[rows], self.positions[rows], metadata, self.max_model_len)


Replay = Callable[[], StepOutputs]
"""Runs a step on what its inputs hold now."""
Recorder = Callable[[Decoder, AttentionBackend, StepInputs], Replay]
"""Makes a step on certain inputs repeatable."""


def replay_eagerly(decoder: Decoder, attention: AttentionBackend, inputs: StepInputs) -> Replay:
    """Records nothing: a replay calls one operation after the other. Tests use it, and CUDA graphs are taken of it."""

    def replay() -> StepOutputs:
        attention.begin(inputs.metadata)
        hidden = decoder(inputs.input_ids, inputs.positions, attention)
        logits = decoder.compute_logits(hidden)
        return StepOutputs(hidden, logits, *find_likeliest(logits))

    return replay


class CudaGraphs:
    """Records steps as CUDA graphs, which share their memory: the largest should be recorded first.

    Each keeps its own outputs: with sizes that double, all of them take at most twice as much as the largest's.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, decoder: Decoder, attention: AttentionBackend, inputs: StepInputs) -> Replay:
        """Captures a step."""
        step = replay_eagerly(decoder, attention, inputs)
        # What a backend plans for by the lengths in the CPU's memory must serve every later step.
        inputs.metadata.seq_lens_cpu[:] = inputs.max_model_len
        with torch.cuda.device(decoder.device):  # else a stream of the current GPU would be captured, and nothing in it
            self._stream = self._stream or torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                step()  # compiles kernels and allocates workspaces, which a capture must not do
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = step()
            self._pool = graph.pool()

        def replay() -> StepOutputs:
            graph.replay()
            return outputs

        return replay


def bucket_sizes(most: int) -> list[int]:
    """The sizes that batches are filled up to: 1, 2, 4, 8, … and ``most``.

    A decode step reads every weight however few rows it has, so up to some hundreds of rows padding costs little, and
    few sizes are recorded quickly.
    """
    return [*(2**i for i in range((most - 1).bit_length())), most]


class StepGraphs(PreparedSteps):
    """Runs decode steps that were recorded, one recording for each size of a batch.

    Args:
        decoder: the model, its head included.
        attention: over the cache. Rows of padding write to its last block.
        config: with ``max_model_len`` and ``max_num_batched_tokens`` filled in.
        recorder: records a size when it is first needed.
    """

    how, num_reserved_blocks = "recorded", 1

    @classmethod
    def unsupported(cls, backend_cls: type[AttentionBackend]) -> str | None:
        """A sentence that says why steps with such attention cannot be recorded; None if they can."""
        if not backend_cls.capturable:
            return (
                "a recorded step needs attention that reads the lengths of sequences from the GPU, which "
                f"{backend_cls.__name__} does not: set attention_backend='triton'"
            )
        return None

    def __init__(self, decoder: Decoder, attention: AttentionBackend, config: EngineConfig, recorder: Recorder) -> None:
        self.decoder: Decoder = decoder
        self.attention, self.recorder = attention, recorder
        scheduler, block_size = config.scheduler_config, config.cache_config.block_size
        max_model_len = cast(int, scheduler.max_model_len)
        reserved_block = attention.kv_cache.shape[attention.block_dim] - 1
        max_num_rows = min(scheduler.max_num_seqs, cast(int, scheduler.max_num_batched_tokens))
        self.sizes = bucket_sizes(max_num_rows)
        self.replays: dict[int, Replay] = {}
        """The recordings made so far, by size."""
        starts, shape = np.arange(max_num_rows + 1), (max_num_rows, cdiv(max_model_len, block_size))
        metadata = AttentionMetadata.from_arrays(
            starts,
            np.ones(max_num_rows, dtype=np.int64),
            np.full(max_num_rows, reserved_block * block_size),
            np.full(shape, reserved_block),
            decoder.device,
        )
        ids, positions = torch.zeros((2, max_num_rows), dtype=torch.int64, device=decoder.device)
        self.inputs = StepInputs(ids, positions, metadata, max_model_len)
        """The buffers; whatever is recorded reads their first rows."""
        self._padding = (0, 0, 1, reserved_block * block_size, reserved_block)
        self._num_used = 0  # rows that may hold something other than padding

    def bucket(self, num_rows: int) -> int:
        """The smallest size with room for ``num_rows`` sequences."""
        return next(size for size in self.sizes if size >= num_rows)

    @torch.inference_mode()
    def record_all(self) -> None:
        """Records all sizes, the largest first."""
        for size in reversed(self.sizes):
            self._record(size)
        logger.info("decode steps of %s rows were recorded", ", ".join(map(str, self.sizes)))

    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether a step is a decode step."""
        return metadata.max_query_len == 1

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> StepOutputs:
        """A step with one new token for each sequence; what it is given is copied."""
        num_rows = len(input_ids)
        size = self.bucket(num_rows)
        if size not in self.replays:
            self._record(size)
        self._fill(StepInputs(input_ids, positions, metadata, self.inputs.max_model_len))
        return StepOutputs(*(rows[:num_rows] for rows in self.replays[size]()))

    def _record(self, size: int) -> None:
        self._pad(0)
        self.replays[size] = self.recorder(self.decoder, self.attention, self.inputs.rows(size))
        self._num_used = size  # a recorder may change the lengths

    def _fill(self, step: StepInputs) -> None:
        """Copies a batch into the first rows; those behind become padding."""
        num_rows, width = step.metadata.block_table.shape
        into = self.inputs.rows(num_rows)
        *buffers, table = _tensors(into)
        for buffer, values in zip([*buffers, table[:, :width]], _tensors(step)):  # nobody reads behind a row's length
            buffer.copy_(values)
        into.metadata.seq_lens_cpu[:] = step.metadata.seq_lens_cpu
        self._pad(num_rows)

    def _pad(self, start: int) -> None:
        """Makes padding of the rows from ``start`` that are none yet."""
        if start < self._num_used:
            rows = self.inputs.rows(self._num_used, start)
            for buffer, value in zip(_tensors(rows), self._padding):
                buffer.fill_(value)
            rows.metadata.seq_lens_cpu.fill(1)
        self._num_used = start


class RecordedSteps(StepGraphs):
    """Decode steps that are all recorded as CUDA graphs when the engine starts."""

    def __init__(self, decoder: Decoder, attention: AttentionBackend, config: EngineConfig) -> None:
        super().__init__(decoder, attention, config, CudaGraphs())
        self.record_all()


def _tensors(inputs: StepInputs) -> list[Tensor]:
    """What changes from step to step, the block table last."""
    step = inputs.metadata
    return [inputs.input_ids, inputs.positions, step.seq_lens, step.slot_mapping, step.block_table]
