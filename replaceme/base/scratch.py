"""States too many for memory: tensors mapped to files that nobody sees, on a disk that is asked first."""

import shutil
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from replaceme.base.errors import ResourceError


def scratch(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, folder: Path | None = None, purpose: str = "this step"
) -> list[Tensor]:
    """Return tensors on disk, zeros at first; their place is free again when nothing refers to them.

    Args:
        shapes: of each.
        dtype: of each.
        folder: where they may lie; None is the system's temporary folder.
        purpose: what keeps them, for the message.

    Raises:
        ResourceError: they don't fit.
    """
    where = folder or Path(tempfile.gettempdir())
    require_space(where, sum(map(prod, shapes)) * dtype.itemsize, f"{purpose} keeps {{}} of states there")
    # A mapping outlives its file's name: without one, nothing is left behind however the run ends.
    with tempfile.TemporaryDirectory(prefix="scratch-", suffix=".partial", dir=where, ignore_cleanup_errors=True) as names:
        return [
            torch.from_file(str(Path(names) / str(number)), shared=True, size=prod(shape), dtype=dtype).view(*shape)
            for number, shape in enumerate(shapes)
        ]


def require_space(folder: Path, needed: int, words: str, advice: str = "") -> None:
    """Raise ResourceError where ``needed`` bytes are not free.

    Args:
        folder: where they would lie.
        needed: how many.
        words: what would lie there, with {} for how much.
        advice: what would be less, behind the sentence.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: {words.format(f'{needed >> 20} MiB')}, and {free >> 20} MiB are free{advice}.")
