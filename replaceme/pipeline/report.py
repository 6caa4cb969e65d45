"""report: a page with scores, figures and settings; and, in a file of its own, the cost of the compression."""

from typing import Any

from replaceme.base.files import new_folder, read_json, rounded, write_json
from replaceme.base.params import Params
from replaceme.base.stage import COMPRESSION, Stage
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.report.page import render

# Everything that a result can depend on.
ALL = tuple(name for name in FIELDS if name not in ("save_path", "save_transform_only"))
PEAKS = ("peak_memory_bytes", "peak_cuda_bytes")


def compression_figures(params: Params, work: Workspace) -> dict[str, Any]:
    """Return the cost of the compression, which is that of the stages from calibrate to export.

    Returns:
        ``seconds`` (the sum), ``stage_seconds`` (by stage), ``peak_memory_bytes`` and, if CUDA was used, ``peak_cuda_bytes``
        (the largest of any stage), and ``trained`` (whether anything was trained).

    Raises:
        ResourceError: the cost of a stage is missing.
    """
    costs = {name: read_json(work.cost(name)) for name in COMPRESSION}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    peaks = {key: found for key in PEAKS if (found := max(cost.get(key, 0) for cost in costs.values()))}
    trained = METHODS[params.method].trained or params.heal_epochs > 0
    return {"seconds": rounded(sum(seconds.values()), 4), "stage_seconds": seconds, **peaks, "trained": trained}


def write_report(params: Params, work: Workspace) -> None:
    """Write the report, which has no times, and metrics/compression.json."""
    page, cost = render(params, work), compression_figures(params, work)
    with new_folder(work.report) as folder:
        page.save(folder)
    write_json(work.metric("compression"), cost)


STAGE = Stage(
    name="report",
    run=write_report,
    params=ALL,
    reads=(
        Workspace.profile, Workspace.blocks, Workspace.solution, Workspace.edits,
        Workspace.text_versions, Workspace.model_versions, Workspace.score_versions,
    ),
    writes=Workspace.report,
    metrics=("compression",),
    figures=("select", "solve", "repair", "heal", "export", "evaluation"),
    costs=COMPRESSION,
    code=(
        "base", "models/embedded.py", "models/packages.py", "selection/criteria.py", "selection/blocks.py", "methods", "report",
    ),
    methods=METHODS,
)  # fmt: skip
