"""cost: what the compression cost, in metrics/compression.json.

This stage always runs, and the file is none of its outputs, so that no time gets into dvc.lock. It is a metric of the pipeline
all the same: git keeps it, and DVC shows it.
"""

from typing import Any

from replaceme.base.cost import Cost, kept, known
from replaceme.base.files import rounded, write_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.stage import COMPRESSION, Stage
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import METHODS

PEAKS = ("peak_memory_bytes", "peak_cuda_bytes")


def compression_figures(params: Params, work: Workspace) -> dict[str, Any]:
    """Return the cost of the compression, which is that of the stages from generate to export.

    Returns:
        ``stage_seconds`` (by stage, for those whose cost is known here), ``trained`` (whether anything was trained), and, if
        all are known, ``seconds`` (their sum), ``peak_memory_bytes`` and, if CUDA was used, ``peak_cuda_bytes`` (the largest of
        any stage); otherwise ``stages_not_measured`` (how many are not known).
    """
    costs = {name: cost for name in COMPRESSION if (cost := _cost(name, params, work))}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    figures: dict[str, Any] = {"stage_seconds": seconds} if seconds else {}
    figures["trained"] = METHODS[params.method].trained or params.heal_epochs > 0
    if missing := len(COMPRESSION) - len(costs):
        return figures | {"stages_not_measured": missing}
    peaks = {key: found for key in PEAKS if (found := max(cost.get(key, 0) for cost in costs.values()))}
    return figures | {"seconds": rounded(sum(seconds.values()), 4), **peaks}


def _cost(name: str, params: Params, work: Workspace) -> Cost | None:
    try:
        return known(kept(name, params) if work == Workspace() else work.cost(name))
    except OSError:  # an output that DVC has not fetched
        return None


def write_cost(params: Params, work: Workspace) -> None:
    """Write metrics/compression.json."""
    figures = compression_figures(params, work)
    if "seconds" in figures:
        logger.info("cost: the compression took %.4g s and %.1f GB", figures["seconds"], figures["peak_memory_bytes"] / 1e9)
    else:
        missing = [name for name in COMPRESSION if name not in figures.get("stage_seconds", {})]
        logger.info("cost: not known on this machine: %s", ", ".join(missing))
    write_json(work.metric("compression"), figures)


# It always runs, so its parameters and its code need no declaration.
STAGE = Stage(name="cost", run=write_cost, code=(), methods=METHODS)
