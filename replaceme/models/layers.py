"""Temporary changes to a loaded model: skip layers, silence an attention, choose which parameters get gradients."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn

from replaceme.models.families import Family


def tensor_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output, which some families wrap in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def gradients_for(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Enable gradients for exactly these parameters of a model inside the block, and restore the flags after it."""
    found = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in found.items():
            parameter.requires_grad_(was)


@contextmanager
def silent(attention: nn.Module) -> Iterator[None]:
    """Let an attention compute nothing and return zeros inside the block."""
    from replaceme.models.modeling_pruned import NoAttention

    with mock.patch.object(attention, "forward", NoAttention(None).forward):
        yield


@contextmanager
def passed_by(family: Family, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Skip layers inside the block: each returns its input and computes nothing."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(mock.patch.object(layer, "forward", _pass_on_in_tuple if family.returns_tuple else _pass_on))
        yield


def _pass_on(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Tensor:
    return hidden_states


def _pass_on_in_tuple(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> tuple[Tensor, None]:
    return hidden_states, None
