"""The plan stage: the statistics that the method wants of the chosen blocks."""

from replaceme.methods import METHODS
from replaceme.params import Params
from replaceme.plan import Plan, load_blocks
from replaceme.progress import logger
from replaceme.workspace import Workspace


def plan(params: Params, work: Workspace) -> None:
    """Write the plan."""
    wanted = Plan(load_blocks(work.blocks), METHODS[params.method].statistics(params))
    wanted.save(work.plan)
    logger.info("plan: wanted of each block: %s", ", ".join(wanted.statistics) or "nothing")
