"""Attempts at the exercises of chapter 18, wrong and right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from folovllm.book import faults
from folovllm.book.state_machine import MachineGrammar
from folovllm.sample.structured_output import GuidanceBackend


def tokens_if(fits: Callable[[Any, Any, bytes], Any]) -> Callable[[Any, Any, Sequence[bytes]], list[int]]:
    """The ids of the tokens of which something is true."""
    return lambda machine, state, tokens: [i for i, token in enumerate(tokens) if fits(machine, state, token)]


def byte_by_byte(machine: Any, state: Any, tokens: Sequence[bytes]) -> list[int]:
    found = []
    for i, token in enumerate(tokens):
        after = state
        for byte in token:
            after = machine.next_bytes(after).get(byte, frozenset())
        if token and after:
            found.append(i)
    return found


def bits_of(token_ids: Sequence[int], size: int, order: str = "little", dtype: Any = np.int32) -> np.ndarray:
    bits = np.zeros(size, dtype=np.uint8)
    bits[[i for i in token_ids if i < size]] = 1
    return np.packbits(bits, bitorder=order).view(dtype)  # type: ignore[arg-type]


def by_shifting(token_ids: list[int], vocab_size: int) -> np.ndarray:
    words = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for i in token_ids:
        words[i // 32] |= np.uint32(1 << (i % 32))
    return words.view(np.int32)


def by_adding(token_ids: list[int], vocab_size: int) -> np.ndarray:
    words = np.zeros((vocab_size + 31) // 32, dtype=np.int64)
    for i in token_ids:
        words[i // 32] += 1 << (i % 32)
    return words.astype(np.uint32).view(np.int32)


def in_order(token_ids: list[int], vocab_size: int) -> np.ndarray:
    token_ids.sort()
    token_ids[:] = dict.fromkeys(token_ids)
    return by_shifting(token_ids, vocab_size)


class Right(MachineGrammar):
    def accept_tokens(self, token_ids: Sequence[int]) -> bool:
        return all(map(self.accept, token_ids))

    def accept(self, token_id: int) -> bool:
        if token_id in self.eos_token_ids:
            return self.machine.accepts(self.state)
        self.state = self.machine.step(self.state, self.tokens[token_id]) if self.tokens[token_id] else frozenset()
        return bool(self.state)

    def allowed(self) -> list[int]:
        step, state = self.machine.step, self.state
        found = [i for i, token in enumerate(self.tokens) if token and step(state, token)]
        return found + (list(self.eos_token_ids) if self.machine.accepts(state) else [])

    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        bitmask[row] = bits_of(self.allowed(), 32 * bitmask.shape[1])

    def copy(self) -> Any:
        other = type(self)(self.machine, self.tokens, self.eos_token_ids)
        other.state = self.state
        return other


class CopyIsItself(Right):
    def copy(self) -> Any:
        return self


class CopyBeginsAnew(Right):
    def copy(self) -> Any:
        return type(self)(self.machine, self.tokens, self.eos_token_ids)


class NeverMoves(Right):
    def accept_tokens(self, token_ids: Sequence[int]) -> bool:
        return self.copy_moves(token_ids)

    def copy_moves(self, token_ids: Sequence[int]) -> bool:
        other = Right(self.machine, self.tokens, self.eos_token_ids)
        other.state = self.state
        return other.accept_tokens(token_ids)


class AcceptsAll(Right):
    def accept_tokens(self, token_ids: Sequence[int]) -> bool:
        super().accept_tokens(token_ids)
        return True


class FirstOnly(Right):
    def accept_tokens(self, token_ids: Sequence[int]) -> bool:
        return super().accept_tokens(token_ids[:1])


class AllRows(Right):
    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        bitmask[:] = bits_of(self.allowed(), 32 * bitmask.shape[1])


class KeepsOldBits(Right):
    def fill_bitmask(self, bitmask: Any, row: int) -> None:
        bitmask[row] |= bits_of(self.allowed(), 32 * bitmask.shape[1])


class EndsAnywhere(Right):
    def allowed(self) -> list[int]:
        return [*super().allowed(), *self.eos_token_ids]


class NeverEnds(Right):
    def allowed(self) -> list[int]:
        return [i for i in super().allowed() if i not in self.eos_token_ids]


class OneEnd(Right):
    def allowed(self) -> list[int]:
        return [i for i in super().allowed() if i not in self.eos_token_ids[1:]]


class EmptyTokens(Right):
    def allowed(self) -> list[int]:
        return super().allowed() + [i for i, token in enumerate(self.tokens) if not token]


class EndAlwaysFits(Right):
    def accept(self, token_id: int) -> bool:
        return token_id in self.eos_token_ids or super().accept(token_id)


class SpecialFits(Right):
    def accept(self, token_id: int) -> bool:
        return (not self.tokens[token_id] and token_id not in self.eos_token_ids) or super().accept(token_id)


class StillOne(faults.OnePlaceForAll):
    def compile_grammar(self, structured_outputs: Any) -> Any:
        return faults.OnePlace(GuidanceBackend.compile_grammar(self, structured_outputs))


class CopyOfTheBeginning(faults.OnePlaceForAll):
    """Copies begin anew, which is right for the answers to a prompt and wrong for guesses."""

    def compile_grammar(self, structured_outputs: Any) -> Any:
        grammar = GuidanceBackend.compile_grammar(self, structured_outputs)
        grammar.copy = lambda: GuidanceBackend.compile_grammar(self, structured_outputs)  # type: ignore[method-assign]
        return grammar


class CopiedPlace(faults.OnePlace):
    def copy(self) -> Any:
        return CopiedPlace(self.place.copy())


class MendedCopies(faults.OnePlaceForAll):
    def compile_grammar(self, structured_outputs: Any) -> Any:
        return CopiedPlace(GuidanceBackend.compile_grammar(self, structured_outputs))


class Plain(faults.OnePlaceForAll):
    compile_grammar = GuidanceBackend.compile_grammar


WRONG: dict[str, dict[str, Any]] = {
    "check_allowed_tokens": {
        "all": lambda machine, state, tokens: [*range(len(tokens))],
        "none": lambda machine, state, tokens: [],
        "those without bytes, too": tokens_if(lambda machine, state, token: machine.step(state, token)),
        "the first byte": tokens_if(lambda machine, state, token: token and machine.step(state, token[:1])),
        "the last byte": tokens_if(lambda machine, state, token: token and machine.step(state, token[-1:])),
        "whole texts": tokens_if(lambda machine, state, token: token and machine.accepts(machine.step(state, token))),
        "from the start": tokens_if(lambda machine, state, token: token and machine.step(machine.start, token)),
        "the tokens": lambda machine, state, tokens: [t for t in tokens if t and machine.step(state, t)],
        "twice": lambda machine, state, tokens: 2 * byte_by_byte(machine, state, tokens),
        "a number": lambda machine, state, tokens: 3,
    },
    "check_bitmask": {
        "too few words": lambda token_ids, vocab_size: bits_of(token_ids, vocab_size // 32 * 32),
        "one word too many": lambda token_ids, vocab_size: bits_of(token_ids, (vocab_size // 32 + 1) * 32),
        "the highest bit first": lambda token_ids, vocab_size: bits_of(token_ids, -(-vocab_size // 32) * 32, "big"),
        "unsigned": lambda token_ids, vocab_size: bits_of(token_ids, -(-vocab_size // 32) * 32, dtype=np.uint32),
        "bytes": lambda token_ids, vocab_size: bits_of(token_ids, -(-vocab_size // 32) * 32, dtype=np.int8),
        "added twice": by_adding,
        "a changed list": in_order,
        "a list of zeros": lambda token_ids, vocab_size: [0] * -(-vocab_size // 32),
        "all": lambda token_ids, vocab_size: np.full(-(-vocab_size // 32), -1, dtype=np.int32),
    },
    "check_grammar": {
        "a copy that is none": CopyIsItself,
        "a copy at the start": CopyBeginsAnew,
        "it never moves": NeverMoves,
        "it accepts all": AcceptsAll,
        "the first of several": FirstOnly,
        "all rows": AllRows,
        "old bits": KeepsOldBits,
        "the end anywhere": EndsAnywhere,
        "no end": NeverEnds,
        "one of the ends": OneEnd,
        "tokens without bytes": EmptyTokens,
        "an end fits anywhere": EndAlwaysFits,
        "a special token fits": SpecialFits,
        "no grammar": dict,
    },
    "check_own_places": {
        "the fault": faults.OnePlaceForAll,
        "another way to share": StillOne,
        "not a subclass": GuidanceBackend,
        "a number": 3,
    },
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_allowed_tokens": {
        "byte by byte": byte_by_byte,
        "a filter": tokens_if(lambda machine, state, token: len(token) and machine.step(state, token)),
        "a set": lambda machine, state, tokens: {*byte_by_byte(machine, state, tokens)},
    },
    "check_bitmask": {
        "packed": lambda token_ids, vocab_size: bits_of(token_ids, -(-vocab_size // 32) * 32),
        "shifted": by_shifting,
    },
    "check_grammar": {"with a list": Right},
    "check_own_places": {"copies": MendedCopies, "none of its own": Plain},
}
