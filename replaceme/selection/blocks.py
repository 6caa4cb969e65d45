"""The allowed positions of blocks, and the blocks with the smallest values among them."""

from collections.abc import Iterable, Sequence
from itertools import chain

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, group_adjacent


def smallest_blocks(values: list[list[float]], starts: range, skip: int, count: int = 1) -> list[Block]:
    """Return the ``count`` blocks with the smallest values, in order; of equals, the earliest."""
    ordered = sorted(starts, key=lambda start: values[start - 1][start - 1 + skip])
    return [Block(start, start + skip) for start in ordered[:count]]


def smallest_of_each(rankings: Iterable[list[list[float]]], starts: range, skip: int, count: int) -> list[Block]:
    """Return the ``count`` smallest blocks of each ranking, as of ``smallest_blocks``; those of several once."""
    return [*dict.fromkeys(chain(*(smallest_blocks(values, starts, skip, count) for values in rankings)))]


def disjoint_blocks(values: list[list[float]], starts: range, params: Params) -> list[Block]:
    """Return ``num_A`` blocks that don't overlap, taken greedily by value; adjacent ones are merged unless forbidden."""
    skip, distance = params.layers_to_skip, _distance(params)
    free, chosen = list(starts), []
    for left in reversed(range(params.num_A)):
        # A block may be taken only if it leaves room for the others.
        roomy = [start for start in free if _room(_without(free, start, distance), distance) >= left]
        best = min(roomy, key=lambda start: values[start - 1][start - 1 + skip])
        free = _without(free, best, distance)
        chosen.append(best)
    return group_adjacent([layer for start in chosen for layer in range(start, start + skip)])


def _distance(params: Params) -> int:
    """Return the minimum distance between the starts of two blocks."""
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


def removable_range(params: Params, layers: int) -> tuple[int, int]:
    """Return the first layer that may go, and the one after the last.

    Raises:
        ParameterError: the model has too few layers.
    """
    skip, first, end = params.layers_to_skip, params.min_distance_layer or 1, params.max_distance_layer or layers
    if skip >= layers:
        raise ParameterError(f"layers_to_skip: must be less than the model's {layers} layers, not {skip}.")
    if end > layers:
        raise ParameterError(f"max_distance_layer: must be at most the model's {layers} layers, not {end}.")
    return first, end


def starts_between(params: Params, first: int, end: int) -> range:
    """Return the starts of blocks of ``layers_to_skip`` layers between two layers.

    Raises:
        ParameterError: there are none.
    """
    skip = params.layers_to_skip
    starts = range(first, end - skip + 1)
    if not starts:
        key = "max_distance_layer" if params.min_distance_layer is None else "min_distance_layer"
        advice = f"start at {end - skip} or earlier" if end > skip else "end later"
        raise ParameterError(
            f"{key}: no block of {skip} layers fits between layer {first} and layer {end}; {advice}, or remove fewer layers."
        )
    return starts


def check_blocks_fit(params: Params, starts: range, first: int, end: int) -> None:
    """Raise ParameterError if ``num_A`` blocks don't fit."""
    if _room(starts, _distance(params)) < params.num_A:
        apart = "" if params.merge_consecutive else " with a kept layer between them"
        raise ParameterError(
            f"num_A: {params.num_A} blocks of {params.layers_to_skip} layers{apart} don't fit between layer {first} and layer "
            f"{end}; take fewer."
        )
