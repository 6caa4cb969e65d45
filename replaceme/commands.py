"""The console scripts: they run the pipeline's functions in any folder, without DVC.

Each command imports torch and the like only when it runs, so that ``--help`` is fast. Intermediate results lie beside the
result, in ``<save_path>.work`` (see ``replaceme.steps``).
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from replaceme.base.claims import claim, claim_only_what_is_there, foreign_file, in_use
from replaceme.base.entry import PARAMS_FILE, Parser, run
from replaceme.base.errors import ParameterError, excerpt
from replaceme.base.files import (
    clear_partials,
    copy_content,
    local_path,
    new_folder,
    read_json,
    rounded,
    write_json,
    write_text,
)
from replaceme.base.fingerprints import sha256_below
from replaceme.base.params import Params, nearest, parse_value, read_params
from replaceme.base.progress import align, logger, silence_libraries
from replaceme.base.published_keys import PUBLISHED_KEYS
from replaceme.base.stage import ANALYSIS, FIT, JUDGEMENT
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import EFFECTS, FIELDS, METHODS, criterion_of
from replaceme.selection.criteria import CRITERIA

# What every file of scores has, and none of another program's; and more bytes than one has.
SCORES, LARGEST_SCORES = {"perplexity", "accuracy", "parameters", "disk_bytes"}, 1 << 24
ALIASES = {"model": "model_path", "layers": "layers_to_skip"}


def run_replaceme() -> NoReturn:
    """Prune a model, save it and score it."""
    _main(_prune, "Prune a language model: choose a block of layers, fit its replacement, save and score the result.")


def run_uidl() -> NoReturn:
    """Prune a model by dropping the block."""
    _main(_prune, "Prune a language model by UIDL: drop the block of layers with the smallest angular distance.", method="uidl")


def evaluate_model() -> NoReturn:
    """Score a model."""
    _main(_evaluate, "Score the model at model_path; save_path is a JSON file for the scores.")


def measure_speed() -> NoReturn:
    """Measure the dense and the pruned model."""
    _main(
        _measure,
        "Measure prefill and decoding of the dense model (model_path) and of the pruned one (save_path, or artifacts/model), "
        "in turn, and write the report with these times.",
    )


def get_distance_analysis() -> NoReturn:
    """Profile a model."""
    _main(_analyse, "Measure the angular distance between all pairs of layers, and list the best block of each size.")


def get_lt_with_lstsq() -> NoReturn:
    """Fit a transform."""
    _main(
        _prune, "Fit the linear transform of the best block by least squares and save it, without a model.",
        method="lstsq", save_transform_only=True,
    )  # fmt: skip


def get_lt_with_solvers() -> NoReturn:
    """Fit a transform by an iterative solver."""
    _main(
        _prune, "Fit the linear transform of the best block by an iterative solver and save it, without a model.",
        method="cosine", save_transform_only=True,
    )  # fmt: skip


def _prune(params: Params) -> None:
    from replaceme.evaluation.comparison import comparison_table
    from replaceme.models.model import CARD
    from replaceme.pipeline.cost import write_cost
    from replaceme.pipeline.inputs import inspect_inputs
    from replaceme.publish import card_of
    from replaceme.steps import run_steps

    with _claimed(params, f"{_suffix(params)}-transform" if params.save_transform_only else _suffix(params)) as work:
        inspect_inputs(params, work)
        run_steps(params, work, FIT)
        if params.save_transform_only:
            _deliver(work, work.edits)
            logger.info("only the transform was saved, to %s (edits.safetensors); no model was written", work.model)
            return
        run_steps(params, work, ["export"])
        write_cost(params, work)
        logger.info("the pruned model is in %s, its figures in %s", work.model, work.root / "metrics")
        if params.tasks:
            if "evaluate" not in run_steps(params, work, JUDGEMENT):
                print(comparison_table(read_json(work.metric("evaluation"))))
            logger.info("the report is %s", work.report / "index.html")
        card = card_of(params, work)
        claim(work, {CARD: hashlib.sha256(card.encode()).hexdigest()})
        write_text(work.model / CARD, card)
        claim_only_what_is_there(work)


def _evaluate(params: Params) -> None:
    from replaceme.evaluation.comparison import scores_table
    from replaceme.evaluation.scores import score_model
    from replaceme.evaluation.tasks import task_fingerprints
    from replaceme.models.find import find_model

    fingerprints = task_fingerprints(params)
    if not fingerprints:
        raise ParameterError("tasks: is empty; name at least one task.")
    model = find_model(params)
    target = _scores_file(params, model.name)
    scores = score_model(params, model, model.name, fingerprints).figures
    print(scores_table(scores))
    write_json(target, rounded(scores))
    logger.info("the scores are in %s", target)


def _measure(params: Params) -> None:
    work = _result_of(params)
    with in_use(work) if work.save_path else nullcontext():
        _measure_result(params, work)


def _measure_result(params: Params, work: Workspace) -> None:
    from replaceme.models.find import identity, recorded_model
    from replaceme.models.model import Model
    from replaceme.pipeline.cost import compression_figures
    from replaceme.report.page import SETTINGS_FILE, render
    from replaceme.speed import measure_speed

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
        write_json(folder / "speed.json", rounded(times, 4))
        # The page shows the settings that the model was made with, not those of this call.
        if (settings := work.report / SETTINGS_FILE).is_file():
            made_with = read_params(settings, methods=METHODS)
            # These name local files without their folders, and the pipeline's costs are known by its own parameters.
            own = PARAMS_FILE if work == Workspace() and PARAMS_FILE.is_file() else settings
            cost = compression_figures(read_params(own, methods=METHODS), work)
            render(made_with, work, times, cost).save(folder)
    logger.info("the times, and the report with them, are in %s", work.speed)


def _result_of(params: Params) -> Workspace:
    """Return the paths of an existing result, the pipeline's or a console script's."""
    if params.save_path in (None, "artifacts/model") and (work := Workspace()).model.is_dir():
        return work
    work = _place_of(params, _suffix(params))
    if not work.model.is_dir() or not work.model_input.is_file():
        raise ParameterError(f"save_path: there is no pruned model in {work.model}; run `dvc repro` or run_replaceme first.")
    return work


def _scores_file(params: Params, name: str) -> Path:
    """Return the file for the scores. Raises ParameterError if it holds something else or isn't writable."""
    target = _target(params, name.replace("/", "--"))
    if params.save_path is None or target.is_dir():
        target = target.with_name(f"{target.name}.evaluation.json")
    if target.exists():
        try:
            held = read_json(target) if target.is_file() and target.stat().st_size < LARGEST_SCORES else None
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict) or not held.keys() >= SCORES:
            raise ParameterError(f"save_path: {excerpt(target)} exists and holds no scores; choose another file.")
    _make_folder(target.parent)
    return target


def _analyse(params: Params) -> None:
    from replaceme.pipeline.inputs import inspect_inputs
    from replaceme.selection.blocks import smallest
    from replaceme.selection.criteria import allowed_starts
    from replaceme.steps import run_steps

    # Nothing is pruned here, so no transform has to fold.
    bare = {"method": "uidl", "transform": "dense", "repair": False, "heal_epochs": 0}
    single = params.model_copy(update={"layers_to_skip": 1, "num_A": 1, **bare})
    with _claimed(params, "distances") as work:
        inspect_inputs(single, work)
        run_steps(params, work, ANALYSIS)
        _deliver(work, work.profile)
        content = read_json(work.profile / "profile.json")
    criteria = {"angular distance": content["angular_distance"], "residual": content["residual"]}
    rows = [("layers to skip", *(head for name in criteria for head in ("host", "removed", name)))]
    for skip in range(1, len(allowed_starts(single, layers := len(content["residual"]), criterion_of(single))) + 1):
        starts = allowed_starts(single.model_copy(update={"layers_to_skip": skip}), layers, criterion_of(single))
        row = [str(skip)]
        for values in criteria.values():
            (block,) = smallest(values, starts, skip)
            removed = f"{block.start}–{block.end - 1}" if skip > 1 else str(block.start)
            row += [str(block.host), removed, f"{values[block.host][block.end - 1]:.4f}"]
        rows.append(tuple(row))
    print(align(rows))
    logger.info("all pairs are in %s", work.model / "distances.csv")


def _suffix(params: Params) -> str:
    """Return the part of a result folder's name that distinguishes results of one model."""
    tolerated = "" if params.tolerated_loss is None else f"-within-{params.tolerated_loss:g}"
    return f"{params.method}-{params.layers_to_skip}{tolerated}"


@contextmanager
def _claimed(params: Params, suffix: str) -> Iterator[Workspace]:
    """Yield the paths of the result and of the intermediate results beside it, which are this process's alone in the block.

    What killed runs left unfinished there is deleted. The folders that this call makes are deleted again if nothing is written.

    Args:
        params: ``save_path`` is the place of the result.
        suffix: appended to the model's name for the place, if ``save_path`` is None.

    Raises:
        ParameterError: another process works there, or the place holds files that this program didn't write, or isn't writable.
    """
    from replaceme.models.model import CARD

    work = _place_of(params, suffix)
    target = work.model
    try:
        place = target.resolve()
    except (OSError, RuntimeError):
        raise ParameterError(f"save_path: {excerpt(target, 150)} is a link that leads nowhere; choose another place.") from None
    if place == local_path(params.model_path).resolve():
        raise ParameterError(f"save_path: {target} is the model that is to be pruned; choose another folder.")
    # A device is never read to its end.
    if target.exists() and not target.is_dir():
        raise ParameterError(f"save_path: {excerpt(target, 150)} exists and is no folder; choose another place.")
    for folder in place.parents:
        if (folder / "dvc.yaml").is_file() and place.is_relative_to(folder / "artifacts"):
            raise ParameterError(
                f"save_path: {excerpt(folder / 'artifacts', 150)} belongs to the pipeline; choose another folder."
            )
    new = [folder for folder in (work.root, *work.root.parents) if not folder.exists()]
    _make_folder(work.root)
    try:
        with in_use(work):
            clear_partials(work.root, alone=True)
            clear_partials(target.parent, target.name, alone=True)
            clear_partials(target, CARD, alone=True)
            if target.exists() and (foreign := foreign_file(work)):
                what = f"{excerpt(target, 100)} holds {excerpt(foreign)}, which this program did not write"
                raise ParameterError(f"save_path: {what}; choose another folder.")
            yield work
    finally:
        for folder in new:
            with suppress(OSError):  # It isn't empty.
                folder.rmdir()


def _place_of(params: Params, suffix: str) -> Workspace:
    source = local_path(params.model_path).resolve()
    name = source.name if source.is_dir() else params.model_path.replace("/", "--")
    return Workspace.beside(_target(params, f"{name}-{suffix}"))


def _target(params: Params, default: str) -> Path:
    """Return the absolute path of the result. Raises ParameterError for a path that names none."""
    target = local_path(params.save_path) if params.save_path else Path(default)
    if params.save_path and str(target).startswith("~"):
        raise ParameterError(f"save_path: {excerpt(target.parts[0])} is no user of this machine; give the whole path.")
    if not target.absolute().name:
        raise ParameterError(f"save_path: {target} can't be a result's folder; choose another one.")
    return target.absolute()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ParameterError(f"save_path: nothing can be written in {folder}; choose another place.")


def _deliver(work: Workspace, folder: Path) -> None:
    """Copy a step's output to the place of the result, and record it."""
    claim(work, sha256_below(folder))
    with new_folder(work.model) as copy:
        copy_content(folder, copy)
    claim_only_what_is_there(work)


def _main(action: Callable[[Params], None], description: str, **fixed: Any) -> NoReturn:
    arguments = sys.argv[1:]

    def work() -> None:
        config, overrides = _parse(arguments, description)
        for key, value in fixed.items():
            if overrides.get(key, value) != value:
                raise ParameterError(f"{key}: this command sets it to {value}; use run_replaceme for {overrides[key]}.")
        params = read_params(config, {**overrides, **fixed}, METHODS)
        silence_libraries(load=True)
        action(params)

    sys.exit(run(work, debug="--debug" in arguments))


def _parse(arguments: Sequence[str], description: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the config file and the overrides of a command line."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Every option is collected, so that one given twice is noticed, under whichever of its names.
    parser.add_argument("--config", action="append", default=argparse.SUPPRESS, metavar="FILE", help="YAML file of parameters")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name in FIELDS:
        flags = [f"--{name}", *(f"--{alias}" for alias, key in ALIASES.items() if key == name)]
        parser.add_argument(*flags, dest=name, action="append", default=argparse.SUPPRESS, metavar="VALUE", help=_help(name))
    for name in PUBLISHED_KEYS:
        parser.add_argument(f"--{name}", action="append", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(arguments)
    problems = []
    for word in unknown:
        if word.startswith("--"):
            name = word.lstrip("-").split("=")[0]
            hint = nearest(name, [*FIELDS, *ALIASES, *PUBLISHED_KEYS])
            problems.append(f"command line: '{excerpt(word)}' is not an option{hint}; see --help.")
    if unknown and not problems:
        problems.append(f"command line: '{excerpt(unknown[0])}' belongs to no option; see --help.")
    given = {name: list(dict.fromkeys(values)) for name, values in vars(known).items() if name != "debug"}
    for name, values in given.items():
        if len(values) > 1:
            first, second, *_ = map(excerpt, values)
            problems.append(f"command line: {name}: is given twice, as {first} and as {second}; keep one.")
    if problems:
        raise ParameterError(problems)
    config = Path(given.pop("config")[0]) if "config" in given else None
    return config, {name: _typed(name, value) for name, (value,) in given.items()}


def _help(name: str) -> str:
    """Return a parameter's sentence, with the values that it can name, what it belongs to, and its default."""
    default = "null" if FIELDS[name].default is None else FIELDS[name].default
    names = {"method": METHODS, "selection": CRITERIA}.get(name)
    one_of = f" One of {', '.join(names)}." if names else ""
    belongs = f" ({EFFECTS[name][0]})" if name in EFFECTS else ""
    return f"{FIELDS[name].description}{one_of}{belongs} [{default}]"


def _typed(name: str, value: str) -> Any:
    parsed, field = parse_value(value), FIELDS.get(name)
    if parsed is not None and field and field.annotation in (str, str | None):
        return value
    if name == "dataset" and not isinstance(parsed, list):
        return value
    if name == "tasks" and isinstance(parsed, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return parsed
