"""select: choose the layers to remove."""

from functools import partial

from replaceme.base.files import read_json, round_floats, write_json
from replaceme.base.parameters import Params
from replaceme.base.plan import save_blocks
from replaceme.base.progress import logger
from replaceme.base.ranks import rank
from replaceme.methods.registry import METHODS, criterion_of, read_by
from replaceme.models.devices import use_processor
from replaceme.models.find import calibration_context, recorded_model
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace
from replaceme.selection.budget import apply_budget
from replaceme.selection.compensation import require_scalable, scale_blocks
from replaceme.selection.criteria import SelectionContext, allowed_starts


def select(params: Params, work: Workspace) -> None:
    """Write the blocks and metrics/select.json."""
    use_processor(params.threads)
    profile = read_json(work.profile / "profile.json")
    distances, residuals, criterion = profile["angular_distance"], profile["residual"], criterion_of(params)
    surrogate = METHODS[params.method].surrogate(params)
    work.blocks.parent.mkdir(parents=True, exist_ok=True)
    if params.remove is not None:
        params = apply_budget(params, recorded_model(params, work.model_input), criterion)
    starts = allowed_starts(params, len(distances), criterion)
    context = SelectionContext(params, profile, starts, surrogate, partial(calibration_context, params, work))
    blocks, figures = criterion.choose(context)
    if surrogate == "scalar" and any(block.scale is None for block in blocks):
        require_scalable(context.model_context)
        blocks = scale_blocks(context.model_context, blocks)
    if rank():
        return
    save_blocks(blocks, work.blocks)
    for number, block in enumerate(blocks):
        chosen = {
            "host": block.layer_before_cut,
            "start": block.start,
            "end": block.end,
            "angular_distance": distances[block.layer_before_cut][block.end - 1],
            "residual": residuals[block.layer_before_cut][block.end - 1],
        } | ({} if block.scale is None else {"scale": block.scale})
        figures |= {f"block{number}": chosen} if number else chosen
        logger.info(
            "select: layers %d to %d of %d are removed, after layer %d, by %s: angular distance %.4f, residual %.4f%s",
            block.start, block.end - 1, len(distances), block.layer_before_cut, criterion.name, chosen["angular_distance"],
            chosen["residual"], f", mean loss {figures['loss']:.4f}" if "loss" in figures else "",
        )  # fmt: skip
    write_json(work.metric("select"), round_floats(figures))


STAGE = Stage(
    name="select",
    run=select,
    params=(
        "method", "transform", "selection", "layers_to_skip", "remove", "tolerated_loss", "min_distance_layer",
        "max_distance_layer", "num_A", "merge_consecutive", *read_by("select"), *PASS,
    ),
    reads=(Workspace.profile, Workspace.model_input, Workspace.documents, Workspace.model_versions),
    writes=Workspace.blocks,
    metrics=("select",),
    methods=METHODS,
    shared=lambda params, work: criterion_of(params).shared or METHODS[params.method].surrogate(params) == "scalar",
)  # fmt: skip
