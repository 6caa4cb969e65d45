"""What torch says of accelerators of any kind: NVIDIA's and AMD's (``cuda``), Apple's (``mps``), Intel's (``xpu``).

No other module asks torch about them. ``torch.accelerator`` answers for all kinds; what it lacks is in the module of the kind.
A device is named with its number here (``cuda:1``): a thread's current device is its own, so that a name without one means
another device in the threads that load weights.

Sums and solutions are float64. Apple's GPUs and some of Intel's have none, so ``to_float64`` brings their tensors to the
processor.
"""

from functools import cache

import torch
from torch import Tensor

# What a kind without ``torch.accelerator``'s memory functions raises: Apple's, before torch 2.14.
NO_FIGURES = (RuntimeError, AttributeError)


def find_kind() -> str | None:
    """Return the kind of the machine's accelerators, as torch names it; None if it has none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def count_devices() -> int:
    """Return how many accelerators torch sees."""
    return torch.accelerator.device_count() if find_kind() else 0


def current_device() -> int:
    """Return the number of this thread's accelerator."""
    return torch.accelerator.current_device_index()


def select_device(number: int) -> None:
    """Make an accelerator the one of this thread."""
    torch.accelerator.set_device_index(number)


def is_accelerator(device: torch.device | str) -> bool:
    """Return whether a device is an accelerator, not the processor."""
    return torch.device(device).type not in ("cpu", "meta")


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done all that it was given; the processor always has."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def synchronize_all() -> None:
    """Wait until all accelerators that this process has used have done what they were given."""
    for number in range(count_devices()):
        try:
            used = torch.accelerator.max_memory_allocated(number)
        except NO_FIGURES:
            used = 1
        if used:  # or torch would take memory of it
            torch.accelerator.synchronize(number)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. CUDA takes it without a wait for what the device computes; it may change at once here."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def device_name(device: str) -> str:
    """Return an accelerator's name, as its maker gives it."""
    if device.startswith("mps"):
        return torch.backends.mps.get_name()
    return str(torch.get_device_module(torch.device(device)).get_device_name(torch.device(device)))


def used_names() -> list[str]:
    """Return the names of the accelerators, if this process has had memory of any."""
    used = (find_kind() == "mps" and torch.mps.driver_allocated_memory()) or peak_bytes()
    return [device_name(f"{find_kind()}:{number}") for number in range(count_devices())] if used else []


def memory(device: str) -> tuple[int, int]:
    """Return the bytes of an accelerator that are free and that it has.

    Blocks that torch keeps for its own next tensors count as free. Of Apple's memory, which is the processor's too, it is what
    the system recommends for the GPU.
    """
    if device.startswith("mps"):
        total = torch.mps.recommended_max_memory()
        return max(total - torch.mps.current_allocated_memory(), 0), total
    free, total = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device), total


def shares_memory(device: str) -> bool:
    """Return whether a device's memory is the processor's."""
    return device.startswith("mps")


def peak_bytes() -> int:
    """Return the largest number of bytes that tensors took, summed over all accelerators; 0 if torch doesn't know."""
    try:
        return sum(map(torch.accelerator.max_memory_allocated, range(count_devices())))
    except NO_FIGURES:
        return 0


def release_cached() -> None:
    """Return the blocks that torch keeps for its own next tensors to the driver, for other processes."""
    if find_kind() == "mps":
        torch.mps.empty_cache()
    elif find_kind():
        torch.accelerator.empty_cache()


def has_bfloat16(device: str) -> bool | None:
    """Return whether a device computes bfloat16 at its full speed; None if torch doesn't say."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device is known to have instructions for products of bfloat16; a processor emulates them without."""
    if device.type == "cpu":
        known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return known is not None and bool(known())
    return bool(has_bfloat16(str(device)))


@cache
def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    try:
        torch.ones(2, 2, dtype=torch.float64, device=device).sum().item()
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device | str) -> torch.device:
    """Return where float64 is computed for what is on a device: there, or on the processor."""
    device = torch.device(device)
    return torch.device("cpu") if is_accelerator(device) and not has_float64(device) else device


def to_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device or, where that has none, on the processor."""
    return tensor.to(float64_device(tensor.device)).double()


def collective_backend(kind: str) -> str:
    """Return the backend of ``torch.distributed`` that exchanges tensors of the processor and of the accelerators."""
    return f"cpu:gloo,{kind}:{torch.distributed.get_default_backend_for_device(kind)}"
