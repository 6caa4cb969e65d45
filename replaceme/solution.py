"""The solve stage: from statistics to edits, by the method's own solver."""

from safetensors.torch import load_file
from torch import Tensor

from replaceme.compute import use_threads
from replaceme.files import new_folder, rounded, write_json
from replaceme.methods import METHODS
from replaceme.params import Params
from replaceme.plan import Plan
from replaceme.progress import logger
from replaceme.workspace import Workspace


def solve(params: Params, work: Workspace) -> None:
    """Run the method's solver, and write its edits and metrics/solve.json."""
    use_threads(params.threads)
    plan = Plan.load(work.plan)

    def statistic(name: str, block: int) -> dict[str, Tensor]:
        return load_file(work.statistics / f"{name}-{block}.safetensors")

    edits, figures = METHODS[params.method].solve(params, plan, statistic)
    with new_folder(work.solution) as folder:
        edits.save(folder)
    figures = {"removed_layers": len(edits.removed_layers), **figures}
    write_json(work.metric("solve"), rounded(figures))
    if not edits.transforms:
        logger.info("solve: %d layers go, and nothing takes their place", len(edits.removed_layers))
