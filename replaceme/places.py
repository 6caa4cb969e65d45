"""The place of a result, outside of the pipeline: where it goes, whose it is, and where a finished one lies.

Intermediate results lie beside the result, in ``<save_path>.work``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from replaceme.base.claims import claim, claim_only_what_is_there, foreign_file, in_use
from replaceme.base.errors import ParameterError, excerpt
from replaceme.base.files import clear_partials, copy_content, local_path, new_folder, read_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.params import Params
from replaceme.base.workspace import Workspace

# What every file of scores has, and none of another program's; and more bytes than one has.
SCORES, LARGEST_SCORES = {"perplexity", "accuracy", "parameters", "disk_bytes"}, 1 << 24


def suffix_of(params: Params) -> str:
    """Return the part of a result folder's name that distinguishes results of one model."""
    tolerated = "" if params.tolerated_loss is None else f"-within-{params.tolerated_loss:g}"
    share = "" if params.remove is None else f"-{params.remove.replace('%', '-percent').replace(' ', '-')}"
    return f"{params.method}-{params.layers_to_skip}{tolerated}{share}"


@contextmanager
def claimed(params: Params, suffix: str) -> Iterator[Workspace]:
    """Yield the paths of the result and of the intermediate results beside it, which are this process's alone in the block.

    What killed runs left unfinished there is deleted. The folders that this call makes are deleted again if nothing is written.

    Args:
        params: ``save_path`` is the place of the result.
        suffix: appended to the model's name for the place, if ``save_path`` is None.

    Raises:
        ParameterError: another process works there, or the place holds files that this program didn't write, or isn't writable.
    """
    from replaceme.models.model_files import CARD

    work = place_of(params, suffix)
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


def place_of(params: Params, suffix: str) -> Workspace:
    """Return the paths of a result, which is ``<model>-<suffix>`` in the current folder if ``save_path`` is None."""
    source = local_path(params.model_path).resolve()
    name = source.name if source.is_dir() else params.model_path.replace("/", "--")
    return Workspace.beside(_target(params, f"{name}-{suffix}"))


def result_of(params: Params) -> Workspace:
    """Return the paths of an existing result, the pipeline's or a console script's."""
    if params.save_path in (None, "artifacts/model") and (work := Workspace()).model.is_dir():
        return work
    work = place_of(params, suffix_of(params))
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
            held = read_json(target) if target.is_file() and target.stat().st_size < LARGEST_SCORES else None
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict) or not held.keys() >= SCORES:
            raise ParameterError(f"save_path: {excerpt(target)} exists and holds no scores; choose another file.")
    _make_folder(target.parent)
    return target


def deliver(work: Workspace, folder: Path) -> None:
    """Copy a step's output to the place of the result, and record it."""
    claim(work, sha256_below(folder))
    with new_folder(work.model) as copy:
        copy_content(folder, copy)
    claim_only_what_is_there(work)


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
