"""What the commands do, in any folder and without DVC."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from replaceme.base.errors import ModelError, ParameterError, excerpt, renaming
from replaceme.base.files import new_folder, read_json, round_floats, write_json, write_text
from replaceme.base.fingerprints import sha256_of
from replaceme.base.parameters import Params, read_params
from replaceme.base.progress import align, logger
from replaceme.calibration.find import dataset_fingerprints, healing_fingerprints
from replaceme.calibration.sources import read_record
from replaceme.evaluation.comparison import compare_scores
from replaceme.evaluation.contamination import CalibrationText
from replaceme.evaluation.continuations import pair_continuations
from replaceme.evaluation.scores import score_model
from replaceme.evaluation.tables import format_score_comparison, format_scores
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.export.card import SETTINGS
from replaceme.methods.registry import METHODS
from replaceme.models.checks import check_weights
from replaceme.models.find import find_model, identity, recorded_model
from replaceme.models.formats import resolve_formats
from replaceme.models.model import Model
from replaceme.models.model_files import CARD, WEIGHTS
from replaceme.pipeline.cost import compression_figures, print_scores, write_cost
from replaceme.pipeline.report import CARD_FILE
from replaceme.pipeline.results import (
    MADE_OF,
    SPEED_FILE,
    check_finished,
    exclusive_result,
    existing_result,
    publish_file,
    publish_folder,
    result_lock,
    result_name,
    scores_file,
)
from replaceme.pipeline.runner import STAGES, run_stages
from replaceme.pipeline.sizes import STAGE as SIZES
from replaceme.pipeline.sizes import apply_default_size, print_sizes
from replaceme.pipeline.speed import measure_speed
from replaceme.report.page import SETTINGS_FILE, Page, render
from replaceme.running.entry import PARAMS_FILE
from replaceme.running.stage import ANALYSIS, COMPRESSION, FIT, ORDER, Stage, pipeline_params
from replaceme.running.workspace import Workspace


def prune(params: Params, texts: Sequence[str] | None = None, overwrite: bool = False, has_size: bool = True) -> Workspace:
    """Prune a model, save and score it, and return the paths of the result.

    Args:
        params: where ``save_transform_only`` is set, only the edits are saved, without a model.
        texts: calibration documents, which are written to the file that ``dataset`` names; None where it exists.
        overwrite: whether a finished result that was made of something else is replaced.
        has_size: whether the user has said how much goes; if not, a share of the layers does.

    Raises:
        ParameterError: there is such a result, and ``overwrite`` is not set.
    """
    params = params if has_size else apply_default_size(params)
    stages = FIT if params.save_transform_only else ORDER if params.tasks else COMPRESSION
    with exclusive_result(params, result_name(params)) as work:
        if texts is not None:
            write_text(Path(str(params.dataset)), "".join(json.dumps({"text": text}) + "\n" for text in texts))
        _run_stages(params, work, stages, (*SETTINGS, "save_transform_only"), overwrite)
        if params.save_transform_only:
            publish_folder(work, work.edits)
            logger.info("only the transform was saved, to %s (edits.safetensors); no model was written", work.model)
            return work
        write_cost(params, work)
        logger.info("the pruned model is in %s, its figures in %s", work.model, work.root / "metrics")
        if not params.tasks:
            logger.info("it was not scored: nothing is known of its quality; replaceme evaluate --model %s", work.model)
            return work
        publish_file(work, work.report / CARD_FILE, CARD)
        print_scores(work)
        logger.info("the report is %s", work.report / "index.html")
    return work


def _run_stages(
    params: Params, work: Workspace, stages: Sequence[str], keys: Iterable[str], overwrite: bool, then: Sequence[Stage] = ()
) -> None:
    """Run the stages (``then`` as of ``run_stages``), and record what the result is made of: the parameters ``keys``."""
    # Model and texts are known by their content, not by their names. On threads, only the last bits depend.
    named = {"model_path", "revision", "dataset", "dataset_revision", "heal_dataset"}
    settings = params.model_dump(mode="json", include={*keys} - named - {"threads"})
    if work.model.is_dir() and not overwrite:
        texts_now = {"text": dataset_fingerprints(params), "heal_dataset": healing_fingerprints(params)}
        check_finished(work, {**settings, "model": identity(find_model(params)), **texts_now})
    run_stages(params, work, ("inputs",))
    inputs = {"model": work.model_input, "text": work.dataset_input, "heal_dataset": work.heal_dataset_input}
    write_json(work.root / MADE_OF, {**settings, **{name: read_json(file) for name, file in inputs.items()}})
    run_stages(params, work, stages, then)


def evaluate(params: Params, compare_with: str | None = None) -> None:
    """Score the model at ``model_path``, print the scores and write them to ``save_path``.

    Args:
        params: the model and the tasks.
        compare_with: the dense model, which is scored too; the scores are printed side by side, and the file has their
            comparison and how both models go on after a few prompts. None scores one model.
    """
    fingerprints = task_fingerprints(params)
    if not fingerprints:
        raise ParameterError("tasks: is empty; name at least one task.")
    model = find_model(params)
    check_weights(model)
    params = resolve_formats(params, model)
    target, sources = scores_file(params, model.name), read_record(model.folder)
    calibration = CalibrationText(sources, None) if sources else None
    if calibration:
        logger.info("calibration text: its sources are in the model's record; copies of it in other texts are not looked for")
    if compare_with is None:
        figures = score_model(params, model, fingerprints, calibration=calibration).figures
        print(format_scores(figures))
    else:
        with renaming({"model_path": "compare_with"}):
            source = _find_dense_model(params, model, compare_with)
            dense = score_model(params, source, fingerprints, is_dense=True)
        scores = score_model(params, model, fingerprints, dense, calibration)
        compared = round_floats(compare_scores(dense.figures, scores.figures, dense.items, scores.items))
        figures = scores.figures | {
            "comparison": compared,
            "continuations": pair_continuations(dense.continuations, scores.continuations),
        }
        print(format_score_comparison(compared))
    write_json(target, round_floats(figures))
    logger.info("the scores are in %s", target)


def _find_dense_model(params: Params, model: Model, name: str) -> Model:
    """Return the dense model that a pruned one is compared with.

    Raises:
        ParameterError: the name can't be one, or is that of the pruned model.
        ModelError: there is no such model, or its words have other numbers, so that the two can't be compared item by item.
    """
    if not name.strip():
        raise ParameterError(f"compare_with: must be a folder, a hub id or an embedded model's name, not {excerpt(name)!r}.")
    dense = find_model(params.model_copy(update={"model_path": name, "revision": None}))
    if dense.folder.resolve() == model.folder.resolve():
        raise ParameterError("compare_with: is the model that is scored; name the one that it was made from.")
    check_weights(dense)
    if dense.tokenizer().get_vocab() != model.tokenizer().get_vocab():
        raise ModelError(
            f"compare_with: {excerpt(name)} has another tokenizer than {model.name}; name the model that it was made from."
        )
    return dense


def measure(params: Params) -> None:
    """Time the dense model and a result in turn, and write the result's report with these times."""
    work = existing_result(params)
    with result_lock(work) if work.save_path else nullcontext():
        dense = recorded_model(params, work.model_input)
        pruned = Model(work.model, work.model.name, trust_remote_code=params.trust_remote_code)
        if identity(dense) != read_json(work.model_input):
            raise ParameterError(f"model_path: {params.model_path} is not what {work.model} was made from; name that model.")
        times = measure_speed(params, dense, pruned)
        rows: list[tuple[str, ...]] = [("measured", "dense", "pruned", "faster")]
        for name, key in (("prefill", "prefill_seconds"), ("decoding, a token", "decode_seconds_per_token")):
            pair = times[key]
            rows.append((name, *(f"{1000 * pair[side]:.1f} ms" for side in ("dense", "pruned")), f"x {pair['speedup']:.2f}"))
        print(align(rows))
        with new_folder(work.speed) as folder:
            write_json(folder / SPEED_FILE, round_floats(times, 4))
            if page := _render_page(work, times):
                page.save(folder)
    logger.info("the times, and the report with them, are in %s", work.speed)


def report(params: Params, folder: Path) -> None:
    """Print a result's scores, and write its report, with its cost and the times that were measured, to a folder.

    Raises:
        ParameterError: there is no such result, it was made without scores, or the folder holds something else.
    """
    work = existing_result(params)
    if folder.exists() and not (folder / SETTINGS_FILE).is_file():
        raise ParameterError(f"--output: {excerpt(folder, 150)} exists and holds no report; choose another folder.")
    file = work.speed / SPEED_FILE
    times = read_json(file) if file.is_file() else None
    # Those of other weights say nothing of these.
    if times and times["weights"] != sha256_of(Model(work.model, work.model.name).files(WEIGHTS), work.model):
        times = None
    page = _render_page(work, times)
    if page is None:
        raise ParameterError(f"save_path: {work.model} was made without scores, so it has no report; prune it with tasks.")
    print_scores(work)
    with new_folder(folder) as new:
        page.save(new)
    logger.info("the report is %s", folder / "index.html")


def _render_page(work: Workspace, times: Mapping[str, Any] | None) -> Page | None:
    """Return the report of a result with its cost; None if it was made without one."""
    # The page shows the settings that the model was made with, not those of this call.
    settings = work.report / SETTINGS_FILE
    if not settings.is_file():
        return None
    made_with = read_params(settings, methods=METHODS)
    # These name local files without their folders, and the pipeline's costs are known by its own parameters.
    own = pipeline_params(METHODS) if work == Workspace() and PARAMS_FILE.is_file() else made_with
    return render(made_with, work, times, compression_figures(own, work))


def profile(params: Params, overwrite: bool = False) -> None:
    """Measure all pairs of layers, and print the cost of each size; ``overwrite`` as of ``prune``."""
    # Nothing is pruned here, so no transform has to fold.
    bare = {"method": "uidl", "transform": "dense", "repair": False, "heal_tokens": 0}
    single = params.model_copy(update={"layers_to_skip": 1, "num_A": 1, **bare})
    with exclusive_result(params, "distances") as work:
        keys = [key for stage in (*map(STAGES.__getitem__, ANALYSIS), SIZES) for key in stage.params]
        _run_stages(single, work, ANALYSIS, keys, overwrite, [SIZES])
        publish_folder(work, work.profile)
        for name in ("sizes.csv", "sizes.png"):
            publish_file(work, work.artifact("sizes") / name, name)
    print_sizes(work)
    logger.info("all pairs are in %s, the sizes in sizes.csv and sizes.png beside it", work.model / "distances.csv")
