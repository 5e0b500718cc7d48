"""Seeds, ids, devices and memory."""

from folovllm.utils.common import (
    cdiv,
    generate_request_id,
    get_cpu_memory_info,
    get_device,
    get_gpu_memory_info,
    is_cuda_available,
    move_to_device,
    print_gpu_memory_info,
    set_random_seed,
    without_autocast,
)

__all__ = [
    "cdiv",
    "generate_request_id",
    "get_cpu_memory_info",
    "get_device",
    "get_gpu_memory_info",
    "is_cuda_available",
    "move_to_device",
    "print_gpu_memory_info",
    "set_random_seed",
    "without_autocast",
]
