"""Run a model with its edits as hooks, its weights unchanged: used to check every fold, and to run a shortened model before its
weights are changed.

A hook on each edited linear computes ``y T + G Δᵀ + δ`` from its output ``y`` and its input ``G``. Where a norm or a mixture of
experts follows the linear, T acts on what that adds to the residual stream. The product with Δ has the model's dtype, as in a
folded model. A hook on each linear of a layer that mixes layers computes ``Σ c_j (G W_jᵀ + b_j)`` with the other layers' own
linears. An operator is a hook on its layer. Parameters made of chosen channels, and trained ones, replace the model's own while
the hooks are in place. Removed layers pass their input on. A ``ModelEdit`` brings hooks of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits.channels import assemble_mlp
from replaceme.edits.edits import OUTSIDE, Change, Edits, rotation_and_gains
from replaceme.models.families import Family, Linear, linears_within
from replaceme.models.layers import replace_output, replacing_parameter, skip_layers, tensor_of
from replaceme.models.streaming import layers_in_memory


@contextmanager
def unfused(model: nn.Module, family: Family, edits: Edits) -> Iterator[None]:
    """Run a model with the edits inside the block; afterwards it is as before."""
    layers = family.decoder_layers(model)
    with ExitStack() as stack:
        for layer, channels in edits.channels.items():
            for name, value in assemble_mlp(family, layers, layer, channels):
                stack.enter_context(replacing_parameter(layers[layer], name, value))
        # Before the changes: their hooks then get the mixture's output.
        for layer, mixture in edits.mixtures.items():
            stack.enter_context(layers_in_memory([layers[layer], *(layers[source] for source in mixture)]))
            for path, module in linears_within(layers[layer]).items():
                others = [(layers[source].get_submodule(path), part) for source, part in mixture.items() if source != layer]
                stack.callback(module.register_forward_hook(_mixing(mixture.get(layer, 0.0), others)).remove)
        for (layer, linear), change in edits.changes().items():
            for module, part in _parts(family, layers[layer], linear, change):
                stack.callback(module.register_forward_hook(_changing(part)).remove)
        for (layer, name), value in edits.parameters.items():
            # Within its module: what is in no layer is in memory, of a streamed model too.
            path, _, leaf = name.rpartition(".")
            owner, own = (model.get_submodule(path), leaf) if layer == OUTSIDE else (layers[layer], name)
            stack.enter_context(replacing_parameter(owner, own, value))
        for layer, P in edits.operators.items():
            stack.callback(layers[layer].register_forward_hook(operator_hook(P)).remove)
        if edits.model_edit:
            stack.enter_context(edits.model_edit.unfused(model, family))
        stack.enter_context(skip_layers(family, (layers[index] for index in edits.removed_layers)))
        yield


def _parts(family: Family, layer: nn.Module, linear: Linear, change: Change) -> Iterator[tuple[nn.Module, Change]]:
    """Yield the modules whose outputs a change concerns, each with its part of the change."""
    if linear == "attention_output":
        yield family.linear_of(layer, linear), change
    elif not family.norm_after_mlp:
        yield family.transformed(layer), change
    else:
        if change.transform is not None:
            weight = family.norm_weight(layer).to(change.transform)
            yield family.transformed(layer), Change(change.transform / torch.where(weight == 0, 1, weight)[:, None])
        if change.weight is not None:
            # Δ in ``W' = QᵀW + Δ`` is in coordinates rotated by Q. Here Q acts after the norm, so Δ is rotated back. (A map
            # without Δ need not fold: the cuts are ranked by dense ones.)
            Q = None if change.transform is None else rotation_and_gains(change.transform)[0]
            added = (part if part is None or Q is None else Q @ part.double() for part in (change.weight, change.bias))
            yield family.linear_of(layer, linear), Change(None, *added)


def operator_hook(P: Tensor) -> Any:
    """Return a forward hook that multiplies a module's output by P: a scalar (), a diagonal (d,) or a map (d, d)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        state = tensor_of(output)
        dtype = torch.promote_types(state.dtype, torch.float32)
        operator = P.to(state.device, dtype)
        changed = state.to(dtype) @ operator if P.ndim == 2 else state.to(dtype) * operator
        return replace_output(output, changed.to(state.dtype))

    return hook


def _mixing(own: float, others: Sequence[tuple[nn.Module, float]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = own * output.to(torch.promote_types(output.dtype, torch.float32))
        for linear, part in others:
            if part:
                # ``forward`` and not a call: hooks on that linear must not run.
                total = total + part * linear.forward(args[0]).to(total)
        return total.to(output.dtype)

    return hook


def product_format(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the product with Δ: the model's, but float32 for float16, which Δ of a quiet feature can exceed."""
    return torch.float32 if dtype == torch.float16 else dtype


def _changing(change: Change) -> Any:
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
