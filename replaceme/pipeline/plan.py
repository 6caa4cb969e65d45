"""plan: decide which statistics of the chosen blocks the method needs."""

from replaceme.base.params import Params
from replaceme.base.plan import Plan, load_blocks
from replaceme.base.progress import logger
from replaceme.base.stage import Stage
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import METHODS, read_by


def plan(params: Params, work: Workspace) -> None:
    """Write the plan."""
    wanted = Plan(load_blocks(work.blocks), METHODS[params.method].statistics(params))
    wanted.save(work.plan)
    logger.info("plan: statistics of each block: %s", ", ".join(wanted.statistics) or "none")


STAGE = Stage(
    name="plan",
    run=plan,
    params=("method", "transform", *read_by("plan")),
    reads=(Workspace.blocks,),
    writes=Workspace.plan,
    code=("base", "selection/criteria.py", "selection/blocks.py", "methods"),
    methods=METHODS,
)
