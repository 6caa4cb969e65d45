"""An MLP made of channels of several layers.

A channel ``g_i(x)`` is one input of an MLP's last linear; the linears before it compute it with the channel's rows. A removed
layer's channel computes nearly the same from the state before the cut as from its own. The norms before the two MLPs differ,
and the difference folds into the rows (γ and β are the weight and bias of the norm in the source, γ' and β' in the layer that
gets the channel):

    W' = W diag(γ / γ'),    b' = b + W β − W' β'.

``replaceme.repair.channel_choice`` chooses the channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from replaceme.base.accelerators import float64_device, to_device, to_float64
from replaceme.base.errors import ModelError
from replaceme.models.families import Family, inputs_of, parameter_of


def channels_of(layer: int, count: int) -> Tensor:
    """Return all channels of a layer, (channels, 2) int64: the layer, and the channel's index in it."""
    return torch.stack([torch.full((count,), layer), torch.arange(count)], dim=1)


def assemble_mlp(family: Family, layers: nn.ModuleList, layer: int, channels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a layer's MLP, made of the chosen channels.

    Args:
        family: describes the model's parts.
        layers: the dense model's layers.
        layer: the layer that gets the channels.
        channels: (channels, 2) int64: the layer of each channel and its index there. Their number is the MLP's new width.

    Yields:
        Each parameter's name within the layer and its value, float64 in torch's layout. The bias of the last linear belongs to
        no channel and is left out.

    Raises:
        ModelError: the norm before the MLP has a bias, and a linear after it has none.
    """
    names = family.cut_parameters(layers[layer], "mlp_output")
    assert 0 in names.values(), "the linears before the MLP's last one are not described"
    for name in names:
        yield name, assemble_parameter(family, layers, layer, channels, name)


def assemble_parameter(family: Family, layers: nn.ModuleList, layer: int, channels: Tensor, name: str) -> Tensor:
    """Return one of the parameters that ``assemble_mlp`` yields, by its name within the layer."""
    dimension = family.cut_parameters(layers[layer], "mlp_output")[name]
    count, own = inputs_of(family.linear_of(layers[layer], "mlp_output")), parameter_of(layers[layer], name)
    # A linear can have several rows for each channel (gate and up in one): as many parts, one after the other.
    parts = own.shape[dimension] // count
    shape = [*own.shape]
    shape[dimension] = parts * len(channels)
    made = torch.empty(shape, dtype=torch.float64, device=float64_device(own.device))
    for source in channels[:, 0].unique().tolist():
        positions = (channels[:, 0] == source).nonzero()[:, 0]
        rows, targets = _in_every_part(channels[positions, 1], parts, count), _in_every_part(positions, parts, len(channels))
        value = _rows(layers[source], name, dimension, rows)
        if dimension == 0 and source != layer:
            value = _for_norm_of(family, layers[source], layers[layer], name, rows, value)
        made.index_copy_(dimension, to_device(targets, made.device), value.to(made.device))
    return made


def _in_every_part(indices: Tensor, parts: int, size: int) -> Tensor:
    """Return the indices of channels in each of the parts of a linear, (parts · indices,)."""
    return torch.cat([indices + part * size for part in range(parts)])


def _rows(layer: nn.Module, name: str, dimension: int, rows: Tensor) -> Tensor:
    value = parameter_of(layer, name)
    return to_float64(value.index_select(dimension, to_device(rows, value.device)))


def _for_norm_of(family: Family, source: nn.Module, layer: nn.Module, name: str, rows: Tensor, value: Tensor) -> Tensor:
    """Return rows of the source's weight or bias, converted from the source's norm to the layer's (float64)."""
    norms = [each.get_submodule(family.mlp_norm) for each in (source, layer)]
    weight, own_weight = (parameter_of(norm, "weight").to(value) for norm in norms)
    # A feature that the layer's norm sets to 0 can't be recovered. The fit comes later and sees this.
    ratio = torch.where(own_weight == 0, 0, weight / own_weight)
    path, _, kind = name.rpartition(".")
    shifted = getattr(norms[0], "bias", None) is not None
    if shifted and getattr(source.get_submodule(path), "bias", None) is None:
        raise ModelError(f"model_path: {path} has no bias to absorb that of {family.mlp_norm}; use transform: joint.")
    if kind == "weight":
        return value * ratio
    if not shifted:
        return value
    bias, own_bias = (parameter_of(norm, "bias").to(value) for norm in norms)
    # The source's own weight, before its conversion.
    return value + _rows(source, f"{path}.weight", 0, rows).to(value) @ (bias - ratio * own_bias)
