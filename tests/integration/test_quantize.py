"""Quantizing whole models: what is written can be read, GPTQ beats rounding, and what goes wrong is one sentence."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from folovllm import ModelConfig, ModelLoader
from folovllm.__main__ import CALIBRATION_CHARACTERS, _cut_texts, main
from folovllm.model import quantized_files
from folovllm.model.checkpoint import Checkpoint, ModelLoadError
from folovllm.model.decoder import make_empty_decoder
from folovllm.model.gptq import (
    PRODUCTS,
    Calibration,
    QuantizedLayer,
    choose_method,
    estimate_bytes,
    quantize_layers,
)
from folovllm.model.packing import unpack_compressed, unpack_gptq
from folovllm.model.quantized_files import quantize_checkpoint
from folovllm.tales import EMBEDDED_MODEL
from folovllm.tales.evaluate import calibration

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen2, a bias": Qwen2Config(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
}
SEQUENCES = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (60, 1, 25)]


def open_checkpoint(folder: Path | str) -> Checkpoint:
    return ModelLoader(ModelConfig(str(folder), dtype="float32")).open("cpu")


def save(config: Any, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2 if weight.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def run(checkpoint: Checkpoint, sequences: list[list[int]], method: str, **settings: int) -> tuple[list, Calibration]:
    texts = Calibration(checkpoint, sequences)
    return list(quantize_layers(texts, choose_method(method, **settings))), texts


def dequantized(layers: list[QuantizedLayer]) -> dict[str, Tensor]:
    return {
        f"{name}.weight": weight.dequantize(torch.float32) for layer in layers for name, weight in layer.weights.items()
    }


@pytest.fixture(scope="module")
def embedded() -> tuple[Checkpoint, list[list[int]]]:
    tokenizer = ModelLoader(ModelConfig(str(EMBEDDED_MODEL))).load_tokenizer()
    return open_checkpoint(EMBEDDED_MODEL), [tokenizer(document.text)["input_ids"] for document in calibration(24)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_both_walks_are_the_models(name: str, tmp_path: Path) -> None:
    """The unquantized one is transformers' model; the quantized one is it with the weights that were found."""
    checkpoint = save(CONFIGS[name], tmp_path)
    layers, texts = run(checkpoint, SEQUENCES, "gptq", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for hidden, weights in ((texts.reference, {}), (texts.hidden, dequantized(layers))):
        model.load_state_dict(weights, strict=False)
        found = texts.head.compute_logits(texts.head.norm(hidden))
        wanted = torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
        assert (found - wanted).abs().max() < 1e-3 and wanted.abs().max() > 1
    assert len(dequantized(layers)) == 7 * SHAPE["num_hidden_layers"]


def test_gptq_beats_rounding_on_the_embedded_model(embedded: Any) -> None:
    """In every product, after every layer, and at the end."""
    rounded, rounded_texts = run(*embedded, "rtn", group_size=32)
    carried, carried_texts = run(*embedded, "gptq", group_size=32)
    for before, after in zip(rounded, carried, strict=True):
        assert after.error < 0.6 * before.error
        assert all(after.output_errors[name] < before.output_errors[name] for name in PRODUCTS)
    assert 0 < carried_texts.compute_kl() < 0.8 * rounded_texts.compute_kl()


def test_kl_does_not_depend_on_how_many_rows_are_computed_at_a_time(tmp_path: Path) -> None:
    _, texts = run(save(CONFIGS["qwen3"], tmp_path), SEQUENCES, "rtn", group_size=32)
    assert texts.compute_kl(7) == pytest.approx(texts.compute_kl(), rel=1e-4)


@pytest.mark.parametrize("file_format, group_size", [("gptq", 32), ("gptq", -1), ("compressed-tensors", 16)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_can_be_read(
    name: str, file_format: str, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(CONFIGS[name], tmp_path / "model")
    others = ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for other in others:
        (tmp_path / "model" / other).write_text("{}")
    layers, _ = run(checkpoint, SEQUENCES, "gptq", group_size=group_size)
    monkeypatch.setattr(quantized_files, "MAX_SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    report = quantize_checkpoint(
        checkpoint, out, SEQUENCES, group_size=group_size, file_format=file_format, use_tqdm=False
    )
    written = {name: t for path in sorted(out.glob("*.safetensors")) for name, t in load_file(path).items()}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys() and len(set(index["weight_map"].values())) > 1
    for weight_name, wanted in dequantized(layers).items():
        prefix = weight_name.removesuffix("weight")
        tensors = {key.removeprefix(prefix): t for key, t in written.items() if key.startswith(prefix)}
        unpack = unpack_compressed if file_format == "compressed-tensors" else lambda t: unpack_gptq(t, 1)
        assert torch.equal(unpack(tensors).dequantize(torch.float32), wanted)
        for key in tensors:
            del written[prefix + key]
    kept = {name: t for name, t in load_file(tmp_path / "model" / "model.safetensors").items() if name in written}
    assert all(torch.equal(written[key], kept[key]) for key in written) and "model.embed_tokens.weight" in kept
    before, after = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (tmp_path / "model", out))
    assert before - after == {Path("model.safetensors")}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == file_format
    assert report.bytes_after == sum(path.stat().st_size for path in out.glob("*.safetensors")) < report.bytes_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


class TestCommand:
    def quantize(self, *arguments: str) -> int:
        return main(["quantize", *arguments])

    def check(self, status: int, words: str, capsys: pytest.CaptureFixture) -> None:
        lines = capsys.readouterr().err.strip().split("\n")
        assert status == 1 and words in lines[-1] and lines[-1].startswith("error: ")

    @pytest.fixture
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("folovllm.tales.evaluate.calibration", lambda: calibration(3))

    def test_the_embedded_model(self, short: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        out = tmp_path / "out"
        assert self.quantize(str(EMBEDDED_MODEL), str(out), "--group-size", "32", "--format", "compressed-tensors") == 0
        said = capsys.readouterr().out
        assert "layer 3" in said and "KL to the unquantized model" in said and "3.6 MiB before" in said
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (out / name).read_bytes() == (EMBEDDED_MODEL / name).read_bytes()
        assert not (out / "README.md").exists()  # its figures are another model's

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--bits", "3"], "bits must be 4"),
            (["--group-size", "48"], "group_size must be -1 or divide the 128 input columns of each weight, got 48"),
            (["--group-size", "0"], "got 0"),
        ],
    )
    def test_what_cannot_be(
        self, arguments: list[str], words: str, short: None, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out"), *arguments), words, capsys)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_there(self, short: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path)), "exists already; name a folder", capsys)
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "no" / "out")), "there is no folder", capsys)
        (tmp_path / "link").symlink_to("nowhere")
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "link")), "exists already", capsys)
        self.check(self.quantize("no/such/folder", str(tmp_path / "out")), "no/such/folder", capsys)

    def test_no_room(
        self, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out")), "has 1 MiB free", capsys)

    def test_a_disk_that_fills_up(
        self, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise quantized_files.SafetensorError("I/O error: No space left on device")

        monkeypatch.setattr(quantized_files, "save_file", full)
        self.check(self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out")), "No space left on device", capsys)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("at", ["quantize_layer", "compute_kl"])
    def test_ctrl_c_leaves_nothing(self, at: str, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Calibration, index: int = 2, *_: Any) -> QuantizedLayer:
            if index == 2:
                raise KeyboardInterrupt
            return original(self, index, *_)

        original = Calibration.quantize_layer
        monkeypatch.setattr(Calibration, at, interrupted)
        assert self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out")) == 130
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
    def test_who_is_told_to_end_leaves_nothing(
        self, name: str, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if (number := getattr(signal, name, None)) is None:
            pytest.skip(f"there is no {name} on this system")
        monkeypatch.setattr(Calibration, "compute_kl", lambda _: signal.raise_signal(number))
        # Who started these tests may have told them to ignore it, as nohup does.
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises(SystemExit) as ended:
                self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out"))
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)
        assert ended.value.code == 128 + number and list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP on this system")
    def test_a_hangup_that_is_ignored_stays_ignored(
        self, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As under nohup."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            original = Calibration.compute_kl

            def compute_kl(calibration: Calibration) -> float:
                signal.raise_signal(signal.SIGHUP)
                return original(calibration)

            monkeypatch.setattr(Calibration, "compute_kl", compute_kl)
            assert self.quantize(str(EMBEDDED_MODEL), str(tmp_path / "out")) == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_other_models_need_a_text(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        copy = shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy")
        out = tmp_path / "out"
        self.check(self.quantize(str(copy), str(out)), "--calibration FILE is required", capsys)
        (tmp_path / "empty").touch()
        status = self.quantize(str(copy), str(out), "--calibration", str(tmp_path / "empty"))
        self.check(status, "must have at least one token", capsys)
        with contextlib.suppress(SystemExit):
            self.quantize(str(copy), str(out), "--calibration", "no/such/file")
        assert "'no/such/file' cannot be read" in capsys.readouterr().err
        (tmp_path / "text").write_text("Once upon a time, in the valley, there lived a fox named Oskar.")
        assert self.quantize(str(copy), str(out), "--calibration", str(tmp_path / "text"), "--method", "rtn") == 0
        self.check(
            self.quantize(str(out), str(tmp_path / "again"), "--calibration", str(tmp_path / "text")),
            "quantized",
            capsys,
        )


def test_a_checkpoint_that_lacks_a_weight(tmp_path: Path) -> None:
    checkpoint = save(CONFIGS["qwen3"], tmp_path)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        entry = checkpoint.headers.pop(name)
        with pytest.raises(ModelLoadError, match=name):
            quantize_checkpoint(checkpoint, tmp_path / "out", SEQUENCES, group_size=32, use_tqdm=False)
        checkpoint.headers[name] = entry


@pytest.mark.parametrize("name", ["model.foo.weight", "lm_head.bias"])
def test_a_weight_that_the_engine_would_refuse(name: str, tmp_path: Path) -> None:
    save(CONFIGS["qwen3"], tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors") | {name: torch.ones(3)}
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "in")
    with pytest.raises(ModelLoadError, match=f"has a weight {name}, which the model"):
        quantize_checkpoint(checkpoint, tmp_path / "out", SEQUENCES, group_size=32, use_tqdm=False)


@pytest.mark.parametrize("settings", [{"bits": 4.0}, {"group_size": 32.0}, {"group_size": "32"}])
def test_numbers_that_are_none(settings: Any, tmp_path: Path) -> None:
    checkpoint = save(CONFIGS["qwen3"], tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        quantize_checkpoint(checkpoint, tmp_path / "out", SEQUENCES, use_tqdm=False, **settings)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    checkpoint, out = save(CONFIGS["qwen3"], tmp_path), tmp_path / "out"
    quantize_checkpoint(checkpoint, out, SEQUENCES, group_size=32, method="rtn", use_tqdm=False)
    assert len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1


def test_the_room_that_is_asked_for_is_that_of_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(CONFIGS["qwen2, a bias"], tmp_path)
    empty = make_empty_decoder(checkpoint)
    room = estimate_bytes(empty, 86)
    empty.layers *= 50
    assert estimate_bytes(empty, 86) == room < 8 * empty.num_bytes
    for num_bytes, is_refused in ((room - 1, True), (room, False)):
        free = SimpleNamespace(available=num_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        with pytest.raises(ModelLoadError, match="one at a time") if is_refused else contextlib.nullcontext():
            Calibration(checkpoint, SEQUENCES)


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    save(CONFIGS["qwen3"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 1: self_attn\.o_proj cannot be quantized: the weight has a"):
        run(open_checkpoint(tmp_path), SEQUENCES, "gptq", group_size=32)


def test_nor_is_a_weight_copied_that_is_not_a_number(tmp_path: Path) -> None:
    save(CONFIGS["qwen3"], tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "in")
    with pytest.raises(ValueError, match=r"model\.norm\.weight of .* has a number that is not finite"):
        quantize_checkpoint(checkpoint, tmp_path / "out", SEQUENCES, group_size=32, use_tqdm=False)
    assert not (tmp_path / "out").exists()


def test_a_token_without_an_embedding(tmp_path: Path) -> None:
    checkpoint = save(CONFIGS["qwen3"], tmp_path)
    for token_id in (300, -1):
        message = rf"the calibration has tokens \[{token_id}\], but the model has embeddings for 300;"
        with pytest.raises(ValueError, match=message):
            Calibration(checkpoint, [[1, 2], [token_id]])


def test_of_a_long_text_only_pieces_become_tokens() -> None:
    seen = []

    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [ord(letter) for letter in text]}

    pieces = _cut_texts(tokenizer, ["a" * 2**21 + "b" * 2**21], 512)
    assert sum(map(len, seen)) == CALIBRATION_CHARACTERS and seen[-1].count("a") == seen[-1].count("b")
    assert {piece[0] for piece in pieces} == set(map(ord, "ab"))


def test_how_texts_are_cut() -> None:
    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    assert _cut_texts(Tokenizer(), ["abcde", "", "f"], 3) == [[1, 97, 98], [1, 99, 100], [1, 101], [1, 102]]
    pieces = _cut_texts(Tokenizer(), ["a" * 60_000 + "b" * 60_000], 4)
    assert {len(piece) for piece in pieces} == {4}
    assert 0.99 < 4 * len(pieces) / 2**14 <= 1.01 and sum(piece[1] == 97 for piece in pieces) == len(pieces) / 2
