"""The command line: ``python -m folovllm generate PROMPT`` and ``python -m folovllm chat``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from folovllm.sampling_params import SamplingParams
from folovllm.tales import default_model

if TYPE_CHECKING:
    from folovllm.llm import LLM


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(prog="python -m folovllm", description="Runs a model and streams its answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("prompt", help="the text, or - to read it from standard input")
    commands.add_parser("chat", help="talk, one line at a time; an empty line ends it")
    for command in commands.choices.values():
        command.add_argument("--model", default=str(default_model()), help="name or path of a checkpoint")
        command.add_argument("--device", help="cpu, cuda, cuda:1; left out: CUDA if there is one")
        command.add_argument("--max-tokens", type=int, default=256)
        command.add_argument("--temperature", type=float)
        command.add_argument("--top-p", type=float)
        command.add_argument("--top-k", type=int)
        command.add_argument("--seed", type=int)
        command.add_argument("--stop", action="append", help="a text that ends the answer; may be given several times")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    args = parse_args(argv)
    try:
        from folovllm.llm import LLM

        llm = LLM(args.model, device=args.device)
        given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")}
        given = {name: value for name, value in given.items() if value is not None}
        params = replace(llm.engine.default_params, **given, max_tokens=args.max_tokens)
        if args.command == "generate":
            prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
            _show(llm.stream(prompt, params))
        else:
            _chat(llm, params)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _show(pieces: Iterable[str]) -> str:
    """Prints a text as it comes, and gives it back whole."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _chat(llm: LLM, params: SamplingParams) -> None:
    """Reads a line, answers it, until a line is empty."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = _show(llm.stream(llm.apply_chat_template(messages), params))
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    sys.exit(main())
