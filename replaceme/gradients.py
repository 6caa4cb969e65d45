"""Which of a model's parameters get a gradient, for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def wanted(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let these parameters of a model want a gradient, and no other one; they are left as they were found."""
    found = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in found.items():
            parameter.requires_grad_(was)
