"""Apply edits to a model: fold changes into weights, drop layers, and renumber whatever counts layers.

The fold (ReplaceMe, section 3): with ``y = G Wᵀ + b`` and row vectors, ``y T + G Δᵀ + δ = G (TᵀW + Δ)ᵀ + Tᵀb + δ``, so that
``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ`` compute the change with no new parameter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits import Change, Edits
from replaceme.families import Family


def apply_edits(model: Any, family: Family, edits: Edits) -> None:
    """Change a loaded model in place.

    Args:
        model: a causal language model with its original weights (not quantized).
        family: where its parts are.
        edits: what to change.
    """
    layers = family.decoder_layers(model)
    for (layer, linear), change in edits.changes().items():
        fold(family.linear_of(layers[layer], linear), change)
    kept = [layer for index, layer in enumerate(layers) if index not in set(edits.removed_layers)]
    model.set_submodule(family.layers, nn.ModuleList(kept))
    renumber(kept)
    cut_config(model.config, family, edits.removed_layers)


@torch.no_grad()
def fold(linear: nn.Module, change: Change) -> None:
    """Fold a change into a linear, in float64; the weights keep their dtype."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    weight.copy_(folded(weight, change.transform, change.weight))
    if bias is not None:
        bias.copy_(folded(bias, change.transform, change.bias))
    else:
        assert change.bias is None


def folded(original: Tensor, transform: Tensor | None, addition: Tensor | None) -> Tensor:
    """Return ``Tᵀ original + addition`` (float64), of a weight (d, inputs) or a bias (d,)."""
    exact = original.double()
    if transform is not None:
        exact = transform.to(exact).T @ exact
    return exact if addition is None else exact + addition.to(exact)


def renumber(layers: Sequence[nn.Module]) -> None:
    """Give every module of a layer that knows its layer's position the new one: the KV cache is addressed by it."""
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]


def cut_config(config: Any, family: Family, removed_layers: Sequence[int]) -> None:
    """Cut the number of layers, every list with one entry a layer, and every field that is a layer's position."""
    total, removed = int(config.num_hidden_layers), set(removed_layers)
    for name in family.per_layer:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, [entry for index, entry in enumerate(entries) if index not in removed])
    for name in family.layer_bounds:
        bound = getattr(config, name, None)
        if bound is not None:
            setattr(config, name, bound - sum(index < bound for index in removed))
    config.num_hidden_layers = total - len(removed)
