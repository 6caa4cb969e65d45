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
from collections.abc import Iterator, MutableMapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replaceme.base.errors import ResourceError
from replaceme.base.files import temporary_folder
from replaceme.base.ranks import rank


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
    require_space(folder, sum(map(prod, shapes)) * dtype.itemsize, f"{purpose} keeps {{}} of states there")
    # A mapping outlives the deletion of its file, so nothing is left on disk however the run ends.
    with temporary_folder(f"scratch-{rank()}-", where) as names:
        for number, shape in enumerate(shapes):
            _take_space(names / str(number), prod(shape) * dtype.itemsize)
        return [
            torch.from_file(str(names / str(number)), shared=True, size=prod(shape), dtype=dtype).view(*shape)
            for number, shape in enumerate(shapes)
        ]


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


def _take_space(file: Path, size: int) -> None:
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


class _Place(NamedTuple):
    start: int
    like: Tensor  # on the meta device
    device: torch.device


class ScratchFile:
    """A file for tensors that wait for their next use; a context manager. Nothing is left on disk however the run ends."""

    def __init__(self, folder: Path | None = None):
        """Choose the disk.

        Args:
            folder: on the disk to use; None is the system's temporary folder.
        """
        self.folder = folder or Path(tempfile.gettempdir())
        self.end = 0
        self.free: dict[int, list[int]] = {}

    def __enter__(self) -> "ScratchFile":
        self.file = tempfile.TemporaryFile(dir=self.folder)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.file.close()

    def mapping(self) -> MutableMapping[object, Tensor]:
        """Return an empty mapping whose tensors lie in the file."""
        return _OnDisk(self)

    def write(self, tensor: Tensor) -> _Place:
        """Write a tensor, and return its place.

        Raises:
            ResourceError: the disk has too little free space.
        """
        size = tensor.numel() * tensor.itemsize
        if self.free.get(size):
            start = self.free[size].pop()
        else:
            require_space(self.folder, size, "states between layers need {} there")
            start, self.end = self.end, self.end + size
        rest = memoryview(_bytes(tensor.detach().cpu().contiguous()))
        while rest:
            rest = rest[os.pwrite(self.file.fileno(), rest, start + size - len(rest)) :]
        return _Place(start, torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format), tensor.device)

    def read(self, place: _Place) -> Tensor:
        """Return the tensor of a place, on the device that it came from."""
        tensor = torch.empty_like(place.like, device="cpu")
        rest = memoryview(_bytes(tensor))
        end = place.start + len(rest)
        while rest:
            if not (count := os.preadv(self.file.fileno(), [rest], end - len(rest))):
                raise OSError("a scratch file is shorter than what was written to it")
            rest = rest[count:]
        return tensor.to(place.device)

    def forget(self, place: _Place) -> None:
        """Let another tensor of the same size have a place."""
        self.free.setdefault(place.like.numel() * place.like.itemsize, []).append(place.start)


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()


class _OnDisk(MutableMapping[object, Tensor]):
    """Tensors by key in a ``ScratchFile``; each is read anew whenever it is looked up."""

    def __init__(self, file: ScratchFile):
        self.file = file
        self.places: dict[object, _Place] = {}

    def __getitem__(self, key: object) -> Tensor:
        return self.file.read(self.places[key])

    def __setitem__(self, key: object, tensor: Tensor) -> None:
        if key in self.places:
            del self[key]
        self.places[key] = self.file.write(tensor)

    def __delitem__(self, key: object) -> None:
        self.file.forget(self.places.pop(key))

    def __iter__(self) -> Iterator[object]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
