"""Our Triton kernels: their numbers under the interpreter, that GPUs can have them, and what is said elsewhere.

A process imports Triton to interpret kernels or to compile them, and never changes. So whatever is interpreted runs in
a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention import choose_backend, triton
from folovllm.attention.triton import TritonAttention
from folovllm.book.listing import show_source
from folovllm.model import fused

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FUSED_KERNELS = (fused.add_rms_norm_kernel, fused.rotate_and_write_kernel, fused.silu_and_mul_kernel)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: on Linux ./setup_env.sh --triton does that, elsewhere there is none",
)


def run_python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    env |= {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


@needs_triton
def test_under_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_triton.py")
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


class FakeKernel:
    """Takes what the kernel is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, **options):
        self.args, self.options = args, options


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 90: 227}
"""Of a program, at most: KiB by compute capability, as CUDA's programming guide has it."""


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compile_launched(kernel: Any, launched: FakeKernel, capability: int) -> Any:
    """What Triton makes of a kernel for the arguments that it was launched with."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {
        param.name: "constexpr" if param.is_constexpr
        else f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor)
        else param.annotation
        for param, value in zip(kernel.params, launched.args)
    }  # fmt: skip
    constants = {param.name: value for param, value in zip(kernel.params, launched.args) if param.is_constexpr}
    source = ASTSource(kernel, signature, constants)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=launched.options)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "max_query_len"),
    [
        (75, torch.float16, 128, 64),
        (80, torch.bfloat16, 96, 1),
        (75, torch.float16, 256, 1),
        (75, torch.float32, 128, 1),
        (86, torch.float32, 256, 64),
        (90, torch.float16, 128, 1),
        (90, torch.bfloat16, 128, 64),
    ],
)
def test_attention_compiles_for_gpus(monkeypatch, tmp_path, capability, dtype, head_dim, max_query_len) -> None:
    """All that can be known of it without a GPU: its types are right, it fits, and float32 is not rounded to TF32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels, launched = triton.load_kernels(), (FakeKernel(), FakeKernel())
    monkeypatch.setattr(triton, "load_kernels", lambda: launched)
    table, starts, lens = (meta(*n, dtype=torch.int32) for n in ((2, 4), (3,), (2,)))
    cache = meta(2, 2, 8, 3, head_dim, dtype=dtype)
    triton.paged_attention(meta(128, 6, head_dim, dtype=dtype), *cache, table, starts, lens, max_query_len)
    made = compile_launched(kernels[0], launched[0], capability)
    assert made.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert "tf32" not in made.asm["ptx"]
    assert "fma" in made.asm["ptx"] or "mma" in made.asm["ptx"]
    has_parts = hasattr(launched[1], "args")
    assert has_parts == (max_query_len == 1 and dtype != torch.float32)
    assert not has_parts or compile_launched(kernels[1], launched[1], capability).asm["ptx"]


def test_keys_are_split_where_few_sequences_decode() -> None:
    parts = [triton.choose_num_parts(num, torch.bfloat16, 1) for num in (1, 8, 24, 100, 128, 200, 256, 4096)]
    assert parts == [16, 16, 16, 4, 4, 2, 2, 1]
    assert triton.choose_num_parts(1, torch.float32, 1) == triton.choose_num_parts(1, torch.float16, 2) == 1


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, torch.float16), (80, torch.bfloat16), (86, torch.float32), (90, torch.bfloat16)]
)
def test_fused_operations_compile_for_gpus(monkeypatch, tmp_path, capability, dtype) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels, launched = [], []

    def load_kernel(kernel):
        kernels.append(kernel)
        launched.append(FakeKernel())
        return launched[-1]

    compiled = {kernel: fused.load_kernel(kernel) for kernel in FUSED_KERNELS}
    monkeypatch.setattr(fused, "load_kernel", load_kernel)
    residual, weight, table = meta(5, 576, dtype=dtype), meta(576, dtype=dtype), meta(90, 1, 96, dtype=dtype)
    for x in (None, residual):
        fused.add_rms_norm(residual, x, weight, 1e-6)
    slots, integers = meta(40, 2, 2, 96, dtype=dtype), [meta(5, dtype=torch.int64)] * 2
    for qk_weight in (None, meta(6, 96, dtype=dtype)):
        fused.rotate_and_write(
            meta(5, 8, 96, dtype=dtype), qk_weight, 1e-6, table, table, integers[0], slots, integers[1]
        )
    fused.silu_and_mul(meta(5, 3072, dtype=dtype))
    assert {*kernels} == {*FUSED_KERNELS} and len(kernels) == 5
    for kernel, launch in zip(kernels, launched):
        assert compile_launched(compiled[kernel], launch, capability).asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "parts"),
    [
        (lambda: triton.load_kernels()[0], {"block_table", "query_start_loc", "seq_lens"}),
        (lambda: fused.load_kernel(fused.rotate_and_write_kernel), {"positions", "slot_mapping"}),
    ],
    ids=["attention", "rotation"],
)
def test_no_kernel_is_compiled_anew_for_where_a_step_has_its_parts(kernel, parts) -> None:
    """A step brings them in one copy, so that their addresses are multiples of 16 in some steps, and not in others."""
    assert {param.name for param in kernel().params if param.do_not_specialize_on_alignment} == parts


class TestWhereItCannotRun:
    def test_triton_is_not_installed(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        why = TritonAttention.unsupported(GPU, torch.float16, 64, 16)
        assert "./setup_env.sh --triton" in why and 'pip install "folovllm[triton]"' in why
        with pytest.raises(ValueError, match="attention_backend='triton' cannot serve: Triton is not installed"):
            choose_backend("triton", CPU, torch.float32, 64, 16)

    def test_its_listing_needs_no_triton(self) -> None:
        done = run_python(
            "-c",
            "import sys; sys.modules['triton'] = None\n"
            "from folovllm.attention.triton import paged_attention_kernel\n"
            "from folovllm.book.listing import show_source\n"
            "print(show_source(paged_attention_kernel).source)",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip() == show_source(triton.paged_attention_kernel).source

    @needs_triton
    def test_a_cpu_without_the_interpreter(self) -> None:
        assert "TRITON_INTERPRET=1" in TritonAttention.unsupported(CPU, torch.float32, 64, 16)

    @needs_triton
    def test_the_interpreter_is_switched_on_too_late(self) -> None:
        done = run_python(
            "-c",
            "import os, triton, torch\n"
            "os.environ['TRITON_INTERPRET'] = '1'\n"
            "from folovllm.attention.triton import TritonAttention\n"
            "print(TritonAttention.unsupported(torch.device('cpu'), torch.float32, 64, 16))",
        )
        assert done.stdout.strip().endswith("set before Triton is imported, which it is not"), done.stderr

    @needs_triton
    @pytest.mark.parametrize(
        ("device", "dtype", "word"), [("cuda", torch.float64, "float64"), ("mps", torch.float16, "mps")]
    )
    def test_what_the_kernel_was_not_written_for(self, device, dtype, word) -> None:
        assert word in TritonAttention.unsupported(torch.device(device), dtype, 64, 16)

    @needs_triton
    @pytest.mark.parametrize(("capability", "dtype", "can"), [
        ((7, 5), torch.bfloat16, False), ((7, 5), torch.float16, True), ((8, 0), torch.bfloat16, True),
    ])  # fmt: skip
    def test_bfloat16_needs_a_newer_gpu(self, monkeypatch, capability, dtype, can) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        why = TritonAttention.unsupported(GPU, dtype, 64, 16)
        assert why is None if can else "8.0" in why
