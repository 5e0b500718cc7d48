"""A regular expression as a state machine over bytes, small enough to be read and drawn. Chapter 18.

`StateMachine` knows literals, ``[classes]`` of ASCII characters, ``.``, groups, ``|``, ``?``, ``*``, ``+`` and
``{m,n}``. It is what `folovllm.sample.structured_output` leaves to llguidance, which knows much more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar, cast

from folovllm.request import StructuredOutputGrammar
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ASCII = range(128)
MAX_REPEATS = 64
"""Most repetitions that ``{m,n}`` may ask for."""


class StateMachine:
    """A regular expression, read once, and then followed byte by byte.

    A place of the expression is a number, and ``edges[place]`` says by which byte which other places are reached
    (Thompson 1968). A state of the machine is the set of places at which the next byte may be; empty: the text does not
    fit.

    Args:
        pattern: what a whole text must match.

    Raises:
        ValueError: if the pattern is not one of the few kinds that it knows.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.edges: list[dict[int, set[int]]] = []
        self._free: list[set[int]] = []  # places that are reached without a byte
        self._text = pattern
        first, self.last = self._either()
        require(not self._text, f"pattern must close every bracket that it opens, and no other, got {pattern!r}")
        self.start: frozenset[int] = self._close({first})
        self.step = lru_cache(10_000)(self._step)
        """``step(state, data)``: the state after some bytes; empty if they do not fit."""

    def _step(self, state: frozenset[int], data: bytes) -> frozenset[int]:
        for byte in data:
            state = self._close({target for place in state for target in self.edges[place].get(byte, ())})
        return state

    def accepts(self, state: frozenset[int]) -> bool:
        """Whether a text may end here."""
        return self.last in state

    def matches(self, text: str) -> bool:
        """Whether a text fits as a whole."""
        return self.accepts(self.step(self.start, text.encode()))

    def next_bytes(self, state: frozenset[int]) -> dict[int, frozenset[int]]:
        """Each byte that may come next, and the state that it leads to."""
        found = sorted({byte for place in state for byte in self.edges[place]})
        return {byte: self.step(state, bytes([byte])) for byte in found}

    def _close(self, places: Iterable[int]) -> frozenset[int]:
        """These places, and those that are reached from them without a byte."""
        found, left = set(), list(places)
        while left:
            if (place := left.pop()) not in found:
                found.add(place)
                left += self._free[place]
        return frozenset(found)

    # Reading the pattern: each part gives the place it begins at, and the one it ends at.

    def _place(self) -> int:
        self.edges.append({})
        self._free.append(set())
        return len(self.edges) - 1

    def _take(self, *symbols: str) -> str:
        """The next symbol of the pattern if it is one of these (any, if none are given), else nothing."""
        symbol = self._text[:1]
        if not symbol or (symbols and symbol not in symbols):
            return ""
        self._text = self._text[1:]
        return symbol

    def _either(self) -> tuple[int, int]:
        first, last = self._place(), self._place()
        while True:
            begin, end = self._sequence()
            self._free[first].add(begin)
            self._free[end].add(last)
            if not self._take("|"):
                return first, last

    def _sequence(self) -> tuple[int, int]:
        first = last = self._place()
        while self._text and self._text[0] not in "|)":
            before = self._text
            begin, end = self._atom()
            written = before[: len(before) - len(self._text)]
            begin, end = self._repeated(written, begin, end)
            self._free[last].add(begin)
            last = end
        return first, last

    def _repeated(self, written: str, begin: int, end: int) -> tuple[int, int]:
        """The part that has just been read, as often as the symbol behind it says."""
        symbol = self._take("?", "*", "+", "{")
        if not symbol:
            return begin, end
        least, most = {"?": (0, 1), "*": (0, None), "+": (1, None), "{": (0, 0)}[symbol]
        if symbol == "{":
            counts, brace, self._text = self._text.partition("}")
            low, comma, high = counts.partition(",")
            require(
                bool(brace) and low.isdigit() and (not high or high.isdigit()),
                f"{{m,n}} must have numbers, got {self.pattern!r}",
            )
            least, most = int(low), int(high) if high else None if comma else int(low)
            require(max(least, most or 0) <= MAX_REPEATS, f"{{m,n}} must be at most {MAX_REPEATS}, got {counts}")
        copies = [(begin, end)] + [self._read(written) for _ in range(max(least, most or 1) - 1)]
        first, last = self._place(), self._place()
        previous = first
        for i, (one, other) in enumerate(copies):
            if i >= least:
                self._free[previous].add(last)
            self._free[previous].add(one)
            previous = other
        self._free[previous].add(last)
        if most is None:
            self._free[previous].add(copies[-1][0])
        if most == 0:
            self._free[first] = {last}
        return first, last

    def _read(self, part: str) -> tuple[int, int]:
        """The same part once more, with places of its own."""
        rest, self._text = self._text, part
        found = self._atom()
        self._text = rest
        return found

    def _atom(self) -> tuple[int, int]:
        symbol = self._take()
        if symbol == "(":
            if self._text.startswith("?:"):
                self._text = self._text[2:]
            found = self._either()
            require(bool(self._take(")")), f"pattern must close every bracket that it opens, got {self.pattern!r}")
            return found
        if symbol == ".":
            return self._one_of(lambda byte: byte != ord("\n"))
        if symbol == "[":
            return self._class()
        require(symbol not in "?*+{", f"pattern must have something before {symbol!r}, got {self.pattern!r}")
        first = last = self._place()
        for byte in (self._take() if symbol == "\\" else symbol).encode():
            self.edges[last][byte] = {self._place()}
            last = len(self.edges) - 1
        return first, last

    def _class(self) -> tuple[int, int]:
        inside, bracket, self._text = self._text.partition("]")
        require(bool(bracket) and inside.isascii(), f"[class] must be closed and of ASCII, got {self.pattern!r}")
        negated, inside = inside.startswith("^"), inside.removeprefix("^")
        named: set[int] = set()
        while inside:
            to = inside[2] if inside[1:2] == "-" and len(inside) > 2 else inside[0]
            named.update(range(ord(inside[0]), ord(to) + 1))
            inside = inside[3 if to is not inside[0] else 1 :]
        return self._one_of(lambda byte: (byte in named) != negated)

    def _one_of(self, fits: Callable[[int], bool]) -> tuple[int, int]:
        first, last = self._place(), self._place()
        self.edges[first] = {byte: {last} for byte in ASCII if fits(byte)}
        return first, last


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token stands for, by its id; none for special tokens, which are no text."""
    from llguidance.hf import from_tokenizer

    known = from_tokenizer(cast("PreTrainedTokenizerFast", tokenizer))
    return [b"" if known.is_special_token(i) else known.decode_bytes([i]) for i in range(known.vocab_size)]


@cache
def machine_of(pattern: str) -> StateMachine:
    """A pattern's machine, made once."""
    return StateMachine(pattern)


class MachineGrammar(StructuredOutputGrammar):
    """Where an answer is in a state machine; a subclass says how it goes on, and what it allows.

    Args:
        machine: what the whole answer must match.
        tokens: the bytes of each token, by its id; those of special tokens are empty.
        eos_token_ids: the tokens that end a text.
    """

    def __init__(self, machine: StateMachine, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        self.machine, self.tokens, self.eos_token_ids = machine, tokens, eos_token_ids
        self.vocab_size = len(tokens)
        self.state = machine.start

    def copy(self) -> MachineGrammar:
        """Another one in the same place; nothing of it but the name of its state ever changes."""
        return copy.copy(self)


class MachineBackend:
    """Makes grammars of state machines: what `folovllm.sample.structured_output.GuidanceBackend` is to llguidance.

    A subclass sets ``grammar_cls``.
    """

    grammar_cls: ClassVar[type[MachineGrammar]]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        known = token_bytes(tokenizer)
        self.tokens = known + [b""] * (vocab_size - len(known))
        self.eos_token_ids = list(eos_token_ids)

    def compile_grammar(self, structured_outputs: StructuredOutputsParams) -> MachineGrammar:
        """A regular expression's state machine, at its start.

        Raises:
            ValueError: if something else is asked for.
        """
        regex = structured_outputs.regex
        if regex is None:
            raise ValueError(f"a state machine needs a regex, got {structured_outputs!r}")
        return self.grammar_cls(machine_of(regex), self.tokens, self.eos_token_ids)
