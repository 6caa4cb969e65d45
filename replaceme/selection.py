"""Choose the blocks of layers to remove, by what their removal costs.

A block ``[start, end)`` leaves host ``start − 1`` in front of it, so ``start`` is at least 1. Criteria, cheapest first:

- ``angular``: the smallest ``D(start − 1, end − 1)`` (UIDL; ReplaceMe, section 3).
- ``residual``: the smallest relative residual of a linear map in the block's place (``replaceme.residuals``).
- ``loss``: of the few cuts with the smallest residuals (or with these and the smallest angles, where no map takes the block's
  place), the one whose shortened model predicts held-out calibration text best (``replaceme.cut_loss``). With
  ``tolerated_loss``, as many layers go as raise that loss by no more.

- ``mean_cosine``: the highest mean cosine, over all tokens, of what enters the block and what leaves it (LinearPatch, arXiv
  2505.24680; Ghosted, arXiv 2605.15491).

Two criteria choose single layers, and a block is a run of them:

- ``influence``: the layers that change their input least (ShortGPT, arXiv 2403.03853): ``replaceme.profile``.
- ``greedy``: one by one, each the one without which the loss is lowest (SLEB, arXiv 2402.09025): ``replaceme.greedy``.

And one, of a method that puts another layer in the host's place, sees the host as gone too:

- ``window``: the highest mean cosine of what enters the host and what leaves the block (LLM-Streamline, arXiv 2403.19135).

Methods that take away parts of layers choose by themselves (``width``): no block goes.

And one says what hosts become, too:

- ``collapse``: the layers that can be merged into the one in front of them (LaCo, arXiv 2402.11187): ``replaceme.collapse``.

One scales the state where a layer has gone, before it looks for the next:

- ``compensated``: one by one, each the one with the lowest influence by then (Prune&Comp, arXiv 2507.18212):
  ``replaceme.compensation``. A method that scales gets its scalars here whatever it chooses by.

Several blocks (``num_A``; ReplaceMe, section 4) are taken in the order of their values, each where it overlaps none before
it; unless adjacent ones are merged into one, a kept layer stays between them: a block's host.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import Any

from replaceme.collapse import Way, collapsed_blocks, most
from replaceme.compensation import blocks_of, check_scale, compensated, compensated_layers
from replaceme.compute import use_processor
from replaceme.cut_loss import cut_losses, dense_loss
from replaceme.documents import Documents
from replaceme.errors import ParameterError
from replaceme.families import Family
from replaceme.files import read_json, rounded, write_json
from replaceme.greedy import greedy_layers
from replaceme.methods import METHODS
from replaceme.methods.method import Criterion
from replaceme.models import calibration_model
from replaceme.params import Params
from replaceme.plan import Block, runs, save_blocks
from replaceme.progress import logger
from replaceme.residuals import HELD_OUT_EVERY
from replaceme.workspace import Workspace

# How many cuts are measured by their loss.
SHORTLIST = 6


def allowed_starts(params: Params, layers: int) -> range:
    """Return the starts that the limits leave for a block of ``layers_to_skip`` layers.

    Raises:
        ParameterError: there is none.
    """
    skip = params.layers_to_skip
    if skip >= layers:
        raise ParameterError(f"layers_to_skip: must be less than the model's {layers} layers, not {skip}.")
    first = params.min_distance_layer or 1
    end = params.max_distance_layer or layers
    if end > layers:
        raise ParameterError(f"max_distance_layer: must be at most the model's {layers} layers, not {end}.")
    criterion = criterion_of(params)
    if criterion == "loss" and params.dataset_size < HELD_OUT_EVERY:
        raise ParameterError(
            f"dataset_size: selection loss holds documents out and needs at least {HELD_OUT_EVERY}, not {params.dataset_size}."
        )
    if params.num_A > 1 and criterion not in ("angular", "residual", "mean_cosine"):
        raise ParameterError(f"selection: {criterion} makes one choice; with several blocks (num_A) use residual or angular.")
    if criterion == "width":  # no block has to find room
        return range(first, end)
    starts = range(first, end - skip + 1)
    if not starts:
        key = "max_distance_layer" if params.min_distance_layer is None else "min_distance_layer"
        advice = f"start at {end - skip} or earlier" if end > skip else "end later"
        raise ParameterError(
            f"{key}: no block of {skip} layers fits between layer {first} and layer {end}; {advice}, or remove fewer layers."
        )
    if criterion == "collapse" and (go := most(layers, _way(params, layers))) < skip:
        raise ParameterError(
            f"laco_interval: merges {params.laco_interval} layers apart remove {go} of the {skip} layers between layer {first} "
            f"and layer {end} at most; lower it, or remove fewer layers."
        )
    if _room(starts, _distance(params)) < params.num_A:
        apart = "" if params.merge_consecutive else " with a kept layer between them"
        raise ParameterError(
            f"num_A: {params.num_A} blocks of {skip} layers{apart} don't fit between layer {first} and layer {end}; take fewer."
        )
    return starts


def criterion_of(params: Params) -> Criterion:
    """Return what the cut is chosen by: ``selection``, or the method's own criterion."""
    return params.selection or METHODS[params.method].criterion


def smallest(values: list[list[float]], starts: range, skip: int, count: int = 1) -> list[Block]:
    """Return the ``count`` blocks with the smallest values (host × last removed layer), in order; the earliest of equals."""
    ordered = sorted(starts, key=lambda start: values[start - 1][start - 1 + skip])
    return [Block(start, start + skip) for start in ordered[:count]]


def several(values: list[list[float]], starts: range, params: Params) -> list[Block]:
    """Return ``num_A`` blocks that don't overlap, the smallest values first served; adjacent ones merged if wanted."""
    skip, distance = params.layers_to_skip, _distance(params)
    free, chosen = list(starts), []
    for left in reversed(range(params.num_A)):
        # Whoever takes the best one must leave room for the others.
        roomy = [start for start in free if _room(_without(free, start, distance), distance) >= left]
        best = min(roomy, key=lambda start: values[start - 1][start - 1 + skip])
        free = _without(free, best, distance)
        chosen.append(best)
    return runs([layer for start in chosen for layer in range(start, start + skip)])


def _distance(params: Params) -> int:
    """Return how far the starts of two blocks are apart at least."""
    return params.layers_to_skip + (0 if params.merge_consecutive else 1)


def _without(starts: list[int], taken: int, distance: int) -> list[int]:
    return [start for start in starts if abs(start - taken) >= distance]


def _room(starts: Sequence[int], distance: int) -> int:
    """Return how many of the starts can be taken with at least this distance between them."""
    count, after = 0, -1
    for start in starts:
        if start >= after:
            count, after = count + 1, start + distance
    return count


def select(params: Params, work: Workspace) -> None:
    """Write the blocks, and metrics/select.json."""
    profile = read_json(work.profile / "profile.json")
    distances, residuals, criterion = profile["angular_distance"], profile["residual"], criterion_of(params)
    starts = allowed_starts(params, len(distances))
    allowed = range(starts.start, starts.stop + params.layers_to_skip - 1)
    figures: dict[str, Any] = {}
    if criterion == "width":
        blocks: list[Block] = []
        logger.info("select: parts of layers go, as many parameters as %d layers have", params.layers_to_skip)
    elif criterion == "loss":
        blocks, figures = _by_loss(params, work, distances, residuals, starts)
    elif criterion == "greedy":
        blocks, figures = _one_by_one(params, work, allowed)
    elif criterion == "collapse":
        blocks, figures = _merges(params, work, len(distances))
    elif criterion == "compensated":
        blocks, figures = _compensated(params, work, allowed)
    elif criterion == "influence":
        influence = profile["layers"]["block_influence"]
        layers = sorted(allowed, key=influence.__getitem__)[: params.layers_to_skip]
        blocks, figures = runs(layers), {"influence": sum(influence[layer] for layer in layers)}
    elif criterion == "window":
        cosines = profile["mean_cosine"]
        blocks = smallest([[-cosine for cosine in row] for row in cosines], starts, params.layers_to_skip)
        figures = {"mean_cosine": cosines[blocks[0].host][blocks[0].end - 1]}
        logger.info(
            "select: what enters layer %d and leaves layer %d has a mean cosine of %.4f",
            blocks[0].host,
            blocks[0].end - 1,
            figures["mean_cosine"],
        )
    elif criterion == "mean_cosine":
        # Of what leaves the host, which enters the block.
        blocks = several([[-cosine for cosine in row] for row in profile["mean_cosine"][1:]], starts, params)
    else:
        blocks = several(residuals if criterion == "residual" else distances, starts, params)
    if criterion != "compensated" and METHODS[params.method].stand_in(params) == "scalar":
        blocks = _scaled(params, work, blocks)
    save_blocks(blocks, work.blocks)
    for number, block in enumerate(blocks):
        chosen = {
            "host": block.host,
            "start": block.start,
            "end": block.end,
            "angular_distance": distances[block.host][block.end - 1],
            "residual": residuals[block.host][block.end - 1],
        } | ({} if block.scale is None else {"scale": block.scale})
        figures |= {f"block{number}": chosen} if number else chosen
        logger.info(
            "select: layers %d to %d of %d go, host %d, by %s: angular distance %.4f, residual %.4f%s",
            block.start, block.end - 1, len(distances), block.host, criterion, chosen["angular_distance"],
            chosen["residual"], f", loss {figures['loss']:.4f}" if "loss" in figures else "",
        )  # fmt: skip
    write_json(work.metric("select"), rounded(figures))


def _by_loss(
    params: Params, work: Workspace, distances: list[list[float]], residuals: list[list[float]], starts: range
) -> tuple[list[Block], dict[str, Any]]:
    stand_in = METHODS[params.method].stand_in(params)
    # Where nothing takes the block's place, what a map would miss says too little, and the angle has misses of its own.
    criteria = [distances, residuals] if stand_in in ("nothing", "scalar") else [residuals]
    (model, family), documents = _loaded(params, work), Documents.load(work.documents)
    dense, limit = dense_loss(model, documents, params.batch_size), params.layers_to_skip
    if not math.isfinite(dense):
        raise ParameterError(f"dtype: {params.dtype} overflows in the model's predictions; use bfloat16 or float32.")
    # Of each number of layers, the losses with the best few blocks, the lowest first.
    tried: dict[int, dict[Block, float]] = {}

    def rise(count: int) -> float:
        """Return by how much the loss rises with the best block of so many layers."""
        longer, each = range(starts.start, starts.stop + limit - count), SHORTLIST // len(criteria)
        candidates = [*dict.fromkeys(chain(*(smallest(values, longer, count, each) for values in criteria)))]
        losses = cut_losses(model, family, documents, candidates, stand_in=stand_in, batch_size=params.batch_size)
        finite = [pair for pair in zip(candidates, losses, strict=True) if math.isfinite(pair[1])]
        tried[count] = dict(sorted(finite, key=lambda pair: pair[1]))
        risen = lowest(count) - dense
        logger.info("select: %s less: the loss rises by %.4f nats", f"{count} layers" if count > 1 else "1 layer", risen)
        return risen

    def lowest(count: int) -> float:
        return min(tried[count].values(), default=math.inf)

    if params.tolerated_loss is None:
        rise(count := limit)
    else:
        # The rise is taken to grow with the number of layers.
        count = bisect_right(range(1, limit + 1), params.tolerated_loss, key=rise)
    if not tried[max(count, 1)]:
        raise ParameterError(f"dtype: {params.dtype} overflows in every shortened model; use bfloat16 or float32.")
    rises = {each: lowest(each) - dense for each in sorted(tried) if tried[each]}
    if not count:
        raise ParameterError(
            f"tolerated_loss: the loss rises by {rises[1]:.4f} nats without one layer, and {params.tolerated_loss:g} are "
            "tolerated; take more, or null."
        )
    best, *_ = tried[count]
    figures: dict[str, Any] = {
        "loss": tried[count][best],
        "dense_loss": dense,
        "losses": {f"host{block.host}": loss for block, loss in tried[count].items()},
    }
    if params.tolerated_loss is not None:
        figures["rises"] = {f"layers{each}": risen for each, risen in rises.items()}
    return [best], figures


def _one_by_one(params: Params, work: Workspace, allowed: Sequence[int]) -> tuple[list[Block], dict[str, Any]]:
    model, family = _loaded(params, work)
    documents, count = Documents.load(work.documents), params.layers_to_skip
    work.blocks.parent.mkdir(parents=True, exist_ok=True)
    layers, losses = greedy_layers(
        model, family, documents, allowed, count, batch_size=params.batch_size, folder=work.blocks.parent
    )
    logger.info("select: layers in the order in which they went: %s", ", ".join(map(str, layers)))
    return runs(layers), {
        "loss": losses[-1],
        "order": {f"layer{layer}": loss for layer, loss in zip(layers, losses, strict=True)},
    }


def _merges(params: Params, work: Workspace, layers: int) -> tuple[list[Block], dict[str, Any]]:
    model, family = _loaded(params, work)
    work.blocks.parent.mkdir(parents=True, exist_ok=True)
    blocks, alike, threshold = collapsed_blocks(
        model, family, Documents.load(work.documents), _way(params, layers), params.laco_threshold,
        batch_size=params.batch_size, folder=work.blocks.parent,
    )  # fmt: skip
    if threshold < params.laco_threshold:
        logger.info("select: laco_threshold %g leaves too many layers, and was lowered to %g", params.laco_threshold, threshold)
    listed = ", ".join(f"{value:.4f} with layer {place}" for place, value in alike.items())
    logger.info("select: similarity behind each merge, above the threshold %g: %s", threshold, listed)
    return blocks, {
        "threshold": threshold,
        "similarity": [*alike.values()][-1],
        "merges": {f"layer{place}": value for place, value in alike.items()},
    }


def _compensated(params: Params, work: Workspace, allowed: Sequence[int]) -> tuple[list[Block], dict[str, Any]]:
    model, family, documents = _scalable(params, work)
    scales, influences = compensated_layers(
        model, family, documents, allowed, params.layers_to_skip, batch_size=params.batch_size
    )
    listed = ", ".join(f"{layer} (influence {influences[layer]:.4f}, scale {scale:.4f})" for layer, scale in scales.items())
    logger.info("select: layers in the order in which they went: %s", listed)
    return blocks_of(scales), {
        "influence": sum(influences.values()),
        "order": {f"layer{layer}": {"influence": influences[layer], "scale": scale} for layer, scale in scales.items()},
    }


def _scaled(params: Params, work: Workspace, blocks: Sequence[Block]) -> list[Block]:
    """Return blocks that were chosen otherwise, with the scalars of their places."""
    model, family, documents = _scalable(params, work)
    return compensated(model, family, documents, blocks, batch_size=params.batch_size)


def _scalable(params: Params, work: Workspace) -> tuple[Any, Family, Documents]:
    """Return the dense model, its description and the text, when scalars are known to fold."""
    (model, family), documents = _loaded(params, work), Documents.load(work.documents)
    if family.detected:
        check_scale(model, family, documents)
    return model, family, documents


def _way(params: Params, layers: int) -> Way:
    first, end = (params.min_distance_layer or 1) - 1, params.max_distance_layer or layers
    return Way(first, end, params.laco_layers, params.laco_interval, params.layers_to_skip)


def _loaded(params: Params, work: Workspace) -> tuple[Any, Family]:
    """Return the dense model and its description."""
    use_processor(params.threads)
    return calibration_model(params, work.model_input)
