"""Checks of the exercises of chapter 7."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from folovllm.book.exercises.verdict import exercise, expect


def _is(got: float, right: float) -> bool:
    return math.isclose(float(got), right, rel_tol=1e-3)


@exercise(
    "that is where arithmetic takes as long as reading: on an H100 with 16-bit weights at 295 tokens.", gives="a number"
)
def check_ridge(attempt: Callable[[float, float, float], float]) -> None:
    """``attempt(flops, bandwidth, bytes_per_weight)``: tokens per step at which both times are equal."""
    got = attempt(989.4e12, 3.35e12, 2)
    expect(not _is(got, 2 * 989.4 / 3.35), "each weight costs two FLOPs per token, a multiplication and an addition.")
    expect(not _is(got, 989.4 / 3.35 / 2), "the larger a weight is, the longer it takes to read: see its bytes.")
    expect(not _is(got, 3.35 / 989.4), "that is bandwidth over arithmetic: it should be the other way round.")
    for flops, bandwidth, num_bytes, right in (
        (989.4e12, 3.35e12, 2, 295.3),
        (100e9, 25e9, 4, 8.0),
        (312e12, 2.039e12, 0.5, 38.26),
        (60e9, 20e9, 1, 1.5),
    ):
        got = attempt(flops, bandwidth, num_bytes)
        is_rounded = got in (math.floor(right), math.ceil(right))
        expect(
            _is(got, right),
            f"{flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s and {num_bytes} bytes per weight: {right:,.4g} "
            f"tokens, yours says {float(got):,.4g}{': do not round it' if is_rounded else ''}.",
        )


@exercise("two terms: keys and values of every sequence, and the weights once or their arithmetic.", gives="a number")
def check_tpot(attempt: Callable[[float, float, Sequence[int], float, float], float]) -> None:
    """``attempt(num_weights, kv_token_bytes, contexts, flops, bandwidth)``: seconds of a decode step."""
    weights, kv, h100 = 7.568e9, 147_456.0, (989.4e12, 3.35e12)
    cases: tuple[tuple[float, float, list[int], tuple[float, float], float, str], ...] = (
        (weights, kv, [2000], h100, 4.606e-3, "one sequence of 2,000 tokens on an H100"),
        (1e9, 1e4, [5000, 10, 90_000], (50e12, 0.5e12), 5.900e-3, "three sequences of very different lengths"),
        (weights, kv, [2000] * 64, h100, 10.15e-3, "64 sequences of 2,000 tokens on an H100"),
        (1e9, 1e4, [500] * 300, (50e12, 1e12), 13.5e-3, "300 sequences on a card with a ridge of 50"),
        (weights, kv, [100] * 400, h100, 7.880e-3, "400 sequences of 100 tokens on an H100, beyond its ridge"),
    )
    for num_weights, kv_bytes, contexts, (flops, bandwidth), right, case in cases:
        got = float(attempt(num_weights, kv_bytes, contexts, flops, bandwidth))
        if _is(got, right):
            continue
        per_token = kv_bytes / bandwidth
        read, product = 2 * num_weights / bandwidth, 2 * num_weights * len(contexts) / flops
        for wrong, why in _wrong_tpots(contexts, read, product, per_token):
            if not _is(wrong, right):
                expect(not _is(got, wrong), f"{case}: {why}.")
        expect(False, f"{case}: {1000 * right:.4g} ms, yours says {1000 * got:.4g} ms.")


def _wrong_tpots(
    contexts: Sequence[int], read: float, product: float, per_token: float
) -> tuple[tuple[float, str], ...]:
    """Answers with one thing wrong, and what that is.

    Args:
        contexts: cached tokens of each sequence.
        read: seconds to read the weights.
        product: seconds to multiply with them.
        per_token: seconds to read a token's keys and values.
    """
    num, cached = len(contexts), sum(contexts) * per_token
    larger, factors = max(read, product), cached / 0.70 + max(read / 0.85, product / 0.65)
    return (
        (1000 * (larger + cached), "that is milliseconds, seconds were asked for"),
        ((larger + cached) / num, "each sequence waits for the whole step, so nothing is divided among them"),
        (read / 2 + cached, "a 16-bit weight is two bytes"),
        (max(read, product / 2) + cached, "a weight takes two FLOPs for each token"),
        (max(read, product * sum(contexts) / num) + cached, "one token of each sequence is computed, not all of them"),
        (num * read + cached, "the weights are read once for all sequences"),
        (read, "every sequence reads its own keys and values besides"),
        (larger, "every sequence reads its own keys and values besides"),
        (larger + contexts[0] * per_token, "each sequence reads its own keys and values"),
        (larger + max(contexts) * per_token, "each sequence reads its own keys and values"),
        (larger + num * contexts[0] * per_token, "each sequence reads as many keys and values as it has"),
        (larger + num * max(contexts) * per_token, "each sequence reads as many keys and values as it has"),
        (larger + 2 * cached, "kv_token_bytes are those of key and value together"),
        (larger + cached + num * per_token, "contexts has all tokens that are read, so none is to be added"),
        (max(read + cached, product), "reading keys and values comes on top of the larger of the other two"),
        (max(read, product, cached), "reading keys and values comes on top of the larger of the other two"),
        (read + cached, "the arithmetic takes longer than reading the weights"),
        (read + product + cached, "weights are read while others are multiplied: take the longer time, not both"),
        (product + cached, "reading the weights takes longer than the arithmetic"),
        (min(read, product) + cached, "of reading and multiplying the longer time counts"),
        (factors, "the data sheet alone was asked for, without what is reached of it"),
        (factors + 1.5e-3, "the data sheet alone was asked for, without what is reached of it and the host"),
        (larger + cached + 1.5e-3, "the data sheet alone was asked for, without the time of the host"),
    )


@exercise("an input embedding is not read, unless it is the head as well.", gives="a number")
def check_crossing(attempt: Callable[[int, int, int, bool, int], float]) -> None:
    """``attempt(num_params, vocab_size, hidden_size, tied, kv_token_bytes)``: cached tokens, all sequences together."""
    cases = (
        ("Qwen3 8B", 8_190_427_136, 151_936, 4096, False, 147_456, 102_650.0),
        ("Llama 3.2 1B, whose embedding is its head", 1_235_746_816, 128_256, 2048, True, 32_768, 75_424.0),
        ("Qwen3 32B", 32_761_446_400, 151_936, 5120, False, 262_144, 244_015.0),
        ("Llama 3.1 8B", 8_029_995_008, 128_256, 4096, False, 131_072, 114_511.0),
    )
    for name, num_params, vocab_size, hidden_size, tied, kv_bytes, right in cases:
        got = float(attempt(num_params, vocab_size, hidden_size, tied, kv_bytes))
        embedding = vocab_size * hidden_size
        if math.isclose(got, right, rel_tol=1e-4):
            continue
        for wrong, why in (
            (2 * num_params / kv_bytes, "the input embedding is looked up, not read"),
            (2 * (num_params - embedding) / kv_bytes, "this embedding is the head too, and the head is read"),
            (2 * (num_params - 2 * embedding) / kv_bytes, "the head is read in every step, only the embedding is not"),
            ((num_params - (0 if tied else embedding)) / kv_bytes, "a 16-bit weight is two bytes"),
            (16 * (num_params - (0 if tied else embedding)) / kv_bytes, "a 16-bit weight is two bytes"),
            ((2 * num_params - embedding) / kv_bytes, "the embedding's weights are two bytes each, too"),
            (2 * (num_params + embedding) / kv_bytes, "what is embedding and head at once is one matrix, read once"),
        ):
            if not math.isclose(wrong, right, rel_tol=1e-4):
                expect(not math.isclose(got, wrong, rel_tol=1e-4), f"{name}: {why}.")
        expect(False, f"{name}: {right:,.0f} tokens, yours says {got:,.0f}.")
