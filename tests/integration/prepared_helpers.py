"""Prepared steps on a CPU: random ones over a cache of its own, and engines that have them under random settings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from folovllm import LLMEngine, SamplingParams
from folovllm.attention import AttentionMetadata
from folovllm.attention.gather import GatherAttention
from folovllm.book import judges
from folovllm.llm import make_engine_config
from folovllm.tales import EMBEDDED_MODEL
from folovllm.utils import cdiv
from folovllm.worker import model_runner
from folovllm.worker.prepared_steps import PreparedSteps
from folovllm.worker.step_graph import Recorder, StepGraphs, replay_eagerly

MAX_MODEL_LEN = 64
MAX_TOKENS, NUM_PROMPTS = 12, 8
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True, "seed": 5}
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}  # its steps are no decode steps


def recording(recorder: Recorder) -> type[StepGraphs]:
    """Graphs whose sizes are recorded when they are first needed, without a GPU."""

    class Recording(StepGraphs):
        def __init__(self, decoder, attention, config) -> None:
            super().__init__(decoder, attention, config, recorder)

    return Recording


EAGER = recording(replay_eagerly)


def make_engine(steps_cls: type[PreparedSteps] = EAGER, **kwargs) -> LLMEngine:
    """An engine that has prepared steps on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "choose_prepared_steps", lambda is_eager, *_: None if is_eager else steps_cls)
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


def tell_alone() -> dict[tuple[str, int], list[list[int]]]:
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


class Batches:
    """Random decode steps over a cache of its own, beside what a decoder gives for each without them."""

    def __init__(
        self,
        steps_cls: type[PreparedSteps] = EAGER,
        num_layers: int = 4,
        tolerance: float = 1e-4,
        num_shared: int = 0,
        num_blocks: int = 16,
        **settings,
    ) -> None:
        self.tolerance, self.num_shared, self.num_blocks, self.block_size = tolerance, num_shared, num_blocks, 4
        engine = make_engine(block_size=4, num_blocks=num_blocks, **{"max_num_seqs": 7, **settings})
        engine.decoder.layers = engine.decoder.layers[:num_layers]
        self.decoder = engine.decoder
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
