"""What test_small_changes.py should know about the exercises of chapter 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def generate(
    feed: Callable[[list[int]], Any] = lambda unread: torch.tensor([unread]),
    place: Any = (0, -1),
    grows: bool = True,
    **options: Any,
) -> Callable[[Any, list[int], int], list[int]]:
    """Generates with a cache; each part may be got wrong."""

    def attempt(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
        output: list[int] = []
        cache, unread = None, prompt
        while len(output) < max_tokens:
            result = model(feed(unread), past_key_values=cache, **options)
            cache, unread = result.past_key_values, [int(result.logits[place].argmax())]
            output += unread if grows else []
        return output

    return attempt


def with_the_first_cache(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    first = model(torch.tensor([prompt]))
    output = [int(first.logits[0, -1].argmax())]
    for _ in range(max_tokens - 1):
        result = model(torch.tensor([output[-1:]]), past_key_values=first.past_key_values)
        output.append(int(result.logits[0, -1].argmax()))
    return output


def on_its_device(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    return generate(lambda unread: torch.tensor([unread], device=model.device), use_cache=True)(
        model, prompt, max_tokens
    )


WRONG: dict[str, dict[str, Any]] = {
    "check_tokens_computed": {
        "the numbers of all passes": lambda prompt, output, cached: [prompt + i for i in range(output)],
        "half the square": lambda prompt, output, cached: prompt + output - 1 if cached else output * output / 2,
        "both": lambda prompt, output, cached: (prompt + output - 1, output * prompt + output * (output - 1) // 2),
        "a prompt of 7": lambda prompt, output, cached: (
            6 + output if cached else 7 * output + output * (output - 1) // 2
        ),
    },
    "check_generate": {
        "tells the model to keep nothing": generate(use_cache=False),
        "one dimension": generate(torch.tensor),
        "a list": generate(lambda unread: [unread]),
        "no number of the list": generate(lambda unread: torch.tensor(unread[-1])),
        "the first place": generate(place=(0, 0)),
        "the likeliest of all places": generate(place=0),
        "a loop that never ends": generate(grows=False),
        "the first cache always": with_the_first_cache,
        "the tokens as a text": lambda model, prompt, n: " ".join(map(str, generate()(model, prompt, n))),
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_tokens_computed": {
        "a sum": lambda prompt, output, cached: prompt + output - 1 if cached else sum(range(prompt, prompt + output)),
        "half in floats": lambda prompt, output, cached: (
            prompt + output - 1 if cached else output * prompt + output * (output - 1) / 2
        ),
    },
    "check_generate": {"on the model's device": on_its_device},
}

SAME = {
    "check_generate": {
        "output.append(int(result.logits[0, -1].argmax())) → output.append(int(result.logits[-1, -1].argmax()))": (
            "the batch has one row, which is the first and the last"
        ),
    }
}
