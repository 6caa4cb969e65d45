"""Trainings that are counted step by step, and stopped in the middle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from replaceme.training import training


class InterruptedRunError(Exception):
    pass


@contextmanager
def counted(before: Callable[[int], None] = lambda taken: None) -> Iterator[list[int]]:
    """Yield the steps that trainings take meanwhile; in front of each, ``before`` is told how many were taken."""
    steps: list[int] = []
    take = training._Run.take

    def noting(run: Any, step: int) -> None:
        before(len(steps))
        steps.append(step)
        take(run, step)

    with mock.patch.object(training._Run, "take", noting):
        yield steps


def stop_at(step: int) -> Callable[[int], None]:
    """Return what interrupts a training when it has taken so many steps."""

    def stop(taken: int) -> None:
        if taken == step:
            raise InterruptedRunError

    return stop
