"""Checks of the exercises of chapter 4."""

from __future__ import annotations

from collections.abc import Callable

from folovllm.book.exercises.verdict import exercise, expect


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
