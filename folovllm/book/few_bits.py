"""The embedded model in fewer bits, and how far it is from the truth then. Chapter 15.

`make_decoder` takes weights of any width from 2 to 8 bits as the float32 numbers that they stand for, so that one plain
decoder can be measured with all of them. `TruthMeter` is the book's measure of quality, KL(grammar || model).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from folovllm.config import ModelConfig
from folovllm.model.checkpoint import Checkpoint, iterate_weights
from folovllm.model.decoder import Decoder, DecoderConfig
from folovllm.model.gptq import (
    PRODUCTS,
    Calibration,
    QuantizedLayer,
    attend_within,
    choose_method,
    quantize_layers,
    quantize_weight,
)
from folovllm.model.hf_config import read_json
from folovllm.model.packing import GPTQ_ZEROS_OFFSET, QuantizedWeight, unpack_gptq, unpack_int4
from folovllm.model.quantized_files import quantize_checkpoint
from folovllm.model_loader import ModelLoader
from folovllm.tales import default_model
from folovllm.tales.evaluate import ASSISTANT, held_out
from folovllm.tales.grammar import IM_END, continuations


def open_default_model() -> Checkpoint:
    """The checkpoint that the notebooks run on, for reading it as float32."""
    return ModelLoader(ModelConfig(default_model(), dtype="float32")).open("cpu")


def make_decoder(checkpoint: Checkpoint, layers: Sequence[QuantizedLayer] = ()) -> Decoder:
    """A decoder in float32 with a checkpoint's weights, those that were quantized in place of their own."""
    config = DecoderConfig.from_hf(checkpoint.hf_config)
    decoder = Decoder(config, min(checkpoint.max_model_len, 2048), torch.float32)
    decoder.load_weights(iterate_weights(checkpoint))
    for layer in layers:
        decoder.load_weights(
            (f"{name}.weight", weight.dequantize(torch.float32)) for name, weight in layer.weights.items()
        )
    decoder.process_weights_after_loading()
    return decoder


@dataclass(frozen=True)
class Truth:
    """How far a model is from the grammar."""

    kl: float
    """KL(grammar || model) in nats per conversation."""
    num_right: int
    """Questions about the tale that are answered right, greedily."""


class TruthMeter:
    """KL(grammar || model), exactly at every place of some conversations, and the answers that come out right.

    Args:
        tokenizer: of the model.
        num_documents: conversations, each with a tale, a question about it and its card.
    """

    def __init__(self, tokenizer: Any, num_documents: int = 16) -> None:
        self.documents = [document.text for document in held_out("chat", num_documents)]
        self.sequences: list[list[int]] = []
        rows: list[int] = []
        tokens: list[int] = []
        probs: list[float] = []
        self._answers: list[list[int]] = []
        start = 0
        for text in self.documents:
            encoded = tokenizer(text, return_offsets_mapping=True)
            token_ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
            for place, truth in enumerate(_truths(text, token_ids, ends, tokenizer), start):
                rows += [place] * len(truth)
                tokens += truth.keys()
                probs += truth.values()
            self._answers.append([start + place for place in _answer_places(text, ends)])
            self.sequences.append(token_ids)
            start += len(token_ids)
        self._rows, self._tokens, self._probs = torch.tensor(rows), torch.tensor(tokens), torch.tensor(probs)

    @torch.inference_mode()
    def measure(self, decoder: Decoder) -> Truth:
        """Runs the model once over the conversations."""
        lengths = [len(sequence) for sequence in self.sequences]
        input_ids = torch.tensor([token_id for sequence in self.sequences for token_id in sequence])
        positions = torch.cat([torch.arange(length) for length in lengths])
        there = input_ids.to(decoder.device), positions.to(decoder.device)
        logits = decoder.compute_logits(decoder(*there, attend_within(lengths))).cpu()
        logprobs = logits.double().log_softmax(-1)[self._rows, self._tokens]
        kl = float((self._probs * (self._probs.log() - logprobs)).sum()) / len(lengths)
        # Greedily every token of an answer is written if each is the likeliest after those before it.
        is_right = logits[:-1].argmax(-1) == input_ids[1:]
        return Truth(kl, sum(bool(is_right[places].all()) for places in self._answers))


def _truths(text: str, token_ids: list[int], ends: list[int], tokenizer: Any) -> Iterator[dict[int, float]]:
    """The grammar's probability of each next token, after every token of a text but the last."""
    options: dict[tuple[int, ...], float] = {}  # the tokens of each continuation from a place on, and its probability
    begun = 0
    for place in range(len(token_ids) - 1):
        so_far = tuple(token_ids[begun : place + 1])
        options = {option: p for option, p in options.items() if option[: len(so_far)] == so_far}
        if so_far in options or not options:  # the continuation has ended, or another tokenizer cuts texts elsewhere
            begun, so_far = place + 1, ()
            options = {tuple(tokenizer.encode(t, add_special_tokens=False)): p for t, p in _continue(text, ends[place])}
        truth: dict[int, float] = {}
        for option, p in options.items():
            if len(option) > len(so_far):
                truth[option[len(so_far)]] = truth.get(option[len(so_far)], 0.0) + p / sum(options.values())
        yield truth or {token_ids[place + 1]: 1.0}


def _continue(text: str, end: int) -> Iterable[tuple[str, float]]:
    """What may come after the beginning of a text; nothing where it is not one of the grammar's."""
    try:
        return continuations(text[:end]).items()
    except ValueError:
        return ()


def _answer_places(text: str, ends: Sequence[int]) -> list[int]:
    """The places before each token of a conversation's answer, and before the marker that ends it."""
    first = [i for i in range(len(text)) if text.startswith(ASSISTANT, i)][1] + len(ASSISTANT)
    last = text.index(IM_END, first) + len(IM_END)
    return [place for place, end in enumerate(ends) if first <= end < last]


def read_weight(checkpoint: Checkpoint, module: str) -> Tensor:
    """One weight of a checkpoint in float32, ``[num_out, num_in]``, by the name of its module."""
    return dict(iterate_weights(checkpoint, f"{module}.weight"))[f"{module}.weight"].float()


def collect_hessians(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], layer: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight of each product of a layer, and the Hessian of its inputs; the layers before it are rounded to 8 bits.

    Args:
        checkpoint: the model.
        sequences: the calibration, token ids of each text.
        layer: its number.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def look(weight: Tensor, hessian: Tensor) -> QuantizedWeight:
        seen.append((weight, hessian))
        return quantize_weight(weight, None, 8, -1)

    calibration = Calibration(checkpoint, sequences)
    for index in range(layer + 1):
        calibration.quantize_layer(index, look)
    return dict(zip(PRODUCTS, seen[-len(PRODUCTS) :], strict=True))


class WeightReader:
    """Reads the weights of a folder in GPTQ's format, in steps of which each can be replaced."""

    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        """The zero points, uint8 ``[num_out, num_groups]``.

        Args:
            qzeros: int32 ``[num_groups, num_out / 8]``, as in the file.
            num_out: rows of the weight.
            version: 1 where the file has each zero point less one, else 2.
        """
        if version == 1:
            qzeros = qzeros + GPTQ_ZEROS_OFFSET
        return unpack_int4(qzeros, num_out).T.contiguous()

    def read(self, tensors: Mapping[str, Tensor], version: int) -> QuantizedWeight:
        """A weight, from its tensors in the file."""
        weight = unpack_gptq(tensors, version)
        return replace(weight, zeros=self.read_zeros(tensors["qzeros"], len(weight.values), version))


def read_decoder(folder: Path, reader: WeightReader, num_positions: int) -> Decoder:
    """A decoder in float32 with the weights of a folder in GPTQ's format, by a reader.

    Raises:
        ValueError: if the folder is in another format.
    """
    checkpoint = ModelLoader(ModelConfig(str(folder), dtype="float32")).open("cpu")
    config = checkpoint.quantization
    if config is None or config.method != "gptq":
        raise ValueError(f"{folder} must be in GPTQ's format")
    decoder = Decoder(DecoderConfig.from_hf(checkpoint.hf_config), num_positions, torch.float32)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in iterate_weights(checkpoint):
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    for module, tensors in modules.items():
        if "qweight" in tensors:
            tensors = {"weight": reader.read(tensors, config.version).dequantize(torch.float32)}
        decoder.load_weights((f"{module}.{part}", tensor) for part, tensor in tensors.items())
    decoder.process_weights_after_loading()
    return decoder


def write_default_model(folder: Path, version: int = 1) -> None:
    """Writes the default model, rounded to 4 bits, in one of the two versions of GPTQ's format."""
    quantize_checkpoint(open_default_model(), folder, [[0]], group_size=32, method="rtn", use_tqdm=False)
    if version == 2:
        path = folder / "model.safetensors"
        tensors = {
            name: tensor + GPTQ_ZEROS_OFFSET if name.endswith("qzeros") else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
        config = read_json(folder / "config.json")
        config["quantization_config"]["checkpoint_format"] = "gptq_v2"
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def quantize_model(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], method: str, bits: int, group_size: int = 32
) -> list[QuantizedLayer]:
    """All layers of a model in few bits.

    Args:
        checkpoint: the model.
        sequences: the calibration, token ids of each text.
        method: "gptq" or "rtn".
        bits: of a weight, 2 to 8.
        group_size: input columns that share a scale.
    """
    return list(quantize_layers(Calibration(checkpoint, sequences), choose_method(method, bits, group_size)))
