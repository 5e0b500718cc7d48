"""Attempts at the exercises of chapter 7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tpot(weights: float, kv: float, contexts: Sequence[int], flops: float, bandwidth: float) -> float:
    return sum(contexts) * kv / bandwidth + max(2 * weights / bandwidth, 2 * weights * len(contexts) / flops)


WRONG: dict[str, dict[str, Any]] = {
    "check_ridge": {
        "FLOPs per byte": lambda flops, bandwidth, num_bytes: flops / bandwidth,
        "one FLOP per weight": lambda flops, bandwidth, num_bytes: flops / bandwidth * num_bytes,
        "upside down": lambda flops, bandwidth, num_bytes: bandwidth / flops,
        "bytes divided": lambda flops, bandwidth, num_bytes: flops / bandwidth / num_bytes,
        "295 always": lambda flops, bandwidth, num_bytes: 295.3,
        "rounded": lambda flops, bandwidth, num_bytes: flops * num_bytes // (2 * bandwidth),
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
        "milliseconds": lambda w, kv, contexts, f, b: 1000 * tpot(w, kv, contexts, f, b),
    },
    "check_crossing": {
        "all weights": lambda n, vocab, hidden, tied, kv: 2 * n / kv,
        "never the embedding": lambda n, vocab, hidden, tied, kv: 2 * (n - vocab * hidden) / kv,
        "not the head either": lambda n, vocab, hidden, tied, kv: 2 * (n - 2 * vocab * hidden) / kv,
        "one byte": lambda n, vocab, hidden, tied, kv: (n - (0 if tied else vocab * hidden)) / kv,
        "the other way round": lambda n, vocab, hidden, tied, kv: 2 * (n - (vocab * hidden if tied else 0)) / kv,
        "upside down": lambda n, vocab, hidden, tied, kv: kv / (2 * (n - (0 if tied else vocab * hidden))),
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
