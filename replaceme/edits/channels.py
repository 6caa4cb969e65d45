"""An MLP made of channels of several layers.

A channel is what one column of an MLP's last linear multiplies, ``g_i(x)``, made by the rows in front of it. One of a removed
layer computes on the host's state nearly what it did on its own: rows and norms of the two layers differ, and the difference of
the norms folds into the rows (γ, β of the norms in front of the MLP, of the source and the host),

    W' = W diag(γ_source / γ_host),    b' = b + W β_source − W' β_host.

Which channels serve best, ``replaceme.methods.channel_choice`` finds out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from replaceme.base.errors import ModelError
from replaceme.models.families import Family, inputs_of, parameter_of


def channels_of(layer: int, count: int) -> Tensor:
    """Return all channels of a layer, (channels, 2) int64: the layer, and the place of the channel in it."""
    return torch.stack([torch.full((count,), layer), torch.arange(count)], dim=1)


def assembled(family: Family, layers: nn.ModuleList, host: int, channels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of an MLP of chosen channels, that stands behind the host's norm.

    Args:
        family: where the parts are.
        layers: the dense model's.
        host: where the channels go.
        channels: (channels, 2) int64, a layer and a place in it of each; as many as there are to be.

    Yields:
        A name within the layer, and the value: float64, in torch's layout. A bias of the last linear is no channel's.

    Raises:
        ModelError: the norm in front has a bias, and a linear behind it has none.
    """
    names = family.cut_parameters(layers[host], "mlp_output")
    assert 0 in names.values(), "the linears in front of the MLP's last one are not described"
    for name in names:
        yield name, assembled_parameter(family, layers, host, channels, name)


def assembled_parameter(family: Family, layers: nn.ModuleList, host: int, channels: Tensor, name: str) -> Tensor:
    """Return one of the parameters that ``assembled`` yields."""
    dimension = family.cut_parameters(layers[host], "mlp_output")[name]
    count, own = inputs_of(family.linear_of(layers[host], "mlp_output")), parameter_of(layers[host], name)
    # One linear can make several rows for each channel, one part of them behind the other.
    parts = own.shape[dimension] // count
    shape = [*own.shape]
    shape[dimension] = parts * len(channels)
    made = torch.empty(shape, dtype=torch.float64, device=own.device)
    for source in channels[:, 0].unique().tolist():
        places = (channels[:, 0] == source).nonzero()[:, 0]
        rows, targets = _in_parts(channels[places, 1], parts, count), _in_parts(places, parts, len(channels))
        value = _rows(layers[source], name, dimension, rows)
        if dimension == 0 and source != host:
            value = _behind_norm(family, layers[source], layers[host], name, rows, value)
        made.index_copy_(dimension, targets.to(own.device), value.to(own.device))
    return made


def _in_parts(places: Tensor, parts: int, size: int) -> Tensor:
    return torch.cat([places + part * size for part in range(parts)])


def _rows(layer: nn.Module, name: str, dimension: int, rows: Tensor) -> Tensor:
    value = parameter_of(layer, name)
    return value.index_select(dimension, rows.to(value.device)).double()


def _behind_norm(family: Family, source: nn.Module, host: nn.Module, name: str, rows: Tensor, value: Tensor) -> Tensor:
    """Return rows of a source's weight or bias, as they are to be behind the host's norm."""
    norms = [layer.get_submodule(family.mlp_norm) for layer in (source, host)]
    weight, host_weight = (parameter_of(norm, "weight").to(value) for norm in norms)
    # Where the host's norm lets nothing through, nothing comes: the fit sees that, as it sees all of this.
    ratio = torch.where(host_weight == 0, 0, weight / host_weight)
    path, _, kind = name.rpartition(".")
    shifted = getattr(norms[0], "bias", None) is not None
    if shifted and getattr(source.get_submodule(path), "bias", None) is None:
        raise ModelError(f"model_path: {path} has no bias that could take in that of {family.mlp_norm}; use transform: joint.")
    if kind == "weight":
        return value * ratio
    if not shifted:
        return value
    bias, host_bias = (parameter_of(norm, "bias").to(value) for norm in norms)
    # The same rows of the weight, which is the source's own here.
    return value + _rows(source, f"{path}.weight", 0, rows).to(value) @ (bias - ratio * host_bias)
