"""Prune&Comp (arXiv 2507.18212): drop layers one by one, and scale the state at each cut.

Each time, the layer with the lowest influence in the model as shortened and scaled so far is dropped
(``replaceme.selection.compensation``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.methods.method import Method, leave_empty
from replaceme.selection.criteria import Criterion, SelectionContext

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


def choose(context: SelectionContext) -> tuple[list[Block], dict[str, Any]]:
    """Return the blocks with their scalars, and figures for metrics/select.json."""
    from replaceme.selection.compensation import blocks_of, compensated_layers, require_scalable

    require_scalable(context.model_context)
    scales, influences = compensated_layers(context.model_context, context.layers, context.params.layers_to_skip)
    listed = ", ".join(f"{layer} (influence {influences[layer]:.4f}, scale {scale:.4f})" for layer, scale in scales.items())
    logger.info("select: layers in order of removal: %s", listed)
    return blocks_of(scales), {
        "influence": sum(influences.values()),
        "order": {f"layer{layer}": {"influence": influences[layer], "scale": scale} for layer, scale in scales.items()},
    }


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse families that read the residual stream other than through norms: no scalar folds there."""
    if not family.norm_before:
        raise ParameterError(
            f"method: prune_and_comp scales the residual stream, and not all that reads it in the family "
            f"'{model.config().model_type}' does so through a norm: no scalar folds; use shortgpt."
        )


METHOD = Method(
    surrogate=lambda params: "scalar",
    solve=leave_empty("Prune&Comp"),
    criterion=Criterion(
        "compensated",
        "the smallest block influence, one layer at a time, with the state scaled at earlier cuts",
        choose,
        shared=True,
    ),
    words="replaces removed layers by a scalar",
    check=check,
)
