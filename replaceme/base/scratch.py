"""Tensors on disk, for states that exceed the memory, in unnamed temporary files, after a check of the free space.

``scratch`` maps whole tensors into memory, for random access. What a ``ScratchFile`` holds is read and written as a whole, and
takes no memory of the process.
"""

import ctypes
import mmap
import os
import platform
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replaceme.base.accelerators import to_device
from replaceme.base.errors import ResourceError
from replaceme.base.files import temporary_folder
from replaceme.base.ranks import rank


def scratch(shapes: Sequence[Sequence[int]], dtype: torch.dtype, folder: Path | None, purpose: str) -> list[Tensor]:
    """Return tensors on disk, initially zero; their space is freed when the last reference goes.

    Args:
        shapes: one for each tensor.
        dtype: of all tensors.
        folder: on the disk to use; None is the system's temporary folder.
        purpose: the subject of the error message.

    Raises:
        ResourceError: the disk has too little free space.
    """
    where = folder or Path(tempfile.gettempdir())
    require_space(folder, sum(map(prod, shapes)) * dtype.itemsize, f"{purpose} keeps {{}} of states there")
    # A mapping outlives the deletion of its file, so nothing is left on disk however the run ends.
    with temporary_folder(f"scratch-{rank()}-", where) as names:
        for number, shape in enumerate(shapes):
            _allocate_file(names / str(number), prod(shape) * dtype.itemsize)
        return [
            torch.from_file(str(names / str(number)), shared=True, size=prod(shape), dtype=dtype).view(*shape)
            for number, shape in enumerate(shapes)
        ]


def copy_to_scratch(tensor: Tensor, folder: Path | None, purpose: str) -> Tensor:
    """Return a copy of a tensor on disk, which takes no memory until it is read; see ``scratch``."""
    (copy,) = scratch([tensor.shape], tensor.dtype, folder, purpose)
    copy.copy_(tensor)
    unmap(copy)
    return copy


def unmap(tensor: Tensor) -> None:
    """Free the memory of a contiguous part of a tensor of ``scratch``; what is read of it later comes from the file."""
    # Other memory would be lost.
    assert tensor.untyped_storage().filename
    if platform.system() == "Linux":
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
        # Whole pages.
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _allocate_file(file: Path, size: int) -> None:
    """Make a file whose space is taken at once; a write to a mapping that finds the disk full ends the process (SIGBUS)."""
    with file.open("wb") as stream:
        # Not on macOS.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, max(size, 1))


def require_space(folder: Path | None, needed: int, words: str, advice: str = "") -> None:
    """Raise ResourceError if fewer than ``needed`` bytes are free.

    Args:
        folder: on the disk to check; None is the system's temporary folder.
        needed: bytes.
        words: what needs the space, with {} for how much.
        advice: how to need less, appended to the sentence.
    """
    where = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise ResourceError(f"{where}: {words.format(f'{needed >> 20} MiB')}, and {free >> 20} MiB are free{advice}.")


class ScratchFile:
    """A file for tensors that wait for their next use; a context manager. Nothing is left on disk however the run ends.

    Attributes:
        end: its size in bytes.
    """

    def __init__(self, folder: Path | None):
        """Choose the disk.

        Args:
            folder: on the disk to use; None is the system's temporary folder.
        """
        self.folder = folder or Path(tempfile.gettempdir())
        self.end = 0
        # Bytes → where parts of the file begin that hold nothing any more.
        self.unused: dict[int, list[int]] = defaultdict(list)

    def __enter__(self) -> "ScratchFile":
        self.file = tempfile.TemporaryFile(dir=self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def mapping(self) -> MutableMapping[object, Tensor]:
        """Return an empty mapping whose tensors lie in the file; each is read anew whenever it is looked up.

        Raises:
            ResourceError: when a tensor is put into it, and the disk has too little free space.
        """
        return _TensorsOnDisk(self)


class _TensorsOnDisk(MutableMapping[object, Tensor]):
    """Tensors by key in a ``ScratchFile``."""

    def __init__(self, file: ScratchFile):
        self.file = file
        # Key → where its part of the file begins, the tensor on the meta device, and its own device.
        self.parts: dict[object, tuple[int, Tensor, torch.device]] = {}

    def __getitem__(self, key: object) -> Tensor:
        start, like, device = self.parts[key]
        tensor = torch.empty_like(like, device="cpu")
        self.file.file.seek(start)
        self.file.file.readinto(_bytes_of(tensor))
        return to_device(tensor, device)

    def __setitem__(self, key: object, tensor: Tensor) -> None:
        if key in self.parts:
            del self[key]
        content = _bytes_of(tensor.detach().cpu().contiguous())
        if unused := self.file.unused[len(content)]:
            start = unused.pop()
        else:
            require_space(self.file.folder, len(content), "states between layers need {} there")
            start, self.file.end = self.file.end, self.file.end + len(content)
        self.file.file.seek(start)
        self.file.file.write(content)
        like = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        self.parts[key] = start, like, tensor.device

    def __delitem__(self, key: object) -> None:
        start, like, _ = self.parts.pop(key)
        self.file.unused[like.numel() * like.itemsize].append(start)

    def __iter__(self) -> Iterator[object]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()
