"""What do fewer bits cost in quality? ``python tests/benchmarks/fewer_bits.py [embedded] [FOLDER …]``.

The embedded model is held against the grammar: KL(grammar || model), and questions that are answered right. Any other
checkpoint, such as one of ``foreign_model.py``, reads this book: it is calibrated on the prose of the chapters with
even numbers, and its perplexity is measured on that of the others. A folder that another program has quantized from it,
and that this engine can run, is measured beside it with ``--also``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from folovllm.__main__ import _cut_texts
from folovllm.book.few_bits import TruthMeter, make_decoder, quantize_model
from folovllm.config import ModelConfig
from folovllm.model.decoder import Decoder, load_decoder
from folovllm.model.gptq import attend_within
from folovllm.model_loader import ModelLoader
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.evaluate import calibration

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PIECE, NUM_PIECES = 512, 8
"""Tokens of a piece of text that perplexity is measured on, and how many pieces there are."""


def prose(remainder: int) -> str:
    """The text of the chapters whose number has this remainder by two, without code and tags."""
    cells = [
        "".join(cell["source"])
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        if int(path.name[:2]) % 2 == remainder
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    ]
    text = re.sub(r"<[^>]+>|\]\([^)]*\)|\[", "", "\n\n".join(cells))
    return re.sub(r"\n{3,}", "\n\n", text)


@torch.inference_mode()
def perplexity(decoder: Decoder, pieces: Sequence[Sequence[int]]) -> float:
    """exp of the mean of ``-log p`` over all tokens but the first of each piece."""
    nats, num_tokens = 0.0, 0
    for piece in pieces:
        ids = torch.tensor(piece)
        hidden = decoder(ids, torch.arange(len(ids)), attend_within([len(ids)]))
        nats += float(F.cross_entropy(decoder.compute_logits(hidden)[:-1].float(), ids[1:], reduction="sum"))
        num_tokens += len(ids) - 1
    return math.exp(nats / num_tokens)


def ways(bits: Sequence[int], group_sizes: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Bits, group size and method, from many bits to few."""
    yield from ((width, size, method) for width in bits for size in group_sizes for method in ("rtn", "gptq"))


def measure_embedded() -> None:
    """KL(grammar || model) in nats per conversation, and how many of its questions are answered right."""
    loader = ModelLoader(ModelConfig(str(EMBEDDED_MODEL), dtype="float32"))
    checkpoint, tokenizer = loader.open("cpu"), loader.load_tokenizer()
    sequences = [tokenizer(document.text)["input_ids"] for document in calibration()]
    meter = TruthMeter(tokenizer, 100)
    print("| weights | KL, nats | answers right of 100 |\n|---|---|---|")
    truth = meter.measure(make_decoder(checkpoint))
    print(f"| float32 | {truth.kl:.3f} | {truth.num_right} |")
    for bits, group_size, method in ways((8, 6, 5, 4, 3, 2), (32, 128)):
        layers = quantize_model(checkpoint, sequences, method, bits, group_size)
        truth = meter.measure(make_decoder(checkpoint, layers))
        print(f"| {bits} bits, groups of {group_size}, {method} | {truth.kl:.3f} | {truth.num_right} |", flush=True)


def measure_foreign(folder: str, also: Sequence[str]) -> None:
    """Perplexity on this book, as it is and with 4 bits."""
    loader = ModelLoader(ModelConfig(folder, dtype="float32"))
    checkpoint, tokenizer = loader.open("cpu"), loader.load_tokenizer()
    sequences = _cut_texts(tokenizer, [prose(0)], PIECE)
    pieces = _cut_texts(tokenizer, [prose(1)], PIECE)[:: 32 // NUM_PIECES]
    print(f"{sum(map(len, sequences)):,} tokens of calibration, {sum(map(len, pieces)):,} to measure on")
    print("| weights | perplexity | loss | CPU s |\n|---|---|---|---|")
    whole = perplexity(make_decoder(checkpoint), pieces)
    print(f"| float32 | {whole:.3f} | | |", flush=True)
    found = perplexity(load_decoder(ModelLoader(ModelConfig(folder, quantization="int8")).open("cpu")), pieces)
    print(f"| 8 bits, activations too (`int8`) | {found:.3f} | {found - whole:.3f} | |", flush=True)
    for bits, group_size, method in ways((4,), (32,)):
        before = time.process_time()
        layers = quantize_model(checkpoint, sequences if method == "gptq" else [[0]], method, bits, group_size)
        taken = time.process_time() - before
        found = perplexity(make_decoder(checkpoint, layers), pieces)
        name = f"{bits} bits, groups of {group_size}, {method}"
        print(f"| {name} | {found:.3f} | {found - whole:.3f} | {taken:.0f} |", flush=True)
    for other in also:
        quantized = ModelLoader(ModelConfig(other, dtype="float32")).open("cpu")
        found = perplexity(load_decoder(quantized), pieces)
        print(f"| {Path(other).name} | {found:.3f} | {found - whole:.3f} | |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=["embedded"], help="embedded, or folders of checkpoints")
    parser.add_argument("--also", nargs="*", default=[], metavar="FOLDER", help="quantized from the last of them")
    parser.add_argument("--write-calibration", type=Path, metavar="FILE", help="write the text that others are given")
    args = parser.parse_args()
    if args.write_calibration is not None:
        args.write_calibration.write_text(prose(0), encoding="utf-8")
        sys.exit()
    for model in args.models:
        if model == "embedded":
            measure_embedded()
        else:
            measure_foreign(model, args.also if model == args.models[-1] else ())


if __name__ == "__main__":
    main()
