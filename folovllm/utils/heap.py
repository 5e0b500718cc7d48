"""What the memory allocator of C does with what is freed."""

from __future__ import annotations

import torch

LARGEST_LEARNED = 2**25 - 2**16
"""Bytes. A larger block teaches glibc nothing (``DEFAULT_MMAP_THRESHOLD_MAX``, 32 MiB; a block is a little more)."""


def keep_freed_memory() -> None:
    """Has glibc keep up to 64 MiB that are free at the end of the main thread's heap; elsewhere it does nothing.

    It gives them back to the system when they are more than twice the largest block that was freed so far (``man 3
    mallopt``, ``M_MMAP_THRESHOLD``). When a step asks for them again, the system has to clear every page: 657 tokens of
    prompts of Qwen3-0.6B's shape took 0.88 s in 8 bits so and 0.62 without, and eagerly 1.48 and 0.96 (two cores). The
    block that is freed here is never touched, so that it costs no memory. (What other threads ask for lies in heaps of
    64 MiB at most, which go back as a whole when they are empty.)
    """
    torch.empty(LARGEST_LEARNED, dtype=torch.uint8, device="cpu")
