"""plan: decide which statistics of the chosen blocks the method needs, and how wide the kept layers' MLPs stay."""

from collections.abc import Sequence

from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan, load_blocks
from replaceme.base.progress import logger
from replaceme.methods.registry import METHODS, read_by
from replaceme.running.stage import Stage
from replaceme.running.workspace import Workspace


def plan(params: Params, work: Workspace) -> None:
    """Write the plan."""
    blocks = load_blocks(work.blocks)
    width = _choose_width(params, work, blocks) if blocks and params.remove is not None else None
    statistics = METHODS[params.method].statistics(params)
    Plan(blocks, statistics, width).save(work.plan)
    logger.info("plan: statistics of each block: %s", ", ".join(statistics) or "none")


def _choose_width(params: Params, work: Workspace, blocks: Sequence[Block]) -> int | None:
    """Return the width of the kept layers' MLPs that meets the budget, and log how near it comes."""
    # Only a budget needs the model's libraries, which take seconds to load.
    from replaceme.models.find import recorded_model
    from replaceme.selection.budget import log_budget, mlp_width

    model, removed = recorded_model(params, work.model_input), [layer for block in blocks for layer in block.layers]
    width = mlp_width(params, model, removed)
    log_budget(params, model, removed, width)
    return width


STAGE = Stage(
    name="plan",
    run=plan,
    params=("method", "transform", "repair", "remove", *read_by("plan"), "trust_remote_code"),
    reads=(Workspace.blocks, Workspace.model_input, Workspace.model_versions),
    writes=Workspace.plan,
    methods=METHODS,
)
