"""Apply edits to a model: fold transforms, drop layers, and renumber whatever counts layers.

The fold (ReplaceMe, section 3): with ``M = G Wᵀ + b`` and row vectors, ``M T = G (TᵀW)ᵀ + Tᵀb``, so that
``W' = TᵀW`` and ``b' = Tᵀb`` compute the transform with no new parameter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits import Edits
from replaceme.families import Family


def apply_edits(model: Any, family: Family, edits: Edits) -> None:
    """Change a loaded model in place.

    Args:
        model: a causal language model with its original weights (not quantized).
        family: where its parts are.
        edits: what to change.
    """
    layers = family.decoder_layers(model)
    for layer, transform in edits.transforms.items():
        fold(family.mlp_output_of(layers[layer]), transform)
    kept = [layer for index, layer in enumerate(layers) if index not in set(edits.removed_layers)]
    model.set_submodule(family.layers, nn.ModuleList(kept))
    renumber(kept)
    cut_config(model.config, family, edits.removed_layers)


@torch.no_grad()
def fold(linear: nn.Module, transform: Tensor) -> None:
    """Fold T (d, d) into a linear (weight d × f), in float64; the weights keep their dtype."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    transform = transform.to(weight.device, torch.float64)
    weight.copy_(transform.T @ weight.double())
    if bias is not None:
        bias.copy_(transform.T @ bias.double())


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
