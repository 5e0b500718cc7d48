"""Attempts at the exercises of chapter 15, wrong and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from folovllm.book import faults
from folovllm.book.few_bits import WeightReader


def packing(
    pack: Callable[[int, int], int] = lambda value, place: value << (4 * place),
    signed: Callable[[int], int] = lambda number: number - 2**32 if number >= 2**31 else number,
    unpack: Callable[[int, int], int] = lambda number, place: (number >> (4 * place)) & 15,
    places: range = range(8),
) -> type:
    """A class that packs and unpacks; each part may be got wrong."""

    class Packing:
        def pack(self, values: Any) -> int:
            return signed(sum(pack(value, place) for place, value in enumerate(values)))

        def unpack(self, number: int) -> list[int]:
            return [unpack(number, place) for place in places]

    return Packing


class PacksInPlace:
    def pack(self, values: list[int]) -> int:
        values.reverse()
        return packing()().pack(values[::-1])

    def unpack(self, number: int) -> list[int]:
        return packing()().unpack(number)


class PacksWithTorch:
    def pack(self, values: list[int]) -> int:
        shifted = torch.tensor(values, dtype=torch.int32) << torch.arange(0, 32, 4, dtype=torch.int32)
        return int(shifted.sum(dtype=torch.int32))

    def unpack(self, number: int) -> tuple[int, ...]:
        return tuple(number >> shift & 0xF for shift in range(0, 32, 4))


def scale(
    largest: Callable[[Tensor], Tensor] = lambda group: group.abs().amax(dim=1),
    steps: Callable[[int], float] = lambda bits: 2**bits - 1,
    width: float = 2,
    mend: Callable[[Tensor], Tensor] = lambda scales: torch.where(scales > 0, scales, 1.0),
) -> Callable[[Tensor, int], Tensor]:
    """The scale of each row; each part may be got wrong."""
    return lambda group, bits: mend(width * largest(group) / steps(bits))


def scale_in_place(group: Tensor, bits: int) -> Tensor:
    return scale(largest=lambda group: group.abs_().amax(dim=1))(group, bits)


def step(
    lost: Callable[[Tensor, Tensor], Tensor] = lambda weight, rounded: weight - rounded,
    divide: bool = True,
    row: Callable[[Tensor, int], Tensor] = lambda factor, column: factor[column, column + 1 :],
    give: Callable[[Tensor], Any] = lambda error: error,
    change: bool = True,
) -> Callable[..., Any]:
    """One step of GPTQ; each part may be got wrong."""

    def attempt(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Any:
        error = lost(block[:, column], rounded)
        if divide:
            error = error / factor[column, column]
        if change:
            block[:, column + 1 :] -= torch.outer(error, row(factor, column))
        return give(error)

    return attempt


def step_in_loops(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Tensor:
    error = (block[:, column] - rounded) / factor[column, column]
    for later in range(column + 1, block.shape[1]):
        block[:, later] = block[:, later] - error * factor[column, later]
    return error


def step_writes_the_rounded_column(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Tensor:
    error = step()(block, column, rounded, factor)
    block[:, column] = rounded
    return error


def step_changes_factor(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Tensor:
    factor[column] /= factor[column, column].clone()
    return step(divide=False)(block, column, rounded, factor)


class OnlyTheFirstRow(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return super().read_zeros(qzeros + (version == 1), num_out, version)


class AlwaysOneMore(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return super().read_zeros(qzeros, num_out, version) + 1


class Eight(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return torch.full((num_out, len(qzeros)), 8, dtype=torch.uint8)


class TheOtherVersion(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return super().read_zeros(qzeros, num_out, version) + (version == 2)


class InTheFile(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return super().read_zeros(qzeros + (0x11111111 if version == 1 else 0), num_out, version)


class OneMore(faults.ZerosAsStored):
    def read_zeros(self, qzeros: Tensor, num_out: int, version: int) -> Tensor:
        return super().read_zeros(qzeros, num_out, version) + (version == 1)


WRONG: dict[str, dict[str, Any]] = {
    "check_packing": {
        "a function": lambda values: 0,
        "the first value on top": packing(pack=lambda value, place: value << (4 * (7 - place))),
        "no sign": packing(signed=lambda number: number),
        "bytes": packing(pack=lambda value, place: value << (8 * place)),
        "added up": packing(pack=lambda value, place: value),
        "unpacks without a mask": packing(unpack=lambda number, place: number >> (4 * place)),
        "unpacks from the top": packing(unpack=lambda number, place: (number >> (28 - 4 * place)) & 15),
        "unpacks seven": packing(places=range(7)),
        "a mask of three bits": packing(unpack=lambda number, place: (number >> (4 * place)) & 7),
        "changes the list": PacksInPlace,
        "a sign for every number": packing(signed=lambda number: number - 2**32),
        "gives text": packing(signed=str),
    },
    "check_scale": {
        "the largest, not in size": scale(largest=lambda group: group.amax(dim=1)),
        "from end to end": scale(largest=lambda group: (group.amax(dim=1) - group.amin(dim=1)) / 2),
        "one for all rows": scale(largest=lambda group: group.abs().amax().repeat(len(group))),
        "half": scale(width=1),
        "a step too many": scale(steps=lambda bits: 2**bits),
        "the largest on the last value": scale(steps=lambda bits: 2**bits - 2),
        "always 4 bits": scale(steps=lambda bits: 15),
        "zero": scale(mend=lambda scales: scales),
        "one over": scale(mend=lambda scales: 1 / scales),
        "a number": lambda group, bits: 0.1,
        "a column": scale(mend=lambda scales: scales.unsqueeze(1)),
        "changes the weights": scale_in_place,
        "the mean": scale(largest=lambda group: group.abs().mean(dim=1)),
    },
    "check_step": {
        "no change": step(change=False),
        "the other sign": step(lost=lambda weight, rounded: rounded - weight),
        "not divided": step(divide=False),
        "a column of factor": step(row=lambda factor, column: factor[column + 1 :, column]),
        "the error as it was": step(give=lambda error: error * 2),
        "None": step(give=lambda error: None),
        "writes the column": step_writes_the_rounded_column,
        "changes factor": step_changes_factor,
        "always the first row": step(row=lambda factor, column: factor[0, column + 1 :]),
        "gives a number": step(give=lambda error: float(error.sum())),
    },
}

WRONG["check_zeros"] = {
    "still not": type("Same", (faults.ZerosAsStored,), {}),
    "always one more": AlwaysOneMore,
    "always eight": Eight,
    "only the first row": OnlyTheFirstRow,
    "the other version": TheOtherVersion,
    "another class": WeightReader,
    "a function": step(),
}

SAYS: dict[str, dict[str, str]] = {
    "check_packing": {"gives text": "yours gives '124076833' (a str)"},
    "check_scale": {"the largest on the last value": "half a step beyond the last value"},
    "check_zeros": {"only the first row": "of row 1 are [15], yours reads [14]"},
}

RIGHT: dict[str, dict[str, Any]] = {
    "check_packing": {"in one line": packing(), "with torch": PacksWithTorch},
    "check_scale": {
        "as in the engine": scale(mend=lambda scales: scales.clamp_min(2**-24)),
        "in 16 bits": scale(mend=lambda scales: scales.half().clamp_min(2**-24)),
        "in 64 bits": scale(mend=lambda scales: torch.where(scales > 0, scales.double(), 1.0)),
    },
    "check_step": {"as in the engine": step(), "in loops": step_in_loops},
    "check_zeros": {"in the file": InTheFile, "one more": OneMore},
}

SAME: dict[str, dict[str, str]] = {
    "check_scale": {
        "return torch.where(scales > 0, scales, 1.0) → return torch.where(scales > 0, scales, 2.0)": (
            "a row of zeros is divided by any number alike"
        )
    }
}
