"""Apply edits to a model: fold changes into weights, remove layers, and renumber everything that counts layers.

The fold (ReplaceMe, section 3): with ``y = G Wᵀ + b`` and row vectors, ``y T + G Δᵀ + δ = G (TᵀW + Δ)ᵀ + Tᵀb + δ``, so that
``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ`` compute the change with no new parameter. Where a norm follows, ``M = u diag(γ)``, a
transform ``Q D`` of u folds into ``W' = QᵀW + Δ`` and ``γ' = D``: an orthogonal Q doesn't change the root mean square by which
the norm divides.

A mixture of layers (``W = Σ c_j W_j``) takes the place of the layer's own W, in the fold too.

A scalar s on the state after a layer folds into the later layers: the state is kept s times smaller, everything that they add
is divided by s, and their norms and the last one ignore the scale, up to the epsilon under the root.

An MLP of other channels gets their rows and columns (``replaceme.edits.channels``); a change is folded into the result. A
trained parameter has its value already.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.accelerators import to_float64
from replaceme.edits.channels import assemble_parameter
from replaceme.edits.edits import OUTSIDE, Change, Edits, rotation_and_gains
from replaceme.models.depth import cut_config, renumber_layers
from replaceme.models.families import Family, Linear, in_torch_layout, is_conv1d, linear_parameters, parameter_of


def apply_edits(model: Any, family: Family, edits: Edits) -> None:
    """Change a loaded model in place.

    Args:
        model: a causal language model with its original weights (not quantized).
        family: describes the model's parts.
        edits: the changes.
    """
    layers = shorten(model, family, edits)
    for name, exact in edited_parameters(model, family, layers, edits):
        set_parameter(model, name, exact)


def shorten(model: Any, family: Family, edits: Edits) -> nn.ModuleList:
    """Give a model the layers, the modules and the config that it has with the edits, in place; no weight changes yet.

    Returns:
        All layers that it had.
    """
    layers = family.decoder_layers(model)
    kept = [layer for index, layer in enumerate(layers) if index not in set(edits.removed_layers)]
    model.set_submodule(family.layers, nn.ModuleList(kept))
    renumber_layers(kept)
    if form := edits.own_form(family.layers):
        from replaceme.models.modeling_pruned import reshape

        # The linears get their new shapes with their new weights, which are computed from the old ones.
        reshape(model, {**form, "linears": {}})
    edit_config(model.config, family, edits)
    return layers


def edit_config(config: Any, family: Family, edits: Edits) -> None:
    """Change the dense model's config, in place, to the shortened model's."""
    cut_config(config, family, edits.removed_layers)
    for name, value in edits.config.items():
        setattr(config, name, value)


def set_parameter(model: nn.Module, name: str, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Replace a parameter by one with the given values, of any shape; a module that shared it keeps the old.

    Args:
        model: the model.
        name: the parameter's name.
        exact: the new values, in torch's layout.
        dtype: of the new one; None keeps the old one's.
    """
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    old = model.get_parameter(name)
    made = in_torch_layout(model, name, exact.to(old.device, dtype or old.dtype)).contiguous()
    setattr(owner, leaf, nn.Parameter(made, requires_grad=old.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif is_conv1d(owner):
        owner.nx, owner.nf = owner.weight.shape


def edited_parameters(
    model: nn.Module, family: Family, layers: nn.ModuleList, edits: Edits, only: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter that the edits change: its name in the shortened model and its new value (float64, torch's layout).

    All values are computed from original weights. A parameter can be overwritten once it has been yielded.

    Args:
        model: the dense model; its list of layers may be cut already.
        family: describes the model's parts.
        layers: all layers of the dense model.
        edits: the changes.
        only: the one kept layer whose parameters are returned; None returns all.
    """
    kept = [at for at in range(len(layers)) if at not in set(edits.removed_layers)]
    selected = [*kept, OUTSIDE] if only is None else [only]
    edited: Iterator[tuple[int | None, str, Tensor]]
    if edits.model_edit:
        edited = edits.model_edit.edited_parameters(model, family, layers)
    else:
        edited = _edited_in_layers(family, layers, edits.select_layers(selected), [at for at in selected if at != OUTSIDE])
    for layer, name, exact in edited:
        if layer in (None, OUTSIDE):
            yield name, exact
        elif layer in selected:
            yield f"{family.layers}.{edits.position(layer)}.{name}", exact


def _edited_in_layers(
    family: Family, layers: nn.ModuleList, edits: Edits, selected: Collection[int]
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield each parameter of some layers that the edits change: the layer, the name within it and the new value."""
    scales = {layer: edits.scale(layer) for layer in selected}
    done = set()
    for layer, name, exact in changed_parameters(family, layers, edits):
        done.add((layer, name))
        if scales[layer] != 1 and name in family.scaling_parameters(layers[layer]):
            exact = _divided(family, name, exact, scales[layer])
        yield layer, name, exact
    for layer, scale in scales.items():
        for name in family.scaling_parameters(layers[layer]) if scale != 1 else ():
            if (layer, name) not in done:
                yield layer, name, _divided(family, name, to_float64(parameter_of(layers[layer], name)), scale)
    for layer, operator in edits.operators.items():
        if operator.ndim and layer in selected:
            yield layer, "operator.weight", operator
    for (layer, name), value in edits.parameters.items():
        yield layer, name, to_float64(value)


def _divided(family: Family, name: str, exact: Tensor, scale: float) -> Tensor:
    """Return a parameter in proportion to which its layer adds to the stream, so that the layer adds ``scale`` times less."""
    offset = family.norm_offset or 0.0
    return (exact + offset) / scale - offset


def changed_parameters(family: Family, layers: nn.ModuleList, edits: Edits) -> Iterator[tuple[int, str, Tensor]]:
    """Yield each parameter that the edits change, operators left out: the layer, the name within it, the new value.

    The value is float64 in torch's layout.
    """
    changes = edits.changes()
    for layer in sorted({*edits.mixtures, *edits.channels, *(layer for layer, _ in changes)}):
        own = {linear: change for (at, linear), change in changes.items() if at == layer}
        ends = {name for linear in own for name in family.output_parameters(layers[layer], linear)}
        # The last linear comes last: with a new one, the layer no longer says how many channels it had.
        for name in _rebuilt_names(family, layers, edits, layer):
            if name not in ends:
                yield layer, name, to_float64(_original(family, layers, edits, layer, name))
        for linear, change in own.items():
            for name, exact in folds(family, layers[layer], linear, change, partial(_original, family, layers, edits, layer)):
                yield layer, name, exact


def _rebuilt_names(family: Family, layers: nn.ModuleList, edits: Edits, layer: int) -> list[str]:
    """Return the names, within a layer, of the parameters that its mixture or its channels change."""
    if layer in edits.mixtures:
        return linear_parameters(layers[layer])
    return [*family.cut_parameters(layers[layer], "mlp_output")] if layer in edits.channels else []


def _original(family: Family, layers: nn.ModuleList, edits: Edits, layer: int, name: str) -> Tensor:
    """Return a parameter before the change of its linear: mixed, made of channels (a bias belongs to none), or the layer's."""
    if mixture := edits.mixtures.get(layer):
        assert set(mixture) - {layer} <= set(edits.removed_layers), "a kept layer is mixed into another one"
        # Σ c_j θ_j over the layers' parameters of this name, float64
        parts = (coefficient * to_float64(parameter_of(layers[source], name)) for source, coefficient in mixture.items())
        return reduce(torch.add, parts)
    if layer in edits.channels and name in family.cut_parameters(layers[layer], "mlp_output"):
        return assemble_parameter(family, layers, layer, edits.channels[layer], name)
    return parameter_of(layers[layer], name)


def folds(
    family: Family, layer: nn.Module, linear: Linear, change: Change, original: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of a folded change: its name within the layer and its new value (float64, torch's layout).

    Args:
        family: describes the layer's parts.
        layer: the layer.
        linear: the changed linear.
        change: the change.
        original: returns the linear's parameters before the change, by name within the layer.

    Raises:
        SolveError: a norm follows the linear, and the transform does not fold into it.
    """
    transform = change.transform
    if transform is not None and family.norm_after_mlp:
        transform, gains = rotation_and_gains(transform)
        assert family.norm_offset is not None
        yield f"{family.mlp}.weight", gains - family.norm_offset
    for name in family.output_parameters(layer, linear):
        addition = change.bias if name.endswith(".bias") else change.weight
        yield name, fold_parameter(original(name), transform, addition)


def fold_parameter(original: Tensor, transform: Tensor | None, addition: Tensor | None) -> Tensor:
    """Return ``Tᵀ original + addition`` (float64) for a weight (…, d, inputs) or a bias (d,)."""
    exact = to_float64(original)
    if transform is not None:
        exact = transform.to(exact).T @ exact
    return exact if addition is None else exact + addition.to(exact)
