"""Run several computations with a streamed model side by side, so that they share each layer's weights while it is in memory.

Each computation, whatever it does (passes with a KV cache, generation), has a thread of its own. Only one runs at a time: it
pauses before every layer, and one goes on whose layer is in memory, or comes soonest. The results are the same bits as of one
computation after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from threading import Semaphore, Thread, current_thread
from typing import Generic, TypeVar
from unittest import mock

import torch
from torch import nn

from replaceme.models.streaming import LayerStream, stream_of

T = TypeVar("T")
# Computations side by side: their states are in memory.
AT_ONCE = 16


def together(model: nn.Module, tasks: Iterable[Callable[[], T]], most: int = AT_ONCE) -> Iterator[T]:
    """Yield what each task returns, in order; with a resident model, they run one by one.

    Args:
        model: the model that the tasks run.
        tasks: they depend on nothing that another one does. Hooks of layers that keep something from their input for later
            would get another task's: there must be none.
        most: tasks side by side, at most ``AT_ONCE``.
    """
    stream = stream_of(model)
    if stream is None:
        for task in tasks:
            yield task()
        return
    left = iter(tasks)
    while some := [*islice(left, max(1, min(most, AT_ONCE)))]:
        yield from _Shift(stream, some).results()


class _AbandonedError(Exception):
    """Ends a task because another one failed."""


class _Shift(Generic[T]):
    """Some tasks that take turns."""

    def __init__(self, stream: LayerStream, tasks: Sequence[Callable[[], T]]):
        self.stream, self.paused = stream, Semaphore(0)
        self.workers = [_Worker(task, self.paused) for task in tasks]

    def results(self) -> list[T]:
        """Run all tasks to their ends, and return what they return."""
        layer, count = 0, len(self.stream.layers)
        with mock.patch.object(self.stream, "turn", self._turn):
            try:
                for worker in self.workers:
                    worker.start()
                while left := [worker for worker in self.workers if not worker.ended]:
                    # Those that have not begun first, so that all reach the first layer before any leaves it.
                    worker = min(left, key=lambda each: -1 if each.layer is None else (each.layer - layer) % count)
                    layer = layer if worker.layer is None else worker.layer
                    worker.go.release()
                    self.paused.acquire()
                    if worker.failure is not None:
                        raise worker.failure
            except BaseException:  # an interrupt, too, leaves no thread that goes on
                self._abandon()
                raise
        return [worker.result for worker in self.workers]

    def _turn(self, layer: int) -> None:
        worker = current_thread()
        assert isinstance(worker, _Worker)
        worker.wait_before(layer)

    def _abandon(self) -> None:
        for worker in self.workers:
            if worker.is_alive():
                worker.abandoned = True
                worker.go.release()
                worker.join()


class _Worker(Thread, Generic[T]):
    """The thread of a task."""

    result: T

    def __init__(self, task: Callable[[], T], paused: Semaphore):
        super().__init__(daemon=True)
        self.task, self.paused, self.go = task, paused, Semaphore(0)
        self.layer: int | None = None
        self.ended = self.abandoned = False
        self.failure: BaseException | None = None
        # Both belong to a thread.
        self.inference, self.threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.abandoned:
                torch.set_num_threads(self.threads)
                with torch.inference_mode(self.inference):
                    self.result = self.task()
        except BaseException as failure:  # it is raised in the thread that waits
            self.failure = failure
        finally:
            self.ended = True
            self.paused.release()

    def wait_before(self, layer: int) -> None:
        """Pause until it is this thread's turn to compute a layer."""
        self.layer = layer
        self.paused.release()
        self.go.acquire()
        if self.abandoned:
            raise _AbandonedError
