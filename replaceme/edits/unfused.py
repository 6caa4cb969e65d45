"""Compute with a model's own weights what it would compute with its edits: the reference of every fold, and a way to look at
a shortened model before any weight is changed.

A hook on each edited linear makes ``y T + G Δᵀ + δ`` of its output ``y`` and its input ``G``; where a norm or a mixture of
experts stands behind the linear, T is a hook on what that adds to the residual stream. The product with Δ is in the model's
format, as it is in a folded one. A hook on each linear of a layer that mixes layers makes ``Σ c_j (G W_jᵀ + b_j)``, by the
other layers' own linears. An operator is a hook on its layer. Parameters that are others, and those that chosen channels make,
stand in for a while. An attention that is gone adds nothing. The features of removed groups are 0 before they enter the last
linear. Removed layers pass their input on. Where the residual stream is narrower, hooks project it onto its basis at each
signal.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from replaceme.edits.channels import assembled
from replaceme.edits.edits import Change, Edits, behind_norm, features_of
from replaceme.models.families import Family, Linear, in_torch_layout, inputs_of, is_conv1d, linears_within
from replaceme.models.layers import passed_by, silent


@contextmanager
def unfused(model: nn.Module, family: Family, edits: Edits) -> Iterator[None]:
    """Let a model with its original weights compute, for a while, what the edits make of it."""
    layers = family.decoder_layers(model)
    with ExitStack() as stack:
        for (layer, name), value in edits.parameters.items():
            stack.enter_context(_standing_in(layers[layer], name, value))
        for layer, channels in edits.channels.items():
            for name, value in assembled(family, layers, layer, channels):
                stack.enter_context(_standing_in(layers[layer], name, value))
        for layer, (attention, _) in edits.without_attention.items():
            stack.enter_context(silent(layers[layer].get_submodule(attention)))
        for (layer, linear), groups in edits.kept.items():
            last = family.linear_of(layers[layer], linear)
            stack.callback(last.register_forward_pre_hook(_without(features_of(groups, inputs_of(last)))).remove)
        # Before the changes, whose hooks see what a mixture makes.
        for layer, mixture in edits.mixtures.items():
            for path, module in linears_within(layers[layer]).items():
                others = [(layers[source].get_submodule(path), part) for source, part in mixture.items() if source != layer]
                stack.callback(module.register_forward_hook(_mixing(mixture.get(layer, 0.0), others)).remove)
        for (layer, linear), change in edits.changes().items():
            for module, part in _parts(family, layers[layer], linear, change):
                stack.callback(module.register_forward_hook(_hook(part)).remove)
        for layer, P in edits.operators.items():
            stack.callback(layers[layer].register_forward_hook(operating(P)).remove)
        if edits.bases:
            _project(stack, family, layers, edits)
        stack.enter_context(passed_by(family, (layers[index] for index in edits.removed_layers)))
        yield


def _parts(family: Family, layer: nn.Module, linear: Linear, change: Change) -> Iterator[tuple[nn.Module, Change]]:
    """Yield the modules whose outputs a change is about, each with its part of the change."""
    if linear == "attention_output":
        yield family.linear_of(layer, linear), change
    elif not family.norm_after_mlp:
        yield family.transformed(layer), change
    else:
        Q = None
        if change.transform is not None:
            weight = family.norm_weight(layer).to(change.transform)
            yield family.transformed(layer), Change(change.transform / torch.where(weight == 0, 1, weight)[:, None])
            # ``W' = QᵀW + Δ`` ends in coordinates that Q has turned, and here it is the norm's output that is turned.
            Q, _ = behind_norm(change.transform)
        if change.weight is not None:
            added = (part if part is None or Q is None else Q @ part.double() for part in (change.weight, change.bias))
            yield family.linear_of(layer, linear), Change(None, *added)


@contextmanager
def _standing_in(layer: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let a parameter have, for a while, another value, given in torch's layout; its shape may be another one, too."""
    parameter, owner = layer.get_parameter(name), layer.get_submodule(name.rpartition(".")[0])
    own = parameter.data
    parameter.data = in_torch_layout(layer, name, value).to(own, copy=True).contiguous()
    try:
        # The one linear that asks for its number of outputs.
        with mock.patch.object(owner, "nf", parameter.shape[-1]) if is_conv1d(owner) else nullcontext():
            yield
    finally:
        parameter.data = own


def _project(stack: ExitStack, family: Family, layers: nn.ModuleList, edits: Edits) -> None:
    """Let ``h Q Qᵀ`` stand for ``h`` at each signal: in front of each layer and its MLP's norm, and behind the last layer."""
    for index, layer in enumerate(layers):
        entering = _Entering(edits.basis(2 * index))
        stack.callback(layer.register_forward_pre_hook(entering.hook, with_kwargs=True).remove)
        # What the attention adds is made such that with what it is added to, the sum is the projected one.
        between = _between(entering, edits.basis(2 * index + 1), family.multiplier)
        stack.callback(layer.get_submodule(family.attention).register_forward_hook(between).remove)
    last = edits.basis(2 * len(layers)).double()
    stack.callback(layers[-1].register_forward_hook(operating(last @ last.T)).remove)


class _Entering:
    """Hook that projects what enters a layer, and keeps it."""

    def __init__(self, Q: Tensor):
        self.Q = Q

    def hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        self.state = projected(entering, self.Q).to(entering.dtype)
        return ((self.state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.state})


def _between(entering: _Entering, Q: Tensor, multiplier: float) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        added = output if isinstance(output, Tensor) else output[0]
        dtype = torch.promote_types(added.dtype, torch.float32)
        state = entering.state.to(dtype)
        changed = ((projected(state + multiplier * added.to(dtype), Q) - state) / multiplier).to(added.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return hook


def projected(state: Tensor, Q: Tensor) -> Tensor:
    """Return ``h Q Qᵀ``, in float32 at least."""
    dtype = torch.promote_types(state.dtype, torch.float32)
    Q = Q.to(state.device, dtype)
    return state.to(dtype) @ Q @ Q.T


def operating(P: Tensor) -> Any:
    """Return a forward hook that multiplies what a module returns by P: a scalar (), a diagonal (d,) or a map (d, d)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        state = output if whole else output[0]
        dtype = torch.promote_types(state.dtype, torch.float32)
        operator = P.to(state.device, dtype)
        changed = (state.to(dtype) @ operator if P.ndim == 2 else state.to(dtype) * operator).to(state.dtype)
        return changed if whole else (changed, *output[1:])

    return hook


def _without(kept: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Not by a product: infinity times 0 is none.
        return args[0].masked_fill(~kept.to(args[0].device), 0), *args[1:]

    return hook


def _mixing(own: float, others: Sequence[tuple[nn.Module, float]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = own * output.to(torch.promote_types(output.dtype, torch.float32))
        for linear, part in others:
            if part:
                # Not by a call: what others watch on that linear is not meant.
                total = total + part * linear.forward(args[0]).to(total)
        return total.to(output.dtype)

    return hook


def product_format(dtype: torch.dtype) -> torch.dtype:
    """Return the format for a correction in a model of some format: that of a quiet feature can be too large for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _hook(change: Change) -> Any:
    moved: dict[tuple[torch.device, torch.dtype], Change] = {}

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dtype, key = torch.promote_types(output.dtype, torch.float32), (output.device, output.dtype)
        if key not in moved:
            parts = (change.transform, dtype), (change.weight, product_format(output.dtype)), (change.bias, dtype)
            moved[key] = Change(*(None if part is None else part.to(output.device, format) for part, format in parts))
        here, changed = moved[key], output.to(dtype)
        if here.transform is not None:
            changed = changed @ here.transform
        if here.weight is not None:
            changed = changed + args[0].to(here.weight) @ here.weight.T
        if here.bias is not None:
            changed = changed + here.bias
        return changed.to(output.dtype)

    return hook
