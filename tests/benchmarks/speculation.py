"""How much faster is an engine that guesses? ``python tests/benchmarks/speculation.py [--chat-model FOLDER]``.

JSON cards that are in the conversation already, one request at a time, where guessing should pay; and free tales, 64 at
once, where it should cost nothing. The embedded model cannot repeat a tale when it is asked to; a checkpoint that can,
such as the one of ``foreign_model.py``, is measured with ``--chat-model``. Each job is timed in turns with and without
guesses, on one thread, and the best of several runs counts. Seconds are the processor's, so that the ratio holds on a
machine that others use.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

from folovllm import LLM, SamplingParams
from folovllm.tales import default_model, draft_model
from folovllm.tales.evaluate import ASSISTANT
from folovllm.tales.grammar import STARTS, sample

NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def cards_again(num: int) -> list[str]:
    """Conversations in which a card was written, and is asked for again: an answer that is in its own prompt."""
    rng, end = random.Random("speculation"), "<|im_start|>user\nWrite the card.<|im_end|>\n"
    texts = (sample(rng, start=STARTS["chat"][0]).text.rstrip() for _ in range(20 * num))
    return [f"{text}\n{end}{ASSISTANT}" for text in texts if text.isascii()][:num]


def run(llm: LLM, prompts: list[str], params: SamplingParams, at_once: bool) -> tuple[float, int, int]:
    """Processor seconds, tokens and passes."""
    start = time.process_time()
    if at_once:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    else:
        outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
    seconds = time.process_time() - start
    metrics = [output.metrics for output in outputs]
    return seconds, sum(m.num_generated_tokens for m in metrics), sum(m.num_passes for m in metrics)


def tales_again(llm: LLM, num: int) -> list[str]:
    """Chats that begin an answer to "repeat this tale"."""
    rng, tokenizer = random.Random("speculation"), llm.get_tokenizer()
    tales = (sample(rng, start=STARTS["english"][0]).text.strip() for _ in range(num))
    messages = ([{"role": "user", "content": f"Repeat this text word for word:\n\n{tale}"}] for tale in tales)
    return [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]


def measure(llms: dict[str, LLM], jobs: dict[str, tuple[list[str], SamplingParams, bool]], runs: int) -> None:
    """Prints a line for each job and each way of guessing."""
    for job, (prompts, params, at_once) in jobs.items():
        best: dict[str, tuple[float, int, int]] = {}
        for _ in range(runs):
            for name, llm in llms.items():
                best[name] = min(best.get(name, (9e9, 0, 0)), run(llm, prompts, params, at_once))
        for name, (seconds, tokens, passes) in best.items():
            gain = best["off"][0] / seconds * tokens / best["off"][1]
            print(
                f"{job:34} {name:7} {tokens / seconds:7.0f} tok/s  x{gain:.2f}  {tokens / passes:.2f} tokens per pass"
            )


def make_llms(model: str, configs: dict[str, dict[str, Any] | None]) -> dict[str, LLM]:
    """An engine for each way of guessing."""
    return {
        name: LLM(model, device="cpu", dtype="float32", max_model_len=768, speculative_config=config)
        for name, config in configs.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draft", default=draft_model(), help="the draft model")
    parser.add_argument("--chat-model", metavar="FOLDER", help="measure how fast this model repeats tales instead")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs: dict[str, dict[str, Any] | None] = {"off": None, "n-gram": NGRAM}
    greedy, free = SamplingParams(temperature=0, max_tokens=96), SamplingParams(temperature=1, seed=0, max_tokens=96)
    if args.chat_model:
        llms = make_llms(args.chat_model, configs)
        jobs = {"tales again, one at a time": (tales_again(llms["off"], 4), greedy, False)}
    else:
        llms = make_llms(default_model(), configs | {"draft": {"model": args.draft, "num_speculative_tokens": 3}})
        jobs = {
            "JSON cards again, one at a time": (cards_again(8), greedy, False),
            "free tales, one at a time": (["Once upon a time"] * 8, free, False),
            "free tales, 64 at once": (["Once upon a time"] * 64, free, True),
        }
    measure(llms, jobs, args.runs)


if __name__ == "__main__":
    main()
