"""What the whole compression cost: the content of metrics/compression.json."""

from typing import Any

from replaceme.cost import COMPRESSION
from replaceme.files import read_json, rounded
from replaceme.methods import METHODS
from replaceme.params import Params
from replaceme.workspace import Workspace

PEAKS = ("peak_memory_bytes", "peak_cuda_bytes")


def compression_figures(params: Params, work: Workspace) -> dict[str, Any]:
    """Add up what the stages from calibrate to export cost when each of them ran.

    Returns:
        ``seconds`` (all stages together), ``stage_seconds`` (by stage), ``peak_memory_bytes`` and, where CUDA was used,
        ``peak_cuda_bytes`` (the largest of any stage), and ``trained``, which says whether anything was trained.

    Raises:
        ResourceError: a stage has left no record of its cost.
    """
    costs = {name: read_json(work.cost(name)) for name in COMPRESSION}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    peaks = {key: found for key in PEAKS if (found := max(cost.get(key, 0) for cost in costs.values()))}
    trained = METHODS[params.method].trained or params.heal_epochs > 0
    return {"seconds": rounded(sum(seconds.values()), 4), "stage_seconds": seconds, **peaks, "trained": trained}
