"""check: compare the result with plain removal, and take the better one, if ``keep_if_better`` is set."""

from math import isfinite

from replaceme.base.combinations import NEW_WEIGHTS
from replaceme.base.errors import ModelError
from replaceme.base.files import copy_tree, new_folder, read_json, round_floats, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.evaluation.plain_removal import TITLE, Comparison, compare_with_plain_removal, plain_cuts, write_own_text
from replaceme.models.devices import use_processor
from replaceme.models.find import calibration_context, recorded_model
from replaceme.models.streaming import stream_of
from replaceme.running.stage import PASS, Stage
from replaceme.running.workspace import Workspace


def check(params: Params, work: Workspace) -> None:
    """Write the final edits and metrics/check.json; without a comparison, the edits are copied."""
    comparison = _compare(params, work) if params.keep_if_better else None
    # A published method's result is kept as it is.
    is_healed = read_json(work.metric("heal")).get("training_tokens", 0) > 0
    has_new_weights = params.repair or params.transform in NEW_WEIGHTS or is_healed
    replaced = comparison is not None and comparison.favours_plain and has_new_weights
    with new_folder(work.edits) as folder:
        # What was trained and repaired, curves and text, stays beside what is exported.
        copy_tree(work.healed, folder)
        if comparison and replaced:
            Edits(TITLE, [*comparison.removed_layers]).save(folder)
    figures = {**comparison.figures(), "plain_removal_is_exported": replaced} if comparison else {}
    write_json(work.metric("check"), round_floats(figures))
    if comparison:
        plain = figures["plain_removal"]
        logger.info(
            "check: on text that the dense model wrote, KL %.3f and x %.3g the perplexity; with nothing in the place of layers "
            "%d to %d, KL %.3f and x %.3g", figures["kl"], figures["perplexity_ratio"], plain["first_layer"],
            plain["last_layer"], plain["kl"], plain["perplexity_ratio"],
        )  # fmt: skip
    if replaced:
        logger.warning("check: plain removal is nearer to the dense model than this result, and is exported")


def _compare(params: Params, work: Workspace) -> Comparison | None:
    """Return the result beside plain removal; None where there is none of its size, or no text at a reasonable cost."""
    edits = Edits.load(work.healed)
    if edits.only_remove:
        logger.info("check: this result is plain removal itself")
        return None
    if edits.parts or not edits.removed_layers:
        logger.info("check: plain removal takes whole layers alone; it is not compared with this result")
        return None
    use_processor(params.threads)
    context = calibration_context(params, work)
    if stream_of(context.model) or any(parameter.is_meta for parameter in context.model.parameters()):
        logger.info("check: this model's weights are brought for each token that it writes; plain removal is not compared")
        return None
    profile, count = read_json(work.profile / "profile.json"), len(edits.removed_layers)
    first, end = params.min_distance_layer or 1, params.max_distance_layer or len(context.layers)
    rankings = [profile["angular_distance"], profile["residual"]]
    cuts = plain_cuts(rankings, range(first, end - count + 1), edits.removed_layers)
    if not cuts:
        logger.info("check: no block of %d layers fits between the limits; plain removal is not compared", count)
        return None
    tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
    try:
        # Another seed than that of the calibration's own text.
        text = write_own_text(context, tokenizer, params.max_length, params.seed + 1)
    except ModelError as reason:  # it has no cache of keys and values, or its texts no start
        logger.info("check: the model can't write text by itself here; plain removal is not compared (%s)", reason)
        return None
    comparison = compare_with_plain_removal(context.with_documents(text), edits, cuts)
    if not all(map(isfinite, (*comparison.result.values(), *comparison.plain.values()))):
        logger.warning("check: dtype %s overflows in the predictions; plain removal is not compared", params.dtype)
        return None
    return comparison


STAGE = Stage(
    name="check",
    run=check,
    params=(
        "keep_if_better", "transform", "repair", "min_distance_layer", "max_distance_layer", "max_length",
        "seed", *PASS,
    ),
    reads=(
        Workspace.model_input, Workspace.tokenizer_input, Workspace.documents, Workspace.profile, Workspace.healed,
        Workspace.text_versions, Workspace.model_versions,
    ),
    writes=Workspace.edits,
    metrics=("check",),
    figures=("heal",),
)  # fmt: skip
