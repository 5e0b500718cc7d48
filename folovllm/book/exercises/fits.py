"""Checks of the exercises of chapter 18."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from folovllm.book.exercises.verdict import NotYet, exercise, expect, expect_subclass

WORDS = (
    (
        "(fox|frog)s?",
        [b"f", b"fox", b"frogs", b"foxy", b"x", b"o", b"og", b"s", b"ro", b"", b"fo", b"gs", b" fox", b"fr"],
    ),
    ("[a-c]{2,3}", [b"", b"a", b"ab", b"abc", b"abca", b"d", b"bd", b"cc", b"ba"]),
    ("(狐|狸)", ["狐".encode(), "狸".encode(), b"\xe7", b"\x8b", b"\x90", b"\xe7\x8b", b"f", b"", "狐狸".encode()]),
)
"""Patterns, and tokens to choose from."""


@exercise(
    "a token fits if the machine survives all of its bytes, and no token of no bytes does.", gives="a list of ids"
)
def check_allowed_tokens(attempt: Callable[[Any, Any, Sequence[bytes]], Any]) -> None:
    """``attempt(machine, state, tokens)``: the ids of the tokens that may come next."""
    from folovllm.book.state_machine import machine_of

    for pattern, tokens in WORDS:
        machine = machine_of(pattern)
        texts = [b"", *dict.fromkeys(token for token in tokens if token and machine.step(machine.start, token))]
        for text in texts:
            state = machine.step(machine.start, text)
            right = [i for i, token in enumerate(tokens) if token and machine.step(state, token)]
            got = sorted(attempt(machine, state, list(tokens)))
            where = f"{pattern!r}, after {text!r}"
            for i in sorted({*got} ^ {*right}, key=lambda i: (i in right, i)):
                expect(isinstance(i, int) and 0 <= i < len(tokens), f"{where}: {i!r} is not the id of a token.")
                _explain(machine, state, tokens[i], i in right, where)
            expect(got == right, f"{where}: each token is to be named once, yours are {got}.")


def _explain(machine: Any, state: Any, token: bytes, fits: bool, where: str) -> None:
    """Says what is wrong about one token."""
    if fits:
        whole = machine.accepts(machine.step(state, token))
        why = "" if whole else "; the text need not be complete after it, it must only be able to go on"
        raise NotYet(f"{where}: the token {token!r} fits, and is not among yours{why}.")
    if not token:
        raise NotYet(f"{where}: a token of no bytes is no text, and would be allowed for ever.")
    begins = machine.step(state, token[:1])
    why = "; only its first byte does" if begins else ""
    raise NotYet(f"{where}: the token {token!r} does not fit, and is among yours{why}.")


@exercise("32 tokens in a word, and the last bit of a word is its sign.", gives="an array")
def check_bitmask(attempt: Callable[[list[int], int], Any]) -> None:
    """``attempt(token_ids, vocab_size)``: the words of a mask, int32 ``[ceil(vocab_size / 32)]``."""
    for token_ids, vocab_size in (
        ([0], 1),
        ([1, 5], 32),
        ([32, 33], 64),
        ([31], 33),
        ([0, 31, 32, 63, 64], 65),
        ([], 100),
        ([7, 7, 40], 96),
        ([*range(0, 1294, 7), 1293], 1294),
    ):
        given = list(token_ids)
        got = np.asarray(attempt(given, vocab_size))
        case = f"{token_ids if len(token_ids) < 9 else f'{len(token_ids)} tokens'} of {vocab_size}"
        expect(given == token_ids, f"{case}: token_ids is another list afterwards, and it is not yours to change.")
        num_words = -(-vocab_size // 32)
        expect(got.shape == (num_words,), f"{case}: {num_words} words are asked for, yours have shape {[*got.shape]}.")
        expect(got.dtype == np.int32, f"{case}: the words are to be int32, yours are {got.dtype}.")
        bits = np.unpackbits(np.ascontiguousarray(got).view(np.uint8), bitorder="little")
        found = bits.nonzero()[0].tolist()
        right = sorted(set(token_ids))
        if found != right:
            shown = found if len(found) < 9 else [*found[:8], "…"]
            raise NotYet(
                f"{case}: your bits are {shown}; token i is bit i % 32 of word i // 32, counted from the lowest."
            )


@exercise("the engine follows your machine, in any company, and every answer fits.")
def check_grammar(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.state_machine.MachineGrammar`."""
    from folovllm.book.judges import judge_grammars
    from folovllm.book.state_machine import MachineBackend, MachineGrammar

    expect_subclass(attempt, MachineGrammar)
    _walk(attempt)
    judge_grammars(type("Backend", (MachineBackend,), {"grammar_cls": attempt}))


ENDS = (3, 70)
TOKENS = [b"", b"f", b"fo", b"", b"fox", b"x", b"o", b"r", b"og", b"frog", b"s", b"xs", b"foxy", b"g"]


def _walk(attempt: Any) -> None:
    """Follows a few texts by hand, with tokens that can be looked at."""
    from folovllm.book.state_machine import machine_of

    tokens = TOKENS + [b""] * (100 - len(TOKENS))
    machine = machine_of("(fox|frog)s?")
    for walk in ([4, 10], [2, 5], [1, 7, 8, 3], [9]):
        grammar = attempt(machine, tokens, ENDS)
        text = b""
        for token_id in [None, *walk]:
            if token_id is not None:
                other = grammar.copy()
                expect(other is not None and other is not grammar, "copy is to give another grammar in the same place.")
                kept = _mask(other)
                expect(kept == _mask(grammar), f"a copy made after {text!r} is in another place.")
                expect(
                    bool(grammar.accept_tokens([token_id])),
                    f"after {text!r} the token {_name(token_id)} fits, and accept_tokens is to give True.",
                )
                expect(
                    _mask(other) == kept, f"after {text!r} a copy has moved, although only the other one was moved on."
                )
                text += tokens[token_id]
            if token_id in ENDS:
                break
            _compare(machine, grammar, text)
        for wrong in (5, 0, *ENDS[:1]):
            grammar = attempt(machine, tokens, ENDS)
            expect(not grammar.accept_tokens([wrong]), f"at the start {_name(wrong)} does not fit; say False.")
    together = attempt(machine, tokens, ENDS)
    expect(
        bool(together.accept_tokens([1, 6, 5])), "accept_tokens may be given several tokens: b'f', b'o' and b'x' fit."
    )
    _compare(machine, together, b"fox")


def _mask(grammar: Any) -> set[int]:
    """The tokens that a grammar allows; in the middle of three rows, of which the others must stay as they are."""
    from folovllm.book.judges.grammars import read_bitmask

    bitmask = np.full((3, 4), -1, dtype=np.int32)
    grammar.fill_bitmask(bitmask, 1)
    expect((bitmask[[0, 2]] == -1).all(), "fill_bitmask is to set one row of the bitmask, yours sets others, too.")
    return read_bitmask(bitmask[1])


def _compare(machine: Any, grammar: Any, text: bytes) -> None:
    state = machine.step(machine.start, text)
    right = {i for i, token in enumerate(TOKENS) if token and machine.step(state, token)}
    right |= set(ENDS) if machine.accepts(state) else set()
    got = _mask(grammar)
    for token_id in sorted(got ^ right):
        is_not = "is not allowed, and it fits" if token_id in right else "is allowed, and it does not fit"
        raise NotYet(f"after {text!r} of '(fox|frog)s?', {_name(token_id)} {is_not}.")


def _name(token_id: int) -> str:
    if token_id in ENDS:
        return "an end token"
    data = TOKENS[token_id] if token_id < len(TOKENS) else b""
    return repr(data) if data else "a special token"


@exercise("each answer has a place of its own, and all of them fit.")
def check_own_places(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.faults.OnePlaceForAll` in which copies are copies."""
    from folovllm.book import faults
    from folovllm.book.judges import judge_grammars

    expect_subclass(attempt, faults.OnePlaceForAll)
    judge_grammars(attempt)
