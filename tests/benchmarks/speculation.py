"""How much faster is an engine that guesses? ``python tests/benchmarks/speculation.py``.

JSON cards that are in the conversation already, one request at a time, where guessing should pay; and free tales, 64 at
once, where it should cost nothing. Each is done in turns with and without guesses, on one thread; a ratio is the median
over the rounds. Seconds are the processor's, so that others on the machine matter less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

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


def measure(llms: dict[str, LLM], jobs: dict[str, tuple[list[str], SamplingParams, bool]], rounds: int) -> None:
    """Prints a line for each job and each way of guessing."""
    for job, (prompts, params, at_once) in jobs.items():
        found = [{name: run(llm, prompts, params, at_once) for name, llm in llms.items()} for _ in range(rounds)]
        for name in llms:
            speeds = [each[name][1] / each[name][0] for each in found]
            gain = statistics.median(speed * each["off"][0] / each["off"][1] for speed, each in zip(speeds, found))
            _, tokens, passes = found[0][name]
            print(
                f"{job:34} {name:7} {statistics.median(speeds):7.0f} tok/s  x{gain:.2f}  "
                f"{tokens / passes:.2f} tokens per pass"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draft", default=draft_model(), help="the draft model")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = {"off": None, "n-gram": NGRAM, "draft": {"model": args.draft, "num_speculative_tokens": 3}}
    llms = {
        name: LLM(default_model(), device="cpu", dtype="float32", max_model_len=768, speculative_config=config)
        for name, config in configs.items()
    }
    greedy, free = SamplingParams(temperature=0, max_tokens=96), SamplingParams(temperature=1, seed=0, max_tokens=96)
    jobs = {
        "JSON cards again, one at a time": (cards_again(8), greedy, False),
        "free tales, one at a time": (["Once upon a time"] * 8, free, False),
        "free tales, 64 at once": (["Once upon a time"] * 64, free, True),
    }
    measure(llms, jobs, args.rounds)


if __name__ == "__main__":
    main()
