"""Checks of the exercises of chapter 4."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folovllm.book.exercises.verdict import NotYet, exercise, expect


def _try_header(attempt: Callable[..., Any], *args: Any) -> Any:
    """What the attempt gives; the usual errors of reading a header are explained."""
    try:
        return attempt(*args)
    except KeyError as error:
        entry = error.args[0] if error.args else None
        expect(
            entry not in ("shape", "dtype", "data_offsets"),
            f"__metadata__ in the header is no tensor and has no {entry}: leave it out.",
        )
        expect(entry != "__metadata__", "not every file has a __metadata__ in its header: leave it out where it is.")
        raise
    except RuntimeError as error:
        expect(
            "for input of size" not in str(error), f"too many or too few bytes for the shape and the dtype ({error})."
        )
        raise
    except (ValueError, OverflowError, MemoryError) as error:
        is_text = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        expect(
            not is_text and not isinstance(error, (OverflowError, MemoryError)),
            f"the header was not cut out exactly ({type(error).__name__}): its length is a little-endian number in the "
            "first 8 bytes, and so many bytes of JSON follow.",
        )
        raise


@exercise("the header alone is enough, and its __metadata__ is no tensor.", gives="a number of weights")
def check_count_weights(attempt: Callable[[Path], int]) -> None:
    """``attempt(path)``: weights in a safetensors file."""
    import torch
    from safetensors.torch import save_file

    note = {"note": "x" * 70_000}  # so that the header's length fills more than two of its eight bytes
    half = torch.zeros(4, 4, dtype=torch.bfloat16)
    cases: tuple[tuple[dict[str, Any], dict[str, str] | None, int, str], ...] = (
        ({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, {"format": "pt"}, 22, "a matrix of 3 x 5 and a vector of 7"),
        (
            {"a": torch.zeros(5, 2), "b": torch.zeros(3)},
            None,
            13,
            "a matrix of 5 x 2, a vector of 3 and no __metadata__",
        ),
        ({"a": half, "s": torch.tensor(1.0)}, {}, 17, "16 weights of two bytes and a single number without a shape"),
        ({"a": torch.zeros(2, 3, 4)}, note, 24, "one tensor of 2 x 3 x 4 and a header of 70,000 bytes"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for number, (tensors, metadata, right, what) in enumerate(cases):
            path = Path(folder) / f"{number}.safetensors"
            save_file(tensors, path, metadata=metadata)
            got = _try_header(attempt, path)
            size = path.stat().st_size
            expect(
                got != size // 4, "that is the file's size over four: the header is no weight, and not all are 4 bytes."
            )
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            expect(got != num_bytes, "those are the bytes of the tensors, and a weight takes two or four of them.")
            expect(got == right, f"{what}: {right} weights, yours says {got!r}.")


@exercise("the right bytes, in the right type and shape.", gives="a torch tensor")
def check_read_tensor(attempt: Callable[[Path, str], Any]) -> None:
    """``attempt(path, name)``: one tensor of a safetensors file, read without the library."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        "first": torch.tensor([1.5, -2.0, 0.25]),
        "matrix": torch.arange(12.0).reshape(4, 3),
        "half": torch.tensor([[3.0, 5.0], [7.0, -11.0]], dtype=torch.bfloat16),
        "other half": torch.tensor([0.1, 0.2, 65504.0], dtype=torch.float16),
        "number": torch.tensor(13.0),
        "last": torch.tensor([[[17.0, 19.0]]]),
    }
    others = {name: tensors[name] + 1 for name in ("last", "half", "first")}
    with tempfile.TemporaryDirectory() as folder:
        for number, (stored, metadata) in enumerate(((tensors, {}), (others, {"note": "x" * 300}))):
            path = Path(folder) / f"{number}.safetensors"
            save_file(stored, path, metadata=metadata)
            for name, right in stored.items():
                _expect_tensor(_try_header(attempt, path, name), right, name)


def _expect_tensor(got: Any, right: Any, name: str) -> None:
    """Ends a check unless two tensors are the same, in the order in which a reader goes wrong."""
    import torch

    expect(isinstance(got, torch.Tensor), f"a torch tensor was asked for, yours gives {type(got).__name__}.")
    kind = str(right.dtype).removeprefix("torch.")
    expect(
        got.dtype is right.dtype,
        f"{name!r} is stored as {kind}, yours gives {str(got.dtype).removeprefix('torch.')}: look at its dtype.",
    )
    shape = list(right.shape)
    expect(
        got.numel() == right.numel(),
        f"{name!r} has {right.numel()} numbers, yours {got.numel()}: data_offsets says where its bytes begin and end.",
    )
    expect(list(got.shape) == shape, f"{name!r} has the shape {shape}, yours {list(got.shape)}: reshape it.")
    expect(
        torch.equal(got, right),
        f"{name!r} has other numbers, so other bytes were read: data_offsets count from the end of the header, which "
        "is 8 + length bytes into the file.",
    )


@exercise("a key and a value, for each layer and each KV head.", gives="a number of bytes")
def check_kv_bytes(attempt: Callable[[int, int, int, int, int], int]) -> None:
    """``attempt(num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number)``: bytes of KV cache per token."""
    models = {
        "7 layers, 20 query heads, 5 KV heads, head_dim 11, 3 bytes per number": (7, 20, 5, 11, 3),
        "Llama 3 8B in float32": (32, 32, 8, 128, 4),
        "Qwen3 8B in bfloat16": (36, 32, 8, 128, 2),
        "the embedded model in bfloat16": (4, 4, 2, 32, 2),
    }
    for what, (layers, heads, kv_heads, dim, size) in models.items():
        got = attempt(layers, heads, kv_heads, dim, size)
        right, query_heads = 2 * layers * kv_heads * dim * size, 2 * layers * heads * dim * size
        if what.startswith("7 layers"):  # numbers of which no two products are the same, so each slip is known
            expect(got != query_heads, "that counts the query heads: only the KV heads are kept.")
            expect(
                2 * got != query_heads,
                "that is one vector for each query head: a key and a value for each KV head are kept.",
            )
            expect(2 * got != right, "there are two vectors for each token and KV head, a key and a value.")
            expect(
                2 * got != 3 * right, "those are three vectors: a query is used once, and only key and value are kept."
            )
            expect(got * layers != right, "that is one layer: each layer has keys and values of its own.")
            expect(got * size != right, "those are numbers: multiply by the bytes of each.")
        expect(got == right, f"{what}: {right:,} bytes per token, yours says {got!r}.")


@exercise("the last place of every row is a real token, and the mask hides the rest.", gives="a pair of rows and mask")
def check_pad_batch(attempt: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[int]]]]) -> None:
    """``attempt(prompts, pad_id)``: rows of one length, and their attention mask."""
    cases: list[tuple[list[list[int]], int]] = [
        ([[5], [6, 7, 8]], 0),
        ([[9], [6, 7]], 9),
        ([[6, 7], [8]], 1),
        ([[5, 5, 5, 5], [4, 3], [2], [1, 0, 1]], 3),
        ([[1, 2], [3, 4]], 7),
    ]
    for prompts, pad_id in cases:
        before = [list(prompt) for prompt in prompts]
        found = attempt(prompts, pad_id)
        expect(len(found) == 2, "two things were asked for, the rows and the mask.")
        rows, mask = ([[int(token) for token in row] for row in part] for part in found)
        expect(prompts == before, "your code changes the lists it was given: make new ones.")
        _expect_padded(rows, mask, before, pad_id)


def _expect_padded(rows: list[list[int]], mask: list[list[int]], prompts: list[list[int]], pad_id: int) -> None:
    """Ends a check unless rows and mask are those of the prompts, padded on the left."""
    longest = max(map(len, prompts))
    told = f"prompts {prompts}, pad_id {pad_id}"
    gaps = [longest - len(prompt) for prompt in prompts]
    expect(
        [len(row) for row in rows] == [longest] * len(prompts),
        f"{told}: each of the {len(prompts)} rows should have the length of the longest, {longest}, yours are {rows}.",
    )
    right = [[pad_id] * gap + prompt for prompt, gap in zip(prompts, gaps)]
    on_the_right = [prompt + [pad_id] * gap for prompt, gap in zip(prompts, gaps)]
    expect(
        rows == right or rows != on_the_right,
        "the padding is on the right: then the last place, where the model predicts, is a pad token.",
    )
    expect(rows == right, f"{told}: the rows should be {right}, yours are {rows}.")
    right = [[0] * gap + [1] * len(prompt) for prompt, gap in zip(prompts, gaps)]
    from_tokens = [[int(token != pad_id) for token in row] for row in rows]
    if mask != right and mask == from_tokens and pad_id in itertools.chain(*prompts):
        raise NotYet(f"{told}: a real token may be equal to the pad token, so make the mask from lengths.")
    expect(mask == right, f"{told}: the mask should be {right}, yours is {mask}.")
