"""Errors about a solver's arguments; callers put in the names of the parameters that set them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from replaceme.base.errors import SolveError


class _Names(dict[str, str]):
    def __missing__(self, argument: str) -> str:
        return argument


class ArgumentError(SolveError):
    """A solver's argument leaves the problem without a solution.

    Attributes:
        sentence: what is wrong and what would be right, with arguments in braces: "{ridge}: 0 is too small; raise {ridge}."
        names: argument → its name in the message; an argument that is missing here keeps its own.
    """

    def __init__(self, sentence: str, names: Mapping[str, str] | None = None):
        self.sentence, self.names = sentence, dict(names or {})
        super().__init__(sentence.format_map(_Names(self.names)))


@contextmanager
def naming(**parameters: str) -> Iterator[None]:
    """Name parameters, instead of the solver's arguments that they set, in an ``ArgumentError`` of the block.

    Args:
        parameters: argument → parameter.
    """
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(error.sentence, {**parameters, **error.names}) from error
