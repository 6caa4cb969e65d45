"""Merge layers into the one before them, as long as the model's last states stay similar (LaCo, arXiv 2402.11187).

From the last layer to the first, a layer l absorbs the m layers after it, which are removed: each of its linears becomes

    θ*_l = θ_l + Σ_{k=1..m} (θ_{l+k} − θ_l) = (1 − m) θ_l + Σ_{k=1..m} θ_{l+k},     m = min(C − 1, last − l)

and its norms stay. The merge is accepted if the cosine between the last states of the merged and the original model, all tokens
of a text as one vector, exceeds a threshold T on average over a few texts; then l decreases by an interval I, else by one. (The
published program also resets l if it lies beyond the new last layer. This cannot happen, because l decreases with every merge.)
Merged layers may have absorbed others before, so a layer is stored as integer coefficients, of sum 1, of original ones.

The last states are those after the final norm, as in the published program (transformers' ``hidden_states[-1]``): the head's
input, where all tokens have about the same norm. Before it, a few tokens of huge norm can dominate the cosine.

A merge never removes more layers than are left to remove; T is lowered until ``layers_to_skip`` are removed. Layers before l
are unchanged, so a candidate runs only the layers from l on; the similarity of a repeated candidate is cached.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import torch
from torch import nn

from replaceme.base.accelerators import to_float64
from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.plan import Block
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.models.context import ModelContext
from replaceme.models.families import linear_parameters, parameter_of
from replaceme.selection.candidate_evaluation import CandidateEvaluation, batches_of, last_states

# The texts and the tokens of each (the paper takes a few sentences), the seed that picks them, and the step of the threshold.
TEXTS, LENGTH, SEED, STEP = 10, 64, 0, 0.01

# For each remaining layer, the coefficients of its own linears and of the absorbed ones, in the original order.
Layers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MergeSchedule:
    """The positions where merges are tried.

    Attributes:
        first: the first layer that may absorb others (L).
        end: the layer after the last one that may go (H).
        size: the most layers in one merge, the absorbing one included (C).
        interval: the distance from an accepted merge to the next attempt (I).
        count: the number of layers to remove.
    """

    first: int
    end: int
    size: int
    interval: int
    count: int


def merge_layers(layers: Layers, position: int, count: int) -> Layers:
    """Return the layers after the one at ``position`` has absorbed the next ``count``."""
    own, others = layers[position], layers[position + 1 : position + 1 + count]
    return (*layers[:position], (*((1 - count) * part for part in own), *chain(*others)), *layers[position + 1 + count :])


def blocks_of(layers: Layers) -> list[Block]:
    """Return the removed blocks, with the coefficients of the layers before them."""
    blocks, layer = [], 0
    for parts in layers:
        if len(parts) > 1:
            blocks.append(Block(layer + 1, layer + len(parts), parts))
        layer += len(parts)
    return blocks


def collapse(
    total: int, schedule: MergeSchedule, threshold: float, similarity: Callable[[Layers, int], float]
) -> tuple[Layers, dict[int, float]]:
    """Merge layers with one threshold.

    Args:
        total: the number of layers.
        schedule: where merges are tried.
        threshold: T.
        similarity: returns the cosine of the last states, given the layers and the position of the last merge.

    Returns:
        The layers, fewer by ``schedule.count`` at most, and the similarity after each merge, by its position, in order.
    """
    layers: Layers = ((1,),) * total
    end, to_remove, similarities = schedule.end, schedule.count, {}
    # The largest merge absorbs all layers to remove.
    position = end - min(schedule.size, to_remove + 1)
    while to_remove and position >= schedule.first:
        count = min(schedule.size - 1, end - 1 - position, to_remove)
        candidate = merge_layers(layers, position, count)
        value = similarity(candidate, position)
        if value > threshold:
            layers, similarities[position] = candidate, value
            end, to_remove, position = end - count, to_remove - count, position - schedule.interval
        else:
            position -= 1
    return layers, similarities


def max_removed(total: int, schedule: MergeSchedule) -> int:
    """Return how many layers go if every merge is accepted."""
    return total - len(collapse(total, schedule, 0.0, lambda *_: 1.0)[0])


def collapse_all(
    total: int, schedule: MergeSchedule, threshold: float, similarity: Callable[[Layers, int], float]
) -> tuple[Layers, dict[int, float], float]:
    """Merge layers until ``schedule.count`` are removed, with the highest threshold of T, T − 0.01, … that allows it.

    Returns:
        As ``collapse``, and the threshold.

    Raises:
        ParameterError: the similarities aren't finite, so that no threshold is exceeded.
    """
    known: dict[Layers, float] = {}

    def cached_similarity(layers: Layers, position: int) -> float:
        if layers not in known:
            known[layers] = similarity(layers, position)
        return known[layers]

    # Down to a threshold below any cosine, where every merge is accepted.
    thresholds = (round(threshold - STEP * number, 6) for number in range(round((threshold + 1) / STEP) + 2))
    for lowered in progress(thresholds, "merging layers", "thresholds"):
        layers, similarities = collapse(total, schedule, lowered, cached_similarity)
        if total - len(layers) == schedule.count:
            return layers, similarities, lowered
    raise ParameterError("dtype: the merged models overflow; use bfloat16 or float32.")


def collapsed_blocks(
    context: ModelContext, schedule: MergeSchedule, threshold: float
) -> tuple[list[Block], dict[int, float], float]:
    """Return the removed blocks with their coefficients, the similarity after each merge, and the threshold.

    Args:
        context: the dense model and its calibration text.
        schedule: where merges are tried.
        threshold: the initial T.

    Raises:
        ModelError: the layers' linears differ in their shapes.
        ParameterError: the merged models overflow.
    """
    context = context.with_documents(draw_texts(context.documents))
    model, texts, layers = context.model, context.documents, context.layers
    check_same_shapes(layers, range(schedule.first, schedule.end))
    original = last_states(model, batches_of(context))
    shape = len(layers), texts.token_count, context.width
    (entering,) = scratch([shape], model.dtype, context.folder, "the choice of layers")
    evaluation = CandidateEvaluation(context, entering)
    evaluation.record_states(range(schedule.first, schedule.end - 1))

    def similarity(candidate: Layers, position: int) -> float:
        blocks = blocks_of(candidate)
        edits = Edits("", list(chain(*(block.layers for block in blocks))))
        edits.mixtures = {block.layer_before_cut: block.mixture for block in blocks}
        with evaluation.candidate(edits, position) as batches:
            states = last_states(model, batches)
        return fmean(
            float(torch.cosine_similarity(to_float64(state), to_float64(before), dim=0))
            for state, before in zip(states, original, strict=True)
        )

    remaining, similarities, reached = collapse_all(len(layers), schedule, threshold, similarity)
    return blocks_of(remaining), similarities, reached


def draw_texts(documents: Documents) -> Documents:
    """Return ``TEXTS`` documents at most, in a seeded order, cut to ``LENGTH`` tokens."""
    return documents.shuffled(SEED).head(TEXTS, LENGTH)


def check_same_shapes(layers: nn.ModuleList, positions: Iterable[int]) -> None:
    """Raise ModelError if the linears of these layers differ in names or shapes."""
    shapes = {
        position: {name: tuple(parameter_of(layers[position], name).shape) for name in linear_parameters(layers[position])}
        for position in positions
    }
    first, *others = shapes
    for position in others:
        if shapes[position] != shapes[first]:
            raise ModelError(
                f"model_path: the linears of layers {first} and {position} differ in their shapes, so that they can't be "
                "merged; use another method."
            )
