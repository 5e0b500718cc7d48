"""The command line: it streams, reads standard input, and says what was wrong in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from folovllm import SamplingParams, StructuredOutputsParams
from folovllm.__main__ import CONFIGS, DEFAULT_MAX_TOKENS, SAMPLING_OPTIONS, _fit, main
from folovllm.llm import LLM
from folovllm.tales import EMBEDDED_MODEL

COMMON = ["--model", str(EMBEDDED_MODEL), "--device", "cpu", "--temperature", "0"]
TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


class FakeLLM:
    """Gives answers that a test has written, and remembers what it was asked."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs, self.prompts, self.params = kwargs, [], []
        self.answers: list[list[Any]] = []
        self.engine = SimpleNamespace(tokenizer=TOKENIZER, max_model_len=2048, default_params=SamplingParams())

    def __call__(self, **kwargs: Any) -> FakeLLM:
        self.kwargs = kwargs
        return self

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[str]:
        self.prompts.append(prompt if isinstance(prompt, str) else TOKENIZER.decode(prompt))
        self.params.append(params)
        for piece in self.answers.pop(0) if self.answers else ["yes"]:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture
def llm(monkeypatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr("folovllm.llm.LLM", fake)
    return fake


def type_lines(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def run_shell(command: str) -> subprocess.CompletedProcess:
    """Runs a command line in which FOLOVLLM stands for ``python -m folovllm``."""
    command = command.replace("FOLOVLLM", f"'{sys.executable}' -m folovllm")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, encoding="utf-8")


def answer(prompt: str, max_tokens: int) -> str:
    llm = LLM(str(EMBEDDED_MODEL), device="cpu")
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0].outputs[0].text


class TestGenerate:
    def test_as_it_is_typed(self):
        command = [sys.executable, "-m", "folovllm", "generate", "Once upon a time", *COMMON, "--max-tokens", "12"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == (0, answer("Once upon a time", 12) + "\n", "")

    def test_it_reads_standard_input_and_stops(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
        assert main(["generate", "-", *COMMON, "--stop", "."]) == 0
        assert capsys.readouterr().out == answer("Once upon a time", 60).split(".")[0] + "\n"

    def test_an_output_that_has_no_such_character(self, llm, monkeypatch):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", out)
        llm.answers = [["caf", "é"]]
        assert main(["generate", "a"]) == 0
        assert out.buffer.getvalue() == b"caf\\xe9\n"


class TestTrace:
    COMMAND = ("generate", "Once upon a time", *COMMON, "--max-tokens", "6")

    def test_it_writes_a_page_of_the_run(self, tmp_path, capsys):
        file = tmp_path / "run.html"
        assert main([*self.COMMAND, "--trace", str(file)]) == 0
        assert capsys.readouterr() == (answer("Once upon a time", 6) + "\n", "")
        page = file.read_text(encoding="utf-8")
        assert page.startswith("<!DOCTYPE html>") and "1 request along 6 steps" in page and "://" not in page
        (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
        (run,) = json.loads(data)["runs"]
        assert len(run["steps"]) == 6 and all("bars" in step for step in run["steps"])

    def test_an_engine_that_gives_few_log_probabilities(self, tmp_path, capsys):
        file = tmp_path / "run.html"
        assert main([*self.COMMAND, "--max-logprobs", "2", "--trace", str(file)]) == 0, capsys.readouterr().err
        assert file.exists()

    def test_what_has_run_before_ctrl_c_is_on_it(self, tmp_path, monkeypatch, capsys):
        stream = LLM.stream

        def interrupted(self: LLM, *args: Any) -> Iterator[str]:
            pieces = stream(self, *args)
            yield next(pieces)
            raise KeyboardInterrupt

        monkeypatch.setattr(LLM, "stream", interrupted)
        file = tmp_path / "run.html"
        assert main([*self.COMMAND, "--trace", str(file)]) == 130
        assert "1 request along 1 step" in file.read_text(encoding="utf-8")

    def test_a_file_that_cannot_be_made_is_found_at_once(self, tmp_path, llm, capsys):
        (tmp_path / "taken.html").write_text("mine")
        wrong = {
            "taken.html": "exists already: choose another name, or delete it",
            "none/run.html": "cannot be written: there is no such folder",
            "taken.html/run.html": "cannot be written: Not a directory",
            "x" * 300: "cannot be written: File name too long",
        }
        for name, reason in wrong.items():
            with pytest.raises(SystemExit) as ended:
                main(["generate", "a", "--trace", str(tmp_path / name)])
            error = capsys.readouterr().err
            assert ended.value.code == 2 and error.count("\n") == 1 and f"{name}' {reason}" in error
        assert (tmp_path / "taken.html").read_text() == "mine" and not llm.prompts
        assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


class TestOptions:
    def test_every_field_of_the_configs_is_one_and_reaches_the_engine(self, llm):
        expected = {"trust_remote_code": True, "dtype": "half", "tokenizer_mode": "slow", "model": "m", "seed": 7}
        expected |= {"tokenizer": "t", "max_model_len": 64, "block_size": 8, "gpu_memory_utilization": 0.5}
        expected |= {"swap_space": 2.0, "enable_prefix_caching": True, "num_blocks": 9, "max_num_batched_tokens": 99}
        expected |= {"max_num_seqs": 3, "enable_chunked_prefill": True, "policy": "priority", "batching": "static"}
        expected |= {"preemption_mode": "swap", "scheduler_reserve_full_isl": False}
        expected |= {"attention_backend": "sdpa", "enforce_eager": True, "quantization": "int8", "max_logprobs": 7}
        names = {field.name for kind in CONFIGS for field in dataclasses.fields(kind)}
        assert set(expected) == names - {"scheduler_cls", "kv_cache_manager_cls"}  # nobody can type a class
        asked = {"method": "ngram", "num_speculative_tokens": 4}
        typed = ["--speculative-config", json.dumps(asked)]
        for name, value in expected.items():
            option = name.replace("_", "-")
            typed += [
                f"--no-{option}" if value is False else f"--{option}",
                *([] if value in (True, False) else [str(value)]),
            ]
        assert main(["generate", "a", "--device", "cuda:1", *typed]) == 0
        assert llm.kwargs == {**expected, "speculative_config": asked, "device": "cuda:1"}

    def test_those_of_sampling(self, llm):
        expected = {"temperature": 0.5, "top_p": 0.5, "top_k": 7, "min_p": 0.5, "seed": 7, "stop": ["a", "b"]}
        expected |= {"max_tokens": 7, "min_tokens": 1, "ignore_eos": True, "repetition_penalty": 1.5}
        expected |= {"presence_penalty": -0.5, "frequency_penalty": 0.5}
        assert set(expected) == set(SAMPLING_OPTIONS)
        typed = ["--stop", "a", "--stop", "b", "--ignore-eos"]
        for name in set(expected) - {"stop", "ignore_eos"}:
            typed += [f"--{name.replace('_', '-')}", str(expected[name])]
        assert main(["generate", "a", *typed]) == 0
        assert {name: getattr(llm.params[0], name) for name in expected} == expected

    def test_what_the_answer_must_be(self, llm, tmp_path):
        (tmp_path / "schema.json").write_text('{"type": "integer"}')
        assert main(["generate", "a", "--json-schema", str(tmp_path / "schema.json")]) == 0
        assert main(["generate", "a", "--regex", "[0-9]+"]) == 0
        found = [params.structured_outputs for params in llm.params]
        assert found == [StructuredOutputsParams(json={"type": "integer"}), StructuredOutputsParams(regex="[0-9]+")]

    def test_a_schema_that_is_null_is_not_as_if_there_were_none(self, llm, tmp_path):
        (tmp_path / "schema.json").write_text("null")
        assert main(["generate", "a", "--json-schema", str(tmp_path / "schema.json")]) == 0
        assert llm.params[0].structured_outputs.json == "null"  # which no engine takes

    def test_what_is_left_out_is_as_the_checkpoint_recommends(self, llm):
        llm.engine.default_params = SamplingParams(temperature=0.3, min_p=0.1)
        assert main(["generate", "a", "--min-p", "0.2"]) == 0
        params = llm.params[0]
        assert (params.temperature, params.min_p, params.max_tokens) == (0.3, 0.2, DEFAULT_MAX_TOKENS)
        llm.engine.default_params = SamplingParams(max_tokens=30)
        assert main(["generate", "a"]) == 0 and llm.params[1].max_tokens == 30

    @pytest.mark.parametrize("command", ["generate", "chat"])
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert ended.value.code == 0 and text.isascii()
        for words in ("CacheConfig:", "--block-size N", "Tokens in one KV block. Default: 16.", "--no-ignore-eos"):
            assert words in " ".join(text.split())


class TestChat:
    def test_it_remembers_what_was_said(self, monkeypatch, capsys):
        typed = ["Tell me a tale about a fox.", "Who did you tell me about?", ""]
        type_lines(monkeypatch, *typed)
        assert main(["chat", *COMMON]) == 0
        first, second = capsys.readouterr().out.removeprefix("> ").removesuffix("> ").split("> ")
        llm = LLM(str(EMBEDDED_MODEL), device="cpu")
        messages = [{"role": "user", "content": typed[0]}, {"role": "assistant", "content": first[:-1]}]
        messages += [{"role": "user", "content": typed[1]}]
        expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
        assert second[:-1] == expected[0].outputs[0].text

    def test_the_end_of_the_input_ends_it(self, llm, monkeypatch, capsys):
        type_lines(monkeypatch, "a")
        assert main(["chat"]) == 0
        assert capsys.readouterr() == ("> yes\n> \n", "")

    def test_its_options(self, llm, monkeypatch, tmp_path):
        (tmp_path / "tools.json").write_text('[{"name": "f"}]')
        template = "{{ tools[0].name }}{{ mood }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        (tmp_path / "template").write_text(template)
        type_lines(monkeypatch, "a")
        files = ["--tools", str(tmp_path / "tools.json"), "--chat-template", str(tmp_path / "template")]
        assert main(["chat", "--system", "Be kind.", *files, "--chat-template-kwargs", '{"mood": "!"}']) == 0
        assert llm.prompts == ["f![system]Be kind.[user]a"]

    def test_ctrl_c_stops_an_answer_and_what_there_is_of_it_stays(self, llm, monkeypatch, capsys):
        llm.answers = [["Once ", "upon", KeyboardInterrupt()]]
        type_lines(monkeypatch, "a", "b")
        assert main(["chat"]) == 0
        assert "assistant\nOnce upon<|im_end|>" in llm.prompts[1]
        assert capsys.readouterr() == ("> Once upon\n> yes\n> \n", "")

    def test_ctrl_c_at_the_prompt_ends_it(self, llm, monkeypatch, capsys):
        def interrupted(_):
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupted)
        assert main(["chat"]) == 130
        assert "Traceback" not in capsys.readouterr().err

    def test_a_long_conversation_goes_on_without_its_oldest_messages(self, llm, monkeypatch, capsys):
        llm.engine.max_model_len = 128
        type_lines(monkeypatch, *(f"Tell me tale number {i}." for i in range(6)))
        assert main(["chat", "--system", "Be kind."]) == 0
        assert all(len(TOKENIZER.encode(prompt)) <= 96 and "Be kind." in prompt for prompt in llm.prompts)
        assert "number 5." in llm.prompts[5] and "number 4." in llm.prompts[5] and "number 0." not in llm.prompts[5]
        assert "oldest messages no longer fit in" in capsys.readouterr().err

    def test_the_system_message_and_the_last_question_stay_though_they_do_not_fit(self):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
        assert _fit(lambda kept: [0] * 9 * len(kept), messages, 1, 5)[0] == messages

    def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(self, llm, monkeypatch, capsys):
        llm.answers = [["first"], [ValueError("prompt has 99 tokens")], ["third"]]
        type_lines(monkeypatch, "a", "b", "c")
        assert main(["chat"]) == 0
        assert capsys.readouterr().err == "error: prompt has 99 tokens\n"
        assert "first" in llm.prompts[2] and "user\nb" not in llm.prompts[2]


class TestWhatIsWrong:
    def check(self, status: int, words: str, capsys) -> None:
        captured = capsys.readouterr()
        assert status in (1, 2) and captured.out == "" and words in captured.err
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["generate", "a", *COMMON, "--top-p", "2"], "top_p"),
            (["generate", "a", *COMMON, "--block-size", "0"], "block_size"),
            (["generate", "a", *COMMON, "--num-blocks", str(10**14)], "num_blocks must fit"),
            (["simulate", "--num-requests", "1", "--num-blocks", str(10**15)], "num_blocks must be at most"),
            (["simulate", "--preemption-mode", "swap", "--swap-space", str(10**15)], "MemoryError"),
            (["simulate", "--attention-backend", "flash"], "--attention-backend changes nothing in a simulation"),
            (["simulate", "--tokenizer", "x"], "--tokenizer changes nothing in a simulation"),
            (["simulate", "--workload", __file__, "--rate", "2"], "--rate changes nothing of what a file says"),
            (
                ["simulate", "--workload", "possion", "--rate", "2"],
                "workload must be chat, poisson, burst or a CSV file",
            ),
            (
                ["simulate", "--workload", "burst", "--rate", "5e-324"],
                "rate must be at least 1e-09 requests per second",
            ),
            (["simulate", "--workload", "poisson", "--rate", "1e-310"], "rate must be at least 1e-09"),
            (["generate", "a", *COMMON, "--regex", "fox\\"], "regex must not end within an escape"),
            (["simulate", "--rate", "-1"], "rate must be positive, got -1"),
            (["simulate", "--enforce-eager"], "--enforce-eager changes nothing in a simulation"),
            (["simulate", "--quantization", "int8"], "--weight-bits make of it"),
            (["generate", "", *COMMON], "at least one token"),
            (
                ["generate", "a", *COMMON, "--regex", "(?=a)b"],
                "regex cannot be followed: look-around",
            ),
            (["generate", "a", *COMMON, "--regex", ""], "structured_outputs.regex"),
            (["generate", "a", "--model", "no/such/folder"], "no/such/folder"),
            (["generate", "a", "--device", "moon"], "moon"),
            (["generate", "caf\udce9", *COMMON], "Unicode"),
            (["chat", *COMMON, "--chat-template-kwargs", "[1]"], "chat_template_kwargs must be a dict"),
            (["chat", *COMMON, "--chat-template-kwargs", '{"tokenize": true}'], "'tokenize'"),
        ],
    )
    def test_while_it_runs(self, arguments, words, capsys):
        self.check(main(arguments), words, capsys)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            ([], "command"),
            (["sing"], "sing"),
            (["generate"], "PROMPT"),
            (["generate", "a", "--no-such-option"], "--no-such-option"),
            (["generate", "a", "--n", "2"], "--n"),
            (["generate", "a", "--block-size", "x"], "'x'"),
            (["generate", "a", "--dtype", "int8"], "int8"),
            (["generate", "a", "--policy", "random"], "'fcfs', 'priority'"),
            (["chat", "--chat-template-kwargs", "{"], "must be JSON"),
            (["chat", "--chat-template-kwargs", "[" * 100_000], "must be JSON"),
            (["chat", "--tools", "no/such/file"], "'no/such/file' cannot be read"),
            (["generate", "a", "--json-schema", "no/such/file"], "'no/such/file' cannot be read"),
            (
                ["generate", "a", "--json-schema", str(EMBEDDED_MODEL / "config.json"), "--regex", "a"],
                "not allowed with",
            ),
            (["chat", "--chat-template", str(EMBEDDED_MODEL)], "cannot be read"),
            (["chat", "--chat-template", str(EMBEDDED_MODEL / "model.safetensors")], "cannot be read"),
        ],
    )
    def test_in_the_options(self, arguments, words, capsys):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        self.check(ended.value.code, words, capsys)

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
    def test_standard_input_that_is_no_text(self, errors, llm, monkeypatch, capsys):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
        self.check(main(["generate", "-"]), "standard input must be", capsys)

    def test_no_standard_input(self, llm, monkeypatch, capsys):
        monkeypatch.setattr("sys.stdin", None)
        self.check(main(["generate", "-"]), "no standard input", capsys)

    def test_a_template_that_shows_nothing_is_said_before_anybody_types(self, llm, monkeypatch, capsys, tmp_path):
        (tmp_path / "template").write_text("{{ messages | length }}")
        monkeypatch.setattr("builtins.input", None)
        words = "the chat template must write what the user says, got '1' for 'Hello'"
        self.check(main(["chat", "--chat-template", str(tmp_path / "template")]), words, capsys)

    def test_no_chat_template_is_said_before_anybody_types(self, llm, monkeypatch, capsys):
        llm.engine.tokenizer = SimpleNamespace(chat_template=None)
        monkeypatch.setattr("builtins.input", None)
        self.check(main(["chat"]), "no chat template", capsys)


class TestHowItEnds:
    @pytest.mark.parametrize("method", ["__init__", "stream"])
    def test_ctrl_c(self, method, monkeypatch, capsys):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(LLM, method, interrupted)
        assert main(["generate", "a", *COMMON]) == 130
        assert "Traceback" not in capsys.readouterr().err

    def test_nobody_reads_any_more(self):
        done = run_shell(
            "FOLOVLLM generate 'Once upon' --max-tokens 60 --temperature 0 | head -c 5; echo ${PIPESTATUS[0]}"
        )
        assert (done.stdout, done.stderr) == (answer("Once upon", 60)[:5] + "141\n", "")

    def test_nobody_reads_the_help(self):
        done = run_shell("FOLOVLLM generate --help | true; echo ${PIPESTATUS[0]}")
        assert done.stdout in ("0\n", "141\n") and done.stderr == ""

    def test_an_answer_that_was_cut_is_not_what_it_must_be(self, capsys):
        asked = ["generate", "a", *COMMON, "--regex", "[a-z]{30}"]
        assert main([*asked, "--max-tokens", "3"]) == 1
        captured = capsys.readouterr()
        assert captured.out.strip() and captured.err.startswith("error: the answer was cut at its limit")
        assert main(asked) == 0
        assert len(capsys.readouterr().out) == 31
        assert main(["generate", "a", *COMMON, "--regex", "[a-z]+", "--max-tokens", "3"]) == 0  # it may end anywhere
        assert capsys.readouterr().err == ""

    def test_nobody_reads_a_report(self):
        done = run_shell("unset PYTHONUNBUFFERED; FOLOVLLM simulate --num-requests 4 | true; echo ${PIPESTATUS[0]}")
        assert (done.stdout, done.stderr) == ("141\n", "")

    def test_standard_error_is_closed(self):
        done = run_shell("FOLOVLLM generate a --top-p 3 2>&-")
        assert (done.returncode, done.stdout) == (1, "")

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
    @pytest.mark.parametrize("command", ["generate a --max-tokens 5", "simulate --num-requests 4"])
    def test_the_disk_is_full(self, command):
        done = run_shell(f"unset PYTHONUNBUFFERED; FOLOVLLM {command} > /dev/full")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
