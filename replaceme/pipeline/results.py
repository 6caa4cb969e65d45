"""Where a result goes without DVC, and whose it is: one process works there, and it replaces only what this program wrote.

Intermediate results lie next to the result, in ``<save_path>.work``, with a record of the files that this program put into
the result (``Workspace.record_own_files``). A folder with any other file, or with a file that was changed, is refused. So is a
finished result of another model, text or setting, unless the user says to overwrite it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from replaceme.base.errors import ParameterError, excerpt, quote
from replaceme.base.files import clear_partials, copy_tree, local_path, new_folder, read_json
from replaceme.base.locks import holding_lock
from replaceme.base.parameters import Params
from replaceme.running.workspace import Workspace

# What every file of scores has, and none of another program's.
SCORES = {"perplexity", "accuracy", "parameters", "disk_bytes"}
LOCK = "in-use.lock"
# What a result was made of, or is being made of, in its work folder.
MADE_OF = "made_of.json"
MOST_NAMED = 3
# Measured times, in ``Workspace.speed`` and among the comparison of experiments.
SPEED_FILE = "speed.json"


def result_name(params: Params) -> str:
    """Return the part of a result folder's name that distinguishes results of one model."""
    tolerated = "" if params.tolerated_loss is None else f"-within-{params.tolerated_loss:g}"
    share = "" if params.remove is None else f"-{params.remove.replace('%', '-percent').replace(' ', '-')}"
    only_edits = "-transform" if params.save_transform_only else ""
    return f"{params.method}-{params.layers_to_skip}{tolerated}{share}{only_edits}"


def result_paths(params: Params, name: str) -> Workspace:
    """Return the paths of a result, which is ``<model>-<name>`` in the current folder if ``save_path`` is None."""
    source = Path(os.path.realpath(local_path(params.model_path)))
    model = source.name if source.is_dir() else params.model_path.replace("/", "--")
    return Workspace.for_result(_target(params, f"{model}-{name}"))


@contextmanager
def exclusive_result(params: Params, name: str) -> Iterator[Workspace]:
    """Yield the paths of a result, which are this process's alone in the block.

    Args:
        params: ``save_path`` is the folder of the result.
        name: as ``result_paths``.

    Raises:
        ParameterError: another process works there, or the folder isn't writable, or holds files of another program.
    """
    work = result_paths(params, name)
    _check_target(work, params)
    _make_folder(work.root)
    with result_lock(work):
        try:
            partials = [path for path in work.model.parent.iterdir() if path.name.startswith(f"{work.model.name}.")]
            clear_partials([*work.root.rglob("*"), *partials], own=True)
            if work.model.exists() and (foreign := work.find_foreign_file()):
                what = f"{excerpt(work.model, 100)} holds {excerpt(foreign)}, which this program did not write"
                raise ParameterError(f"save_path: {what}; choose another folder.")
            yield work
        finally:
            # A run that is refused leaves nothing.
            if [path.name for path in work.root.iterdir()] == [LOCK]:
                shutil.rmtree(work.root)


def result_lock(work: Workspace) -> AbstractContextManager[None]:
    """Return the lock of a result, which has a work folder. Raises ParameterError if another process holds it."""

    def stop() -> None:
        raise ParameterError(f"save_path: {work.model} is in use by another process; wait for it, or choose another folder.")

    return holding_lock(work.root / LOCK, stop)


def _check_target(work: Workspace, params: Params) -> None:
    """Raise ParameterError for a path that is no folder, the dense model's or the pipeline's."""
    # Unlike ``Path.resolve``, no error for links that form a loop.
    target, resolved = work.model, Path(os.path.realpath(work.model))
    if os.path.lexists(target) and not target.is_dir():
        raise ParameterError(f"save_path: {excerpt(target, 150)} exists and is no folder; choose another one.")
    if resolved == Path(os.path.realpath(local_path(params.model_path))):
        raise ParameterError(f"save_path: {target} is the model that is to be pruned; choose another folder.")
    for folder in resolved.parents:
        if (folder / "dvc.yaml").is_file() and resolved.is_relative_to(folder / "artifacts"):
            artifacts = excerpt(folder / "artifacts", 150)
            raise ParameterError(f"save_path: {artifacts} belongs to the pipeline; choose another folder.")


def check_finished(work: Workspace, made_of: Mapping[str, Any]) -> None:
    """Raise ParameterError if a finished result was made of something else, and name it.

    ``made_of`` is what it would be made of now: parameters, and fingerprints of model and texts, as JSON has them.
    """
    file = work.root / MADE_OF
    earlier = read_json(file) if file.is_file() else {}
    if "heal_dataset" in earlier:
        # None, in an earlier form.
        earlier["heal_dataset"] = earlier["heal_dataset"] or {}
    differences = [
        f"another {key}"
        if key in ("model", "text", "heal_dataset")
        else f"{key} {quote(earlier.get(key))}, not {quote(made_of.get(key))}"
        for key in {**earlier, **made_of}
        if earlier.get(key) != made_of.get(key)
    ]
    if differences:
        more = f" and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
        what = f"with {'; '.join(differences[:MOST_NAMED])}{more}" if earlier else "by another version"
        raise ParameterError(
            f"save_path: {excerpt(work.model, 150)} is finished, and was made {what}; choose another folder, or replace it: "
            "--overwrite, in Python overwrite=True."
        )


def publish_folder(work: Workspace, folder: Path) -> None:
    """Copy a stage's output to the folder of the result."""
    work.record_own_files(folder)
    with new_folder(work.model) as copy:
        copy_tree(folder, copy)


def publish_file(work: Workspace, file: Path, name: str) -> None:
    """Copy a stage's file into the result."""
    work.record_own_files(file)
    # Not copied into the result directly: a copy that is killed must not leave half a file there.
    copy = work.root / name
    shutil.copyfile(file, copy)
    os.replace(copy, work.model / name)


def existing_result(params: Params) -> Workspace:
    """Return the paths of an existing result, the pipeline's or that of a run without DVC."""
    if params.save_path in (None, "artifacts/model") and (work := Workspace()).model.is_dir():
        return work
    work = result_paths(params, result_name(params))
    if not work.model.is_dir() or not work.model_input.is_file():
        raise ParameterError(
            f"save_path: there is no pruned model in {work.model}; run `dvc repro` or `replaceme prune` first."
        )
    return work


def scores_file(params: Params, name: str) -> Path:
    """Return the file for the scores. Raises ParameterError if it holds something else or isn't writable."""
    target = _target(params, name.replace("/", "--"))
    if params.save_path is None or target.is_dir():
        target = target.with_name(f"{target.name}.evaluation.json")
    if target.exists():
        try:
            content = read_json(target) if target.is_file() else None
        except ValueError:
            content = None
        if not isinstance(content, dict) or not content.keys() >= SCORES:
            raise ParameterError(f"save_path: {excerpt(target)} exists and holds no scores; choose another file.")
    _make_folder(target.parent)
    return target


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
        raise ParameterError(f"save_path: nothing can be written in {folder}; choose another folder.")
