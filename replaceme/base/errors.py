"""Errors that a user can cause. A message has one sentence per problem: the key or file, what is wrong, what would be right.

The entry points (``replaceme.running.entry``) print the message and exit with ``exit_code``; they show a traceback only with
``--debug``. Each class also derives from the built-in error that it refines, so that library callers can catch either.

A value that a message repeats passes through ``excerpt`` or ``quote``, so that no message is longer than its reader's patience.
"""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from reprlib import Repr
from typing import Any

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
SENTENCE_CHARACTERS = 300
EXCERPT_CHARACTERS = 80
_BOUNDED = Repr()
_BOUNDED.maxlevel = 3
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = EXCERPT_CHARACTERS


def excerpt(text: object, most: int = EXCERPT_CHARACTERS) -> str:
    """Return a text on one line, without control characters; of one longer than ``most`` characters its start and its end."""
    whole = str(text)
    # Of a text of many megabytes, only both ends are looked at.
    ends = whole if len(whole) <= 4 * most else f"{whole[: 2 * most]} {whole[-2 * most :]}"
    line = "".join(letter if letter.isprintable() else "�" for letter in " ".join(ends.split()))
    return line if len(line) <= most else f"{line[: most * 2 // 3]} … {line[3 + most * 2 // 3 - most :]}"


def quote(value: Any) -> str:
    """Return a value as Python writes it, cut as by ``excerpt``; nested values are cut before they are written."""
    return excerpt(_BOUNDED.repr(value))


class ReplaceMeError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 2


class ParameterError(ReplaceMeError, ValueError):
    """One or several parameters are unknown, of the wrong type or out of range."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class ModelError(ReplaceMeError, ValueError):
    """The model is missing, unreachable, damaged, or can't be pruned exactly."""


class DatasetError(ReplaceMeError, ValueError):
    """The text is missing, unreachable, empty, or lacks the requested column."""


class ResourceError(ReplaceMeError, OSError):
    """The machine lacks something: disk space, memory, a device, or the output of an earlier stage."""


class LostProcessError(ResourceError):
    """Another of the processes that share a run has ended."""


class SolveError(ReplaceMeError, ArithmeticError):
    """The least-squares system has no unique solution."""


class VerificationError(ReplaceMeError, RuntimeError):
    """The exported model doesn't compute the solution: a bug here, not a mistake of the user."""

    exit_code = 1


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Let an error inside the block name a parameter as its caller does: one of these keys → its other name."""
    try:
        yield
    except ReplaceMeError as error:
        text = str(error)
        for key, name in names.items():
            text = re.sub(rf"(?m)^(command line: )?{key}: ", rf"\1{name}: ", text)
        error.args = (text,)
        if isinstance(error, ParameterError):
            error.problems = text.split("\n")
        raise


def is_out_of_device_memory(error: BaseException) -> bool:
    """Return whether a GPU's memory ran out, as torch says it of each kind."""
    return type(error).__name__ == "OutOfMemoryError" or "MPS backend out of memory" in str(error)


def resource_failure(error: BaseException) -> ResourceError | None:
    """Return an error for a full disk, a too large file or exhausted memory, whatever exception a library raises; else None."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno in FULL_DISK) or "No space left on device" in text:
        return ResourceError("the disk is full; free space and run again: finished stages are kept.")
    if (isinstance(error, OSError) and error.errno == errno.EFBIG) or "File too large" in text:
        return ResourceError(
            "a file grew beyond what its file system or `ulimit -f` allows; choose another folder or raise the limit, and run "
            "again: finished stages are kept."
        )
    if isinstance(error, MemoryError) or is_out_of_device_memory(error) or "can't allocate memory" in text:
        return ResourceError(
            "memory ran out; lower batch_size or max_length, or set use_4bit: true (in healing, heal_weights: lora)."
        )
    return None
