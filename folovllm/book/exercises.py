"""Checks of the exercises: each takes an attempt and says in one sentence what is wrong with it, or that it is right.

An attempt may be anything, also unfinished or broken: what it raises becomes part of the sentence, never a traceback.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'Right' if self.passed else 'Not yet'}: {self.message}"


class NotYet(Exception):
    """Raised inside a check with the sentence about what is wrong."""


def expect(ok: bool, sentence: str) -> None:
    """Ends a check with ``sentence`` unless ``ok``."""
    if not ok:
        raise NotYet(sentence)


def exercise(praise: str) -> Callable[[Callable[[Any], None]], Callable[[Any], Verdict]]:
    """Makes a check out of a function that calls `expect`: ``praise`` is what a right attempt reads."""

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
        @functools.wraps(check)
        def run(attempt: Any) -> Verdict:
            try:
                check(attempt if isinstance(attempt, type) else _guarded(attempt))
            except NotYet as error:
                return Verdict(False, _one_line(str(error)))
            except Exception as error:  # in the check, which could not work with what the attempt gave
                return Verdict(False, f"what your code gives is not of the kind that was asked for ({_name(error)}).")
            return Verdict(True, praise)

        return run

    return decorate


def _guarded(attempt: Any) -> Callable[..., Any]:
    """The attempt, whose errors and forgotten ``return`` become sentences."""

    def call(*args: Any) -> Any:
        try:
            found = attempt(*args)
        except Exception as error:
            raise NotYet(f"your code raised {_name(error)}.") from None
        expect(found is not None, "your code gives back None: is there a return?")
        return found

    return call


def _name(error: Exception) -> str:
    message = _one_line(str(error), 200).rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _one_line(text: str, width: int = 290) -> str:
    return textwrap.shorten(text, width, placeholder=" …")


# Chapter 1


@exercise("blocks are handed out whole, so the last one is counted even when a single token is in it.")
def check_num_blocks(attempt: Callable[[int, int], int]) -> None:
    """``attempt(num_tokens, block_size)``: blocks that a sequence takes."""
    expect(attempt(16, 16) == 1, f"16 tokens fill one block of 16 exactly, yours says {attempt(16, 16)}.")
    expect(attempt(17, 16) == 2, f"the 17th token needs a second block of 16, yours says {attempt(17, 16)}.")
    expect(attempt(1, 16) == 1, f"one token takes a whole block, yours says {attempt(1, 16)}.")
    expect(attempt(100, 1) == 100, f"with blocks of one token 100 tokens take 100, yours says {attempt(100, 1)}.")
    expect(
        attempt(2**60 + 1, 2) == 2**59 + 1,
        "very long sequences come out wrong: stay with integers, don't divide with /.",
    )


@exercise("two budgets never share a list, and a mistake is refused where it is typed.")
def check_budget(attempt: type) -> None:
    """``attempt``: a dataclass with ``num_tokens: int = 512`` (positive) and ``requests: list`` (empty, its own)."""
    first, second = attempt(), attempt()
    expect(getattr(first, "num_tokens", None) == 512, "num_tokens should be 512 by default.")
    expect(getattr(first, "requests", None) == [], "requests should be an empty list by default.")
    first.requests.append("r1")
    expect(second.requests == [], "a request added to one budget appears in the other: they share one list.")
    expect(attempt(num_tokens=1).num_tokens == 1, "a budget of 1 token is small, and right.")
    for wrong in (0, -5):
        try:
            attempt(num_tokens=wrong)
        except ValueError as error:
            sentence = str(error)
            expect("num_tokens" in sentence, f"the error for {wrong} should name the field, it says {sentence!r}.")
            expect(str(wrong) in sentence, f"the error for {wrong} should name the value, it says {sentence!r}.")
        else:
            raise NotYet(f"num_tokens={wrong} was accepted: check it in __post_init__ and raise a ValueError.")


@exercise("the memory left after the weights, divided by what one token takes, in whole blocks.")
def check_tokens_that_fit(attempt: Callable[[float, float, float, int, int], int]) -> None:
    """``attempt(total_gib, utilization, weights_gib, bytes_per_token, block_size)``: tokens the cache has room for."""
    got = attempt(24, 0.9, 16, 131072, 16)
    expect(
        got != 24 * 2**30 // 131072 // 16 * 16,
        "the engine may not use all of the GPU, and the weights take their part first.",
    )
    expect(
        got % 16 == 0,
        f"tokens come in blocks of 16, and {got} is no multiple of 16: the rest of a block holds nothing.",
    )
    expect(
        got == 45872,
        f"24 GiB at 0.9, less 16 GiB of weights, has room for 45,872 tokens of 128 KiB; yours says {got:,}.",
    )
    expect(
        attempt(24, 0.5, 16, 131072, 16) == 0, "where the weights alone are over the limit, 0 tokens fit, not fewer."
    )


# Chapter 2


def _tensor(value: Any) -> Any:
    import torch

    return torch.as_tensor(value, dtype=torch.float64)


@exercise("it moves the largest logit to 0 before it takes the exponential.")
def check_softmax(attempt: Callable[[Any, float], Any]) -> None:
    """``attempt(logits, temperature)``: probabilities of a tensor of logits ``[vocab_size]``."""
    import torch

    logits = torch.tensor([2.0, 1.0, -1.0])
    got = _tensor(attempt(logits, 1.0))
    expect(abs(float(got.sum()) - 1) < 1e-4, f"probabilities sum to 1, yours to {float(got.sum()):.3f}.")
    expect(
        torch.allclose(got, _tensor(logits.softmax(0)), atol=1e-4), "at temperature 1 these are not softmax's numbers."
    )
    cold = _tensor(attempt(logits, 0.5))
    expect(
        torch.allclose(cold, _tensor((logits / 0.5).softmax(0)), atol=1e-4),
        "temperature 0.5 changes too little or too much: divide by it.",
    )
    large = _tensor(attempt(torch.tensor([1000.0, 999.0]), 1.0))
    expect(
        bool(large.isfinite().all()),
        "a logit of 1,000 gives nan: only differences matter, so subtract the largest first.",
    )


@exercise("the token that crosses p stays, and so at least one always does.")
def check_top_p(attempt: Callable[[list[float], float], list[int]]) -> None:
    """``attempt(probs, p)``: token ids that stay, likeliest first."""
    probs = [0.1, 0.5, 0.15, 0.25]
    got = list(attempt(probs, 0.7))
    expect(len(got) > 0, "it keeps nothing: at least the likeliest token always stays.")
    expect(got != [1], "at p = 0.7 token 1 has only 0.5: the token that crosses the line stays too.")
    expect(set(got) == {1, 3}, f"at p = 0.7 tokens 1 and 3 stay (0.5 + 0.25), yours keeps {got}.")
    expect(got == [1, 3], f"the likeliest comes first, yours gives {got}.")
    expect(
        list(attempt(probs, 0.4)) == [1],
        f"at p = 0.4 the likeliest token alone crosses, yours keeps {list(attempt(probs, 0.4))}.",
    )
    met = list(attempt(probs, 0.5))
    expect(met == [1], f"at p = 0.5 token 1 reaches the line exactly, and no other is needed; yours keeps {met}.")
    expect(sorted(attempt(probs, 1.0)) == [0, 1, 2, 3], "at p = 1 every token stays.")


@exercise("it walks up the staircase until it is above u.")
def check_draw(attempt: Callable[[list[float], float], int]) -> None:
    """``attempt(probs, u)``: the token whose slice ``u`` falls into."""
    probs = [0.25, 0.0, 0.5, 0.25]
    for u, right in ((0.0, 0), (0.1, 0), (0.6, 2), (0.99, 3)):
        expect(
            attempt(probs, u) == right,
            f"u = {u} falls into the slice of token {right}, yours says {attempt(probs, u)}.",
        )
    expect(
        attempt(probs, 0.25) != 1,
        "token 1 has probability 0 and was drawn: a slice holds its lower end, not its upper one.",
    )
    expect(
        attempt(probs, 0.25) == 2, f"u = 0.25 is the lower end of token 2's slice, yours says {attempt(probs, 0.25)}."
    )


# Chapter 3


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


# Chapter 4


@exercise("the header alone is enough, and its __metadata__ is no tensor.")
def check_count_weights(attempt: Callable[[str], int]) -> None:
    """``attempt(path)``: weights in a safetensors file."""
    import tempfile
    from pathlib import Path

    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, path, metadata={"format": "pt"})
        got = attempt(path)
        expect(
            got != Path(path).stat().st_size // 4,
            "that is the file's size over four: the header is no weight, and not all are 4 bytes.",
        )
        expect(got == 22, f"a matrix of 3 x 5 and a vector of 7 are 22 weights, yours says {got}.")
        save_file({"a": torch.zeros(4, 4, dtype=torch.bfloat16), "s": torch.tensor(1.0)}, path)
        got = attempt(path)
        expect(got == 17, f"16 weights of two bytes and a single number without a shape are 17, yours says {got}.")


@exercise("a key and a value, for each layer and each KV head.")
def check_kv_bytes(attempt: Callable[[int, int, int, int, int], int]) -> None:
    """``attempt(num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number)``: bytes of KV cache per token."""
    got = attempt(32, 32, 8, 128, 4)
    expect(got != 2 * 32 * 32 * 128 * 4, "that counts the query heads: only the KV heads are kept.")
    expect(got not in (32 * 32 * 128 * 4, 32 * 8 * 128 * 4), "there are two vectors for each token, a key and a value.")
    expect(got == 262144, f"Llama 3 8B in float32 keeps 262,144 bytes per token, yours says {got}.")
    got = attempt(4, 4, 2, 32, 2)
    expect(got == 1024, f"the embedded model in bfloat16 keeps 1,024 bytes per token, yours says {got}.")


@exercise("the last place of every row is a real token, and the mask hides the rest.")
def check_pad_batch(attempt: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[int]]]]) -> None:
    """``attempt(prompts, pad_id)``: rows of one length, and their attention mask."""
    rows, mask = attempt([[5], [6, 7, 8]], 0)
    rows, mask = [list(row) for row in rows], [list(row) for row in mask]
    expect({len(row) for row in rows} == {3}, f"both rows should have the length of the longest, yours are {rows}.")
    expect(
        rows[0] != [5, 0, 0],
        "the padding is on the right: then the last place, where the model predicts, is a pad token.",
    )
    expect(rows == [[0, 0, 5], [6, 7, 8]], f"the rows should be [[0, 0, 5], [6, 7, 8]], yours are {rows}.")
    expect(mask == [[0, 0, 1], [1, 1, 1]], f"the mask should be [[0, 0, 1], [1, 1, 1]], yours is {mask}.")
    rows, mask = attempt([[9], [6, 7]], 9)
    expect([list(row) for row in rows] == [[9, 9], [6, 7]], "with pad_id=9 the padding should be 9.")
    expect(
        [list(row) for row in mask] == [[0, 1], [1, 1]],
        "a real token may be equal to the pad token: make the mask from lengths.",
    )


# Chapter 5


@exercise("with a cache each token is computed once; without, each pass computes all there are.")
def check_tokens_computed(attempt: Callable[[int, int, bool], int]) -> None:
    """``attempt(prompt_len, output_len, cached)``: tokens that all forward passes of a generation compute."""
    for (prompt_len, output_len), cached, right in (((5, 1), False, 5), ((5, 3), False, 18), ((5, 3), True, 7)):
        got = attempt(prompt_len, output_len, cached)
        how = "with" if cached else "without"
        expect(
            got == right,
            f"a prompt of {prompt_len} and {output_len} new tokens {how} a cache: {right} computed, yours says {got} "
            "(the last new token is never read).",
        )
    expect(attempt(1000, 1000, True) == 1999, "a prompt of 1,000 and 1,000 new tokens with a cache compute 1,999.")
    expect(attempt(1000, 1000, False) == 1_499_500, "and without a cache 1,499,500.")


class _CountingModel:
    """Stands in for a model: counts the tokens it is given, and always predicts the last token plus one."""

    def __init__(self, vocab_size: int = 50) -> None:
        self.vocab_size, self.num_computed, self.num_passes = vocab_size, 0, 0

    def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True, **_: Any) -> Any:
        import types

        import torch

        past = [] if past_key_values is None else past_key_values
        self.num_computed += input_ids.shape[1]
        self.num_passes += 1
        seen = [*past, *input_ids[0].tolist()]
        logits = torch.zeros(1, input_ids.shape[1], self.vocab_size)
        # The prediction depends on how much the model has seen, so a lost cache changes the text.
        logits[0, -1, (seen[-1] + len(seen)) % self.vocab_size] = 1.0
        return types.SimpleNamespace(logits=logits, past_key_values=seen)


@exercise("the prompt is read once, and then each new token once.")
def check_generate(attempt: Callable[[Any, list[int], int], list[int]]) -> None:
    """``attempt(model, prompt_token_ids, max_tokens)``: the tokens generated greedily, with a cache."""
    model = _CountingModel()
    got = [int(t) for t in attempt(model, [3, 1, 4], 5)]
    right, seen = [], [3, 1, 4]
    for _ in range(5):
        right.append((seen[-1] + len(seen)) % 50)
        seen.append(right[-1])
    expect(len(got) == 5, f"5 tokens were asked for, yours gives {len(got)}.")
    expect(got == right, f"the tokens should be {right}, yours are {got}: is the cache handed on to every pass?")
    expect(
        model.num_computed <= 8,
        f"the right tokens, but {model.num_computed} computed instead of 7: after the first pass feed only the new.",
    )


# Chapter 6


@exercise("the first to come is served first, and a prompt that does not fit waits or is cut.")
def check_schedule(attempt: Callable[[list[int], int, bool], list[int]]) -> None:
    """``attempt(num_left, budget, chunked)``: how many tokens each sequence computes now, first come first served."""
    cases = (
        (([1, 1, 1], 10, False), [1, 1, 1], "all of them fit"),
        (([1, 1, 1], 2, True), [1, 1, 0], "the budget holds two tokens"),
        (([1, 30, 1], 16, True), [1, 15, 0], "a prompt may be cut to what is left"),
        (([1, 30, 1], 16, False), [1, 0, 0], "a prompt that may not be cut waits, and nothing overtakes it"),
    )
    for (num_left, budget, chunked), right, why in cases:
        got = list(attempt(list(num_left), budget, chunked))
        expect(
            got == right,
            f"{num_left} tokens left, a budget of {budget}, {'chunks' if chunked else 'no chunks'}: {right} ({why}), "
            f"yours says {got}.",
        )


@exercise("a block is named by its tokens and by everything before them.")
def check_cached_tokens(attempt: Callable[[list[int], list[int], int], int]) -> None:
    """``attempt(cached, prompt, block_size)``: tokens of ``prompt`` that need not be computed after ``cached`` was."""
    cases = (
        (([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], 2), 4, "two full blocks are alike"),
        (([1, 2, 3, 4, 5], [1, 2, 3, 9, 9], 2), 2, "only full blocks are shared"),
        (([1, 2, 3, 4, 5], [9, 9, 3, 4, 5], 2), 0, "a block after another beginning is another block"),
        (([1, 2, 3, 4], [1, 2, 3, 4], 2), 2, "the last token is always computed, and with it its block"),
    )
    for (cached, prompt, block_size), right, why in cases:
        got = attempt(list(cached), list(prompt), block_size)
        expect(
            got == right,
            f"{prompt} after {cached} in blocks of {block_size}: {right} tokens cached ({why}), yours says {got}.",
        )
