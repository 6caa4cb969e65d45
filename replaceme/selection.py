"""Choose the block of layers to remove.

A block ``[start, end)`` leaves host ``start − 1`` in front of it, so ``start`` is at least 1. The angular criterion takes
the block with the smallest ``D(start − 1, end − 1)`` (UIDL; ReplaceMe, section 3).
"""

from replaceme.errors import ParameterError
from replaceme.files import read_json, rounded, write_json
from replaceme.methods import METHODS
from replaceme.params import Params
from replaceme.plan import Block, Plan
from replaceme.progress import logger
from replaceme.workspace import Workspace


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
    starts = range(first, end - skip + 1)
    if not starts:
        key = "max_distance_layer" if params.min_distance_layer is None else "min_distance_layer"
        advice = f"start at {end - skip} or earlier" if end > skip else "end later"
        raise ParameterError(
            f"{key}: no block of {skip} layers fits between layer {first} and layer {end}; {advice}, or remove fewer layers."
        )
    return starts


def smallest_angle(distances: list[list[float]], starts: range, skip: int) -> Block:
    """Return the block with the smallest distance; the earliest of equals."""
    start = min(starts, key=lambda start: distances[start - 1][start - 1 + skip])
    return Block(start, start + skip)


def select(params: Params, work: Workspace) -> None:
    """Write the plan: the blocks and the statistics that the method wants of them."""
    distances = read_json(work.profile / "profile.json")["angular_distance"]
    starts = allowed_starts(params, len(distances))
    block = smallest_angle(distances, starts, params.layers_to_skip)
    distance = distances[block.host][block.end - 1]
    Plan((block,), METHODS[params.method].statistics).save(work.plan)
    write_json(
        work.metric("select"),
        {"host": block.host, "start": block.start, "end": block.end, "angular_distance": rounded(distance)},
    )
    logger.info(
        "select: layers %d to %d of %d go, host %d, angular distance %.4f",
        block.start, block.end - 1, len(distances), block.host, distance,
    )  # fmt: skip
