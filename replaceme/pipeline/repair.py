"""repair: compute the edits that need the first block's solution (repair, channels, later blocks) from the shortened model's
states.
"""

from typing import Any

from replaceme.base.accelerators import is_accelerator
from replaceme.base.checkpoints import checkpoint_key
from replaceme.base.combinations import STEPWISE
from replaceme.base.documents import Documents
from replaceme.base.files import copy_tree, new_folder, read_json, remove, round_floats, write_json, write_table
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.edits.edits import Edits
from replaceme.methods.method import MethodContext
from replaceme.methods.refusals import streaming_obstacle
from replaceme.methods.registry import METHODS, read_by
from replaceme.models.devices import describe_environment, resolve_device, use_processor
from replaceme.models.families import inputs_of
from replaceme.models.find import calibration_context, recorded_model
from replaceme.models.width import mlp_width_entry
from replaceme.repair.repair import repair_layers
from replaceme.repair.resume import Checkpoints
from replaceme.repair.state import Repair
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace
from replaceme.selection.budget import apply_budget
from replaceme.statistics.cut_statistics import are_reducible
from replaceme.training.training import write_curves


def repair(params: Params, work: Workspace) -> None:
    """Write the edits with ``repairs.csv`` and training curves, and metrics/repair.json."""
    use_processor(params.threads)
    plan, edits = Plan.load(work.plan), Edits.load(work.solution)
    repairs: list[Repair] = []
    figures: dict[str, Any] = {}
    method = METHODS[params.method]
    repairs_layers = method.fit_on_model is None and _changes_layers(params, plan)
    if repairs_layers:
        context = calibration_context(params, work)
        checkpoints = Checkpoints(work.checkpoints, _make_key(params, work, context.documents))
        repairs, figures = repair_layers(params, context, edits, plan, checkpoints)
        if plan.mlp_width:
            edits.config = mlp_width_entry(context.model.config, context.family, plan.mlp_width)
            channels = inputs_of(context.family.linear_of(context.layers[0], "mlp_output"))
            removed = channels - plan.mlp_width
            edits.parts = f"{removed:,} of {channels:,} MLP channels in every layer"
            figures["removed_channels"] = removed * len(edits.channels)
    if rank():
        return
    with new_folder(work.repaired) as folder:
        copy_tree(work.solution, folder)
        if method.fit_on_model:
            context = calibration_context(params, work, obstacle=streaming_obstacle(params))
            if params.remove is not None:
                # Of a method that removes parts of layers, which takes no other criterion and one block.
                params = apply_budget(params, recorded_model(params, work.model_input), method.criterion)
            own = MethodContext(
                **vars(context), params=params, plan=plan, edits=edits, output=folder, checkpoints=work.checkpoints
            )
            figures = method.fit_on_model(own)
        if method.fit_on_model or repairs_layers:
            edits.save(folder)
        rows = [(each.layer, " + ".join(each.linears), each.before, each.after) for each in repairs]
        write_table(folder / "repairs.csv", ("layer", "linear", "residual_before", "residual_after"), rows)
        if not method.trained:
            write_curves(folder, {})
    figures["corrected_linears"] = sum(len(each.linears) for each in repairs if each.scale)
    if repairs:
        figures |= {"first_residual": repairs[0].after, "last_residual": repairs[-1].after}
        figures |= {"last_residual_before": repairs[-1].before}
        figures |= {"ridge_multiple": repairs[0].ridge, "correction_scale": repairs[0].scale}
        logger.info(
            "repair: %d linears corrected; relative residual of the state after the last one %.4f, %.4f before its correction",
            figures["corrected_linears"], repairs[-1].after, repairs[-1].before,
        )  # fmt: skip
    elif not method.fit_on_model:
        logger.info("repair: nothing to do")
    write_json(work.metric("repair"), round_floats(figures))
    # Checkpoints go only after all is written.
    remove(work.checkpoints)


def _changes_layers(params: Params, plan: Plan) -> bool:
    """Return whether kept layers are solved for, or later blocks fitted."""
    return params.repair or params.transform in STEPWISE or bool(plan.statistics and len(plan.blocks) > 1)


def _is_shared(params: Params, work: Workspace) -> bool:
    """Return whether processes can share the walks."""
    plan = Plan.load(work.plan)
    fits = bool(plan.statistics) and (len(plan.blocks) > 1 or plan.mlp_width is not None)
    return (
        METHODS[params.method].fit_on_model is None
        and _changes_layers(params, plan)
        and (are_reducible(plan.statistics) or not fits)
    )


def _make_key(params: Params, work: Workspace, documents: Documents) -> str:
    """Return a digest of everything that a repair depends on: settings, model, earlier edits, text, and the whole code."""
    # A GPU whose memory doesn't suffice goes on from the checkpoint with smaller batches.
    adjusted = {"batch_size"} if is_accelerator(resolve_device(params.device)) else set[str]()
    settings = {
        "params": params.model_dump(include={*STAGE.params} - adjusted),
        "model": read_json(work.model_input),
        "plan": read_json(work.plan),
        "edits": sha256_below(work.solution),
        **describe_environment(resolve_device(params.device)),
    }
    return checkpoint_key(settings, documents.documents)


STAGE = Stage(
    name="repair",
    run=repair,
    params=(
        "method", "transform", "layers_to_skip", "remove", "min_distance_layer", "max_distance_layer", "repair",
        "repair_ridge_attention", "repair_ridge_mlp", "refit_ridge", *read_by("repair"), *PASS,
    ),
    reads=(Workspace.model_input, Workspace.documents, Workspace.plan, Workspace.solution, Workspace.model_versions),
    writes=Workspace.repaired,
    metrics=("repair",),
    methods=METHODS,
    shared=_is_shared,
)  # fmt: skip
