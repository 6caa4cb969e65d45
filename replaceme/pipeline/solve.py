"""solve: compute the edits from the statistics with the method's solver."""

import math

import torch
from safetensors.torch import load_file
from torch import Tensor

from replaceme.base.files import new_folder, round_floats, write_json, write_table
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.methods.method import Solved
from replaceme.methods.registry import METHODS, read_by
from replaceme.models.devices import use_processor
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def solve(params: Params, work: Workspace) -> None:
    """Write the edits, their curves and metrics/solve.json."""
    use_processor(params.threads)
    plan = Plan.load(work.plan)

    def statistic(name: str) -> dict[str, Tensor]:
        return load_file(work.statistics / f"{name}.safetensors")

    # Later blocks are solved in the repair stage; methods that remove parts of layers have no block.
    block = plan.blocks[0] if plan.blocks else Block(0, 0)
    # With narrower MLPs, the states change from the first layer on, so all blocks are.
    solved = Solved(Edits("", [])) if plan.mlp_width else METHODS[params.method].solve(params, block, statistic)
    solved.edits.removed_layers = plan.removed_layers
    solved.edits.mixtures |= plan.mixtures
    solved.edits.operators |= {layer: torch.tensor(scale, dtype=torch.float64) for layer, scale in plan.scales.items()}
    removed = len(plan.removed_layers)
    with new_folder(work.solution) as folder:
        solved.edits.save(folder)
        # With the logarithm, for plots without logarithmic axes.
        path = [(alpha, math.log10(alpha), residual) for alpha, residual in solved.ridge_path]
        write_table(folder / "residuals.csv", ("alpha", "log10_alpha", "relative_residual"), path)
        # Empty for a closed form.
        write_table(folder / "loss.csv", ("iteration", "loss"), solved.loss_curve, digits=9)
    write_json(work.metric("solve"), round_floats({"removed_layers": removed, **solved.figures}))
    if mixtures := solved.edits.mixtures:
        logger.info("solve: %d layers are removed, merged into %d kept ones", removed, len(mixtures))
    elif plan.scales:
        listed = ", ".join(f"{scale:.4f} after layer {layer}" for layer, scale in plan.scales.items())
        logger.info("solve: %d layers are removed, and the state is scaled instead: %s", removed, listed)
    elif plan.mlp_width:
        logger.info(
            "solve: %d layers are removed; what replaces them is fitted in the repair stage, with narrower MLPs", removed
        )
    elif removed and not (METHODS[params.method].fit_on_model or solved.edits.changes() or solved.edits.operators):
        logger.info("solve: %d layers are removed, and nothing replaces them", removed)


STAGE = Stage(
    name="solve",
    run=solve,
    params=("method", "transform", "refit_ridge", *read_by("solve"), "device", "threads"),
    reads=(Workspace.plan, Workspace.statistics, Workspace.model_versions),
    writes=Workspace.solution,
    metrics=("solve",),
    methods=METHODS,
)
