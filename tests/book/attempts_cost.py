"""Attempts at the exercises of chapter 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def tpot(weights: float, kv: float, contexts: Sequence[int], flops: float, bandwidth: float) -> float:
    return sum(contexts) * kv / bandwidth + max(2 * weights / bandwidth, 2 * weights * len(contexts) / flops)


def tpot_of_parts(
    how: Callable[[float, float, float], float],
) -> Callable[[float, float, Sequence[int], float, float], float]:
    """``how`` puts together the seconds of reading keys and values, of reading weights, and of multiplying."""
    return lambda w, kv, contexts, f, b: how(sum(contexts) * kv / b, 2 * w / b, 2 * w * len(contexts) / f)


SAYS: dict[str, dict[str, str]] = {
    "check_ridge": {"one FLOP per weight": "costs two FLOPs per token", "bytes divided": "see its bytes"},
}

WRONG: dict[str, dict[str, Any]] = {
    "check_ridge": {
        "one FLOP per weight": lambda flops, bandwidth, num_bytes: flops / bandwidth * num_bytes,
        "upside down": lambda flops, bandwidth, num_bytes: bandwidth / flops,
        "bytes divided": lambda flops, bandwidth, num_bytes: flops / bandwidth / num_bytes,
        "295 always": lambda flops, bandwidth, num_bytes: 295.3,
        "rounded down": lambda flops, bandwidth, num_bytes: flops * num_bytes // (2 * bandwidth),
        "rounded": lambda flops, bandwidth, num_bytes: round(flops * num_bytes / (2 * bandwidth)),
        "a factor upside down": lambda flops, bandwidth, num_bytes: 2 * flops / bandwidth / num_bytes,
        "16 bits always": lambda flops, bandwidth, num_bytes: flops / bandwidth,
    },
    "check_tpot": {
        "weights only": lambda w, kv, contexts, f, b: 2 * w / b,
        "one byte": lambda w, kv, contexts, f, b: w / b + sum(contexts) * kv / b,
        "weights for each": lambda w, kv, contexts, f, b: len(contexts) * 2 * w / b + sum(contexts) * kv / b,
        "no arithmetic": lambda w, kv, contexts, f, b: 2 * w / b + sum(contexts) * kv / b,
        "no memory": lambda w, kv, contexts, f, b: 2 * w * len(contexts) / f + sum(contexts) * kv / b,
        "all added": lambda w, kv, contexts, f, b: tpot(w, kv, contexts, f, b) + 2 * w * len(contexts) / f,
        "one maximum": lambda w, kv, contexts, f, b: max((2 * w + sum(contexts) * kv) / b, 2 * w * len(contexts) / f),
        "the longest": lambda w, kv, contexts, f, b: tpot(w, kv, [max(contexts)] * len(contexts), f, b),
        "the first": lambda w, kv, contexts, f, b: tpot(w, kv, contexts[:1] * len(contexts), f, b),
        "the average": lambda w, kv, contexts, f, b: tpot(w, kv, [sum(contexts) / len(contexts)], f, b),
        "per token": lambda w, kv, contexts, f, b: tpot(w, kv, contexts, f, b) / len(contexts),
        "one FLOP": tpot_of_parts(lambda cached, read, product: cached + max(read, product / 2)),
        "twice the cache": tpot_of_parts(lambda cached, read, product: 2 * cached + max(read, product)),
        "the shorter time": tpot_of_parts(lambda cached, read, product: cached + min(read, product)),
        "as reached": tpot_of_parts(lambda cached, read, product: cached / 0.7 + max(read / 0.85, product / 0.65)),
        "with the host": tpot_of_parts(lambda cached, read, product: cached + max(read, product) + 1.5e-3),
        "no cache": tpot_of_parts(lambda cached, read, product: max(read, product)),
        "all tokens computed": lambda w, kv, contexts, f, b: (
            sum(contexts) * kv / b + max(2 * w / b, 2 * w * sum(contexts) / f)
        ),
        "the new token, too": lambda w, kv, contexts, f, b: tpot(w, kv, [c + 1 for c in contexts], f, b),
        "the longest only": lambda w, kv, contexts, f, b: tpot(w, kv, [max(contexts)], f, b),
        "milliseconds": lambda w, kv, contexts, f, b: 1000 * tpot(w, kv, contexts, f, b),
    },
    "check_crossing": {
        "all weights": lambda n, vocab, hidden, tied, kv: 2 * n / kv,
        "never the embedding": lambda n, vocab, hidden, tied, kv: 2 * (n - vocab * hidden) / kv,
        "not the head either": lambda n, vocab, hidden, tied, kv: 2 * (n - 2 * vocab * hidden) / kv,
        "one byte": lambda n, vocab, hidden, tied, kv: (n - (0 if tied else vocab * hidden)) / kv,
        "the other way round": lambda n, vocab, hidden, tied, kv: 2 * (n - (vocab * hidden if tied else 0)) / kv,
        "upside down": lambda n, vocab, hidden, tied, kv: kv / (2 * (n - (0 if tied else vocab * hidden))),
        "16 bytes": lambda n, vocab, hidden, tied, kv: 16 * (n - (0 if tied else vocab * hidden)) / kv,
        "one byte of the embedding": lambda n, vocab, hidden, tied, kv: (2 * n - (0 if tied else vocab * hidden)) / kv,
        "a tied one twice": lambda n, vocab, hidden, tied, kv: 2 * (n + (1 if tied else -1) * vocab * hidden) / kv,
        "the rows only": lambda n, vocab, hidden, tied, kv: 2 * (n - (0 if tied else vocab)) / kv,
        "103,000 always": lambda n, vocab, hidden, tied, kv: 102_649,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_ridge": {"times per token": lambda flops, bandwidth, num_bytes: (num_bytes / bandwidth) / (2 / flops)},
    "check_tpot": {"as the formula": tpot},
    "check_crossing": {
        "rounded": lambda n, vocab, hidden, tied, kv: round(2 * (n - (1 - tied) * vocab * hidden) / kv),
    },
}
