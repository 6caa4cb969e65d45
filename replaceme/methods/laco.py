"""LaCo (arXiv 2402.11187): merge layers into the one before them, as long as the model's last states stay similar.

``replaceme.selection.collapse`` does the merging; this file says where merges are tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from replaceme.base.combinations import Settings, Use
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.methods.method import Method, leave_empty
from replaceme.selection.criteria import Criterion, SelectionContext

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model
    from replaceme.selection.collapse import MergeSchedule


class Merging(Settings):
    """Parameters of LaCo."""

    laco_layers: Annotated[int, Use(("select",))] = Field(7, ge=2)
    """Maximum number of layers in a merge, with the one that absorbs them (published as C)."""
    laco_interval: Annotated[int, Use(("select",))] = Field(1, ge=1)
    """How many layers before a merge the next one is tried (published as I)."""
    laco_threshold: Annotated[float, Use(("select",))] = Field(0.45, ge=-1, le=1)
    """Minimum cosine between the merged and the original model's last states (published as T); lowered in steps of 0.01 until
    layers_to_skip layers are removed, so that 1 finds the highest possible one."""


def merge_schedule(params: Params, layers: int) -> MergeSchedule:
    """Return where merges are tried in a model with this number of layers."""
    from replaceme.selection.collapse import MergeSchedule

    own, first, end = Merging.of(params), (params.min_distance_layer or 1) - 1, params.max_distance_layer or layers
    return MergeSchedule(first, end, own.laco_layers, own.laco_interval, params.layers_to_skip)


def check_merges(params: Params, layers: int) -> None:
    """Raise ParameterError when too few layers go even if every merge is accepted."""
    from replaceme.selection.collapse import max_removed

    schedule = merge_schedule(params, layers)
    if (go := max_removed(layers, schedule)) < params.layers_to_skip:
        raise ParameterError(
            f"laco_interval: merges {schedule.interval} layers apart remove {go} of the {params.layers_to_skip} layers between "
            f"layer {schedule.first + 1} and layer {schedule.end} at most; lower it, or remove fewer layers."
        )


def choose(context: SelectionContext) -> tuple[list[Block], dict[str, Any]]:
    """Return the merged blocks, and figures for metrics/select.json."""
    from replaceme.selection.collapse import collapsed_blocks

    initial = Merging.of(context.params).laco_threshold
    schedule = merge_schedule(context.params, len(context.profile["residual"]))
    blocks, similarities, threshold = collapsed_blocks(context.model_context, schedule, initial)
    if threshold < initial:
        logger.info("select: laco_threshold %g leaves too many layers, and was lowered to %g", initial, threshold)
    listed = ", ".join(f"{value:.4f} with layer {layer}" for layer, value in similarities.items())
    logger.info("select: similarity after each merge, above the threshold %g: %s", threshold, listed)
    return blocks, {
        "threshold": threshold,
        "similarity": [*similarities.values()][-1],
        "merges": {f"layer{layer}": value for layer, value in similarities.items()},
    }


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse mixtures of experts: experts of adjacent layers do not correspond."""
    if family.experts:
        raise ParameterError(
            f"method: laco is not derived for the mixture of experts of the family '{model.config().model_type}', where no "
            "expert is the next layer's; use another method."
        )


METHOD = Method(
    settings=Merging,
    solve=leave_empty("LaCo"),
    criterion=Criterion(
        "collapse",
        "merging layers into the one before them, as long as the model's last states stay similar",
        choose,
        check=check_merges,
    ),
    words="merges layers into the one before them",
    selections=(),
    several=False,
    check=check,
)
