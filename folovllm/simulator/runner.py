"""A runner that computes nothing, and one that charges a clock for what it, or a real one, computes. Chapter 7."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from folovllm.config import EngineConfig
from folovllm.core.scheduler import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.served_model import ServedModel
from folovllm.engine.stats import StepStats
from folovllm.outputs import RunnerOutput
from folovllm.sampling_params import SamplingParams
from folovllm.simulator.clock import VirtualClock, to_us
from folovllm.simulator.cost import Cost, Roofline, StepCost, TimedStep
from folovllm.validation import require

if TYPE_CHECKING:
    from folovllm.worker.model_runner import Runner


class TokenRunner:
    """A `folovllm.worker.model_runner.Runner` without a model: each answer gets tokens of its own, always the same.

    Args:
        roofline: the model and the card, which say how many blocks there is room for.
        config: the engine's.
    """

    def __init__(self, roofline: Roofline, config: EngineConfig) -> None:
        self.roofline, self.config = roofline, config

    def count_blocks(self) -> tuple[int, int]:
        """KV blocks that the card has room for (or that the config asks for), and swap blocks in CPU memory.

        Raises:
            ValueError: if there is no room for a single block, or none for what the config asks for.
        """
        cache, scheduler, roofline = self.config.cache_config, self.config.scheduler_config, self.roofline
        num_tokens = scheduler.max_num_batched_tokens or 0
        room = roofline.num_blocks(cache.block_size, cache.gpu_memory_utilization, num_tokens)
        weights = f"{roofline.shape.name} with {roofline.shape.num_bytes / 2**30:.1f} GiB of weights"
        require(
            room > 0,
            f"{weights} leaves no room for a KV block of {cache.block_size} tokens beside steps of {num_tokens} in "
            f"{cache.gpu_memory_utilization:g} of {roofline.gpu.name}'s memory; take a larger card, several, or fewer "
            "bits",
        )
        most = roofline.num_blocks(cache.block_size, 1.0, num_tokens)
        require(
            cache.num_blocks is None or cache.num_blocks <= most,
            f"num_blocks must be at most {most}, for which {weights} leaves room in all of {roofline.gpu.name}'s "
            f"memory, got {cache.num_blocks}",
        )
        swap_bytes = cache.swap_space * 2**30 if scheduler.preemption_mode == "swap" else 0
        return cache.num_blocks or room, int(swap_bytes // roofline.kv_bytes(cache.block_size))

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """Does nothing: there are no keys and values."""

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """A token for each entry of ``sampled``: a function of the answer's name and the token's place."""
        vocab_size = self.roofline.shape.vocab_size
        sampled = scheduler_output.sampled
        token_ids = [[(crc32(seq.seq_id.encode()) + 40_503 * seq.get_len()) % vocab_size] for seq, _ in sampled]
        return RunnerOutput(token_ids, [None] * len(token_ids))


class CostRunner:
    """Lets another runner compute each step, and moves a clock by what the step would have taken.

    Args:
        runner: computes the steps.
        cost: says how long they take.
        clock: is moved.
        block_size: tokens per block, for what is swapped.
    """

    def __init__(self, runner: Runner, cost: Cost, clock: VirtualClock, block_size: int) -> None:
        self.runner, self.cost, self.clock, self.block_size = runner, cost, clock, block_size
        self.last_cost: StepCost | None = None
        """The cost of the last step."""

    def count_blocks(self) -> tuple[int, int]:
        """Those of the other runner."""
        return self.runner.count_blocks()

    def initialize_kv_cache(self, num_blocks: int, num_swap_blocks: int) -> None:
        """The other runner's."""
        self.runner.initialize_kv_cache(num_blocks, num_swap_blocks)

    def run(self, scheduler_output: SchedulerOutput) -> RunnerOutput:
        """Computes a step and charges for it."""
        output = self.runner.run(scheduler_output)
        num_swapped = len(scheduler_output.swap_out) + len(scheduler_output.swap_in)
        self.last_cost = self.cost.step(
            scheduler_output.num_new_tokens,
            [seq.num_computed_tokens for seq in scheduler_output.seqs],
            len(scheduler_output.get_sampled_rows()),
            num_swapped * self.block_size,
        )
        self.clock.advance(to_us(self.last_cost.total))
        return output


def make_engine(config: EngineConfig, roofline: Roofline, cost: Cost | None = None) -> LLMEngine:
    """The real engine, scheduler and cache on a runner without a model and a virtual clock that begins at 0.

    Args:
        config: the engine's.
        roofline: the model and the card.
        cost: says how long steps take; None: the roofline.

    Raises:
        ValueError: what `LLMEngine` raises; if the card has no room for the model; if tokens are to be guessed.
    """
    require(
        config.speculative_config is None,
        "a simulated model says nothing that could be guessed: leave speculative_config out, or charge an engine that "
        "has a model",
    )
    clock = VirtualClock()
    runner = CostRunner(TokenRunner(roofline, config), cost or roofline, clock, config.cache_config.block_size)
    shape = roofline.shape
    model = ServedModel(runner, shape.vocab_size, shape.max_model_len, default_params=SamplingParams(detokenize=False))
    return LLMEngine(config, clock=clock, model=model)


def charge(engine: LLMEngine, cost: Cost) -> VirtualClock:
    """Puts an idle engine on a virtual clock: it computes as before, and each step takes what ``cost`` says.

    Args:
        engine: with or without a real model.
        cost: such as a `Roofline` of another model on a card that is not there.

    Returns:
        the clock, which begins at 0. `folovllm.outputs.RequestMetrics` and statistics are in seconds of it from now on.

    Raises:
        ValueError: if the engine has unfinished requests, which arrived by another clock.
    """
    require(not engine.scheduler.requests, "an engine must have no unfinished requests when its clock is exchanged")
    clock = VirtualClock()
    runner = engine.runner.runner if isinstance(engine.runner, CostRunner) else engine.runner
    engine.clock, engine.runner = clock, CostRunner(runner, cost, clock, engine.cache.block_size)
    return clock


def record_steps(engine: LLMEngine) -> list[TimedStep]:
    """A list to which each further step of an engine is added, with the seconds that all of it took."""
    steps: list[TimedStep] = []

    def record(scheduler_output: SchedulerOutput, runner_output: RunnerOutput, stats: StepStats) -> None:
        num_rows, seconds = len(scheduler_output.get_sampled_rows()), sum(stats.seconds.values())
        steps.append(
            TimedStep(scheduler_output.num_new_tokens, scheduler_output.num_computed_tokens, num_rows, seconds)
        )

    engine.step_hooks.append(record)
    return steps
