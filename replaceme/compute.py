"""Where and with how many threads to compute."""

import os

import torch

from replaceme.errors import ResourceError


def resolve_device(device: str) -> str:
    """Return the device that ``auto`` stands for here, and check that a CUDA device asked for is there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(f"device: {device} is asked for, but torch sees no CUDA device; use cpu or auto.")
    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise ResourceError(f"device: {device} is asked for, but torch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def use_threads(threads: int) -> None:
    """Fix the number of threads: another number sums in another order and gives other last bits."""
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
