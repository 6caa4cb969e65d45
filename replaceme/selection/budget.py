"""A budget of parameters instead of a number of layers: ``remove: 20%``.

    budget = share · (all parameters, or those of the decoder layers)
    n = ⌊budget / layer⌋, at most layers_to_skip                                     whole layers, by depth
    width = MLP width − (budget − removed layers) / (kept layers · parameters of a channel)

Whole layers alone if they come within 1 % of all parameters, or if MLPs can't be made narrower with these settings: then the
nearest number of them. One width for all layers, so that the family's own config can say it, and a multiple of the largest
power of two (128 at most) that stays within the 1 %.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.selection.criteria import Criterion

if TYPE_CHECKING:
    from replaceme.models.model import Model

# Share of all parameters within which a budget is met.
TOLERANCE = 0.01
MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        total: of the model; tied ones count once.
        layers: of each layer.
        width: channels of a layer's MLP; 0 if the layers' differ, or if the config can't say that there are fewer.
        channel: parameters of one of them.
    """

    total: int
    layers: tuple[int, ...]
    width: int
    channel: int

    @classmethod
    @cache
    def of(cls, model: Model) -> Sizes:
        """Return the sizes of a model; its weights are not loaded."""
        from replaceme.models.families import inputs_of, parameter_of
        from replaceme.models.model import parameter_count
        from replaceme.models.width import mlp_width_entry

        family, skeleton = model.family(), model.skeleton(model.config())
        layers = family.decoder_layers(skeleton)
        total, of_layers = parameter_count(skeleton), tuple(map(parameter_count, layers))
        cut = family.cut_parameters(layers[0], "mlp_output")
        # Channels can go where the linears that compute them are described.
        known = 0 in cut.values() and not family.experts
        widths = {inputs_of(family.linear_of(layer, "mlp_output")) for layer in layers} if known else set()
        if len(widths) != 1 or not mlp_width_entry(model.config(), family, max(widths) // 2):
            return cls(total, of_layers, 0, 0)
        channel = sum(parameter_of(layers[0], name).numel() for name in cut) // max(widths)
        return cls(total, of_layers, max(widths), channel)

    def budget(self, remove: str) -> float:
        """Return the number of parameters that ``remove`` names."""
        percent, _, of_layers = remove.partition("%")
        return float(percent) / 100 * (sum(self.layers) if of_layers else self.total)


def can_narrow_mlps(params: Params) -> bool:
    """Return whether a budget may make the kept layers' MLPs narrower: their channels are chosen and solved for in repair."""
    return params.repair and params.transform == "channels"


def apply_budget(params: Params, model: Model, criterion: Criterion) -> Params:
    """Return the parameters with the number of layers that ``remove`` gives; without it, as they are.

    Methods that remove parts of layers get a fraction, the parameters of so many layers.

    Raises:
        ParameterError: the budget can't be met.
    """
    if params.remove is None:
        return params
    sizes = Sizes.of(model)
    budget, most = sizes.budget(params.remove), params.layers_to_skip
    each = params.num_A * sum(sizes.layers) / len(sizes.layers)
    if not 0 < budget < sum(sizes.layers):
        fraction = sum(sizes.layers) / sizes.total
        raise ParameterError(
            f"remove: must be above 0% and below the decoder layers' {fraction:.1%} of all parameters, not {params.remove}."
        )
    if not criterion.whole_layers:
        return params.model_copy(update={"layers_to_skip": budget / each})
    count = round(budget / each)
    narrow = can_narrow_mlps(params) and sizes.width > 0
    if narrow and (count > most or abs(count * each - budget) > TOLERANCE * sizes.total):
        count = min(int(budget / each), most)
    if not count:
        least = "a layer goes" if params.num_A == 1 else f"{params.num_A} layers go"
        fraction = each / sizes.total
        raise ParameterError(
            f"remove: at least {least}, which is {fraction:.1%} of all parameters and more than {params.remove}; use more."
        )
    if count > most:
        raise ParameterError(
            f"remove: {params.remove} takes blocks of {count} layers, and layers_to_skip allows {most} at most; raise that."
        )
    return params.model_copy(update={"layers_to_skip": count})


def mlp_width(params: Params, model: Model, removed: Collection[int]) -> int | None:
    """Return the number of channels that stay in each kept layer's MLP, to meet the budget; None keeps them all.

    Args:
        params: the setting.
        model: the dense model.
        removed: the removed layers.

    Raises:
        ParameterError: no channel would be left.
    """
    if params.remove is None or not can_narrow_mlps(params):
        return None
    sizes = Sizes.of(model)
    if not sizes.width:
        return None
    left = sizes.budget(params.remove) - sum(sizes.layers[layer] for layer in removed)
    allowed, per_channel = TOLERANCE * sizes.total, (len(sizes.layers) - len(removed)) * sizes.channel
    if left <= allowed:
        return None
    exact = sizes.width - left / per_channel
    for multiple in MULTIPLES:
        width = multiple * round(exact / multiple)
        if 0 < width < sizes.width and abs(width - exact) * per_channel <= allowed:
            return width
    raise ParameterError(
        f"remove: {params.remove} would leave none of the MLPs' {sizes.width} channels with {len(removed)} layers less; "
        "raise layers_to_skip."
    )


def log_budget(params: Params, model: Model, removed: Collection[int], width: int | None) -> None:
    """Say how much goes, and warn if the budget is not met within the tolerance."""
    if params.remove is None:
        return
    sizes = Sizes.of(model)
    removed_parameters = sum(sizes.layers[layer] for layer in removed)
    if width is not None:
        removed_parameters += (len(sizes.layers) - len(removed)) * (sizes.width - width) * sizes.channel
    missed = abs(removed_parameters - sizes.budget(params.remove)) > TOLERANCE * sizes.total
    kept = "all channels" if width is None else f"{width} of {sizes.width} channels"
    logger.log(
        logging.WARNING if missed else logging.INFO,
        "plan: %d layers go, and the others keep %s: %.1f %% of all parameters, %.1f %% of those in layers; remove is %s",
        len(removed), kept, 100 * removed_parameters / sizes.total, 100 * removed_parameters / sum(sizes.layers), params.remove,
    )  # fmt: skip
