"""What structured output costs: ``python tests/benchmarks/structured.py [PART …] [--tokenizer FOLDER]``.

Parts, all of them when none is named:

compile   four grammars, each with its first mask, which is computed with it; then the same once more, from the cache
masks     a mask and a token for every token of an answer to each of them: the median, and the slowest in a hundred
step      a step of 32 answers with masks, of the embedded model and of one of Qwen3-0.6B's shape, and the masks' share

Qwen's tokenizer is not at hand, so one of its kind and size (byte-level BPE, 151,936 ids) is trained on the sources of
the installed packages, in a minute or two; ``--tokenizer FOLDER`` keeps it there for the next run. The share is that of
`fill_bitmasks` and `apply_grammar_bitmask` in `LLMEngine.step`. On a CPU they run one after the other with the model; a
GPU computes the forward pass while the first of them runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from side_by_side import print_table, verdict
from throughput import make_large_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from folovllm import LLM, SamplingParams, StructuredOutputsParams
from folovllm.sample import sampler, structured_output
from folovllm.sample.structured_output import GuidanceBackend, fill_bitmasks
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.grammar import CARD_SLOTS

PARTS = ("compile", "masks", "step")
VOCAB_SIZE, NUM_ROWS = 151_936, 32
TARGET = 0.05  # of a step of the larger model
CORPUS_BYTES = 40_000_000
CARD = {
    "type": "object",
    "properties": {slot: {"type": "string", "maxLength": 24} for slot in CARD_SLOTS},
    "required": list(CARD_SLOTS),
    "additionalProperties": False,
}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}}
ASKED: dict[str, tuple[StructuredOutputsParams, str]] = {
    "a card of eight strings": (
        StructuredOutputsParams(json=CARD),
        json.dumps({slot: f"the {slot}" for slot in CARD_SLOTS}),
    ),
    "any JSON object": (
        StructuredOutputsParams(json_object=True),
        json.dumps({"people": [{"name": "Mira", "age": 7, "likes": ["bread", None, 1.5e3]}] * 3}),
    ),
    "a list of people": (
        StructuredOutputsParams(json={"type": "array", "items": PERSON}),
        json.dumps([{"name": f"person number {i}", "age": 7 * i} for i in range(8)]),
    ),
    "a date by a regular expression": (StructuredOutputsParams(regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}"), "2026-11-26"),
}
"""What is asked for, and an answer to it."""


def sources() -> Iterator[str]:
    """Texts of the installed packages, as many as the tokenizer is trained on."""
    left = CORPUS_BYTES
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        left -= len(text)
        if left < 0:
            return
        yield text


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE with Qwen's way to split a text, and as many tokens as its model has logits."""
    tokenizer = Tokenizer(models.BPE())
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Milliseconds, and what it gives."""
    start = time.perf_counter()
    found = function(*args)
    return (time.perf_counter() - start) * 1000, found


def part_compile(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Compiles each grammar twice for each tokenizer."""
    rows = []
    for name, tokenizer in tokenizers.items():
        seconds, backend = timed(GuidanceBackend, tokenizer, len(tokenizer), [tokenizer.eos_token_id])
        rows.append([f"{name}: reading the tokenizer, once", f"{seconds:.0f}", ""])
        for what, (asked, _) in ASKED.items():
            times = [timed(backend.compile_grammar, asked)[0] for _ in range(2)]
            rows.append([f"{name}: {what}", *(f"{ms:.2f}" for ms in times)])
    print_table(["compile, ms", "first", "again"], rows)


def part_masks(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Walks along an answer to each grammar, three times: what a parser has seen it need not work out again."""
    rows = []
    for name, tokenizer in tokenizers.items():
        backend = GuidanceBackend(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
        for what, (asked, text) in ASKED.items():
            masks, moves = [], []
            for _ in range(3):
                grammar = backend.compile_grammar(asked)
                for token_id in tokenizer.encode(text, add_special_tokens=False):
                    masks.append(timed(fill_bitmasks, [grammar])[0] * 1000)
                    ms, accepted = timed(grammar.accept_tokens, [token_id])
                    assert accepted
                    moves.append(ms * 1000)
            slowest = statistics.quantiles(masks, n=100)[-1]
            rows.append(
                [f"{name}: {what}", *(f"{us:.0f}" for us in (*map(statistics.median, (masks, moves)), slowest))]
            )
    print_table(["one row, µs", "mask", "token", "slowest mask in 100"], rows)


def part_step(folders: dict[str, Path]) -> None:
    """Cards for 32 requests at once."""
    rows = []
    for name, folder in folders.items():
        llm = LLM(str(folder), device="cpu", dtype="float32", max_model_len=512, num_blocks=32 * NUM_ROWS)
        params = SamplingParams(
            temperature=1, seed=0, max_tokens=24, structured_outputs=ASKED["a card of eight strings"][0]
        )
        prompts = [[5 + i] * 8 for i in range(NUM_ROWS)]
        spent: dict[str, float] = {}
        with (
            mock.patch.multiple(
                structured_output, fill_bitmasks=adding(structured_output.fill_bitmasks, "fill", spent)
            ),
            mock.patch.multiple(sampler, apply_grammar_bitmask=adding(sampler.apply_grammar_bitmask, "apply", spent)),
        ):
            compiling, _ = timed(llm.engine.input_processor._compile_grammar, params)
            llm.generate(prompts, params, use_tqdm=False)
            llm.engine.steps.clear()
            spent.clear()
            llm.generate(prompts, params, use_tqdm=False)
        steps = llm.engine.stats()
        whole = sum(sum(step.seconds.values()) for step in steps) * 1000
        share = sum(spent.values()) / whole
        rows.append(
            [
                name,
                f"{compiling:.0f}",
                f"{whole / len(steps):.1f}",
                *(f"{spent[part] / len(steps):.2f}" for part in ("fill", "apply")),
                f"{share:.1%}",
                verdict(share <= TARGET) if folder != EMBEDDED_MODEL else "",
            ]
        )
    print_table(["32 rows, ms", "compile", "step", "fill", "apply", "share", f"at most {TARGET:.0%}"], rows)


def adding(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The function, whose milliseconds are added up under a name."""

    def run(*args: Any) -> Any:
        ms, found = timed(function, *args)
        spent[name] = spent.get(name, 0.0) + ms
        return found

    return run


def make_model(folder: Path, weights: Path | None, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A checkpoint of Qwen3-0.6B's shape whose tokenizer is of its size; its weights are linked if there are some."""
    folder.mkdir()
    if weights is None:
        make_large_checkpoint(folder)
    else:
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to((weights / name).resolve())
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where the trained tokenizer is kept")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="weights of Qwen3-0.6B's shape; left out: made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.tokenizer or Path(name) / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(folder)
        large = AutoTokenizer.from_pretrained(folder)
        tokenizers = {"embedded": AutoTokenizer.from_pretrained(EMBEDDED_MODEL), f"{len(large):,} ids": large}
        for part in args.parts or PARTS:
            if part == "step":
                model = make_model(Path(name) / "model", args.model, large)
                part_step({"embedded": EMBEDDED_MODEL, "Qwen3-0.6B's shape": model})
            else:
                {"compile": part_compile, "masks": part_masks}[part](tokenizers)
            print()


if __name__ == "__main__":
    main()
