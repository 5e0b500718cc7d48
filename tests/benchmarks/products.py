"""How fast are products with weights of 32, 8 and 4 bits? ``python tests/benchmarks/products.py [FOLDER …]``.

First single products by their rows, with a weight and a head of Qwen3-0.6B's shape; then, for each checkpoint that is
named, whole answers in floats and in 8 bits. CPU time counts and not the clock's, and of several turns the least, so
that columns can be compared on a machine that others use. With several threads their time adds up.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping

import torch
from side_by_side import MIB, alternate, print_table
from throughput import make_workload, run_engine
from torch import Tensor

from folovllm.llm import LLM
from folovllm.model.int4_kernels import has_int4_kernel
from folovllm.model.layers import Linear, LinearBase, LinearMethod
from folovllm.model.packing import SYMMETRIC_ZERO, QuantizedWeight, column_groups
from folovllm.model.quantized_layers import Int8Linear, PackedInt4

ROWS = {(3072, 1024): (1, 4, 16, 64, 128, 256, 1024), (151_936, 1024): (1, 16)}
"""Rows of each product, by the shape of its weight."""
COLD_BYTES = 64 * MIB
"""What the weights of 8 bits take with which a product is measured in turn: none is found in a cache of 32 MiB."""
TURNS = 7

Product = Callable[[Tensor], Tensor]


def in_floats(num_out: int, num_in: int) -> LinearBase:
    """A product in float32."""
    linear = Linear(torch.randn(num_out, num_in))
    linear.process_weights_after_loading()
    return linear


def in_8_bits(num_out: int, num_in: int) -> LinearBase:
    """A product in 8 bits."""
    linear = Int8Linear(LinearMethod(torch.float32, torch.device("cpu")), {"m": num_out}, num_in)
    linear.places()["m.weight"].copy_(torch.randn(num_out, num_in))
    linear.process_weights_after_loading()
    return linear


def in_4_bits(num_out: int, num_in: int) -> Product:
    """A product in 4 bits and groups of 32, by torch's kernel, of activations in bfloat16."""
    values = torch.randint(16, (num_out, num_in), dtype=torch.uint8)
    scales = torch.rand(num_out, num_in // 32).half()
    zeros = torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    packed = PackedInt4(QuantizedWeight(values, scales, zeros, column_groups(num_in, num_in // 32)))
    return lambda x: packed(x.bfloat16())


def least_seconds(sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of each side's fastest turn."""
    return {name: min(seconds) for name, seconds in alternate(sides, TURNS, time.process_time).items()}


def multiply_by_all(products: list[Product], x: Tensor) -> None:
    """Each product once."""
    for product in products:
        product(x)


@torch.inference_mode()
def measure_products() -> None:
    """Microseconds of single products."""
    kinds: dict[str, Callable[[int, int], Product]] = {"float32": in_floats, "8 bits": in_8_bits}
    if has_int4_kernel(torch.bfloat16, torch.device("cpu")):
        kinds["4 bits"] = in_4_bits
    for (num_out, num_in), row_counts in ROWS.items():
        count = max(1, COLD_BYTES // (num_out * num_in))
        products = {name: [make(num_out, num_in) for _ in range(count)] for name, make in kinds.items()}
        print(f"\nmicroseconds of a product, with each of {count} weights of {num_out:,} x {num_in:,} in turn\n")
        lines = []
        for num_rows in row_counts:
            x = torch.randn(num_rows, num_in)
            sides = {name: functools.partial(multiply_by_all, each, x) for name, each in products.items()}
            seconds = least_seconds(sides)
            lines.append([f"{num_rows:,} rows", *(f"{1e6 * seconds[name] / count:,.0f}" for name in kinds)])
        print_table(["", *kinds], lines)


def measure_answers(folder: str, num_tokens: int) -> None:
    """Tokens per CPU second of whole answers, their prompts of 32 tokens included."""
    llms = {
        name: LLM(folder, device="cpu", dtype="float32", max_model_len=256, quantization=quantization)
        for name, quantization in (("float32", None), ("8 bits", "int8"))
    }
    print(f"\ntokens per CPU second of {folder}, each request with 32 tokens in and {num_tokens} out\n")
    lines = []
    for num_requests in (1, 16):
        work = make_workload(num_requests, (32, 32), (num_tokens, num_tokens), 1000)
        seconds = least_seconds({name: functools.partial(run_engine, llm, work) for name, llm in llms.items()})
        speeds = (f"{num_requests * num_tokens / seconds[name]:.1f}" for name in llms)
        lines.append([f"{num_requests} requests", *speeds, f"{seconds['float32'] / seconds['8 bits']:.2f} x"])
    print_table(["", *llms, "gain"], lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measure_products()
    for folder in options.folders:
        measure_answers(folder, options.tokens)


if __name__ == "__main__":
    main()
