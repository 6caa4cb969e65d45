"""Tensors on disk, for states that exceed the memory: mapped to unnamed temporary files, after a check of the free space."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from replaceme.base.errors import ResourceError
from replaceme.base.files import temporary_folder


def scratch(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, folder: Path | None = None, purpose: str = "this step"
) -> list[Tensor]:
    """Return tensors on disk, initially zero; their space is freed when the last reference is gone.

    Args:
        shapes: one for each tensor.
        dtype: of all tensors.
        folder: on the disk to use; None is the system's temporary folder.
        purpose: the subject of the error message.

    Raises:
        ResourceError: the disk has too little free space.
    """
    where = folder or Path(tempfile.gettempdir())
    require_space(where, sum(map(prod, shapes)) * dtype.itemsize, f"{purpose} keeps {{}} of states there")
    # A mapping outlives the deletion of its file, so nothing is left on disk however the run ends.
    with temporary_folder("scratch-", where) as names:
        for number, shape in enumerate(shapes):
            _take_space(names / str(number), prod(shape) * dtype.itemsize)
        return [
            torch.from_file(str(names / str(number)), shared=True, size=prod(shape), dtype=dtype).view(*shape)
            for number, shape in enumerate(shapes)
        ]


def _take_space(file: Path, size: int) -> None:
    """Make a file whose space is taken at once; a write to a mapping that finds the disk full ends the process (SIGBUS)."""
    with file.open("wb") as stream:
        # Not on macOS.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, max(size, 1))


def require_space(folder: Path, needed: int, words: str, advice: str = "") -> None:
    """Raise ResourceError if fewer than ``needed`` bytes are free.

    Args:
        folder: on the disk to check.
        needed: bytes.
        words: what needs the space, with {} for how much.
        advice: how to need less, appended to the sentence.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: {words.format(f'{needed >> 20} MiB')}, and {free >> 20} MiB are free{advice}.")
