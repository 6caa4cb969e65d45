"""heal: train the last linears of the layers from the cut on, if heal_epochs is above 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replaceme.base.files import copy_tree, new_folder, read_json, remove, round_floats, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace

if TYPE_CHECKING:
    from replaceme.edits.edits import Edits
    from replaceme.training.training import Curves


def heal(params: Params, work: Workspace) -> None:
    """Write the final edits and metrics/heal.json; without healing, the edits are copied."""
    figures: dict[str, Any] = {}
    if params.heal_epochs:
        # Torch takes seconds to load, and most runs train nothing.
        from replaceme.edits.edits import Edits
        from replaceme.training.training import write_curves

        edits = Edits.load(work.repaired)
        figures, curves = _heal(params, work, edits)
    else:
        logger.info("heal: nothing to do")
    if rank():
        return
    with new_folder(work.edits) as folder:
        copy_tree(work.repaired, folder)
        if params.heal_epochs:
            edits.save(folder)
            write_curves(folder, curves)
    write_json(work.metric("heal"), round_floats(figures))
    remove(work.checkpoints)


def _heal(params: Params, work: Workspace, edits: Edits) -> tuple[dict[str, Any], Curves]:
    """Train, add the changes to the edits, and return the training's figures and curves."""
    from replaceme.models.devices import use_processor
    from replaceme.models.find import calibration_context
    from replaceme.models.memory import HEALING_OBSTACLE
    from replaceme.training import healing
    from replaceme.training.checkpoints import checkpoint_key
    from replaceme.training.training import (
        LearningRateSchedule,
        checkpoint_settings,
        record_entry_and_exit,
        summarize_training,
        train,
    )

    use_processor(params.threads)
    context, plan = calibration_context(params, work, obstacle=HEALING_OBSTACLE), Plan.load(work.plan)
    # With narrower MLPs, the states differ from the dense model's from the first layer on.
    first = 0 if plan.mlp_width else plan.blocks[0].layer_before_cut
    schedule = LearningRateSchedule(params.heal_learning_rate, params.heal_epochs, params.batch_size, "heal_learning_rate")
    settings = {
        **checkpoint_settings(schedule, next(context.model.parameters()).device),
        "share": healing.SHARE,
        "first": first,
        "model": read_json(work.model_input),
        "edits": sha256_below(work.repaired),
        "dtype": params.dtype,
    }
    states = record_entry_and_exit(context, first, len(context.layers) - 1)
    task = healing.LogitDistillation(context, edits, first, *states)
    key = checkpoint_key(settings, context.documents.documents)
    parameters, curves = train(task, task.trainable_parameters(), schedule, work.checkpoints, key)
    task.add_corrections(edits, parameters)
    return summarize_training(curves, parameters), curves


STAGE = Stage(
    name="heal",
    run=heal,
    params=("heal_epochs", "heal_learning_rate", *PASS),
    reads=(Workspace.model_input, Workspace.documents, Workspace.plan, Workspace.repaired, Workspace.model_versions),
    writes=Workspace.edits,
    metrics=("heal",),
    shared=lambda params, work: params.heal_epochs > 0,
)
