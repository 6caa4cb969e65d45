"""The errors that a user can cause. Each message is one sentence a problem: the key or file, what is wrong, what is right.

The entry points (``replaceme.base.entry``) print the message and end with ``exit_code``; a traceback is shown with ``--debug``
only. Each class also is the built-in error that it refines, so that library callers can catch either.
"""

import errno

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


class ReplaceMeError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 2


class ParameterError(ReplaceMeError, ValueError):
    """One or several parameters are unknown, of the wrong type or out of range."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class ModelError(ReplaceMeError, ValueError):
    """The model is missing, unreachable, damaged, or of a kind that can't be pruned exactly."""


class DatasetError(ReplaceMeError, ValueError):
    """The text is missing, unreachable, empty, or lacks the column asked for."""


class ResourceError(ReplaceMeError, OSError):
    """The machine lacks something: disk, a package index, a stage's earlier output."""


class SolveError(ReplaceMeError, ArithmeticError):
    """The least-squares system has no unique solution."""


class VerificationError(ReplaceMeError, RuntimeError):
    """The exported model doesn't compute what was solved for: a defect here, not in the user's input."""

    exit_code = 1


def resource_failure(error: BaseException) -> ResourceError | None:
    """Return the sentence for a full disk or for memory that ran out, in whatever error a library wraps it; else None."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno in FULL_DISK) or "No space left on device" in text:
        return ResourceError("the disk is full; free space and run again: what was finished stays.")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return ResourceError("memory ran out; lower batch_size or max_length, or set use_4bit: true.")
    return None
