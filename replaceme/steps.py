"""The pipeline's stages as the console scripts run them, without DVC: in order; a stage whose stamp is still valid is skipped.

A stamp covers the code that the step loads, the versions of the packages that it computes with, the kind of device, the
parameters that it uses, and the content that it read and wrote: an interrupted run resumes where it stopped, a new α repeats
nothing before the solve, and a changed output is made again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from replaceme.base.compute import kind_of, resolve_device
from replaceme.base.cost import recorded
from replaceme.base.estimate import note
from replaceme.base.files import cache_folder, copy_content, new_folder, read_json, write_json
from replaceme.base.fingerprints import PACKAGE, sha256_below, sha256_of_code
from replaceme.base.params import Params
from replaceme.base.processes import run_step
from replaceme.base.progress import logger
from replaceme.base.shared import make_once
from replaceme.base.stage import COMPRESSION, Stage, still_to_go
from replaceme.base.workspace import Workspace
from replaceme.models.model_files import CARD
from replaceme.pipeline import (
    activations,
    baseline,
    calibrate,
    evaluate,
    export,
    generate,
    heal,
    plan,
    profile,
    repair,
    report,
    select,
    solve,
)

# In order (``replaceme.base.stage.ORDER``); without ``inputs`` and ``cost``, which the caller runs.
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        generate.STAGE,
        calibrate.STAGE,
        profile.STAGE,
        select.STAGE,
        plan.STAGE,
        activations.STAGE,
        solve.STAGE,
        repair.STAGE,
        heal.STAGE,
        export.STAGE,
        baseline.STAGE,
        evaluate.STAGE,
        report.STAGE,
    )
}
# Depends on the dense model only, so all results made from it share the output.
SHARED = ("baseline",)


@dataclass(frozen=True)
class Course:
    """All steps of a run, in order, and when it began, so that the log says how far it is."""

    names: Sequence[str]
    began: float = field(default_factory=time.monotonic)

    def place_of(self, name: str) -> str:
        """Return a step's place in words: ``stage 3 of 13: profile, 2:05 min so far``."""
        so_far = int(time.monotonic() - self.began)
        place = f"stage {self.names.index(name) + 1} of {len(self.names)}: {name}"
        return f"{place}, {so_far // 60}:{so_far % 60:02} min so far" if so_far else place


def run_steps(params: Params, work: Workspace, names: Sequence[str], course: Course | None = None) -> list[str]:
    """Run the steps whose stamp isn't valid, in order, and return their names.

    Args:
        params: the setting.
        work: where they read and write.
        names: the steps.
        course: the whole run that they belong to; None if they are all of it.
    """
    ran, course = [], course or Course(names)
    for name in names:
        step, stamp = STAGES[name], work.root / "steps" / f"{name}.json"
        key = _key(params, work, step)
        outputs = [*([work.path(step.writes)] if step.writes else []), *map(work.metric, step.metrics)]
        if name in COMPRESSION:
            outputs.append(work.cost(name))
        if _is_stamped(stamp, [key, _sums(outputs)]):
            logger.info("%s: unchanged since an earlier run", name)
            continue
        stamp.unlink(missing_ok=True)
        logger.info(course.place_of(name))
        if words := still_to_go(name, params, work, course.names):
            logger.info(words)
        if name in SHARED and step.writes:
            _run_once_for_all(name, key, work.path(step.writes), partial(_run, step, params, work))
        else:
            with recorded(work.cost(name)) if name in COMPRESSION else nullcontext():
                _run(step, params, work)
        write_json(stamp, [key, _sums(outputs)])
        ran.append(name)
    return ran


def _run(step: Stage, params: Params, work: Workspace) -> None:
    """Run a step, and keep what it took for later estimates."""
    began = time.monotonic()
    run_step(step, params, work)
    note(step.name, params, time.monotonic() - began)


def _run_once_for_all(name: str, key: str, output: Path, step: Callable[[], None]) -> None:
    """Copy a step's output from the user's cache; or run the step and copy its output there, for other results."""
    shared = cache_folder() / f"{name}s" / key

    def make() -> None:
        step()
        _copy(output, shared)

    if not make_once(shared, name, make):
        logger.info("%s: known from an earlier run", name)
        _copy(shared, output)


def _copy(source: Path, target: Path) -> None:
    with new_folder(target) as folder:
        copy_content(source, folder)


def _is_stamped(stamp: Path, content: list[Any]) -> bool:
    """Return whether a stamp holds this content; False for a damaged one."""
    try:
        return stamp.is_file() and bool(read_json(stamp) == content)
    except ValueError:
        return False


def _sums(paths: Sequence[Path]) -> list[dict[str, str]]:
    return [_content(path) if path.exists() else {} for path in paths]


def _content(path: Path) -> dict[str, str]:
    """Return the sums of what a step reads or writes, except a model's card, to which the scores are added later."""
    return {name: digest for name, digest in sha256_below(path).items() if name != CARD}


def _key(params: Params, work: Workspace, step: Stage) -> str:
    """Return the digest of everything that the step's output depends on."""
    content = {
        # The last digits differ between kinds of devices, and of processors.
        "device": kind_of(resolve_device(params.device)),
        "code": {part: sha256_of_code(PACKAGE / part) for part in (f"pipeline/{step.name}.py", *step.code)},
        "params": params.model_dump(include=set(step.params)),
        "reads": {artifact.place: _content(work.path(artifact)) for artifact in step.reads},
        "figures": {name: sha256_below(work.metric(name)) for name in step.figures},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
