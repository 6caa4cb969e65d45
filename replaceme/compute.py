"""Where and with how many threads to compute."""

import os
from collections.abc import Mapping

import torch
from torch import nn

from replaceme.errors import ModelError, ResourceError


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
