"""Apply edits to a model: fold changes into weights, drop layers, and renumber whatever counts layers.

The fold (ReplaceMe, section 3): with ``y = G Wᵀ + b`` and row vectors, ``y T + G Δᵀ + δ = G (TᵀW + Δ)ᵀ + Tᵀb + δ``, so that
``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ`` compute the change with no new parameter. Behind a norm, which gives ``M = u diag(γ)``, a
transform ``Q D`` of u folds into ``W' = QᵀW + Δ`` and ``γ' = D``: an orthogonal Q leaves the root mean square that the norm
divides by as it was.

A layer that mixes layers (``W = Σ c_j W_j``) has this instead of its own W, in the fold too.

A scalar s on the state behind a layer folds into what is behind: with a state s times smaller, all that the layers behind add
is divided by s, and their norms, up to the epsilon under the root, don't see the difference; neither does the last one.

A narrower residual stream changes every weight that reads it or adds to it: ``replaceme.edits.slicing``.

An MLP of other channels has their rows and columns (``replaceme.edits.channels``), and a change comes on top.

Of a linear in front of which groups go, the columns of their features go, and of the linears that make these, the rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits.channels import assembled_parameter
from replaceme.edits.edits import Change, Edits, behind_norm, features_of
from replaceme.edits.slicing import narrow, sliced_parameters
from replaceme.models.depth import cut_config, renumber
from replaceme.models.families import Family, Linear, linear_parameters, parameter_of
from replaceme.models.modeling_pruned import reshape


def apply_edits(model: Any, family: Family, edits: Edits) -> None:
    """Change a loaded model in place.

    Args:
        model: a causal language model with its original weights (not quantized).
        family: where its parts are.
        edits: what to change.
    """
    layers = family.decoder_layers(model)
    kept = [layer for index, layer in enumerate(layers) if index not in set(edits.removed_layers)]
    model.set_submodule(family.layers, nn.ModuleList(kept))
    renumber(kept)
    if form := edits.form(family.layers):
        # Linears get their shapes with their weights, which are made of those that they have.
        reshape(model, {**form, "linears": {}})
    for name, exact in edited_parameters(model, family, layers, edits):
        _put(model, name, exact, replace=bool(edits.bases))
    cut_config(model.config, family, edits.removed_layers)
    if edits.width:
        narrow(model.config, edits)
    for name, value in edits.config.items():
        setattr(model.config, name, value)


def _put(model: nn.Module, name: str, exact: Tensor, replace: bool) -> None:
    """Give a parameter its new values, or put another in its place, where the shape is new.

    Args:
        model: where it is.
        name: the parameter.
        exact: what it is to be.
        replace: whether it may be another module's too, and stays that one's.
    """
    old = parameter_of(model, name)
    if old.shape == exact.shape and not replace:
        old.copy_(exact)
        return
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(exact.to(old), requires_grad=model.get_parameter(name).requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def edited_parameters(
    model: nn.Module, family: Family, layers: Iterable[nn.Module], edits: Edits
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter that the edits touch: its name in the shortened model, and what it is to be.

    It is float64, in torch's layout. All come from original weights, and none is needed once it has been yielded: it can be
    overwritten.

    Args:
        model: the dense model; its list of layers may be cut already.
        family: where its parts are.
        layers: all its layers.
        edits: what changes.
    """
    if edits.bases:
        yield from sliced_parameters(model, family, edits)
        return
    for layer, name, exact in _edited_in_layers(family, nn.ModuleList(layers), edits):
        yield f"{family.layers}.{edits.position(layer)}.{name}", exact


def _edited_in_layers(family: Family, layers: nn.ModuleList, edits: Edits) -> Iterator[tuple[int, str, Tensor]]:
    """Yield each parameter of a layer that the edits touch: its layer, its name within it, and what it is to be."""
    cuts = {
        (layer, name): (groups, dimension)
        for (layer, linear), groups in edits.kept.items()
        for name, dimension in family.cut_parameters(layers[layer], linear).items()
    }
    for layer, name, exact in _whole(family, layers, edits):
        yield layer, name, cut(exact, *cuts.pop((layer, name))) if (layer, name) in cuts else exact
    for (layer, name), (groups, dimension) in cuts.items():
        yield layer, name, cut(parameter_of(layers[layer], name).double(), groups, dimension)


def cut(parameter: Tensor, groups: Tensor, dimension: int) -> Tensor:
    """Return what is left of a parameter.

    Args:
        parameter: a weight (outputs, inputs) or a bias (outputs,).
        groups: which groups stay, (groups,) bool.
        dimension: the one that these divide into equal parts, in order.
    """
    return parameter.index_select(
        dimension, features_of(groups, parameter.shape[dimension]).nonzero()[:, 0].to(parameter.device)
    )


def _whole(family: Family, layers: nn.ModuleList, edits: Edits) -> Iterator[tuple[int, str, Tensor]]:
    """Yield what the edits make of each parameter that they touch, before any is cut."""
    scales = {layer: edits.scale(layer) for layer in range(len(layers)) if layer not in set(edits.removed_layers)}
    done = set()
    for layer, name, exact in changed_parameters(family, layers, edits):
        done.add((layer, name))
        if scales[layer] != 1 and name in family.adding(layers[layer]):
            exact = _divided(family, name, exact, scales[layer])
        yield layer, name, exact
    for layer, scale in scales.items():
        for name in family.adding(layers[layer]) if scale != 1 else ():
            if (layer, name) not in done:
                yield layer, name, _divided(family, name, parameter_of(layers[layer], name).double(), scale)
    for layer, operator in edits.operators.items():
        if operator.ndim:
            yield layer, "operator.weight", operator


def _divided(family: Family, name: str, exact: Tensor, scale: float) -> Tensor:
    """Return what a parameter that scales what its layer adds becomes, so that it adds ``scale`` times less."""
    offset = family.norm_offset or 0.0
    return (exact + offset) / scale - offset


def changed_parameters(family: Family, layers: nn.ModuleList, edits: Edits) -> Iterator[tuple[int, str, Tensor]]:
    """Yield what the edits but for operators make of each parameter that they touch: its layer, its name within it, its value.

    It is float64, in torch's layout, of a layer as wide as it was.
    """
    done = set()
    for (layer, name), value in edits.parameters.items():
        done.add((layer, name))
        yield layer, name, value.double()
    for (layer, linear), change in edits.changes().items():
        original = partial(mixed, layers, edits.mixtures[layer]) if layer in edits.mixtures else None
        if layer in edits.channels and linear == "mlp_output":
            original = partial(_with_channels, family, layers, layer, edits.channels[layer])
        for name, exact in folds(family, layers[layer], linear, change, original):
            done.add((layer, name))
            yield layer, name, exact
    for layer, channels in edits.channels.items():
        for name in family.cut_parameters(layers[layer], "mlp_output"):
            if (layer, name) not in done:
                yield layer, name, assembled_parameter(family, layers, layer, channels, name)
    for layer, mixture in edits.mixtures.items():
        assert set(mixture) - {layer} <= set(edits.removed_layers), "a kept layer would be mixed into another one"
        for name in linear_parameters(layers[layer]):
            if (layer, name) not in done:
                yield layer, name, mixed(layers, mixture, name)


def _with_channels(family: Family, layers: nn.ModuleList, layer: int, channels: Tensor, name: str) -> Tensor:
    """Return a parameter of an MLP's last linear, as its channels make it; a bias is no channel's."""
    if name in family.cut_parameters(layers[layer], "mlp_output"):
        return assembled_parameter(family, layers, layer, channels, name)
    return parameter_of(layers[layer], name)


def mixed(layers: nn.ModuleList, mixture: Mapping[int, float], name: str) -> Tensor:
    """Return ``Σ c_j θ_j`` (float64, torch's layout) of the parameters that layers have under one name."""
    parts = (coefficient * parameter_of(layers[source], name).double() for source, coefficient in mixture.items())
    return reduce(torch.add, parts)


def folds(
    family: Family, layer: nn.Module, linear: Linear, change: Change, original: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter that a change touches, by name within the layer, and what it is to be: float64, in torch's layout.

    Args:
        family: where the parts are.
        layer: the layer.
        linear: which linear changes.
        change: how.
        original: what the linear's parameters are before; None takes the layer's own.

    Raises:
        SolveError: a norm stands behind the linear, and the transform does not fold through it.
    """
    transform = change.transform
    if transform is not None and family.norm_after_mlp:
        transform, gains = behind_norm(transform)
        assert family.norm_offset is not None
        yield f"{family.mlp}.weight", gains - family.norm_offset
    for name in family.ends(layer, linear):
        addition = change.bias if name.endswith(".bias") else change.weight
        yield name, folded(original(name) if original else parameter_of(layer, name), transform, addition)


def folded(original: Tensor, transform: Tensor | None, addition: Tensor | None) -> Tensor:
    """Return ``Tᵀ original + addition`` (float64), of a weight (…, d, inputs) or a bias (d,)."""
    exact = original.double()
    if transform is not None:
        exact = transform.to(exact).T @ exact
    return exact if addition is None else exact + addition.to(exact)
