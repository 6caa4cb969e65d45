"""Compute with a model's own weights what it would compute with its edits: the reference of every fold, and a way to look at
a shortened model before any weight is changed.

A hook on each edited linear makes ``y T + G Δᵀ + δ`` of its output ``y`` and its input ``G``; where a norm or a mixture of
experts stands behind the linear, the hook is on what that adds to the residual stream. A hook on each linear of a layer that
mixes layers makes ``Σ c_j (G W_jᵀ + b_j)``, by the other layers' own linears. An operator is a hook on its layer. Parameters
that are others stand in for a while. Removed layers pass their input on.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from replaceme.edits import Change, Edits
from replaceme.families import Family, linears_within, parameter_of


@contextmanager
def unfused(model: nn.Module, family: Family, edits: Edits) -> Iterator[None]:
    """Let a model with its original weights compute, for a while, what the edits make of it."""
    layers = family.decoder_layers(model)
    with ExitStack() as stack:
        for (layer, name), value in edits.parameters.items():
            stack.enter_context(_standing_in(layers[layer], name, value))
        # Before the changes, whose hooks see what a mixture makes.
        for layer, mixture in edits.mixtures.items():
            for path, module in linears_within(layers[layer]).items():
                others = [(layers[source].get_submodule(path), part) for source, part in mixture.items() if source != layer]
                stack.callback(module.register_forward_hook(_mixing(mixture.get(layer, 0.0), others)).remove)
        for (layer, linear), change in edits.changes().items():
            part = layers[layer]
            module = family.transformed(part) if linear == "mlp_output" else family.linear_of(part, linear)
            if change.transform is not None and family.norm_after_mlp:
                weight = family.norm_weight(part).to(change.transform)
                change = replace(change, transform=change.transform / torch.where(weight == 0, 1, weight)[:, None])
            stack.callback(module.register_forward_hook(_hook(change)).remove)
        for layer, P in edits.operators.items():
            stack.callback(layers[layer].register_forward_hook(_operating(P)).remove)
        stack.enter_context(passed_by(family, (layers[index] for index in edits.removed_layers)))
        yield


@contextmanager
def _standing_in(layer: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let a parameter have, for a while, another value, given in torch's layout."""
    parameter = layer.get_parameter(name)
    own = parameter.data
    other = torch.empty_like(own)
    parameter.data = other
    parameter_of(layer, name).copy_(value)
    try:
        yield
    finally:
        parameter.data = own


def _operating(P: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        state = output if whole else output[0]
        dtype = torch.promote_types(state.dtype, torch.float32)
        operator = P.to(state.device, dtype)
        changed = (state.to(dtype) @ operator if P.ndim == 2 else state.to(dtype) * operator).to(state.dtype)
        return changed if whole else (changed, *output[1:])

    return hook


@contextmanager
def passed_by(family: Family, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers, for a while, pass their input on and compute nothing."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(mock.patch.object(layer, "forward", _pass_on_in_tuple if family.returns_tuple else _pass_on))
        yield


def _pass_on(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Tensor:
    return hidden_states


def _pass_on_in_tuple(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> tuple[Tensor, None]:
    return hidden_states, None


def _mixing(own: float, others: Sequence[tuple[nn.Module, float]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = own * output.to(torch.promote_types(output.dtype, torch.float32))
        for linear, part in others:
            if part:
                # Not by a call: what others watch on that linear is not meant.
                total = total + part * linear.forward(args[0]).to(total)
        return total.to(output.dtype)

    return hook


def _hook(change: Change) -> Any:
    moved: dict[tuple[torch.device, torch.dtype], Change] = {}

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        key = output.device, dtype
        if key not in moved:
            parts = (None if part is None else part.to(*key) for part in (change.transform, change.weight, change.bias))
            moved[key] = Change(*parts)
        here, changed = moved[key], output.to(dtype)
        if here.transform is not None:
            changed = changed @ here.transform
        if here.weight is not None:
            changed = changed + args[0].to(dtype) @ here.weight.T
        if here.bias is not None:
            changed = changed + here.bias
        return changed.to(output.dtype)

    return hook
