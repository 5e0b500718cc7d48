"""Checks of the exercises of chapter 15."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

from folovllm.book.exercises.verdict import NotYet, blame_part, exercise, expect, expect_subclass, shown

if TYPE_CHECKING:
    from torch import Tensor

EIGHTS = (
    (1, 2, 3, 4, 5, 6, 7, 0),
    (15, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 7),
    (0, 0, 0, 0, 0, 0, 0, 4),
    (0, 0, 0, 0, 0, 0, 0, 8),
    (3, 14, 1, 5, 9, 2, 6, 13),
    (15, 15, 15, 15, 15, 15, 15, 15),
    (0, 0, 0, 0, 0, 0, 0, 0),
    (8, 8, 8, 8, 8, 8, 8, 8),
)
"""Values to pack, also such that the highest bit is set and such that it alone is."""


@exercise("eight numbers of 4 bits in one of 32, whose highest bit is its sign.", gives="a class")
def check_packing(attempt: type) -> None:
    """``attempt().pack(values)`` gives an int32 as Python's int, ``attempt().unpack(number)`` the eight values."""
    expect(isinstance(attempt, type), "a class with the methods pack and unpack is asked for.")
    packing = attempt()
    for values in EIGHTS:
        right = _pack(values)
        given = list(values)
        got = packing.pack(given)
        expect(given == list(values), f"{list(values)}: the list is another afterwards, and it is not yours to change.")
        is_int = isinstance(got, int) and not isinstance(got, bool)
        expect(is_int, f"{list(values)}: pack should give an int, yours gives {shown(got)}.")
        expect(got != _pack(values[::-1]) or got == right, f"{list(values)}: the first value has the lowest bits.")
        expect(
            got != right % 2**32 or got == right,
            f"{list(values)}: {got:,} is more than an int32 can hold; with the highest bit set it stands for "
            f"{right:,}.",
        )
        expect(got == right, f"{list(values)}: {right:,} is right (hexadecimal {right % 2**32:08x}), yours is {got:,}.")
        back = packing.unpack(right)
        is_list = isinstance(back, (list, tuple))
        expect(is_list, f"{right:,}: unpack should give a list of eight values, yours gives a {type(back).__name__}.")
        expect(len(back) == 8, f"{right:,}: unpack should give eight values, yours gives {len(back)}.")
        expect(list(back) == list(values), f"{right:,}: unpack should give {list(values)}, yours gives {list(back)}.")


def _pack(values: Sequence[int]) -> int:
    number = sum(value << (4 * place) for place, value in enumerate(values))
    return number - 2**32 if number >= 2**31 else number


GROUPS = (
    (4, 3, 8, 1.0, "three rows of 8 weights, 4 bits"),
    (4, 1, 32, 0.02, "one row of 32 small weights, 4 bits"),
    (8, 5, 4, 3.0, "five rows of 4 weights, 8 bits"),
    (2, 2, 16, 1.0, "two rows of 16 weights, 2 bits"),
    (3, 4, 1, 1.0, "four rows of one weight, 3 bits"),
)
"""Bits, rows, weights in each, how large they are, and in words."""


@exercise(
    "the largest weight of each row is at most half a step beyond the grid, and nothing is divided by zero.",
    gives="a tensor",
)
def check_scale(attempt: Callable[[Tensor, int], Tensor]) -> None:
    """``attempt(group, bits)``: ``[num_rows, group_size]`` to the scale of each row, ``[num_rows]``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for bits, num_rows, size, spread, case in GROUPS:
        group = spread * torch.randn(num_rows, size, generator=generator)
        group[0] = -group[0].abs()  # the largest in size is negative
        _check_scales(attempt, group, bits, case)
    group = torch.randn(3, 8, generator=generator)
    group[1] = 0
    _check_scales(attempt, group, 4, "three rows, the second all zeros")


def _check_scales(attempt: Callable[[Tensor, int], Tensor], group: Tensor, bits: int, case: str) -> None:
    import torch

    given = group.clone()
    got = attempt(given, bits)
    expect(torch.equal(given, group), f"{case}: the weights are others afterwards, and they are not yours to change.")
    expect(
        isinstance(got, torch.Tensor) and got.shape == group.shape[:1],
        f"{case}: one scale per row is asked for, a tensor of {[len(group)]}, yours is {_kind(got)}.",
    )
    got, largest = got.float(), group.abs().amax(dim=1)  # scales may have 16 bits, as the engine's
    is_zero = largest == 0
    expect(bool(torch.isfinite(got).all()), f"{case}: a scale is not a finite number.")
    expect(
        bool((got[is_zero] > 0).all()),
        f"{case}: a row of zeros has scale 0, by which its weights cannot be divided; any other serves.",
    )
    right = 2 * largest / (2**bits - 1)
    close = torch.isclose(got, right, rtol=1e-3) | is_zero
    if bool(close.all()):
        return
    for wrong, why in _wrong_scales(group, bits):
        expect(not torch.allclose(got[~is_zero], wrong[~is_zero], rtol=1e-3), f"{case}: {why}.")
    row = int((~close).nonzero()[0])
    raise NotYet(f"{case}: row {row} has scale {right[row]:.4g}, yours says {got[row]:.4g}.")


def _wrong_scales(group: Tensor, bits: int) -> Iterator[tuple[Tensor, str]]:
    steps = 2**bits - 1
    yield 2 * group.amax(dim=1) / steps, "a negative weight may be the largest in size"
    yield (
        (group.amax(dim=1) - group.amin(dim=1)) / steps,
        "that is for a grid with a zero of its own; ours is symmetric",
    )
    yield 2 * group.abs().amax() / steps + 0 * group[:, 0], "each row has a scale of its own"
    yield group.abs().amax(dim=1) / steps, "the grid reaches as far below 0 as above, twice the largest weight in all"
    yield 2 * group.abs().amax(dim=1) / (steps + 1), f"between {steps + 1} values there are {steps} steps"
    yield (
        2 * group.abs().amax(dim=1) / (steps - 1),
        f"the largest weight in size is {steps / 2} steps from 0, half a step beyond the last value, and not on it",
    )
    yield steps / (2 * group.abs().amax(dim=1)), "that is one over the scale"


@exercise("each error moves on to the columns after it, as in the engine's own step.")
def check_step(attempt: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> None:
    """``attempt(block, column, rounded, factor)``: `folovllm.model.gptq.carry_error`, put in the place of it."""
    import torch

    from folovllm.model.gptq import carry_error

    generator = torch.Generator().manual_seed(0)
    for num_out, num_columns, column in ((1, 2, 0), (2, 5, 1), (3, 8, 6), (4, 4, 3)):
        block = torch.randn(num_out, num_columns, generator=generator, dtype=torch.float64)
        factor = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64).triu()
        factor.diagonal().abs_().add_(0.5)
        rounded = block[:, column].round()
        case = f"column {column} of {num_columns}, {num_out} {'row' if num_out == 1 else 'rows'}"
        ours, yours, given = block.clone(), block.clone(), factor.clone()
        error, got = carry_error(ours, column, rounded, factor), attempt(yours, column, rounded.clone(), given)
        expect(torch.equal(given, factor), f"{case}: factor is another afterwards, and it is not yours to change.")
        expect(
            isinstance(got, torch.Tensor) and got.shape == error.shape,
            f"{case}: the error of each row is asked for, a tensor of {[num_out]}, yours is {_kind(got)}.",
        )
        for wrong, why in _wrong_steps(block, column, rounded, factor):
            expect(not torch.allclose(yours, wrong) or torch.allclose(yours, ours), f"{case}: {why}.")
        expect(torch.allclose(yours[:, : column + 1], block[:, : column + 1]), f"{case}: columns up to it stay.")
        expect(torch.allclose(yours, ours), f"{case}: the columns after it are to change by error times factor's row.")
        expect(torch.allclose(got, error), f"{case}: give the error divided by factor[{column}, {column}] back.")
    _run_step(attempt)


def _wrong_steps(block: Tensor, column: int, rounded: Tensor, factor: Tensor) -> Iterator[tuple[Tensor, str]]:
    """What the block looks like after the usual mistakes."""
    import torch

    if column + 1 == block.shape[1]:
        return
    lost, row = block[:, column] - rounded, factor[column, column + 1 :]
    for amount, why in (
        (0 * lost, "nothing has changed in the columns after it: change block in place, by a row of factor"),
        (-lost / factor[column, column], "the error has the wrong sign: it is what the weight was less what it became"),
        (lost, "the error is to be divided by factor[column, column] first"),
    ):
        changed = block.clone()
        changed[:, column + 1 :] -= torch.outer(amount, row)
        yield changed, why


def _run_step(attempt: Callable[..., Any]) -> None:
    """Quantizes a weight with the attempt in the place of the engine's own step."""
    import torch

    from folovllm.model import gptq

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 192, generator=generator, dtype=torch.float64)
    x = (
        torch.randn(400, 48, generator=generator, dtype=torch.float64)
        @ torch.randn(48, 192, generator=generator).double()
    )
    hessian = gptq.compute_hessian(x)
    wanted = gptq.quantize_weight(weight, hessian, 4, 64)
    with mock.patch.object(gptq, "carry_error", attempt):
        try:
            found = gptq.quantize_weight(weight, hessian, 4, 64)
        except NotYet:
            raise
        except Exception as error:
            raise NotYet(f"in the engine: {blame_part(error)}.") from None
    same = float((found.values == wanted.values).double().mean())
    expect(same > 0.999, f"in the engine, {1 - same:.0%} of a weight's values are others than with its own step.")


@exercise("version 1 stores each zero point less one, version 2 as it is, and both are read as they were meant.")
def check_zeros(attempt: type) -> None:
    """``attempt``: a subclass of `folovllm.book.faults.ZerosAsStored` that looks at the version."""
    from folovllm.book import faults, judges

    expect_subclass(attempt, faults.ZerosAsStored)
    judges.judge_reader(attempt)


def _kind(got: Any) -> str:
    return str(list(got.shape)) if hasattr(got, "shape") else f"a {type(got).__name__}"
