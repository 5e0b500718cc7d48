"""Checks of the exercises of chapter 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from folovllm.book.exercises.verdict import exercise, expect


@exercise("ends are looked for before the limit, and not before min_tokens.")
def check_finish_status(attempt: Callable[[Any, int], Any]) -> None:
    """``attempt(seq, eos_token_id)``: RUNNING, FINISHED_STOPPED or FINISHED_LENGTH_CAPPED."""
    from folovllm.request import Sequence, SequenceData, SequenceStatus
    from folovllm.sampling_params import SamplingParams

    def status(output: list[int], **fields: Any) -> Any:
        params = SamplingParams(**{"max_tokens": 4, "stop_token_ids": [7], **fields})
        return attempt(Sequence("s", "r", SequenceData([2], output), params), 2)

    running, stopped, capped = (
        SequenceStatus.RUNNING,
        SequenceStatus.FINISHED_STOPPED,
        SequenceStatus.FINISHED_LENGTH_CAPPED,
    )
    expect(status([5]) is running, f"one ordinary token of four: it runs on, yours says {status([5])}.")
    expect(status([5, 5, 5]) is running, f"three ordinary tokens of four: it runs on, yours says {status([5, 5, 5])}.")
    expect(status([5, 2]) is stopped, f"the end token stops it, yours says {status([5, 2])}.")
    expect(status([5, 7]) is stopped, f"a token of stop_token_ids stops it too, yours says {status([5, 7])}.")
    expect(status([5, 5, 5, 5]) is capped, "four ordinary tokens of four: the length cap ends it.")
    expect(status([5, 5, 5, 2]) is stopped, "the last allowed token is the end token: it stopped, it was not cut.")
    early = status([5, 2], min_tokens=3)
    expect(early is running, f"an end token before min_tokens does not end the text, yours says {early}.")
    early = status([5, 7], min_tokens=3)
    expect(early is running, f"nor does a token of stop_token_ids before min_tokens, yours says {early}.")
    past = status([5, 2, 5], min_tokens=3)
    expect(past is running, f"only the last token counts, an earlier end token was passed over; yours says {past}.")
    expect(status([5, 5, 2], min_tokens=3) is stopped, "at min_tokens an end token counts again.")


@exercise("full blocks of the prompt are counted once, and blocks that are written into once for each fork.")
def check_blocks_of_forks(attempt: Callable[[int, int, int, int], int]) -> None:
    """``attempt(prompt_len, output_len, block_size, n)``: blocks that ``n`` forks of one prompt take."""
    for args, right, why in (
        ((32, 16, 16, 1), 3, "a single sequence shares nothing"),
        ((32, 16, 16, 4), 6, "two shared blocks and one of its own for each of four"),
        ((40, 8, 16, 4), 6, "two shared blocks; the third is half prompt, and copied by each fork"),
        ((40, 16, 16, 4), 10, "the output begins in a copied block, so 16 more tokens touch two blocks"),
        ((40, 0, 16, 4), 3, "nothing has been written yet, so even the partly full block is shared"),
    ):
        got = attempt(*args)
        expect(
            got == right,
            f"prompt {args[0]}, output {args[1]}, n = {args[3]}: {right} blocks ({why}), yours says {got}.",
        )
