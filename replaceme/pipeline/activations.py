"""activations: take the planned statistics of the first block, in one pass."""

from dataclasses import replace

import torch
from safetensors.torch import save_file

from replaceme.base.files import new_folder
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.models.devices import use_processor
from replaceme.models.find import calibration_context
from replaceme.models.streaming import evict_layers
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace
from replaceme.statistics.cut_statistics import are_reducible, take_statistics

# With fewer tokens per dimension, the fit overfits the sample.
TOKENS_PER_DIMENSION = 8


def observe_activations(params: Params, work: Workspace) -> None:
    """Take the planned statistics and write one safetensors file for each."""
    use_processor(params.threads)
    plan = Plan.load(work.plan)
    if not plan.statistics or plan.mlp_width:
        why = "they are taken in the repair stage, with narrower MLPs" if plan.mlp_width else "the method needs none"
        logger.info("activations: no statistics: %s", why)
        with new_folder(work.statistics) as folder:
            # DVC does not track empty folders.
            save_file({"none": torch.zeros(1)}, folder / "none.safetensors")
        return
    # Later blocks are fitted in the repair stage, on the states of the shortened model.
    context, block = calibration_context(params, work), plan.blocks[0]
    # Only the first process writes. What others share are sums, which need no folder.
    if rank():
        take_statistics(context, block, plan.statistics)
    else:
        with new_folder(work.statistics) as folder:
            for name, tensors in take_statistics(replace(context, folder=folder), block, plan.statistics).items():
                save_file(tensors, folder / f"{name}.safetensors")
    # In a process that goes on with the next stage, only the garbage collector would.
    evict_layers(context.model)
    if rank():
        return
    width, tokens = context.width, context.documents.token_count
    logger.info("activations: %s over %d tokens, layers 0 to %d", " and ".join(plan.statistics), tokens, block.end - 1)
    if tokens < TOKENS_PER_DIMENSION * width:
        logger.warning(
            "dataset_size: %d tokens are few for a width of %d; the fit needs at least %d, so raise dataset_size or alpha",
            tokens, width, TOKENS_PER_DIMENSION * width,
        )  # fmt: skip


def _is_shared(params: Params, work: Workspace) -> bool:
    """Return whether processes can share the walk."""
    plan = Plan.load(work.plan)
    return plan.mlp_width is None and are_reducible(plan.statistics)


STAGE = Stage(
    name="activations",
    run=observe_activations,
    params=PASS,
    reads=(Workspace.model_input, Workspace.documents, Workspace.plan, Workspace.model_versions),
    writes=Workspace.statistics,
    shared=_is_shared,
)
