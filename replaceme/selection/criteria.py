"""The criteria for choosing blocks of layers, by name.

A block ``[start, end)`` comes after the layer ``start − 1``, so ``start`` is at least 1. Cheapest first:

- ``angular``: the smallest ``D(start − 1, end − 1)`` (UIDL; ReplaceMe, section 3).
- ``residual``: the smallest relative residual of a linear map in the block's place (``replaceme.statistics.residuals``).
- ``loss``: of the few cuts with the smallest residuals (and smallest angles, where no map takes the block's place), the one
  whose shortened model predicts held-out calibration text best (``replaceme.selection.cut_loss``). With ``tolerated_loss``, it
  removes as many layers as it can without raising that loss by more than this value.
- ``mean_cosine``: the highest mean cosine, over all tokens, between the states before and after the block (LinearPatch, arXiv
  2505.24680; Ghosted, arXiv 2605.15491).
- ``window``: the highest mean cosine between the states before that layer and after the block (LLM-Streamline, arXiv
  2403.19135, which replaces that layer too).

Two criteria choose single layers; adjacent ones form a block:

- ``influence``: the layers that change their input least (ShortGPT, arXiv 2403.03853): ``replaceme.statistics.profile``.
- ``greedy``: one layer at a time, the one without which the loss is lowest (SLEB, arXiv 2402.09025):
  ``replaceme.selection.greedy``.

A method can have its own criterion (LaCo's merges, Prune&Comp's scaled layers). Methods that remove parts of layers have the
criterion ``WIDTH``, which chooses no block. Torch is imported only inside the functions that compute, so that reading the table
stays fast.

Several blocks (``num_A``; ReplaceMe, section 4) are taken in the order of their values, skipping overlaps. Unless adjacent ones
are merged, a kept layer stays between two blocks: the one before the later block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Surrogate, group_adjacent
from replaceme.base.progress import logger
from replaceme.selection.blocks import check_blocks_fit, disjoint_blocks, removable_range, smallest_blocks, starts_between

if TYPE_CHECKING:
    from replaceme.models.context import ModelContext

Figures = dict[str, Any]
Pairs = list[list[float]]


@dataclass(frozen=True)
class SelectionContext:
    """The inputs of a criterion.

    Attributes:
        params: the setting.
        profile: the content of ``profile.json``.
        starts: the allowed starts of a block.
        surrogate: what takes the block's place.
        load: loads the dense model and reads its calibration text, for criteria that run it.
    """

    params: Params
    profile: Mapping[str, Any]
    starts: range
    surrogate: Surrogate
    load: Callable[[], ModelContext]

    @property
    def layers(self) -> range:
        """The layers that may go."""
        return range(self.starts.start, self.starts.stop + self.params.layers_to_skip - 1)

    @cached_property
    def model_context(self) -> ModelContext:
        """The dense model and its calibration text."""
        return self.load()


@dataclass(frozen=True)
class Criterion:
    """A way to choose blocks.

    Attributes:
        name: the value of ``selection``, or the name of a method's own criterion.
        words: completes "chosen by …".
        choose: returns the blocks, and figures for metrics/select.json.
        several: whether it ranks blocks, so that ``num_A`` of them can be chosen.
        shared: whether it walks through text, and processes can share the walks.
        whole_layers: whether whole layers go; if parts of layers do, no block has to fit.
        check: raises ParameterError, before any work, if it can't choose from this number of layers with these parameters.
    """

    name: str
    words: str
    choose: Callable[[SelectionContext], tuple[list[Block], Figures]]
    several: bool = False
    shared: bool = False
    whole_layers: bool = True
    check: Callable[[Params, int], None] = field(default=lambda params, layers: None)


def _ranked(values: Callable[[Mapping[str, Any]], Pairs]) -> Callable[[SelectionContext], tuple[list[Block], Figures]]:
    """Return a ``choose`` that takes the blocks with the smallest values (layer before the cut × last removed one)."""
    return lambda context: (disjoint_blocks(values(context.profile), context.starts, context.params), {})


def _negative(rows: Pairs) -> Pairs:
    return [[-value for value in row] for row in rows]


def _window(context: SelectionContext) -> tuple[list[Block], Figures]:
    cosines = context.profile["mean_cosine"]
    (block,) = smallest_blocks(_negative(cosines), context.starts, context.params.layers_to_skip)
    cosine = cosines[block.layer_before_cut][block.end - 1]
    logger.info(
        "select: the states before layer %d and after layer %d have a mean cosine of %.4f",
        block.layer_before_cut,
        block.end - 1,
        cosine,
    )
    return [block], {"mean_cosine": cosine}


def _influence(context: SelectionContext) -> tuple[list[Block], Figures]:
    influence = context.profile["layers"]["block_influence"]
    layers = sorted(context.layers, key=influence.__getitem__)[: context.params.layers_to_skip]
    return group_adjacent(layers), {"influence": sum(influence[layer] for layer in layers)}


def _greedy(context: SelectionContext) -> tuple[list[Block], Figures]:
    from replaceme.selection.greedy import greedy_layers

    layers, losses = greedy_layers(context.model_context, context.layers, context.params.layers_to_skip)
    logger.info("select: layers in order of removal: %s", ", ".join(map(str, layers)))
    order = {f"layer{layer}": loss for layer, loss in zip(layers, losses, strict=True)}
    return group_adjacent(layers), {"loss": losses[-1], "order": order}


def _loss(context: SelectionContext) -> tuple[list[Block], Figures]:
    from replaceme.selection.cut_loss import lowest_loss

    # For an empty cut, the residual of a map is a poor predictor, and the angle alone misses good cuts too.
    rankings = [context.profile["residual"]]
    if context.surrogate in ("nothing", "scalar"):
        rankings = [context.profile["angular_distance"], *rankings]
    return lowest_loss(context.model_context, context.params, rankings, context.starts, context.surrogate)


def _enough_documents(params: Params, layers: int) -> None:
    from replaceme.base.documents import HELD_OUT_EVERY

    if params.dataset_size < HELD_OUT_EVERY:
        raise ParameterError(
            f"dataset_size: selection loss holds documents out and needs at least {HELD_OUT_EVERY}, not {params.dataset_size}."
        )


def _parts_of_layers(context: SelectionContext) -> tuple[list[Block], Figures]:
    logger.info("select: parts of layers go, as many parameters as %.3g layers have", context.params.layers_to_skip)
    return [], {}


# The values of ``selection``.
CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "angular", "the smallest angular distance", _ranked(lambda profile: profile["angular_distance"]), several=True
        ),
        Criterion(
            "residual",
            "the smallest residual of a linear map in the block's place",
            _ranked(lambda profile: profile["residual"]),
            several=True,
        ),
        Criterion(
            "loss", "the smallest rise of the next-token loss among a few cuts", _loss, shared=True, check=_enough_documents
        ),
        Criterion("influence", "the smallest block influence", _influence),
        Criterion("greedy", "the lowest loss without the layer, one layer at a time", _greedy, shared=True),
    )
}
MEAN_COSINE = Criterion(
    "mean_cosine",
    "the highest mean cosine between the states before and after the block",
    # A row of the profile is for the state before a layer; the choice reads rows by the layer before the cut, one earlier.
    _ranked(lambda profile: _negative(profile["mean_cosine"][1:])),
    several=True,
)
WINDOW = Criterion("window", "the highest mean cosine between the states before the trained layer and after the block", _window)
WIDTH = Criterion("width", "parts of layers", _parts_of_layers, whole_layers=False)


def allowed_starts(params: Params, layers: int, criterion: Criterion) -> range:
    """Return the allowed starts of a block of ``layers_to_skip`` layers.

    Args:
        params: the limits.
        layers: the model's number of layers.
        criterion: the criterion of the context.

    Raises:
        ParameterError: there are none, or the criterion can't choose.
    """
    first, end = removable_range(params, layers)
    if params.num_A > 1 and not criterion.several:
        ranking = " or ".join(name for name, each in CRITERIA.items() if each.several)
        raise ParameterError(f"selection: {criterion.name} makes one choice; with several blocks (num_A) use {ranking}.")
    if not criterion.whole_layers:
        criterion.check(params, layers)
        return range(first, end)
    starts = starts_between(params, first, end)
    criterion.check(params, layers)
    check_blocks_fit(params, starts, first, end)
    return starts
