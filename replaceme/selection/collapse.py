"""Merge layers into the one before them, as long as the model's last states stay similar (LaCo, arXiv 2402.11187).

From the last layer to the first, a layer l absorbs the m layers after it, which are removed: each of its linears becomes

    θ*_l = θ_l + Σ_{k=1..m} (θ_{l+k} − θ_l) = (1 − m) θ_l + Σ_{k=1..m} θ_{l+k},     m = min(C − 1, last − l)

and its norms stay. The merge is accepted if the cosine between the last states of the merged and the original model, all tokens
of a text as one vector, exceeds a threshold T on average over a few texts; then l decreases by an interval I, else by one. (The
published program also resets l if it lies beyond the new last layer. This cannot happen, because l decreases with every merge.)
Merged layers may have absorbed others before, so a layer is stored as integer coefficients, of sum 1, of original ones.

The last states are those after the final norm, as in the published program (transformers' ``hidden_states[-1]``): the head's
input, where all tokens have about the same norm. Before it, a few tokens of huge norm can dominate the cosine.

A merge never removes more layers than are left to remove; T is lowered until ``layers_to_skip`` are gone. Layers before l are
unchanged, so a trial runs only the layers from l on; a repeated trial is cached.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.plan import Block
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch
from replaceme.edits.edits import Edits
from replaceme.models.families import Family, linear_parameters, parameter_of
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


def merged(layers: Layers, place: int, count: int) -> Layers:
    """Return the layers after the one at ``place`` has absorbed the next ``count``."""
    own, others = layers[place], layers[place + 1 : place + 1 + count]
    return (*layers[:place], (*((1 - count) * part for part in own), *chain(*others)), *layers[place + 1 + count :])


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
        similarity: returns the cosine of the last states, given the layers and the place of the last merge.

    Returns:
        The layers, fewer by ``schedule.count`` at most, and the similarity after each merge, by its place, in order.
    """
    layers: Layers = ((1,),) * total
    end, left, found = schedule.end, schedule.count, {}
    # The largest merge absorbs all layers to remove.
    place = end - min(schedule.size, left + 1)
    while left and place >= schedule.first:
        count = min(schedule.size - 1, end - 1 - place, left)
        candidate = merged(layers, place, count)
        alike = similarity(candidate, place)
        if alike > threshold:
            layers, found[place] = candidate, alike
            end, left, place = end - count, left - count, place - schedule.interval
        else:
            place -= 1
    return layers, found


def most(total: int, schedule: MergeSchedule) -> int:
    """Return how many layers go if every merge is accepted."""
    return total - len(collapse(total, schedule, 0.0, lambda *_: 1.0)[0])


def collapse_all(
    total: int, schedule: MergeSchedule, threshold: float, similarity: Callable[[Layers, int], float]
) -> tuple[Layers, dict[int, float], float]:
    """Merge layers until ``schedule.count`` are gone, with the highest threshold of T, T − 0.01, … that allows it.

    Returns:
        As ``collapse``, and the threshold.

    Raises:
        ParameterError: the similarities aren't finite, so that no threshold is exceeded.
    """
    known: dict[Layers, float] = {}

    def measured(layers: Layers, place: int) -> float:
        if layers not in known:
            known[layers] = similarity(layers, place)
        return known[layers]

    # Down to a threshold below any cosine, where every merge is accepted.
    thresholds = (round(threshold - STEP * number, 6) for number in range(round((threshold + 1) / STEP) + 2))
    for lowered in progress(thresholds, "merging layers", "thresholds"):
        layers, found = collapse(total, schedule, lowered, measured)
        if total - len(layers) == schedule.count:
            return layers, found, lowered
    raise ParameterError("dtype: the merged models overflow; use bfloat16 or float32.")


def collapsed_blocks(
    model: Any,
    family: Family,
    documents: Documents,
    schedule: MergeSchedule,
    threshold: float,
    *,
    batch_size: int,
    folder: Path | None = None,
) -> tuple[list[Block], dict[int, float], float]:
    """Return the removed blocks with their coefficients, the similarity after each merge, and the threshold.

    Args:
        model: the dense model.
        family: its description.
        documents: calibration text.
        schedule: where merges are tried.
        threshold: the initial T.
        batch_size: documents in a batch.
        folder: where scratch files may lie; None is the system's temporary folder.

    Raises:
        ModelError: the layers' linears differ in their shapes.
        ParameterError: the merged models overflow.
    """
    layers, texts = family.decoder_layers(model), texts_of(documents)
    check_alike(layers, range(schedule.first, schedule.end))
    original = last_states(model, batches_of(model, texts, batch_size))
    shape = len(layers), texts.token_count, int(model.config.hidden_size)
    (entering,) = scratch([shape], model.dtype, folder, "the choice of layers")
    trials = CandidateEvaluation(model, family, texts, entering, batch_size)
    trials.keep(range(schedule.first, schedule.end - 1))

    def similarity(candidate: Layers, place: int) -> float:
        blocks = blocks_of(candidate)
        edits = Edits("", list(chain(*(block.layers for block in blocks))))
        edits.mixtures = {block.layer_before_cut: block.mixture for block in blocks}
        with trials.trial(edits, place) as batches:
            states = last_states(model, batches)
        return fmean(
            float(torch.cosine_similarity(state.double(), before.double(), dim=0))
            for state, before in zip(states, original, strict=True)
        )

    left, found, reached = collapse_all(len(layers), schedule, threshold, similarity)
    return blocks_of(left), found, reached


def texts_of(documents: Documents) -> Documents:
    """Return ``TEXTS`` documents at most, in a seeded order, cut to ``LENGTH`` tokens."""
    return documents.shuffled(SEED).head(TEXTS, LENGTH)


def check_alike(layers: nn.ModuleList, places: Iterable[int]) -> None:
    """Raise ModelError if the linears of these layers differ in names or shapes."""
    shapes = {
        place: {name: tuple(parameter_of(layers[place], name).shape) for name in linear_parameters(layers[place])}
        for place in places
    }
    first, *others = shapes
    for place in others:
        if shapes[place] != shapes[first]:
            raise ModelError(
                f"model_path: the linears of layers {first} and {place} differ in their shapes, so that they can't be merged; "
                "use another method."
            )
