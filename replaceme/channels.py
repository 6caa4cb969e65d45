"""An MLP made of channels of several layers.

A channel is what one column of an MLP's last linear multiplies, ``g_i(x)``, made by the rows in front of it. One of a removed
layer computes on the host's state nearly what it did on its own: rows and norms of the two layers differ, and the difference of
the norms folds into the rows (γ, β of the norms in front of the MLP, of the source and the host),

    W' = W diag(γ_source / γ_host),    b' = b + W β_source − W' β_host.

Which channels serve best, ``replaceme.channel_choice`` finds out.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from replaceme.families import Family, parameter_of


def channel_count(family: Family, layer: nn.Module) -> int:
    """Return how many channels a layer's MLP has."""
    return parameter_of(layer, f"{family.mlp_output}.weight").shape[1]


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
    """
    count = channel_count(family, layers[host])
    for name, dimension in family.cut_parameters(layers[host], "mlp_output").items():
        own = parameter_of(layers[host], name)
        # One linear can make several rows for each channel, one part of it behind the other.
        parts = own.shape[dimension] // count
        shape = [*own.shape]
        shape[dimension] = parts * len(channels)
        made = torch.empty(shape, dtype=torch.float64, device=own.device)
        for source in channels[:, 0].unique().tolist():
            places = (channels[:, 0] == source).nonzero()[:, 0]
            value = _as_at_host(family, layers[source], layers[host], name, dimension)
            wanted = channels[places, 1]
            taken = value(_in_parts(wanted, parts, count).to(own.device))
            made.index_copy_(dimension, _in_parts(places, parts, len(channels)).to(own.device), taken.to(own.device))
        yield name, made


def _in_parts(places: Tensor, parts: int, size: int) -> Tensor:
    return torch.cat([places + part * size for part in range(parts)])


def _as_at_host(family: Family, source: nn.Module, host: nn.Module, name: str, dimension: int) -> Callable[[Tensor], Tensor]:
    """Return what gives some rows or columns of a source's parameter, as they are to be behind the host's norm."""

    def taken(rows: Tensor, name: str = name) -> Tensor:
        value = parameter_of(source, name)
        return value.index_select(dimension, rows.to(value.device)).double()

    if dimension == 1 or source is host:
        return taken
    norms = [layer.get_submodule(family.mlp_norm) for layer in (source, host)]
    weight, host_weight = (parameter_of(norm, "weight").double() for norm in norms)
    # Where the host's norm lets nothing through, nothing comes: the fit sees that, as it sees all of this.
    ratio = torch.where(host_weight == 0, 0, weight.to(host_weight) / host_weight)
    if name.endswith(".weight"):
        return lambda rows: taken(rows) * ratio.to(parameter_of(source, name).device)
    if getattr(norms[0], "bias", None) is None:
        return taken
    biases = [parameter_of(norm, "bias").double() for norm in norms]
    shift = biases[0].to(ratio) - ratio * biases[1]
    weights = name.removesuffix(".bias") + ".weight"
    return lambda rows: taken(rows) + taken(rows, weights) @ shift.to(parameter_of(source, weights).device)
