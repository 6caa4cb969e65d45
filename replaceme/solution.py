"""The solve stage: from statistics to edits, by the method's own solver."""

from safetensors.torch import load_file
from torch import Tensor

from replaceme.compute import use_threads
from replaceme.files import new_folder, rounded, write_json, write_text
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

    solved = METHODS[params.method].solve(params, plan, statistic)
    removed = len(solved.edits.removed_layers)
    with new_folder(work.solution) as folder:
        solved.edits.save(folder)
        rows = [",".join(map(str, map(rounded, row))) for row in solved.ridge_path]
        write_text(folder / "residuals.csv", "\n".join(["host,alpha,relative_residual", *rows]) + "\n")
    write_json(work.metric("solve"), rounded({"removed_layers": removed, **solved.figures}))
    if not solved.edits.transforms:
        logger.info("solve: %d layers go, and nothing takes their place", removed)
