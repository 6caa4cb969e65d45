"""Where and with how many threads to compute."""

import ctypes
import os
import platform
from collections.abc import Mapping

import torch
from torch import nn

from replaceme.base.errors import ModelError, ResourceError

# Of the C library's allocator, by its own numbers (malloc.h), in bytes: what is free at the end of the heap before it is given
# back, what the heap grows by beside what is asked for, and the size from which a block is no part of the heap.
HEAP = {-1: 256 << 20, -2: 32 << 20, -3: 32 << 20}


def resolve_device(device: str) -> str:
    """Return the device that ``auto`` stands for here, and check that a CUDA device asked for is there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(f"device: {device} is asked for, but torch sees no CUDA device; use cpu or auto.")
    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise ResourceError(f"device: {device} is asked for, but torch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def use_processor(threads: int) -> None:
    """Make ready to compute.

    The number of threads is fixed: another number sums in another order and gives other last bits. And memory that becomes free
    is kept for what comes next: glibc gives large blocks back at once, and a page at a time is what it then takes to have
    them again, a million times in a profile of the demo. Who sets its ``MALLOC_…`` variables is left alone.
    """
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        allocator = ctypes.CDLL(None)
        for option, value in HEAP.items():
            allocator.mallopt(option, value)


def require_resident(layers: Mapping[int, nn.Module], words: str) -> None:
    """Raise ModelError where ``device_map`` left weights off the devices: they are there only while the whole model computes.

    Args:
        layers: by their positions, those that are worked on by themselves.
        words: what is done with them, behind a layer's number.
    """
    for position, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ModelError(
                f"device_map: layer {position}, {words}, does not fit the GPUs beside the others; use null, or another machine."
            )
