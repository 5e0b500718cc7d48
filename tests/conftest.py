"""Settings for all tests, and the check that each leaves the process as it found it."""

from __future__ import annotations

import functools
import logging
import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # else the threads of all would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine and in every run, however slow the machine is.
settings.register_profile("folovllm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("folovllm")

LOGGERS = ("", "folovllm", "huggingface_hub", "torch", "transformers")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGALRM)
UNSTABLE = (
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "PYTEST_VERSION",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)
"""Environment variables that pytest changes itself, and those that torch sets when a GPU or its compiler is used."""


def process_state() -> dict[str, Any]:
    """What a test may not leave changed: settings that every later test in the process would feel.

    Of libraries only those that are loaded, for loading one sets it up. The states of random number generators are left
    out, since no test may depend on them; the filters of ``warnings`` too, which pytest gives back itself.
    """
    loaded = sys.modules.get
    state: dict[str, Any] = {
        "os.environ": {name: value for name, value in os.environ.items() if name not in UNSTABLE},
        "the current folder": os.getcwd(),
        "sys.path": list(sys.path),
        "sys.argv": list(sys.argv),
        "the signal handlers": [signal.getsignal(number) for number in SIGNALS],
    }
    for name in LOGGERS:
        if not name or name in sys.modules:
            state[f"the level of logger {name!r}"] = logging.getLogger(name).level
    if torch := loaded("torch"):
        state["torch's default dtype"] = torch.get_default_dtype()
        state["torch's number of threads"] = torch.get_num_threads()
        state["torch's gradients"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        state["torch's deterministic algorithms"] = torch.are_deterministic_algorithms_enabled()
    if transformers_logging := loaded("transformers.utils.logging"):
        state["transformers' progress bars"] = transformers_logging.is_progress_bar_enabled()
    if hub := loaded("huggingface_hub.utils"):
        state["huggingface_hub's progress bars"] = not hub.are_progress_bars_disabled()
    if matplotlib := loaded("matplotlib"):
        state["matplotlib's rcParams"] = {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"}
    if helpers := loaded("matplotlib._pylab_helpers"):
        state["matplotlib's open figures"] = list(helpers.Gcf.figs)
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, of that which there was before."""

    def describe(name: str) -> str:
        old, new = before[name], after[name]
        if isinstance(old, dict):
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            return f"{name} ({', '.join(keys)})"
        return f"{name} ({old} became {new})"

    return [describe(name) for name in before if before[name] != after[name]]


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_the_process_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """For fixtures that live as long as a file's tests, and what its functions keep between them.

    Parsed pages and drawn figures are millions of objects, which every later garbage collection would go through.
    """
    before = process_state()
    yield
    for kept in vars(request.module).values():
        if isinstance(kept, functools._lru_cache_wrapper) and kept.__module__ == request.module.__name__:
            kept.cache_clear()
    if found := changes(before, process_state()):
        pytest.fail(f"this file's tests left changed: {'; '.join(found)}", pytrace=False)


@pytest.fixture(params=["plain", "dynamic", "oneDNN"])
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products with weights of 8 bits are computed: each way that this machine has."""
    import torch

    from folovllm.model import quantized_layers
    from folovllm.model.int8_kernels import OneDnnInt8, has_int8_kernel

    how, has_any = request.param, has_int8_kernel(torch.device("cpu"))
    if not {"plain": True, "dynamic": has_any, "oneDNN": has_any and OneDnnInt8.is_available()}[how]:
        pytest.skip(f"torch has no product of 8 bits here that is {how}")
    monkeypatch.setattr(quantized_layers, "has_int8_kernel", lambda device: how != "plain")
    monkeypatch.setattr(OneDnnInt8, "is_available", lambda: how == "oneDNN")
    return how


@pytest.fixture(autouse=True)
def _test_leaves_the_process_as_it_was() -> Iterator[None]:
    before = process_state()
    yield
    if found := changes(before, process_state()):
        pytest.fail(f"this test left changed: {'; '.join(found)}", pytrace=False)
