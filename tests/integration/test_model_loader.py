"""Checkpoints from disk: what is loaded, what is said about it, and how everything that can be wrong is answered.

The checkpoints are tiny (random weights, two layers of width 16) and made here, so nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from folovllm import EngineConfig, ModelConfig, ModelLoader, get_model_and_tokenizer, model_loader, set_random_seed
from folovllm.model.checkpoint import read_safetensors_header
from folovllm.model.int4_kernels import CudaKernel
from folovllm.model.quantization import QuantizationConfig
from folovllm.model_loader import (
    LoadReport,
    ModelLoadError,
    get_model_max_len,
    kv_cache_bytes_per_token,
)

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, LENGTH = 300, 16, 2, 4, 2, 8, 24, 64
BODY = LAYERS * (
    2 * HEADS * HEAD_DIM * WIDTH  # queries and the output projection
    + 2 * KV_HEADS * HEAD_DIM * WIDTH  # keys and values
    + 2 * HEAD_DIM  # their norms
    + 3 * INNER * WIDTH  # the feed-forward network
    + 2 * WIDTH  # two norms
)
NUM_PARAMETERS = VOCAB * WIDTH + BODY + WIDTH  # embedding (tied to the head), layers, last norm
TEXT = "Once upon a time, in a village by the sea"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def make_model(dtype=torch.float32, **kwargs) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": INNER,
            "max_position_embeddings": LENGTH,
            "tie_word_embeddings": True,
            **kwargs,
        }
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save(folder: Path, model, tokenizer=None, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    (tokenizer or make_tokenizer(eos_token="<eos>", padding_side="right")).save_pretrained(folder)
    return folder


@pytest.fixture
def tmp_path(tmp_path_factory) -> Path:
    """A folder whose name, unlike that of pytest's own, holds no word that a message is searched for."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """One weight file, tied weights, float32."""
    return save(tmp_path_factory.mktemp("checkpoints") / "single", make_model())


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """The same weights in several files."""
    folder = save(tmp_path_factory.mktemp("checkpoints") / "sharded", make_model(), max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def sharded_copy(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "sharded_copy"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def load(folder, device="cpu", **config):
    return ModelLoader(ModelConfig(str(folder), **config)).load_model(device)


# --- the model -----------------------------------------------------------------------------------------------------


class TestLoadModel:
    @pytest.mark.parametrize("device", DEVICES)
    def test_class_mode_and_device(self, checkpoint, device):
        model = load(checkpoint, device)
        assert type(model).__name__ == "Qwen3ForCausalLM"
        assert not any(module.training for module in model.modules())
        assert {parameter.device.type for parameter in model.parameters()} == {device}

    @pytest.mark.parametrize("device", DEVICES)
    def test_the_weights_are_the_checkpoints(self, checkpoint, sharded, device):
        expected = make_model().state_dict()
        for folder in (checkpoint, sharded):
            found = load(folder, device, dtype="float32").state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())

    def test_no_device_is_the_best_there_is(self, checkpoint):
        assert load(checkpoint, None).device.type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_the_gpu_is_never_asked_when_there_is_none(self, checkpoint, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert load(checkpoint, None).device.type == "cpu"

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        "name, dtype",
        [
            ("half", torch.float16),
            ("float16", torch.float16),
            ("bfloat16", torch.bfloat16),
            ("float", torch.float32),
            ("float32", torch.float32),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
        ],
    )
    def test_the_dtype_that_was_asked_for(self, checkpoint, device, name, dtype):
        model = load(checkpoint, device, dtype=name)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    @pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16])
    def test_auto_on_the_cpu_is_float32(self, tmp_path, own):
        assert load(save(tmp_path, make_model(own))).dtype == torch.float32

    AUTO_ON_A_GPU = pytest.mark.parametrize(
        "own, has_bfloat16, dtype",
        [
            (torch.bfloat16, True, torch.bfloat16),
            (torch.bfloat16, False, torch.float16),
            (torch.float16, True, torch.float16),
            (torch.float32, True, torch.float16),
            (torch.float32, False, torch.float16),
        ],
    )

    @AUTO_ON_A_GPU
    def test_auto_on_a_gpu_is_a_16_bit_type(self, tmp_path, monkeypatch, own, has_bfloat16, dtype):
        """With a GPU that is played: nothing is moved to it."""
        save(tmp_path, make_model(own))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: has_bfloat16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40))
        monkeypatch.setattr(model_loader, "get_device", lambda device: torch.device("cuda", 0))
        monkeypatch.setattr(Qwen3ForCausalLM, "to", lambda self, *args, **kwargs: self)
        assert load(tmp_path).dtype == dtype

    @pytest.mark.parametrize("has_kernel", [True, False])
    def test_auto_with_weights_of_4_bits(self, tmp_path, monkeypatch, has_kernel):
        monkeypatch.setattr(CudaKernel, "is_available", lambda device: has_kernel)
        loader, asked = ModelLoader(ModelConfig(str(save(tmp_path, make_model(torch.float16))))), []
        config = AutoConfig.from_pretrained(tmp_path)
        for method in ("gptq", "int8"):
            asked.append(loader._pick_dtype(config, torch.device("cuda"), QuantizationConfig(method)))
        assert asked == [torch.bfloat16 if has_kernel else torch.float16, torch.float16]

    @needs_gpu
    @AUTO_ON_A_GPU
    def test_auto_on_a_real_gpu(self, tmp_path, monkeypatch, own, has_bfloat16, dtype):
        save(tmp_path, make_model(own))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: has_bfloat16)
        model = load(tmp_path, "cuda")
        assert model.dtype == dtype and model.device.type == "cuda"

    def test_a_checkpoint_that_names_no_dtype(self, copy):
        edit_config(copy, dtype=..., torch_dtype=...)
        assert load(copy).dtype == torch.float32

    @pytest.mark.parametrize("device", DEVICES)
    def test_encode_forward_decode(self, checkpoint, device):
        model, tokenizer = get_model_and_tokenizer(ModelConfig(str(checkpoint)), device)
        batch = tokenizer(TEXT, return_tensors="pt").to(device)
        with torch.inference_mode():
            logits = model(**batch).logits
        assert logits.shape == (1, len(TEXT), VOCAB)
        assert logits.isfinite().all()
        assert tokenizer.decode(batch["input_ids"][0]) == TEXT
        assert isinstance(tokenizer.decode([logits[0, -1].argmax().item()]), str)

    def test_forward_gives_what_the_saved_model_gives(self, checkpoint):
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.inference_mode():
            torch.testing.assert_close(load(checkpoint)(ids).logits, make_model().eval()(ids).logits)

    def test_loading_draws_no_random_numbers_that_matter(self, checkpoint):
        logits = []
        for seed in (1, 2):
            set_random_seed(seed)
            logits.append(load(checkpoint)(torch.tensor([[1, 2, 3]])).logits)
        assert torch.equal(*logits)


class TestMaxModelLen:
    @pytest.mark.parametrize("asked, settled", [(None, LENGTH), (1, 1), (LENGTH - 1, LENGTH - 1), (LENGTH, LENGTH)])
    def test_taken_from_the_checkpoint_unless_asked_for(self, checkpoint, asked, settled):
        config = ModelConfig(str(checkpoint), max_model_len=asked)
        loader = ModelLoader(config)
        loader.load_model("cpu")
        assert config.max_model_len == settled
        assert (loader.report.max_model_len, loader.report.model_max_len) == (settled, LENGTH)

    def test_more_than_the_model_has_names_both_numbers(self, checkpoint):
        with pytest.raises(ValueError) as caught:
            load(checkpoint, max_model_len=LENGTH + 1)
        message = str(caught.value)
        assert "max_model_len" in message and str(LENGTH) in message and str(LENGTH + 1) in message

    def test_gpt2_calls_it_n_positions(self, tmp_path):
        config = GPT2Config(vocab_size=VOCAB, n_positions=77, n_embd=16, n_layer=1, n_head=2)
        loader = ModelLoader(ModelConfig(str(save(tmp_path, GPT2LMHeadModel(config)))))
        loader.load_model("cpu")
        assert loader.model_config.max_model_len == 77
        assert loader.report.model_class == "GPT2LMHeadModel"

    def test_2048_when_the_checkpoint_does_not_say(self, tmp_path):
        config = BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
        loader = ModelLoader(ModelConfig(str(save(tmp_path, BloomForCausalLM(config)))))
        loader.load_model("cpu")
        assert loader.model_config.max_model_len == 2048

    @pytest.mark.parametrize(
        "fields, length",
        [
            ({"max_position_embeddings": 5}, 5),
            ({"n_positions": 6}, 6),
            ({"max_position_embeddings": None, "n_positions": 7}, 7),
            ({"max_position_embeddings": None}, 2048),
            ({"max_position_embeddings": -1}, 2048),  # "no limit" in some configs
            ({}, 2048),
        ],
    )
    def test_wherever_it_is_kept(self, fields, length):
        config = types.SimpleNamespace(**fields)
        config.get_text_config = lambda: config
        assert get_model_max_len(config) == length

    def test_a_model_that_also_sees_keeps_it_in_its_text_config(self):
        text_config = {"model_type": "llama", "max_position_embeddings": 333}
        assert get_model_max_len(LlavaConfig(text_config=text_config)) == 333

    @pytest.mark.parametrize("asked", [None, 10])
    def test_model_and_scheduler_agree_after_a_load(self, checkpoint, asked):
        engine = EngineConfig(ModelConfig(str(checkpoint), max_model_len=asked))
        loader = ModelLoader(engine.model_config)
        loader.load_model("cpu")
        settled = engine.resolve_max_model_len(loader.report.model_max_len)
        assert settled == engine.model_config.max_model_len == engine.scheduler_config.max_model_len
        assert settled == (asked or LENGTH)


class TestLoadReport:
    def report(self, folder, **config) -> LoadReport:
        loader = ModelLoader(ModelConfig(str(folder), **config))
        assert loader.report is None
        loader.load_model("cpu")
        return loader.report

    @pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
    def test_figures_with_tied_weights_counted_once(self, checkpoint, sharded, dtype, size):
        for folder in (checkpoint, sharded):
            assert self.report(folder, dtype=dtype) == LoadReport(
                model=str(folder),
                model_class="Qwen3ForCausalLM",
                dtype=getattr(torch, dtype),
                device=torch.device("cpu"),
                num_parameters=NUM_PARAMETERS,
                num_bytes=size * NUM_PARAMETERS,
                max_model_len=LENGTH,
                model_max_len=LENGTH,
            )

    def test_a_head_of_its_own_counts(self, tmp_path):
        folder = save(tmp_path, make_model(tie_word_embeddings=False))
        assert self.report(folder).num_parameters == NUM_PARAMETERS + VOCAB * WIDTH

    @pytest.mark.parametrize("show", [str, repr])
    def test_a_notebook_can_show_it(self, checkpoint, show):
        shown = show(self.report(checkpoint, dtype="half", max_model_len=10))
        for part in (
            "Qwen3ForCausalLM",
            "float16",
            "cpu",
            f"{NUM_PARAMETERS:,}",
            f"{2 * NUM_PARAMETERS:,}",
            "10",
            "64",
        ):
            assert part in shown
        assert str(checkpoint.parent) not in shown  # a path would differ on every machine

    def test_a_hub_name_is_shown_whole(self):
        report = LoadReport("Qwen/Qwen3-0.6B", "C", torch.float32, torch.device("cpu"), 1, 4, 1, 1)
        assert "Qwen/Qwen3-0.6B" in str(report)

    def test_it_counts_a_row_that_was_added_for_padding(self, tmp_path):
        folder = save(tmp_path, make_model(vocab_size=256), make_tokenizer())
        loader = ModelLoader(ModelConfig(str(folder)))
        model, _ = loader.load_model_and_tokenizer("cpu")
        assert model.get_input_embeddings().num_embeddings == 257
        assert loader.report.num_parameters == sum(p.numel() for p in model.parameters())

    def test_it_is_logged_at_info(self, checkpoint, caplog):
        with caplog.at_level(logging.INFO, logger="folovllm"):
            report = self.report(checkpoint)
        (record,) = (record for record in caplog.records if record.name.startswith("folovllm"))
        assert record.levelno == logging.INFO
        assert str(report) in record.getMessage()


class TestKVCacheBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_many_as_the_model_keeps(self, checkpoint, dtype):
        model = load(checkpoint, dtype=dtype)
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert kv_cache_bytes_per_token(model.config, dtype) == kept / 3

    def test_a_config_without_kv_heads_and_head_dim(self):
        config = GPT2Config(n_embd=16, n_layer=3, n_head=2)
        assert kv_cache_bytes_per_token(config, torch.float16) == 2 * 3 * 16 * 2


class TestProgressBar:
    @staticmethod
    def settings_of_others():
        return (
            transformers_logging.is_progress_bar_enabled(),
            transformers_logging.get_verbosity(),
            huggingface_hub.utils.are_progress_bars_disabled(),
        )

    @pytest.fixture(params=["as they are", "bars off", "only the hub's bar off", "talkative"])
    def others(self, request):
        """transformers' settings as somebody else may have left them; given back afterwards."""
        before = self.settings_of_others()
        transformers_logging.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
        if request.param == "bars off":
            transformers_logging.disable_progress_bar()
        elif request.param == "only the hub's bar off":
            huggingface_hub.utils.disable_progress_bars()
        elif request.param == "talkative":
            transformers_logging.set_verbosity_info()
        yield self.settings_of_others()
        (transformers_logging.enable_progress_bar if before[0] else transformers_logging.disable_progress_bar)()
        transformers_logging.set_verbosity(before[1])
        getattr(huggingface_hub.utils, "disable_progress_bars" if before[2] else "enable_progress_bars")()

    def test_others_settings_are_as_before(self, checkpoint, others):
        load(checkpoint)
        assert self.settings_of_others() == others

    def test_others_settings_are_as_before_after_a_failure_too(self, copy, others):
        tensors = load_file(copy / "model.safetensors")
        save_file(dict(list(tensors.items())[1:]), copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelLoadError):
            load(copy)
        assert self.settings_of_others() == others

    def test_none_for_a_small_checkpoint(self, checkpoint, sharded, capfd):
        for folder in (checkpoint, sharded):
            load(folder)
        assert capfd.readouterr() == ("", "")

    def test_one_for_a_checkpoint_worth_waiting_for(self, checkpoint, capfd, monkeypatch):
        monkeypatch.setattr(model_loader, "PROGRESS_BAR_BYTES", 4 * NUM_PARAMETERS)
        load(checkpoint, dtype="float32")
        assert "100%" in capfd.readouterr().err

    def test_none_just_below(self, checkpoint, capfd, monkeypatch):
        monkeypatch.setattr(model_loader, "PROGRESS_BAR_BYTES", 4 * NUM_PARAMETERS + 1)
        load(checkpoint, dtype="float32")
        assert capfd.readouterr().err == ""


# --- the tokenizer -------------------------------------------------------------------------------------------------


class TestLoadTokenizer:
    def load(self, folder, **config):
        return ModelLoader(ModelConfig(str(folder), **config)).load_tokenizer()

    @pytest.mark.parametrize("saved", ["left", "right"])
    def test_it_pads_on_the_left(self, tmp_path, saved):
        make_tokenizer(eos_token="<eos>", padding_side=saved).save_pretrained(tmp_path)
        tokenizer = self.load(tmp_path)
        assert tokenizer.padding_side == "left"
        batch = tokenizer(["a", "abc"], padding=True)
        assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]

    def test_a_pad_token_is_kept(self, tmp_path):
        make_tokenizer(eos_token="<eos>", pad_token="<pad>").save_pretrained(tmp_path)
        tokenizer = self.load(tmp_path)
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")

    def test_a_missing_pad_token_becomes_the_eos_token(self, tmp_path):
        make_tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
        tokenizer = self.load(tmp_path)
        assert tokenizer.pad_token == "<eos>" and tokenizer.pad_token_id == tokenizer.eos_token_id
        assert len(tokenizer) == 257

    def test_without_an_eos_token_pad_is_added(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = self.load(tmp_path)
        assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == 256
        assert len(tokenizer) == 257

    def test_whoever_never_pads_gets_the_vocabulary_as_it_is(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = ModelLoader(ModelConfig(str(tmp_path))).load_tokenizer(add_pad_token=False)
        assert tokenizer.pad_token is None and len(tokenizer) == 256
        assert tokenizer.decode(ids := tokenizer.encode("a [PAD]")) == "a [PAD]" and max(ids) < 256

    def test_it_may_lie_elsewhere(self, checkpoint, tmp_path):
        make_tokenizer(eos_token="<other>").save_pretrained(tmp_path)
        tokenizer = self.load(checkpoint, tokenizer=str(tmp_path))
        assert tokenizer.eos_token == "<other>"

    def test_auto_is_the_fast_one(self, checkpoint):
        assert self.load(checkpoint).is_fast

    def test_slow_where_there_is_no_slow_one_says_so(self, checkpoint, caplog):
        tokenizer = self.load(checkpoint, tokenizer_mode="slow")
        assert not tokenizer.is_fast or "slow" in caplog.text
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT

    @settings(max_examples=50)
    @given(text=st.text(max_size=30))
    def test_any_text_comes_back(self, checkpoint, text):
        tokenizer = self.tokenizer_of(checkpoint)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    _loaded: dict = {}  # noqa: RUF012

    def tokenizer_of(self, folder):
        return self._loaded.setdefault(folder, self.load(folder))


class TestPadding:
    """A batch of texts of different lengths gives what each gives alone."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("special", [{"eos_token": "<eos>"}, {}], ids=["eos pads", "[PAD] is added"])
    @pytest.mark.parametrize("vocab_size", [256, 257, VOCAB])
    @pytest.mark.parametrize("tied", [True, False])
    def test_the_next_token_is_the_same(self, tmp_path, device, special, vocab_size, tied):
        model = make_model(vocab_size=vocab_size, tie_word_embeddings=tied)
        folder = save(tmp_path, model, make_tokenizer(**special))
        config = ModelConfig(str(folder), dtype="float32")
        model, tokenizer = get_model_and_tokenizer(config, device)
        assert not any(module.training for module in model.modules())
        texts = ["a", "a longer text", TEXT]
        with torch.inference_mode():
            batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
            together = model(**batch).logits[:, -1]
            alone = [model(**tokenizer(text, return_tensors="pt").to(device)).logits[0, -1] for text in texts]
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)

    def test_a_new_row_changes_no_other_token(self, tmp_path):
        folder = save(tmp_path, make_model(vocab_size=256), make_tokenizer())
        model, tokenizer = get_model_and_tokenizer(ModelConfig(str(folder)), "cpu")
        ids = torch.tensor([tokenizer.encode("abc")])
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits[..., :256], make_model(vocab_size=256).eval()(ids).logits)

    def test_the_new_row_is_the_same_every_time(self, tmp_path):
        folder = save(tmp_path, make_model(vocab_size=256), make_tokenizer())
        rows = []
        for seed in (1, 2):
            set_random_seed(seed)
            rows.append(get_model_and_tokenizer(ModelConfig(str(folder)), "cpu")[0].get_input_embeddings().weight[256])
        assert torch.equal(*rows)

    def test_an_embedding_with_room_is_left_alone(self, tmp_path):
        folder = save(tmp_path, make_model(), make_tokenizer())
        model, _ = get_model_and_tokenizer(ModelConfig(str(folder)), "cpu")
        assert model.get_input_embeddings().num_embeddings == VOCAB


# --- the file format -----------------------------------------------------------------------------------------------


class TestSafetensorsHeader:
    def test_it_is_what_safetensors_reads(self, checkpoint):
        path = checkpoint / "model.safetensors"
        header = read_safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            assert header.keys() == set(file.keys())
            for name in file.keys():  # noqa: SIM118
                assert header[name]["shape"] == file.get_slice(name).get_shape()
                assert header[name]["dtype"] == "F32"

    def test_no_tensor_at_all(self, tmp_path):
        save_file({}, tmp_path / "empty.safetensors")
        assert read_safetensors_header(tmp_path / "empty.safetensors") == {}

    @settings(max_examples=200)
    @given(data=st.data())
    def test_any_bytes_are_a_header_or_one_error(self, tmp_path_factory, data):
        json_values = st.recursive(
            st.none() | st.integers() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=12), inner, max_size=2),
        )
        entries = st.fixed_dictionaries(
            {}, optional={"dtype": json_values, "shape": json_values, "data_offsets": json_values | st.just([0, 4])}
        )
        header = data.draw(
            st.binary(max_size=20)
            | (json_values | st.dictionaries(st.text(max_size=3), entries, max_size=2)).map(
                lambda value: json.dumps(value).encode()
            )
        )
        length = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
        content = length.to_bytes(8, "little") + header + data.draw(st.binary(max_size=4))
        path = tmp_path_factory.getbasetemp() / "any.safetensors"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            header = read_safetensors_header(path)
        except ModelLoadError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            # The loader multiplies the shapes, so what passes must have them.
            assert all(math.prod(entry["shape"]) >= 0 for entry in header.values())


# --- what can be wrong ---------------------------------------------------------------------------------------------


def refusal(model, device="cpu", error=ModelLoadError, **config) -> str:
    """The one sentence that a checkpoint is refused with."""
    with pytest.raises(Exception) as caught:
        ModelLoader(ModelConfig(str(model), **config)).load_model_and_tokenizer(device)
    raised = caught.value
    assert type(raised) is error, f"{type(raised).__name__}: {raised}"
    assert raised.__cause__ is None
    assert raised.__suppress_context__ or raised.__context__ is None, "somebody else's error hangs on to it"
    message = str(raised)
    assert message and "\n" not in message
    return message


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class TestNoCheckpoint:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        """No test here reaches for the network: huggingface_hub looks into its cache only."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def test_no_such_folder(self, tmp_path):
        message = refusal(tmp_path / "missing")
        assert str(tmp_path / "missing") in message and "no folder" in message

    @pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing-folder", "a/b/missing", "/missing"])
    def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(self, name, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
        assert name in refusal(name)

    @pytest.mark.parametrize("name", ["~no-such-user-here/model", "with\0nul", "x" * 5000, "a b", "-", "a--b", "a/b\n"])
    def test_a_name_that_can_be_nothing(self, name):
        refusal(name)

    def test_a_file_instead_of_a_folder(self, checkpoint):
        path = checkpoint / "model.safetensors"
        message = refusal(path)
        assert str(path) in message and "file" in message and "folder" in message

    def test_offline(self):
        message = refusal("nobody/no-such-model")
        assert "nobody/no-such-model" in message and "network" in message

    @pytest.mark.parametrize(
        "error",
        [
            OSError("Network is unreachable"),
            ConnectionError("several\nlines"),
            huggingface_hub.errors.LocalEntryNotFoundError("not in the cache\nand more"),
            huggingface_hub.errors.HFValidationError("bad name"),
            RuntimeError(""),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_whatever_the_hub_says(self, monkeypatch, error):
        def snapshot_download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        message = refusal("nobody/no-such-model")
        assert "nobody/no-such-model" in message and type(error).__name__ in message

    def test_a_hub_name_is_the_folder_it_is_fetched_into(self, checkpoint, monkeypatch):
        asked = []
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.append((name, kwargs)) or str(checkpoint)
        )
        assert load("somebody/some-model").dtype == torch.float32
        ((name, kwargs),) = asked
        assert name == "somebody/some-model"
        assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in kwargs["allow_patterns"])

    def test_a_pickle_on_the_hub_is_named_as_one(self, tmp_path, monkeypatch):
        """Nobody downloads gigabytes to refuse them, so the sentence must not depend on the file being here."""
        make_model().config.save_pretrained(tmp_path)
        edit_config(tmp_path, architectures=["Qwen3ForCausalLM"])
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(tmp_path))
        assert "pickle" in refusal("somebody/old-model")


class TestDevice:
    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
    def test_a_gpu_on_a_machine_without(self, checkpoint, monkeypatch, device):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        message = refusal(checkpoint, device, error=RuntimeError)
        assert device in message and "cpu" in message

    @pytest.mark.parametrize("device", ["banana", "", "cuda:x", 1.5])
    def test_a_device_that_means_nothing(self, checkpoint, device):
        message = refusal(checkpoint, device, error=ValueError)
        assert message.startswith("device must be") and repr(device) in message

    @pytest.mark.parametrize("device", ["meta", "xpu", "mps"])
    def test_a_device_that_the_engine_does_not_serve(self, checkpoint, device):
        assert device in refusal(checkpoint, device, error=ValueError)

    def test_a_model_too_large_for_the_gpu(self, checkpoint, monkeypatch):
        monkeypatch.setattr(model_loader, "get_device", lambda device: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4 * NUM_PARAMETERS - 1, 2**40))
        monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("read weights"))
        message = refusal(checkpoint, "cuda", dtype="float32")
        assert str(checkpoint) in message and "free" in message and "cuda:0" in message

    @needs_gpu
    def test_a_model_too_large_for_a_real_gpu(self, checkpoint, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1000, 2**40))
        assert "free" in refusal(checkpoint, "cuda")

    @needs_gpu
    def test_one_gpu_more_than_there_are(self, checkpoint):
        device = f"cuda:{torch.cuda.device_count()}"
        assert device in refusal(checkpoint, device, error=RuntimeError)


class TestBadConfig:
    def test_missing(self, copy):
        (copy / "config.json").unlink()
        message = refusal(copy)
        assert str(copy) in message and "config.json" in message

    def test_an_empty_folder(self, tmp_path):
        assert str(tmp_path) in refusal(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"{", b"{'architectures': []}", b"\xff\xfe\x00", b"not JSON"])
    def test_not_json(self, copy, content):
        (copy / "config.json").write_bytes(content)
        message = refusal(copy)
        assert str(copy) in message and "JSON" in message

    @pytest.mark.parametrize("value", [..., None, [], ""])
    def test_no_architecture(self, copy, value):
        edit_config(copy, architectures=value)
        message = refusal(copy)
        assert str(copy) in message and "architecture" in message

    @pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
    def test_json_of_another_kind(self, copy, content):
        (copy / "config.json").write_text(content)
        assert str(copy) in refusal(copy)

    @pytest.mark.parametrize("model_type", ["no_such_model_type", ...])
    def test_a_model_that_transformers_does_not_know(self, copy, model_type):
        edit_config(copy, model_type=model_type, architectures=["NoSuchModelForCausalLM"])
        message = refusal(copy)
        assert str(copy) in message and "NoSuchModelForCausalLM" in message

    def test_a_model_that_continues_no_text(self, copy):
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(copy)
        edit_config(copy, architectures=["T5ForConditionalGeneration"])
        assert str(copy) in refusal(copy)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_attention_heads": "four"},
            {"hidden_size": -1},
            {"num_hidden_layers": 0.5},
            {"rope_parameters": {"rope_type": "no_such_rope"}},
            {"hidden_act": "no_such_function"},
        ],
    )
    def test_values_that_build_no_model(self, copy, changes):
        edit_config(copy, **changes)
        assert str(copy) in refusal(copy)

    def test_more_layers_than_there_are_weights_for(self, copy):
        edit_config(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
        message = refusal(copy)
        assert str(copy) in message and "missing" in message


class TestCodeInTheCheckpoint:
    @pytest.fixture
    def with_code(self, copy, tmp_path, monkeypatch) -> Path:
        """A checkpoint whose classes are code of its own, which leaves a file behind when it runs."""
        edit_config(
            copy,
            model_type="folovllm_test",
            architectures=["OwnForCausalLM"],
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        )
        (copy / "own.py").write_text(
            "from pathlib import Path\n"
            f"Path({str(tmp_path / 'ran')!r}).touch()\n"
            "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
            "class OwnConfig(Qwen3Config):\n"
            "    model_type = 'folovllm_test'\n"
            "class OwnForCausalLM(Qwen3ForCausalLM):\n"
            "    config_class = OwnConfig\n"
        )
        from transformers import dynamic_module_utils

        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        return copy

    def test_is_not_run_unless_trusted(self, with_code, tmp_path):
        message = refusal(with_code)
        assert str(with_code) in message and "trust_remote_code" in message
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("length", ["2048", [2048], {}])
    def test_a_tokenizers_length_must_be_a_number(self, copy, length):
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
        with pytest.raises(ModelLoadError, match="has a model_max_length that is no number"):
            ModelLoader(ModelConfig(str(copy))).load_tokenizer()

    def test_the_tokenizers_is_not_run_either(self, copy, tmp_path):
        (copy / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        path = copy / "tokenizer_config.json"
        raw = json.loads(path.read_text())
        raw.update(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
        path.write_text(json.dumps(raw))
        try:
            ModelLoader(ModelConfig(str(copy))).load_tokenizer()
        except ModelLoadError as error:
            assert str(copy) in str(error)
        assert not (tmp_path / "ran").exists()

    def test_is_run_when_trusted(self, with_code, tmp_path):
        assert type(load(with_code, trust_remote_code=True)).__name__ == "OwnForCausalLM"
        assert (tmp_path / "ran").exists()


class TestBadWeights:
    def test_missing(self, copy):
        (copy / "model.safetensors").unlink()
        message = refusal(copy)
        assert str(copy) in message and "model.safetensors" in message

    def test_under_another_name(self, copy):
        """As AutoGPTQ named them."""
        name = "gptq_model-4bit-128g.safetensors"
        (copy / "model.safetensors").rename(copy / name)
        message = refusal(copy)
        assert name in message and "name a single file model.safetensors" in message

    @pytest.mark.parametrize("which", [0, -1])
    def test_a_missing_shard_is_named(self, sharded_copy, which):
        shard = sorted(sharded_copy.glob("*.safetensors"))[which]
        shard.unlink()
        message = refusal(sharded_copy)
        assert str(sharded_copy) in message and shard.name in message

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "not JSON",
            "[]",
            "{}",
            "null",
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": ["x", "y"]}}',
            '{"weight_map": {"a": "../escape.safetensors"}}',
        ],
    )
    def test_an_index_that_is_none(self, sharded_copy, content):
        (sharded_copy / "model.safetensors.index.json").write_text(content)
        assert str(sharded_copy) in refusal(sharded_copy)

    @pytest.mark.parametrize("cut", [0, 1, 4, 7, 8, 9, 100, "header", "after header", -1000, -1])
    def test_a_truncated_file_at_any_place(self, copy, cut):
        path = copy / "model.safetensors"
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        end = {"header": 8 + header - 1, "after header": 8 + header}.get(cut, cut)
        path.write_bytes(content[:end])
        message = refusal(copy)
        assert str(path) in message and "safetensors" in message

    @pytest.mark.parametrize("end", [0, 4, 50, -1])
    def test_a_truncated_shard_is_named(self, sharded_copy, end):
        shard = sorted(sharded_copy.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:end])
        assert str(shard) in refusal(sharded_copy)

    def test_bytes_too_many(self, copy):
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"\0")
        assert str(path) in refusal(copy)

    @pytest.mark.parametrize(
        "header",
        [
            b"x" * 50,
            b"\xff" * 50,
            b"[]",
            b"3",
            b"null",
            b'{"a": 1}',
            b'{"a": {}}',
            b'{"a": {"dtype": "F32", "shape": [1]}}',
            b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}',
            b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": 0}}',
            b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, "x"]}}',
            b'{"a": {"dtype": "no such", "shape": [0], "data_offsets": [0, 0]}}',
        ],
    )
    def test_a_header_of_garbage(self, copy, header):
        path = copy / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert str(copy) in refusal(copy)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
    def test_a_pickle_is_refused_unread(self, copy, tmp_path, name):
        (copy / "model.safetensors").unlink()
        (copy / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        message = refusal(copy)
        assert str(copy) in message and name in message
        assert "pickle" in message and "code" in message and "safetensors" in message
        assert not (tmp_path / "ran").exists()

    def test_a_pickle_beside_safetensors_is_left_alone(self, copy, tmp_path):
        (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        load(copy)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_a_missing_tensor_is_named(self, copy, name):
        tensors = load_file(copy / "model.safetensors")
        del tensors[name]
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        message = refusal(copy)
        assert str(copy) in message and name in message and "missing" in message

    def test_a_tensor_of_another_shape_is_named(self, copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(WIDTH + 1)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        message = refusal(copy)
        assert str(copy) in message and "model.norm.weight" in message and "shape" in message

    def test_a_tensor_too_many_is_a_warning(self, copy, caplog):
        tensors = load_file(copy / "model.safetensors") | {"something.else": torch.ones(3)}
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        load(copy)
        assert "something.else" in caplog.text

    def test_nothing_is_reported_when_nothing_was_loaded(self, copy):
        (copy / "model.safetensors").write_bytes(b"")
        loader = ModelLoader(ModelConfig(str(copy)))
        with pytest.raises(ModelLoadError):
            loader.load_model("cpu")
        assert loader.report is None


class TestBadTokenizer:
    @pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
    def test_no_tokenizer_to_read(self, copy, damage):
        for path in copy.glob("tokenizer*"):
            path.unlink()
        if damage != "missing":
            (copy / "tokenizer.json").write_text("" if damage == "empty" else '{"version": "no"}')
        # transformers would make a tokenizer without a single token from the config's model type.
        assert str(copy) in refusal(copy)

    def test_a_tokenizer_folder_that_is_not_there(self, checkpoint, tmp_path):
        assert str(tmp_path / "missing") in refusal(checkpoint, tokenizer=str(tmp_path / "missing"))
