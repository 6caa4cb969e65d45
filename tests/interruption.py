"""Count the steps of a training, and stop it at one of them; and kill a process at one of its file operations."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from replaceme.training import training

KILLED = 9
# What Python reports of changes to files (sys.audit), by the events' names. An "open" counts if it is for writing.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree")


class InterruptedRunError(Exception):
    pass


@contextmanager
def counted(before: Callable[[int], None] = lambda taken: None) -> Iterator[list[int]]:
    """Yield the steps that trainings take inside the block; ``before`` gets the number of steps taken before each."""
    steps: list[int] = []
    take = training.TrainingRun.take_step

    def noting(run: Any, step: int) -> None:
        before(len(steps))
        steps.append(step)
        take(run, step)

    with mock.patch.object(training.TrainingRun, "take_step", noting):
        yield steps


def stop_at(step: int) -> Callable[[int], None]:
    """Return a callback that interrupts a training after ``step`` steps."""

    def stop(taken: int) -> None:
        if taken == step:
            raise InterruptedRunError

    return stop


def started(action: Callable[[], object]) -> int:
    """Run ``action`` in a copy of this process, and return its number; it exits with 1 if the action raises."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in a copy of this process, and return its exit code; 1 if it raised."""
    return os.waitstatus_to_exitcode(os.waitpid(started(action), 0)[1])


def ended_process() -> int:
    """Return the number of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def died_at(number: int, action: Callable[[], object], folder: Path) -> bool:
    """Run ``action`` in a copy of this process that ends, without any cleaning up, before its file operation ``number``.

    Args:
        number: from 0; operations below ``folder`` count.
        action: what to run.
        folder: the place that is watched.

    Returns:
        Whether it came to that operation; False if the action ended before.
    """

    def watched() -> None:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in OPERATIONS:
                return
            # What shutil.rmtree deletes is named relative to an open folder.
            relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if not relative and not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if left == 0:
                os._exit(KILLED)
            left -= 1

        sys.addaudithook(hook)
        action()

    code = forked(watched)
    assert code in (0, KILLED), f"the run ended with code {code} before its operation {number}"
    return code == KILLED
