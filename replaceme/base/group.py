"""The processes that share a stage's work, on ``torch.distributed``.

Every process runs the same stage on the same files. Inside ``sharing``, each computes its ``Shard``: every ``size``-th
batch of a walk over the text, or of a training's step. Sums are then reduced over all processes in float64. Solutions are
computed by the first process and broadcast (``compute_on_rank0``), so that all have the same bits.

Outside of ``sharing``, and in a run of one process, a process owns all of the work, and nothing is exchanged.
"""

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from replaceme.base import accelerators
from replaceme.base.errors import LostProcessError, ResourceError

T = TypeVar("T")
# Numbers exchanged at once, so that a large sum needs no second copy.
CHUNK = 1 << 23
# The others wait while the first process works alone, for as long as that takes.
TIMEOUT = timedelta(days=30)


class Shard(NamedTuple):
    """A process's part of the work: all items whose number is ``rank`` modulo ``size``."""

    rank: int = 0
    size: int = 1

    def owns(self, number: int) -> bool:
        """Return whether the item with this number, from 0, is this process's."""
        return number % self.size == self.rank


WHOLE = Shard()
_shard = WHOLE


def shard() -> Shard:
    """Return this process's part of what is being done at present; ``WHOLE`` outside of ``sharing``."""
    return _shard


def local_world_size() -> int:
    """Return how many processes of this machine, this one included, share the work of the block."""
    return 1 if shard() == WHOLE else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def local_gpu() -> int:
    """Return the GPU of this process: the one with its number on the machine. Raises ResourceError without one."""
    number, count = int(os.environ.get("LOCAL_RANK", 0)), accelerators.count_devices()
    if number >= count:
        raise ResourceError(f"processes: each needs a GPU of its own, and torch sees {count}; start at most {count} a machine.")
    return number


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torch's launcher has started, for the block.

    Args:
        device: the parameter; with cpu, no process takes a GPU.

    Raises:
        LostProcessError: another process has ended.
        ResourceError: there are fewer GPUs than processes.
    """
    kind = None if device == "cpu" else accelerators.find_kind()
    if kind:
        accelerators.select_device(local_gpu())
    distributed.init_process_group(accelerators.collective_backend(kind) if kind else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as failure:
        if isinstance(failure, distributed.DistError) or "gloo/transport" in str(failure):
            raise LostProcessError("processes: another one has ended; run again: finished stages are kept.") from failure
        raise
    # A process that fails keeps its connections until it ends, which the others then notice.
    distributed.destroy_process_group()


@contextmanager
def sharing() -> Iterator[None]:
    """Share the work of the block with the other processes of the group, which enter it too."""
    global _shard
    _shard = Shard(distributed.get_rank(), distributed.get_world_size())
    try:
        yield
    finally:
        _shard = WHOLE


def broadcast(value: Any = None) -> Any:
    """Return the first process's value in all processes of the group; it is pickled."""
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value: T) -> list[T]:
    """Return the values of all processes that share the work, by rank; they are pickled."""
    if shard() == WHOLE:
        return [value]
    values: list[Any] = [None] * shard().size
    distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(sums: MutableMapping[str, Tensor]) -> None:
    """Add up the tensors of each name over all processes, in float64 and in place; one that a process lacks is 0 there."""
    if shard() == WHOLE:
        return
    layouts: dict[str, Any] = {}
    for own in all_gather({name: (total.shape, total.dtype, total.device.type) for name, total in sums.items()}):
        layouts |= own
    for name, (shape, dtype, device) in sorted(layouts.items()):
        if name not in sums:
            sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        rows = torch.atleast_1d(sums[name])
        for part in rows.split(max(CHUNK // max(rows[:1].numel(), 1), 1)):
            added = accelerators.to_float64(part).clone(memory_format=torch.contiguous_format)
            distributed.all_reduce(added)
            part.copy_(added)


def merge_rows(tensor: Tensor) -> None:
    """Complete a tensor on the processor, of which each process has written its own rows and left the others zero, in place."""
    if shard() == WHOLE:
        return
    # A sum of bytes with zeros is exact in any format.
    for part in tensor.view(-1).view(torch.uint8).split(8 * CHUNK):
        distributed.all_reduce(part)


def compute_on_rank0(compute: Callable[[], Tensor]) -> Tensor:
    """Return what the first process computes, with the threads of all on its machine, to the bit in every process."""
    if shard() == WHOLE:
        return compute()
    result = torch.empty(0)
    if shard().rank == 0:
        own = torch.get_num_threads()
        # No more than there are processors, unless each process has more already.
        torch.set_num_threads(max(own, min(own * local_world_size(), os.cpu_count() or 1)))
        result = compute().contiguous()
        torch.set_num_threads(own)
    shape, dtype, device = broadcast((result.shape, result.dtype, result.device.type))
    if shard().rank:
        result = torch.empty(shape, dtype=dtype, device=device)
    distributed.broadcast(result, src=0)
    return result
