"""Count the steps of a training, and stop it at one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from replaceme.training import training


class InterruptedRunError(Exception):
    pass


@contextmanager
def counted(before: Callable[[int], None] = lambda taken: None) -> Iterator[list[int]]:
    """Yield the steps that trainings take inside the block; ``before`` gets the number of steps taken before each."""
    steps: list[int] = []
    take = training._Run.take

    def noting(run: Any, step: int) -> None:
        before(len(steps))
        steps.append(step)
        take(run, step)

    with mock.patch.object(training._Run, "take", noting):
        yield steps


def stop_at(step: int) -> Callable[[int], None]:
    """Return a callback that interrupts a training after ``step`` steps."""

    def stop(taken: int) -> None:
        if taken == step:
            raise InterruptedRunError

    return stop
