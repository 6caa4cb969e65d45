"""The processes that share the passes of a run, on torch.distributed.

Each walk is dealt out by batches (``Share``): every process knows all documents, so that samples, folds and held-out texts are
the same whatever the number of processes, and computes the states of its own batches. Sums are added up at the end of a walk,
in float64; after that every process has the same ones. A training is dealt out by the documents of each step, and the gradients
are added up. What must be the same to the bit in all, the first process computes and tells (``from_first``).

Only inside ``sharing`` is a process one of several. Outside of it, all batches are its own and nothing is exchanged.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from replaceme.base.errors import LostProcessError, ResourceError

# Numbers exchanged at once, so that a large sum needs no second copy.
CHUNK = 1 << 23
# Processes wait while the first one works alone, for as long as that takes; one that has ended is noticed at once.
PATIENCE = timedelta(days=30)
# How long a process that has ended may need to disappear.
ENDING_SECONDS = 2.0


class Share(NamedTuple):
    """A process's part of the work: what has a number that is ``rank`` modulo ``size``."""

    rank: int = 0
    size: int = 1

    def takes(self, number: int) -> bool:
        """Return whether the work with this number, from 0, is this process's."""
        return number % self.size == self.rank


WHOLE = Share()


class _Group:
    """The group of this process: its share inside of ``sharing``, and the place (host, number) of each process."""

    def __init__(self) -> None:
        self.share, self.places = WHOLE, list[tuple[str, int]]()


_GROUP = _Group()


def share() -> Share:
    """Return this process's part of what is being done at present; ``WHOLE`` outside of ``sharing``."""
    return _GROUP.share


def group_size() -> int:
    """Return the number of processes of the group that this process has joined; 1 without one."""
    return max(len(_GROUP.places), 1)


def neighbours() -> int:
    """Return how many processes, this one included, share the work of the block on this machine."""
    return 1 if share() == WHOLE else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined(device: str = "auto") -> Iterator[int]:
    """Join the group that the environment describes (``RANK``, ``WORLD_SIZE``, …), and yield this process's rank in it.

    The group is left after the block, unless that fails: then the others notice that this process has gone.

    Args:
        device: the parameter; with cpu, no process takes a GPU.

    Raises:
        ResourceError: there are fewer GPUs than processes.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_gpu())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    rank = distributed.get_rank()
    _GROUP.places = [(platform.node(), os.getpid())] * distributed.get_world_size()
    _GROUP.places = [(host, number) for host, number in _gathered(_GROUP.places[rank])]
    yield rank
    _GROUP.places = []
    distributed.destroy_process_group()


def local_gpu() -> int:
    """Return the GPU of this process, which is the one with its number on the machine. Raises ResourceError without one."""
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= there:
        raise ResourceError(f"processes: each needs a GPU of its own, and torch sees {there}; start at most {there} a machine.")
    return number


@contextmanager
def sharing() -> Iterator[None]:
    """Share the work of the block with the other processes of the group, which have to do the same."""
    _GROUP.share = Share(distributed.get_rank(), distributed.get_world_size())
    try:
        yield
    finally:
        _GROUP.share = WHOLE


def add_up(sums: MutableMapping[str, Tensor]) -> None:
    """Add the sums of all processes in float64, in place; a sum that a process lacks is 0 there."""
    if share() == WHOLE:
        return
    layouts = _gathered({name: _layout(total) for name, total in sums.items()})
    known: dict[str, Any] = {name: layout for each in layouts for name, layout in each.items()}
    for name in sorted(known):
        if name not in sums:
            sums[name] = _made(known[name]).zero_()
        total = sums[name]
        flat = total.contiguous().view(-1)
        for part in flat.split(CHUNK):
            added = part.double()
            _exchange(distributed.all_reduce, added)
            part.copy_(added)
        if flat.data_ptr() != total.data_ptr():
            total.copy_(flat.view_as(total))


def add_numbers(*numbers: float) -> list[float]:
    """Return the sums of these numbers over all processes."""
    sums = {"": torch.tensor(numbers, dtype=torch.float64)}
    add_up(sums)
    found: list[float] = sums[""].tolist()
    return found


def largest(values: Tensor) -> None:
    """Take the largest of each value (float64, processor) over all processes, in place."""
    if share() != WHOLE:
        _exchange(distributed.all_reduce, values, distributed.ReduceOp.MAX)


def merge(rows: Tensor) -> None:
    """Give all processes what each has written into its part of a tensor (processor), zero elsewhere, in place."""
    if share() != WHOLE:
        # Bytes: the sum with zeros is exact in any format.
        for part in rows.view(-1).view(torch.uint8).split(8 * CHUNK):
            _exchange(distributed.all_reduce, part)


def from_first(compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what the first process computes, to the bit; the others don't compute, and it has their threads meanwhile."""
    if share() == WHOLE:
        return dict(compute())
    found: dict[str, Tensor] = {}
    if share().rank == 0:
        with _threads_of_all():
            found = dict(compute())
    layouts: dict[str, Any] = told({name: _layout(tensor) for name, tensor in found.items()})
    for name, layout in layouts.items():
        found[name] = found[name].contiguous() if name in found else _made(layout)
        for part in found[name].view(-1).split(CHUNK):
            _exchange(distributed.broadcast, part, 0)
    return found


@contextmanager
def _threads_of_all() -> Iterator[None]:
    """Let this process compute with the threads of all that share the work on this machine, inside the block."""
    own = torch.get_num_threads()
    # No more than there are processors, unless each process has more already.
    torch.set_num_threads(max(own, min(own * neighbours(), os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def told(value: Any = None) -> Any:
    """Return the first process's value, which has a JSON form, in all processes of the group."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    _exchange(distributed.broadcast, size, 0)
    if distributed.get_rank():
        content = torch.empty(int(size), dtype=torch.uint8)
    _exchange(distributed.broadcast, content, 0)
    return json.loads(content.numpy().tobytes())


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes that share the work, which have a JSON form, by rank."""
    return [value] if share() == WHOLE else _gathered(value)


def _gathered(value: Any) -> list[Any]:
    """Return every process's value, which has a JSON form, by rank."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size())]
    _exchange(distributed.all_gather, sizes, torch.tensor([len(content)]))
    rows = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    own = rows[0].clone()
    own[: len(content)] = content
    _exchange(distributed.all_gather, rows, own)
    return [json.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _layout(tensor: Tensor) -> tuple[list[int], str, str]:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type


def _made(layout: tuple[list[int], str, str]) -> Tensor:
    shape, dtype, device = layout
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def _exchange(operation: Callable[..., Any], *arguments: Any) -> None:
    """Do one exchange. Raises LostProcessError if another process has ended."""
    try:
        operation(*arguments)
    except RuntimeError as failure:
        if (lost := _ended()) is None:
            raise
        raise LostProcessError(f"processes: rank {lost} has ended; run again: finished stages are kept.") from failure


def _ended() -> int | None:
    """Return the rank of a process of this machine that has ended, or None."""
    until = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < until:
        for rank, (host, number) in enumerate(_GROUP.places):
            if host == platform.node() and not _runs(number):
                return rank
        time.sleep(0.02)
    return None


def _runs(number: int) -> bool:
    """Return whether a process of this machine runs; one that has ended, and whose parent has not noticed, doesn't."""
    try:
        os.kill(number, 0)
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # no such folder on macOS
        return True
