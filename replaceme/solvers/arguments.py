"""Errors about a solver's arguments; callers put in the name of the parameter that sets the argument."""

from collections.abc import Iterator
from contextlib import contextmanager

from replaceme.base.errors import SolveError


class ArgumentError(SolveError):
    """A solver's argument leaves the problem without a solution.

    Attributes:
        argument: the argument, or the parameter that sets it: the key before the colon.
        sentence: what is wrong and what would be right, as it is printed after the colon.
    """

    def __init__(self, argument: str, sentence: str):
        self.argument, self.sentence = argument, sentence
        super().__init__(f"{argument}: {sentence}")


@contextmanager
def naming(**parameters: str) -> Iterator[None]:
    """Name parameters, instead of the solver's arguments that they set, in an ``ArgumentError`` of the block.

    Args:
        parameters: argument → parameter.
    """
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(parameters.get(error.argument, error.argument), error.sentence) from error
