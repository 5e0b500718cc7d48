"""Judges of what computes: a runner, an attention backend, a reader of weights; with the embedded model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from folovllm.attention import AttentionBackend
from folovllm.book.exercises.verdict import NotYet, blame_part, expect, expect_subclass
from folovllm.book.faults import replace_part
from folovllm.book.few_bits import WeightReader, read_decoder, write_default_model
from folovllm.book.judges.pretended import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    Arrival,
    check_outputs,
    drive,
    tokenizer,
)
from folovllm.book.judges.scheduling import Watch
from folovllm.core.kv_cache import KVCacheManager
from folovllm.core.scheduler import Scheduler
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.served_model import ServedModel
from folovllm.llm import make_engine_config
from folovllm.model.packing import QuantizedWeight, column_groups, pack_gptq
from folovllm.sampling_params import SamplingParams
from folovllm.tales import EMBEDDED_MODEL
from folovllm.worker.model_runner import ModelRunner

SEEDED = [
    Arrival(
        f"r{i}",
        list(range(10 + 7 * i, 10 + 7 * i + length)),
        SamplingParams(temperature=1.0, seed=i, n=n, max_tokens=num, ignore_eos=True, detokenize=False),
        step,
    )
    for i, (length, n, num, step) in enumerate([(12, 1, 7, 0), (14, 2, 4, 0), (16, 1, 3, 1)])
]
"""Requests whose answers are drawn, with seeds."""


@cache
def _embedded_engine(guessing: bool = False) -> LLMEngine:
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    config = make_engine_config(
        str(EMBEDDED_MODEL),
        max_model_len=64,
        block_size=16,
        num_blocks=16,
        speculative_config=lookup if guessing else None,
    )
    return LLMEngine(config, "cpu")


def _engine_with_embedded_model(settings: Mapping[str, Any]) -> LLMEngine:
    """An engine of its own, without loading the model again."""
    ours = _embedded_engine()
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=MAX_MODEL_LEN, **settings)
    runner = ModelRunner(ours.decoder, cast(ModelRunner, ours.runner).sampler, config)
    return LLMEngine(config, model=ServedModel(runner, VOCAB_SIZE, 512, tokenizer(), decoder=ours.decoder))


@cache
def _repeating() -> list[Arrival]:
    """Requests like `SEEDED`, in whose answers much comes again, so that there is something to guess."""
    prompt = tokenizer().encode("Once upon a time, in the forest, there lived a little fox named Mira. Mira")
    return [replace(a, prompt=prompt, params=replace(a.params, max_tokens=24)) for a in SEEDED]


@cache
def _tokens_alone(guessing: bool = False) -> dict[tuple[str, int], list[int]]:
    """What the embedded model answers to each request alone, by our own runner, which guesses nothing."""
    engine = replace_part(_embedded_engine(), ModelRunner)
    arrivals = _repeating() if guessing else SEEDED
    outputs = [drive(engine, [Arrival(a.name, a.prompt, a.params)])[a.name] for a in arrivals]
    return {(o.request_id, answer.index): answer.token_ids for o in outputs for answer in o.outputs}


def judge_runner(attempt: type, guessing: bool = False) -> None:
    """Lets a reader's runner compute seeded requests with the embedded model.

    Args:
        attempt: a subclass of `folovllm.worker.model_runner.ModelRunner`.
        guessing: whether tokens are guessed, in requests that repeat themselves.

    Raises:
        NotYet: if somebody gets other tokens than alone.
    """
    expect_subclass(attempt, ModelRunner)
    alone, arrivals = _tokens_alone(guessing), _repeating() if guessing else SEEDED
    try:
        engine = replace_part(_embedded_engine(guessing), attempt)
        Watch(engine)
        right = "our own runner gives it alone"
        check_outputs(arrivals, drive(engine, arrivals), lambda a, index: alone[a.name, index], right)
    except NotYet as error:
        raise NotYet(f"{str(error).rstrip('.')}.") from error
    except Exception as error:
        raise NotYet(f"{blame_part(error)}.") from error
    finally:
        _forget_requests(_embedded_engine(guessing))


def _forget_requests(engine: LLMEngine) -> None:
    """Ends what a broken part has left behind, takes its outputs, and puts our own parts back."""
    for name in list(engine.output_processor.states):
        engine.abort_request(name)
    engine.step()  # with nothing to compute
    for part in (KVCacheManager, Scheduler, ModelRunner):
        replace_part(engine, part)


ATTENTION_SETTINGS: tuple[dict[str, Any], ...] = (
    {"block_size": 16, "num_blocks": 16},
    {
        "block_size": 3,
        "num_blocks": 40,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 7,
        "enable_prefix_caching": True,
    },
    {"block_size": 5, "num_blocks": 13, "max_num_batched_tokens": 64},
)
"""Fields of the configs for a judge of attention: whole prompts, chunks of them, and too few blocks for all."""


def judge_attention(attempt: type, settings: SequenceOf[Mapping[str, Any]] = ATTENTION_SETTINGS) -> None:
    """Lets a reader's attention backend serve seeded requests with the embedded model.

    Args:
        attempt: a subclass of `folovllm.attention.AttentionBackend`.
        settings: fields of the configs, for one run each.

    Raises:
        NotYet: if somebody gets other tokens than alone and by our own backend.
    """
    expect_subclass(attempt, AttentionBackend)
    alone = _tokens_alone()
    for each in settings:
        shown = ", ".join(f"{name}={value!r}" for name, value in each.items())
        try:
            engine = replace_part(_engine_with_embedded_model(each), attempt)
            check_outputs(SEEDED, drive(engine, SEEDED), lambda a, index: alone[a.name, index])
        except NotYet as error:
            raise NotYet(f"{str(error).rstrip('.')} ({shown}).") from error
        except Exception as error:
            raise NotYet(f"your code raised {type(error).__name__}: {error} ({shown}).") from error


def judge_reader(attempt: type) -> None:
    """Reads weights of both versions of GPTQ's format, then lets an engine answer with the embedded model's.

    Args:
        attempt: a subclass of `folovllm.book.few_bits.WeightReader`.

    Raises:
        NotYet: if a zero point or a token is another one.
    """
    expect_subclass(attempt, WeightReader)
    for seed, (num_out, num_groups) in enumerate(((8, 1), (24, 3), (16, 2), (40, 1))):
        weight = _random_weight(num_out, num_groups, seed)
        for version in (2, 1):
            groups = "1 group" if num_groups == 1 else f"{num_groups} groups"
            tensors, case = pack_gptq(weight, version), f"{num_out} rows, {groups}, version {version}"
            try:
                zeros = attempt().read(tensors, version).zeros
            except Exception as error:
                raise NotYet(f"{case}: {blame_part(error)}.") from error
            for row, (right, read) in enumerate(zip(weight.zeros.tolist(), zeros.tolist(), strict=True)):
                expect(right == read, f"{case}: the zero points of row {row} are {right}, yours reads {read}.")
    for version in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            found = _tokens_read(Path(folder) / "model", attempt, version)
        right = _tokens_read_by_us()
        expect(found == right, f"in the engine, a model in version {version} says other tokens than by our own reader.")


def _random_weight(num_out: int, num_groups: int, seed: int) -> QuantizedWeight:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        torch.randint(0, 16, (num_out, 16 * num_groups), generator=generator, dtype=torch.uint8),
        torch.rand(num_out, num_groups, generator=generator),
        torch.randint(1, 16, (num_out, num_groups), generator=generator, dtype=torch.uint8),
        column_groups(16 * num_groups, num_groups),
    )


@cache
def _tokens_read_by_us() -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        return _tokens_read(Path(folder) / "model", WeightReader, 1)


def _tokens_read(folder: Path, reader: type[WeightReader], version: int) -> list[int]:
    """What the embedded model says, rounded to 4 bits, written in one version, and read by a reader."""
    import torch

    write_default_model(folder, version)
    decoder = read_decoder(folder, reader(), 64)
    config = make_engine_config(str(EMBEDDED_MODEL), max_model_len=64, num_blocks=8)
    runner = ModelRunner(decoder, cast(ModelRunner, _embedded_engine().runner).sampler, config)
    engine = LLMEngine(config, model=ServedModel(runner, VOCAB_SIZE, 512, tokenizer(), decoder=decoder))
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    with torch.inference_mode():
        output = drive(engine, [Arrival("r", list(range(10, 22)), greedy)])["r"]
    return output.outputs[0].token_ids
