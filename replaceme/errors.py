"""The errors that a user can cause. Each message is one sentence a problem: the key or file, what is wrong, what is right.

The entry points (``replaceme.entry``) print the message and end with ``exit_code``; a traceback is shown with ``--debug``
only. Each class also is the built-in error that it refines, so that library callers can catch either.
"""


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
