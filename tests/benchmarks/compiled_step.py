"""What compiling a decode step gains on a CPU: ``python tests/benchmarks/compiled_step.py [MODEL …]``.

For each number of rows a step is run eagerly and compiled, in turn in one process. CPU time counts and not the clock's,
and of each turn the least, so that the ratio holds on a machine that others use. With several threads their time adds
up. Memory is that of two engines, one for each way. What serves one number of rows may serve the next, and a second run
finds on disk what the first has compiled, unless ``TORCHINDUCTOR_CACHE_DIR`` names an empty folder.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch

from folovllm import LLMEngine
from folovllm.attention import AttentionMetadata
from folovllm.config import CacheConfig
from folovllm.llm import make_engine_config
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils import cdiv
from folovllm.worker.compiled_step import CompiledSteps
from folovllm.worker.step_graph import StepInputs, replay_eagerly

ROWS = (1, 2, 4, 16)
STEPS_PER_TURN = 12
TURNS = 5


def least_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of the fastest of some runs."""
    found = []
    for _ in range(STEPS_PER_TURN):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def make_inputs(num_rows: int, context: int, num_blocks: int, block_size: int) -> StepInputs:
    """A step of sequences that have ``context`` tokens each, the new one included."""
    width = cdiv(context, block_size)
    table = np.arange(num_rows * width).reshape(num_rows, width) % num_blocks
    slots = table[:, -1] * block_size + (context - 1) % block_size
    lens = np.full(num_rows, context)
    metadata = AttentionMetadata.from_arrays(np.arange(num_rows + 1), lens, slots, table)
    positions = torch.full((num_rows,), context - 1)
    return StepInputs(torch.arange(num_rows) + 5, positions, metadata, width * block_size)


@torch.inference_mode()
def measure(engine: LLMEngine, steps: CompiledSteps, num_rows: int, context: int) -> str:
    """A line of the table."""
    attention = engine.runner.attention
    inputs = make_inputs(num_rows, context, attention.num_blocks, attention.block_size)
    eager = replay_eagerly(engine.decoder, attention, inputs)
    compiled = functools.partial(steps.run, inputs.input_ids, inputs.positions, inputs.metadata)
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    found = compiled()
    seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    expected = eager()
    pairs = [(least_seconds(eager), least_seconds(compiled)) for _ in range(TURNS)]
    gain = statistics.median(before / after for before, after in pairs)
    before, after = (1e3 * statistics.median(column) for column in zip(*pairs))
    error = float((expected.logits - found.logits).abs().max())
    memory = psutil.Process().memory_info().rss / 2**20
    return (
        f"| {num_rows} | {before:.2f} | {after:.2f} | {gain:.2f} x | {error:.1e} | {seconds:.0f} ({cpu_seconds:.0f}) "
        f"| {memory:,.0f} |"
    )


def make_engine(model: str, options: argparse.Namespace, enforce_eager: bool) -> LLMEngine:
    """An engine with room for the largest step."""
    config = make_engine_config(
        model,
        max_model_len=options.context,
        max_num_seqs=max(options.rows),
        num_blocks=max(options.rows) * cdiv(options.context, CacheConfig.block_size),
        dtype=options.dtype,
        quantization=options.quantization,
        enforce_eager=enforce_eager,
    )
    return LLMEngine(config, "cpu")


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=[str(EMBEDDED_MODEL)], help="folders")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=100, help="tokens of each sequence (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--quantization", help="of its weights, such as int8 (default: the checkpoint's own)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for model in options.models:
        # Each has its own, since weights of 8 bits may be packed in another order.
        engine, compiled = (make_engine(model, options, enforce_eager) for enforce_eager in (True, False))
        kinds = ", ".join(filter(None, [options.dtype, options.quantization]))
        print(f"\n{model}, {kinds}, context {options.context}, {options.threads} threads\n")
        print("| rows | eager, ms | compiled, ms | gain | largest error | to compile, s (of CPU) | memory, MiB |")
        print("|---|---|---|---|---|---|---|")
        steps = CompiledSteps(compiled.decoder, compiled.runner.attention, compiled.config)
        for num_rows in options.rows:
            print(measure(engine, steps, num_rows, options.context), flush=True)


if __name__ == "__main__":
    main()
