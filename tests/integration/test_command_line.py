"""The command line: it streams, reads standard input, and says what was wrong in one line."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from folovllm import SamplingParams
from folovllm.__main__ import main
from folovllm.llm import LLM
from folovllm.tales import EMBEDDED_MODEL

COMMON = ["--model", str(EMBEDDED_MODEL), "--device", "cpu", "--temperature", "0"]


def answer(prompt: str, max_tokens: int) -> str:
    llm = LLM(str(EMBEDDED_MODEL), device="cpu")
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0].outputs[0].text


def test_generate_as_it_is_typed():
    command = [sys.executable, "-m", "folovllm", "generate", "Once upon a time", *COMMON, "--max-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, answer("Once upon a time", 12) + "\n", "")


def test_generate_reads_standard_input_and_stops(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    assert main(["generate", "-", *COMMON, "--stop", "."]) == 0
    assert capsys.readouterr().out == answer("Once upon a time", 60).split(".")[0] + "\n"


def test_chat_remembers_what_was_said(monkeypatch, capsys):
    typed = ["Tell me a tale about a fox.", "Who did you tell me about?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    assert main(["chat", *COMMON]) == 0
    first, second = capsys.readouterr().out.removeprefix("> ").removesuffix("> ").split("> ")
    llm = LLM(str(EMBEDDED_MODEL), device="cpu")
    messages = [{"role": "user", "content": typed[0]}, {"role": "assistant", "content": first[:-1]}]
    messages += [{"role": "user", "content": typed[1]}]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
    assert second[:-1] == expected[0].outputs[0].text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "a", *COMMON, "--top-p", "2"], "top_p"),
        (["generate", "", *COMMON], "at least one token"),
        (["generate", "a", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_was_wrong_is_one_line(arguments, words, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    assert main(["generate", "a", *COMMON]) == 130
    assert "Traceback" not in capsys.readouterr().err
