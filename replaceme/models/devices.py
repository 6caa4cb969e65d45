"""The device, its kind and its free memory, the number of threads, and the memory allocator."""

import ctypes
import gc
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replaceme.base import accelerators
from replaceme.base.errors import ModelError, ResourceError
from replaceme.base.fingerprints import code_digest
from replaceme.base.group import local_gpu, local_world_size
from replaceme.base.ranks import world_size
from replaceme.running.machine import processor
from replaceme.running.versions import FOUR_BIT, MODEL, versions

# Options of glibc's allocator (malloc.h), in bytes: M_TRIM_THRESHOLD, the free space at the heap's top that is kept; M_TOP_PAD,
# the extra space when the heap grows; M_MMAP_THRESHOLD, the size from which a block is mapped by itself.
HEAP = {-1: 256 << 20, -2: 32 << 20, -3: 32 << 20}
# Linux alone has it.
MEMORY_INFO = Path("/proc/meminfo")
# What a control group may take and takes, in bytes (version 2; a container sees its own).
GROUP_LIMIT, GROUP_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def resolve_device(device: str) -> str:
    """Return the device with its number: that of ``auto``, or of a kind alone, is this process's, or this thread's present one.

    Raises:
        ResourceError: there is no such device.
    """
    kind = accelerators.find_kind()
    if device == "auto":
        device = kind or "cpu"
    if device == "cpu":
        return device
    asked, _, number = device.partition(":")
    if asked != kind:
        seen = f"devices of the kind {kind} only" if kind else f"no {asked} device"
        raise ResourceError(f"device: {device} is asked for, but torch sees {seen}; use {kind or 'cpu'} or auto.")
    if number and int(number) >= (count := accelerators.count_devices()):
        raise ResourceError(f"device: {device} is asked for, but torch sees {count} {kind} device{'s' * (count != 1)}.")
    return f"{kind}:{number or (local_gpu() if world_size() > 1 else accelerators.current_device())}"


def kind_of(device: str) -> str:
    """Return what a result's last digits depend on: the GPU's name; or the processor's, and the vectors that torch uses."""
    if accelerators.is_accelerator(device):
        return accelerators.device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def describe_environment(device: str) -> dict[str, Any]:
    """Return the code, the packages and the kind of device, for a checkpoint's key: others could give other steps."""
    return {"code": code_digest(), "versions": versions((*MODEL, *FOUR_BIT)), "device": kind_of(device)}


def free_memory(device: str) -> int:
    """Return the bytes that are free on a device; for the processor, this process's part of those that swap nothing."""
    free = _free_of_processor() // local_world_size()
    if not accelerators.is_accelerator(device):
        return free
    own, _ = accelerators.memory(device)
    return min(own, free) if accelerators.shares_memory(device) else own


def total_memory() -> int:
    """Return the bytes of memory that the machine has, or that its container may take."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole if (limit := _group_limit()) is None else min(whole, limit)


def _free_of_processor() -> int:
    """Return the bytes that can be taken without swapping."""
    if not MEMORY_INFO.is_file():
        return total_memory() // 2
    match = re.search(r"(?m)^MemAvailable:\s+(\d+) kB$", MEMORY_INFO.read_text(encoding="utf-8"))
    free = int(match[1]) << 10 if match else 0
    if (limit := _group_limit()) is None:
        return free
    return min(free, max(limit - int(GROUP_USE.read_text(encoding="utf-8")), 0))


def _group_limit() -> int | None:
    """Return the bytes that this process's control group may take; None if they are not limited."""
    limit = GROUP_LIMIT.read_text(encoding="utf-8").strip() if GROUP_LIMIT.is_file() else "max"
    return int(limit) if limit.isdigit() else None


def use_processor(threads: int) -> None:
    """Set the number of threads and tune the allocator.

    Another number of threads sums in another order and gives other last bits. By default glibc returns large freed blocks to
    the system at once; reusing that memory costs a page fault for each page, a million in a profile of the demo. So freed
    memory is kept, unless the user set a ``MALLOC_…`` variable.
    """
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        allocator = ctypes.CDLL(None)
        for option, value in HEAP.items():
            allocator.mallopt(option, value)


def release_memory() -> None:
    """Free what only refers to itself, as streamed models do: nothing but the garbage collector lets their weights go.

    The memory of an accelerator that this frees goes back to its driver: another process may be waiting for it.
    """
    gc.collect()
    accelerators.release_cached()


def require_resident(layers: Mapping[int, nn.Module], words: str) -> None:
    """Raise ModelError if ``device_map`` offloaded weights of these layers: they are loaded only during a whole forward pass.

    Args:
        layers: position → layer; layers that are used on their own.
        words: what they are used for, to follow a layer's number in the message.
    """
    for position, layer in layers.items():
        # A streamed layer's parameters can be read.
        if any(parameter.is_meta and not hasattr(parameter, "read") for parameter in layer.parameters()):
            raise ModelError(
                f"device_map: layer {position}, {words}, does not fit the GPUs beside the others; use null, or another machine."
            )
