"""Cut a model's depth: update the config fields that count layers, and the modules that store their layer's index."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from replaceme.models.families import Family


def renumber_layers(layers: Sequence[nn.Module]) -> None:
    """Set ``layer_idx`` of all modules to their layer's new position: the KV cache is addressed by it."""
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]


def cut_config(config: Any, family: Family, removed_layers: Sequence[int]) -> None:
    """Cut, in place, the number of layers, every list with one entry per layer, and every field that is a layer index."""
    total, removed = int(config.num_hidden_layers), set(removed_layers)
    family.make_explicit(config)
    for name in family.per_layer:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, [entry for index, entry in enumerate(entries) if index not in removed])
    for name in family.layer_bounds:
        bound = getattr(config, name, None)
        if bound is not None:
            setattr(config, name, bound - sum(index < bound for index in removed))
    for name in family.layer_indices:
        kept = [layer for layer in getattr(config, name, None) or [] if layer not in removed]
        setattr(config, name, [layer - sum(index < layer for index in removed) for layer in kept])
    config.num_hidden_layers = total - len(removed)


def broken_patterns(config: Any, family: Family) -> list[str]:
    """Return the per-layer lists of a cut config that differ from its class's default for that number of layers.

    transformers reads the lists. A program that derives the pattern from the layer index computes another model.
    """
    lists = {name: entries for name in family.per_layer if (entries := getattr(config, name, None)) is not None}
    plain = {key: value for key, value in config.to_dict().items() if key not in lists}
    default = type(config).from_dict(plain)
    return [name for name, entries in lists.items() if (usual := getattr(default, name, None)) and list(entries) != list(usual)]
