"""The command line: ``python -m folovllm generate PROMPT``, ``chat``, ``simulate``, and ``quantize MODEL OUT``.

Every field of the configs is an option under its own name, and so are those of `SamplingParams` that make sense for
one streamed answer. What goes wrong is one line on standard error and the exit status: 1 for a mistake that was found
while running, 2 for one in the options, 130 after Ctrl-C, 141 when the reader of the output is gone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import MISSING, Field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, get_args, get_origin, get_type_hints

from folovllm.chat import apply_chat_template
from folovllm.config import DTYPES, CacheConfig, ModelConfig, SchedulerConfig
from folovllm.engine.encode import encode_text
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams
from folovllm.tales import EMBEDDED_MODEL, default_model
from folovllm.validation import check_unicode, require, show

if TYPE_CHECKING:
    from folovllm.llm import LLM

CONFIGS = (ModelConfig, CacheConfig, SchedulerConfig)
"""The configs whose fields are options."""
SAMPLING_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""The fields of `SamplingParams` that are options."""
DEFAULT_MAX_TOKENS = 256
"""Tokens of an answer where neither the user nor the checkpoint says how many."""

TRACED_LOGPROBS = 4
"""Tokens whose probabilities are on the page of a run, beside the one that was drawn."""
CALIBRATION_LENGTH, CALIBRATION_TOKENS = 512, 2**14
"""Tokens of a piece of the calibration, and of all pieces."""
CALIBRATION_CHARACTERS, CALIBRATION_CUTS = 2**20, 64
"""Characters of a text that become tokens; of a longer text so many cuts from all over, so that a file may be huge."""

DRAWN_WORKLOAD = {"num_requests": 400, "rate": 8.0}
"""Options of simulated workloads that are drawn, and their defaults; a file says these things itself."""
CHANGE_NO_SIMULATION = {
    "attention_backend", "dtype", "enforce_eager", "max_logprobs", "quantization", "tokenizer", "tokenizer_mode",
    "trust_remote_code",
}  # fmt: skip
"""Settings of an engine that the time of a simulated step and its counts do not depend on."""

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line: the usage of so many options would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush_output()
        super().exit(status, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            check_unicode(f"the argument {argument!r}", argument)
        args = make_parser().parse_args(argv)
        _run(args)
        _flush_output()
    except KeyboardInterrupt:
        _note("")
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        _discard_output()
        return 141
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:  # standard output cannot be written to
            _discard_output()
        _complain(error)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; an option that was left out is None."""
    is_script = Path(sys.argv[0]).stem == "folovllm"
    prog = "folovllm" if is_script else "python -m folovllm"
    parser = _Parser(prog=prog, description="Runs a model and streams its answers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, allow_abbrev=False)
    generate = add(
        "generate", help="continue a text", description="Continues a text.", usage=f"{prog} generate [options] PROMPT"
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text, or - to read it from standard input")
    generate.add_argument(
        "--trace",
        metavar="FILE",
        type=_new_file,
        help="write a page on which the run can be played step by step, for any browser; the file must be new",
    )
    _add_engine_options(generate)
    about = (
        "Answers one line at a time; an empty line or the end of the input ends it. Ctrl-C stops an answer, and what "
        "there is of it stays in the conversation; at the prompt it ends the chat. When a conversation gets too long "
        "for the model, its oldest messages are forgotten, and a line says so."
    )
    chat = add("chat", help="talk, one line at a time", description=about, usage=f"{prog} chat [options]")
    _add_chat_options(chat)
    _add_engine_options(chat)
    about = (
        "Runs a workload through the real engine for a model and a card that are not there, on a virtual clock, and "
        "prints what every request would have waited and paid. Counts are exact, seconds come from a formula."
    )
    simulate = add("simulate", help="serve a workload on a GPU that is not there", description=about)
    _add_simulation_options(simulate)
    _add_config_options(simulate)
    about = (
        "Writes a checkpoint with weights of 4 bits into a new folder, in a format that vLLM reads as well, and prints "
        "what it cost. It runs on the CPU, with one layer in memory at a time."
    )
    _add_quantization_options(add("quantize", help="make a checkpoint's weights smaller", description=about))
    return parser


def _add_chat_options(command: argparse.ArgumentParser) -> None:
    """How the conversation begins, and how it becomes a prompt."""
    group = command.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="the system message that the conversation begins with")
    group.add_argument("--tools", metavar="FILE", type=_json_file, help="JSON: a list of tools the model may call")
    group.add_argument(
        "--chat-template", metavar="FILE", type=_text_file, help="a template in Jinja, not the checkpoint's"
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        type=_json,
        help='variables for the template, such as {"enable_thinking": false}',
    )


def _add_quantization_options(command: argparse.ArgumentParser) -> None:
    """The two folders, and how the one becomes the other."""
    command.add_argument("model", metavar="MODEL", help="the checkpoint: a folder, or a name on the hub")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to be made")
    command.add_argument("--bits", metavar="N", type=int, default=4, help="of a weight; 4 is all that there is yet.")
    command.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        default=128,
        help="input columns of a weight that share a scale; -1: all of them. Default: 128.",
    )
    command.add_argument(
        "--method",
        choices=["gptq", "rtn"],
        default="gptq",
        help="gptq, or rtn, which rounds each number to the nearest. Default: gptq.",
    )
    command.add_argument(
        "--format", choices=["gptq", "compressed-tensors"], default="gptq", help="of the files. Default: gptq."
    )
    command.add_argument(
        "--calibration",
        metavar="FILE",
        type=_text_file,
        help="a text like those that the model will read; the embedded model has its own.",
    )


def _add_simulation_options(command: argparse.ArgumentParser) -> None:
    """The card, who asks, and how many engines there are."""
    group = command.add_argument_group("simulation", "--model is a name such as qwen3-8b, or a checkpoint's folder.")
    group.add_argument("--gpu", metavar="NAME", default="h100", help="the card. Default: h100.")
    group.add_argument(
        "--workload",
        metavar="NAME",
        default="chat",
        help="chat (conversations), poisson (strangers), burst (strangers who come together), or a CSV file with "
        "arrival_s, prompt_tokens and output_tokens. Default: chat.",
    )
    group.add_argument("--rate", metavar="X", type=float, help="requests per second. Default: 8.")
    group.add_argument(
        "--num-requests",
        metavar="N",
        type=int,
        help="how many; of chats the next multiple of 4. Default: 400.",
    )
    group.add_argument(
        "--weight-bits",
        metavar="N",
        type=int,
        help="of the layers' weights. Default: those of the folder's files, of a model by name 16.",
    )
    group.add_argument("--tensor-parallel-size", metavar="N", type=int, default=1, help="cards per engine. Default: 1.")
    group.add_argument("--replicas", metavar="N", type=int, default=1, help="engines behind a router. Default: 1.")
    group.add_argument(
        "--router",
        metavar="NAME",
        default="round_robin",
        help="round_robin, least_loaded or prefix_aware. Default: round_robin.",
    )


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    """The device, the fields of the configs, and those of `SamplingParams`."""
    command.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1; left out: CUDA if there is one")
    taken = _add_config_options(command)
    command.add_argument(
        "--speculative-config",
        metavar="JSON",
        type=_json,
        help='how tokens are guessed, such as \'{"method": "ngram", "num_speculative_tokens": 4}\'',
    )
    about = f"What is left out is as the checkpoint recommends; --max-tokens is {DEFAULT_MAX_TOKENS} where it does not."
    group = command.add_argument_group("SamplingParams", about)
    for field in fields(SamplingParams):
        if field.name in SAMPLING_OPTIONS and field.name not in taken:
            _add_option(group, SamplingParams, field, show_default=False)
    fitting = group.add_mutually_exclusive_group()
    fitting.add_argument("--json-schema", metavar="FILE", type=_schema_file, help="The answer is JSON of this schema.")
    fitting.add_argument("--regex", metavar="TEXT", help="The answer matches this regular expression as a whole.")


def _add_config_options(command: argparse.ArgumentParser) -> set[str]:
    """The fields of the configs; returns their names."""
    taken: set[str] = set()  # a field that two of them have, such as the seed, is one option, given to both
    for kind in CONFIGS:
        group = command.add_argument_group(kind.__name__, inspect.getdoc(kind))
        for field in fields(kind):
            if field.name not in taken:
                _add_option(group, kind, field, show_default=True)
                taken.add(field.name)
    return taken


def _add_option(group: argparse._ArgumentGroup, kind: type, field: Field[Any], show_default: bool) -> None:
    """Adds one field as an option; a field that holds a class cannot be typed and is left out."""
    # torch takes seconds to import, and the names of its dtypes are known without it.
    dtypes = types.SimpleNamespace(dtype=Literal[tuple(DTYPES)])  # type: ignore[valid-type]
    hint = get_type_hints(kind, localns={"torch": dtypes})[field.name]
    allowed = [hint] if get_origin(hint) is Literal else get_args(hint) or [hint]  # the members of a union
    if type in allowed:
        return
    text = _field_docstrings(kind).get(field.name, "")
    if show_default and field.default is not MISSING and field.default is not None:
        text += f" Default: {field.default}."
    options: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%").strip()}
    words = [word for each in allowed if get_origin(each) is Literal for word in get_args(each)]
    if words:
        options |= {"choices": words}
    elif bool in allowed:
        options |= {"action": argparse.BooleanOptionalAction}
    elif list[str] in allowed:
        options |= {"action": "append", "metavar": "TEXT", "help": f"{options['help']} May be given several times."}
    else:
        options |= {"type": allowed[0], "metavar": _METAVARS[allowed[0]]}
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _field_docstrings(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass, from its source; empty without the source."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
    return {
        statement.target.id: re.sub("`+", "", " ".join(text.value.value.split()))
        for statement, text in pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _new_file(path: str) -> Path:
    """The path of a file that can be made, for argparse: a mistake is found before the model has run for nothing."""
    try:
        with open(path, "x"):
            pass
        os.remove(path)
    except FileExistsError:
        raise argparse.ArgumentTypeError(f"{path!r} exists already: choose another name, or delete it") from None
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: there is no such folder") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: {reason}") from None
    return Path(path)


def _text_file(path: str) -> str:
    """The text of a file, for argparse."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a ValueError: not UTF-8, or no path at all
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read: {reason}") from None


def _json_file(path: str) -> Any:
    """The object in a JSON file, for argparse."""
    return _json(_text_file(path))


def _schema_file(path: str) -> str:
    """The text of a JSON schema's file, for argparse: an object would be no option where it is null."""
    text = _text_file(path)
    _json(text)
    return text


def _json(text: str) -> Any:
    """The object in a JSON text, for argparse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON ({error})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what libraries say to programmers: their warnings, and log messages below errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers  # noqa: F401  # sets its logger's level when it is imported

        loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _run(args: argparse.Namespace) -> None:
    """Makes the engine that was asked for, and runs the command on it."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = [*(field.name for kind in CONFIGS for field in fields(kind)), "speculative_config"]
    config = {name: given[name] for name in names if name in given}
    if args.command == "simulate":
        _simulate(args, config)
        return
    if args.command == "quantize":
        with _exit_if_terminated():
            _quantize(args)
        return
    sampling = {name: given[name] for name in SAMPLING_OPTIONS if name in given}
    if "json_schema" in given or "regex" in given:
        sampling["structured_outputs"] = StructuredOutputsParams(json=args.json_schema, regex=args.regex)
    SamplingParams(**{"max_tokens": None, **sampling})  # so that a mistake is found before the model is loaded
    prompt = _read_prompt(args.prompt) if args.command == "generate" else ""
    config = {"model": default_model(), **config}

    with _quiet():
        from folovllm.llm import LLM

        llm = LLM(**config, device=args.device)
        recommended = llm.engine.default_params
        if recommended.max_tokens == SamplingParams().max_tokens:  # the checkpoint recommends nothing
            sampling.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        params = replace(recommended, **sampling)
        if args.command == "chat":
            _chat(llm, params, args)
        elif args.trace is None:
            _show_whole(llm, prompt, params)
        else:
            _show_and_trace(llm, prompt, params, args.trace)


def _simulate(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Runs a workload on a virtual clock and prints the report."""
    # Here, since nobody else pays for them; torch is not loaded.
    from folovllm.simulator.cluster import simulate
    from folovllm.simulator.presets import get_model
    from folovllm.simulator.workload import make_workload

    for name in sorted(config.keys() & CHANGE_NO_SIMULATION):
        raise ValueError(
            f"--{name.replace('_', '-')} changes nothing in a simulation, where a step takes what --gpu, --model and "
            "--weight-bits make of it; leave it out"
        )
    shape = get_model(config.pop("model", "qwen3-8b"))
    shape = shape if args.weight_bits is None else shape.with_bits(args.weight_bits)
    drawn = {name: value for name in DRAWN_WORKLOAD if (value := getattr(args, name)) is not None}
    if drawn and Path(args.workload).is_file():
        raise ValueError(f"--{next(iter(drawn)).replace('_', '-')} changes nothing of what a file says; leave it out")
    drawn = {**DRAWN_WORKLOAD, **drawn, "seed": config.get("seed", 0), "vocab_size": shape.vocab_size}
    workload = make_workload(args.workload, **drawn)
    report = simulate(
        workload,
        args.gpu,
        shape,
        replicas=args.replicas,
        router=args.router,
        tensor_parallel_size=args.tensor_parallel_size,
        **config,
    )
    print(f"{shape.name}, {shape.weight_bits} bits, on {args.gpu}; {args.workload}; replicas: {args.replicas}")
    print(report)


@contextlib.contextmanager
def _exit_if_terminated() -> Iterator[None]:
    """Ends the program like Ctrl-C when it is told to terminate, so that nothing half written is left behind."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, lambda found, _: sys.exit(128 + found))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quantize(args: argparse.Namespace) -> None:
    """Writes a quantized checkpoint and prints the report."""
    with _quiet():
        from folovllm.model.quantized_files import quantize_checkpoint
        from folovllm.model_loader import ModelLoader

        loader = ModelLoader(ModelConfig(args.model, dtype="float32"))
        checkpoint = loader.open("cpu")
        texts = [args.calibration]
        if args.calibration is None:
            require(
                checkpoint.folder.resolve() == EMBEDDED_MODEL.resolve(),
                "--calibration FILE is required for a model other than the embedded one: a text like what it will "
                "read, on which the errors of its weights are kept small",
            )
            from folovllm.tales.evaluate import calibration

            texts = [document.text for document in calibration()]
        length = min(CALIBRATION_LENGTH, checkpoint.max_model_len)
        sequences = _cut_texts(loader.load_tokenizer(add_pad_token=False), texts, length)
        report = quantize_checkpoint(
            checkpoint, args.out, sequences, args.bits, args.group_size, args.method, args.format
        )
    print(report)


def _cut_texts(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """Token ids of texts, the long ones cut to pieces; about `CALIBRATION_TOKENS` of them are kept, from all over."""
    first = tokenizer("")["input_ids"]  # what the tokenizer begins every text with
    room = length - len(first)
    require(
        room > 0, f"max_model_len must be more than the {len(first)} tokens that every text begins with, got {length}"
    )
    pieces = []
    for text in texts:
        if len(text) > CALIBRATION_CHARACTERS:
            size, starts = CALIBRATION_CHARACTERS // CALIBRATION_CUTS, range(CALIBRATION_CUTS)
            text = "".join(text[(at := i * len(text) // CALIBRATION_CUTS) : at + size] for i in starts)
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [first + token_ids[i : i + room] for i in range(0, len(token_ids), room)]
    step = max(1, sum(map(len, pieces)) / CALIBRATION_TOKENS)
    return [pieces[int(i * step)] for i in range(math.ceil(len(pieces) / step))]


def _read_prompt(prompt: str) -> str:
    """The prompt that was typed, or standard input for "-"."""
    return _read(lambda: sys.stdin.read()) if prompt == "-" else prompt


def _read(read: Callable[[], str]) -> str:
    """What ``read`` reads from standard input; bytes that are not text raise a `ValueError`."""
    if sys.stdin is None:
        raise ValueError("there is no standard input to read from")
    try:
        text = read()
    except UnicodeDecodeError as error:
        where = f"byte {error.start} ({error.object[error.start]:#04x})"
        raise ValueError(f"standard input must be text in {error.encoding}, and {where} is not") from None
    return check_unicode("standard input", text)


def _show(pieces: Iterator[str], stop_on_interrupt: bool = False) -> str:
    """Prints a text as it comes, and returns all of it, or what came before Ctrl-C."""
    text = ""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        with contextlib.closing(cast("Generator[str]", pieces)):
            for piece in pieces:
                print(piece.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
                text += piece
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            raise
    print(flush=True)
    return text


def _show_whole(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Prints an answer as it comes; one that was cut before it was what it must be raises a `ValueError`."""
    reasons: list[str | None] = []

    def note_end() -> Generator[str]:
        reasons.append((yield from llm.stream(prompt, params)))

    text = _show(note_end())
    if params.structured_outputs is None or reasons != ["length"]:
        return
    backend = llm.engine.input_processor.structured_output_backend
    token_ids = encode_text(llm.engine.tokenizer, text, llm.engine.max_model_len, add_special_tokens=False)
    require(
        backend.compile_grammar(params.structured_outputs).accept_tokens([*token_ids, *llm.engine.eos_token_ids[:1]]),
        "the answer was cut at its limit of tokens, before it was what --json-schema or --regex asks for: raise "
        "--max-tokens",
    )


def _show_and_trace(llm: LLM, prompt: str, params: SamplingParams, file: Path) -> None:
    """Prints a text as it comes, and writes a page of the run, also of one that Ctrl-C has stopped."""
    from folovllm.book.players import play_trace, record

    with record(llm) as trace:
        try:
            limit = llm.engine.config.model_config.max_logprobs
            num_shown = TRACED_LOGPROBS if limit == -1 else min(TRACED_LOGPROBS, limit)
            _show_whole(llm, prompt, replace(params, logprobs=num_shown))
        finally:
            if trace.steps:
                page = play_trace(trace).to_page("A run of FoloVLLM, step by step")
                with file.open("x", encoding="utf-8", newline="\n") as stream:
                    stream.write(page)


def _chat(llm: LLM, params: SamplingParams, args: argparse.Namespace) -> None:
    """Answers line after line, until one is empty or the input ends."""
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    write = partial(
        apply_chat_template,
        llm.engine.tokenizer,
        tools=args.tools,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    shown = write([*system, {"role": "user", "content": "Hello"}])
    require("Hello" in shown, f"the chat template must write what the user says, got {show(shown)} for 'Hello'")
    messages: list[dict[str, str]] = system
    longest = llm.engine.max_model_len
    room = min(params.max_tokens or longest, longest // 4)
    # The template writes the beginning-of-text token itself.
    encode = partial(encode_text, llm.engine.tokenizer, max_model_len=longest, add_special_tokens=False)
    while line := _read_line():
        try:
            asked = [*messages, {"role": "user", "content": line}]
            kept, token_ids = _fit(lambda kept: encode(write(kept)), asked, len(system), longest - room)
            answer = _show(llm.stream(token_ids, params), stop_on_interrupt=True)
        except ValueError as error:  # the conversation stays as it was
            _complain(error)
            continue
        if num_forgotten := len(messages) + 1 - len(kept):
            _note(f"(the {num_forgotten} oldest messages no longer fit in, and are forgotten)")
        messages = [*kept, {"role": "assistant", "content": answer}]


def _read_line() -> str:
    """The next line, without its end; empty when there are no more."""
    try:
        return _read(partial(input, "> "))
    except EOFError:
        print(flush=True)
        return ""


def _fit(
    encode: Callable[[list[dict[str, str]]], list[int]],
    messages: list[dict[str, str]],
    num_system: int,
    max_tokens: int,
) -> tuple[list[dict[str, str]], list[int]]:
    """The newest messages that make a prompt of at most ``max_tokens``, and that prompt.

    Questions go with their answers; the system message and the last question always stay.
    """
    kept = list(messages)
    while len(token_ids := encode(kept)) > max_tokens and len(kept) > num_system + 1:
        del kept[num_system : num_system + 2]
    return kept, token_ids


def _complain(error: Exception) -> None:
    """Prints in one line what went wrong."""
    _note(f"error: {' '.join(str(error).split()) or type(error).__name__}")


def _note(line: str) -> None:
    """Prints a line that is no answer, if there is somewhere to print it."""
    if sys.stderr is not None:  # or it would go to standard output
        with contextlib.suppress(OSError):  # standard error may be closed
            print(line, file=sys.stderr)


def _flush_output() -> None:
    """Writes what is left in standard output's buffer while a broken pipe or a full disk is still caught."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _discard_output() -> None:
    """Discards what is left in standard output's buffer, which Python would try to write again at exit."""
    with contextlib.suppress(OSError, AttributeError):  # an output without a file descriptor, or none at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
