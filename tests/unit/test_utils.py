"""Seeds, ids, devices and memory. What needs a GPU is played by stand-ins here; integration tests use a real one."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import uuid
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from unit_helpers import ANYTHING, error_of

from folovllm import utils
from folovllm.utils import (
    generate_request_id,
    get_cpu_memory_info,
    get_device,
    get_gpu_memory_info,
    is_cuda_available,
    move_to_device,
    print_gpu_memory_info,
    set_random_seed,
)

KEYS = ["allocated_gb", "reserved_gb", "free_gb", "total_gb"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs of 8 GiB: 1.234 GiB in tensors, 1.5 GiB reserved, 2 GiB free (the rest is somebody else's)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(1.234 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(1.5 * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 8 * 2**30))


def test_all_names_are_there():
    assert all(hasattr(utils, name) for name in utils.__all__)


class TestSetRandomSeed:
    @staticmethod
    def draws() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def test_the_same_seed_gives_the_same_numbers_everywhere(self):
        set_random_seed(3)
        first = self.draws()
        assert self.draws() != first
        set_random_seed(3)
        assert self.draws() == first

    def test_another_seed_gives_others_everywhere(self):
        set_random_seed(3)
        first = self.draws()
        set_random_seed(4)
        assert all(a != b for a, b in zip(self.draws(), first))

    @pytest.mark.parametrize("seed", [0, 2**32 - 1])
    def test_the_bounds_that_model_config_allows(self, seed):
        set_random_seed(seed)

    def test_every_cuda_device_is_seeded(self, monkeypatch):
        seeds = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        set_random_seed(5)
        assert set(seeds) == {5}


class TestGenerateRequestId:
    def test_it_is_a_uuid4_as_text(self):
        request_id = generate_request_id()
        assert type(request_id) is str
        assert str(uuid.UUID(request_id)) == request_id and uuid.UUID(request_id).version == 4

    def test_no_two_are_alike(self):
        assert len({generate_request_id() for _ in range(1000)}) == 1000

    def test_a_seed_does_not_repeat_them(self):
        set_random_seed(0)
        first = generate_request_id()
        set_random_seed(0)
        assert generate_request_id() != first


class TestGetDevice:
    def test_none_is_the_cpu_without_a_gpu(self, no_gpu):
        assert get_device() == get_device(None) == torch.device("cpu")
        assert not is_cuda_available()

    def test_none_is_cuda_where_there_is_one(self, two_gpus):
        assert get_device().type == "cuda"
        assert is_cuda_available()

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_the_cpu_is_always_there(self, two_gpus, device):
        assert get_device(device) == torch.device("cpu")

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", torch.device("cuda", 1)])
    def test_a_gpu_that_is_there(self, two_gpus, device):
        assert get_device(device) == torch.device(device)

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", torch.device("cuda")])
    def test_a_gpu_asked_for_where_there_is_none(self, no_gpu, device):
        message = error_of(get_device, device, error=RuntimeError)
        assert str(device) in message and "cpu" in message

    def test_a_gpu_too_many(self, two_gpus):
        message = error_of(get_device, "cuda:2", error=RuntimeError)
        assert "cuda:2" in message and "2 CUDA GPUs" in message

    @pytest.mark.parametrize("device", ["", "banana", "cuda:x", "cuda:-1", "cpu cpu", 1.5, [], {}, object()])
    def test_a_name_that_means_nothing(self, device):
        with pytest.raises(ValueError) as caught:
            get_device(device)
        message = str(caught.value)
        assert message.startswith("device must be") and repr(device) in message and "\n" not in message
        assert caught.value.__suppress_context__

    @settings(max_examples=50)
    @given(value=ANYTHING)
    def test_anything_is_a_device_or_one_error(self, value):
        try:
            assert isinstance(get_device(value), torch.device)
        except (ValueError, RuntimeError) as error:
            assert "device" in str(error)
            assert error.__suppress_context__ or error.__context__ is None


Pair = namedtuple("Pair", "left right")


class TestMoveToDevice:
    """To "meta", the device that every machine has beside its CPU."""

    def test_a_tensor(self):
        assert move_to_device(torch.ones(2), "meta").device.type == "meta"

    @pytest.mark.parametrize("device", ["meta", torch.device("meta")])
    def test_every_tensor_of_a_structure_keeps_its_place(self, device):
        one = torch.ones(2)
        moved = move_to_device({"a": one, "b": [one, (one, Pair(one, 3))], "c": "text", "d": None}, device)
        assert list(moved) == ["a", "b", "c", "d"]
        assert isinstance(moved["b"], list) and isinstance(moved["b"][1], tuple)
        pair = moved["b"][1][1]
        assert isinstance(pair, Pair) and pair.right == 3
        for tensor in (moved["a"], moved["b"][0], moved["b"][1][0], pair.left):
            assert tensor.device.type == "meta"
        assert moved["c"] == "text" and moved["d"] is None

    def test_what_a_tokenizer_gives(self):
        moved = move_to_device(UserDict(input_ids=torch.ones(2)), "meta")
        assert moved["input_ids"].device.type == "meta"

    def test_the_original_stays_where_it_was(self):
        tensors = {"a": torch.ones(2)}
        move_to_device(tensors, "meta")
        assert tensors["a"].device.type == "cpu"

    @pytest.mark.parametrize("value", [None, 1, "text", b"bytes", [], (), {}])
    def test_what_holds_no_tensor_is_passed_through(self, value):
        assert move_to_device(value, "meta") == value


class TestMemoryInfo:
    def test_nothing_without_a_gpu(self, no_gpu):
        assert get_gpu_memory_info() == {}

    def test_of_a_gpu_in_gib_with_two_decimals(self, two_gpus):
        info = get_gpu_memory_info()
        assert list(info) == KEYS
        assert info == {"allocated_gb": 1.23, "reserved_gb": 1.5, "free_gb": 2.0, "total_gb": 8.0}

    def test_of_the_gpu_that_was_asked_for(self, two_gpus, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device * 2**30, 8 * 2**30))
        assert get_gpu_memory_info(1)["free_gb"] == 1.0

    def test_of_the_cpu_in_the_same_form(self):
        info = get_cpu_memory_info()
        assert list(info) == KEYS
        assert 0 < info["allocated_gb"] < info["total_gb"]
        assert 0 <= info["free_gb"] < info["total_gb"]
        assert all(round(value, 2) == value for value in info.values())

    def test_the_cpus_figure_is_this_process(self, monkeypatch):
        import psutil

        monkeypatch.setattr(psutil.Process, "memory_info", lambda self: psutil._ntuples.pmem(*[3 * 2**30] * 7))
        assert get_cpu_memory_info()["allocated_gb"] == 3.0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told something")
def test_freed_memory_is_kept():
    """Or, more often than not, the system clears tens of thousands of pages anew in five steps, not hundreds."""
    code = """
import resource, torch
from folovllm.utils.heap import keep_freed_memory

def count_pages(mib):
    for num_steps in (4, 5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(num_steps):
            some = [torch.ones(size * 2**20, dtype=torch.uint8) for size in (mib, mib, 3)]
            del some
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(max(map(count_pages, (1, 2, 3, 4, 5, 6, 8, 11, 20, 26))))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 3000


class TestPrintMemoryInfo:
    def test_of_a_gpu(self, two_gpus, capsys):
        print_gpu_memory_info(1)
        line = capsys.readouterr().out
        assert "GPU 1" in line and line.count("\n") == 1
        for figure in ("1.23 GiB allocated", "1.50 GiB reserved", "2.00 GiB free", "8.00 GiB total"):
            assert figure in line

    def test_of_the_cpu_where_there_is_no_gpu(self, no_gpu, capsys):
        print_gpu_memory_info()
        line = capsys.readouterr().out
        assert line.startswith("CPU") and line.count("GiB") == 4
