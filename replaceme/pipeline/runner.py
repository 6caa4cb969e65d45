"""The stages without DVC: in order, in one work folder; a stage that finished with the same key is skipped.

The key is a digest of all that a stage's output depends on: its parameters, the content of what it reads (the versions of the
packages among it), the library's code and the kind of device. A stage's record, ``stages/NAME.json`` in the work folder, has
the key, the sums of what was written, and the cost. It is written last. So a run that was killed goes on with the stage in
which that happened, a new α repeats nothing before the solve, and an output that was changed is made again.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from replaceme.base.errors import ResourceError
from replaceme.base.files import cache_folder, copy_tree, new_folder, read_json, write_json
from replaceme.base.fingerprints import code_digest, sha256_below
from replaceme.base.locks import build_once
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.models.devices import kind_of, resolve_device
from replaceme.models.model_files import CARD
from replaceme.running.cost import cost_measurement
from replaceme.running.stage import ORDER, Stage, call_stage
from replaceme.running.workspace import Workspace

# Each stage has a file of its name in this folder.
STAGES: Mapping[str, Stage] = {name: import_module(f"replaceme.pipeline.{name}").STAGE for name in ("inputs", *ORDER)}


def run_stages(params: Params, work: Workspace, names: Sequence[str], then: Sequence[Stage] = ()) -> list[str]:
    """Run the stages that have not finished with the same key, in order, and return their names.

    Args:
        params: the settings.
        work: where they read and write.
        names: the stages; ``inputs``, which always runs, is not counted.
        then: stages that are none of the pipeline's, and follow them.
    """
    ran, began = [], time.monotonic()
    stages = [*map(STAGES.__getitem__, names), *then]
    counted = [stage.name for stage in stages if not stage.always]
    for stage in stages:
        if stage.always:
            call_stage(stage, params, work)
            continue
        key, record = stage_key(stage, params, work), work.record(stage.name)
        if _is_finished(stage, key, work):
            logger.info("%s: unchanged since an earlier run", stage.name)
            continue
        record.unlink(missing_ok=True)
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        so_far = f", {minutes}:{seconds:02} min so far" if minutes or seconds else ""
        logger.info("stage %d of %d: %s%s", counted.index(stage.name) + 1, len(counted), stage.name, so_far)
        with cost_measurement() as cost:
            _run_stage(stage, key, params, work)
        write_json(record, {"key": key, "written": _hash_outputs(stage, work), "cost": cost})
        ran.append(stage.name)
    return ran


def stage_key(stage: Stage, params: Params, work: Workspace) -> str:
    """Return the digest (sha256, hex) of all that a stage's output depends on."""
    content = {
        # The last digits differ between kinds of devices, and of processors.
        "device": kind_of(resolve_device(params.device)),
        "code": code_digest(),
        "params": params.model_dump(include=set(stage.params)),
        "reads": {artifact: _hash_files(work.artifact(artifact)) for artifact in stage.reads},
        "figures": {name: _hash_files(work.metric(name)) for name in stage.figures},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _run_stage(stage: Stage, key: str, params: Params, work: Workspace) -> None:
    """Run a stage. The scores of the dense model, which all its results share, are copied from the user's cache once known."""
    if stage.name != "baseline":
        call_stage(stage, params, work)
        return
    shared = cache_folder() / "baselines" / key

    def build() -> None:
        call_stage(stage, params, work)
        _copy(work.baseline, shared)

    if not build_once(shared, stage.name, build):
        logger.info("%s: known from an earlier run", stage.name)
        _copy(shared, work.baseline)


def _copy(source: Path, target: Path) -> None:
    with new_folder(target) as folder:
        copy_tree(source, folder)


def _is_finished(stage: Stage, key: str, work: Workspace) -> bool:
    try:
        record = read_json(work.record(stage.name))
        return bool(record["key"] == key and record["written"] == _hash_outputs(stage, work))
    except (ResourceError, ValueError, KeyError):  # there is none, or a crash of the machine has damaged it
        return False


def _hash_outputs(stage: Stage, work: Workspace) -> list[dict[str, str]]:
    """Return the sums of what a stage has written; empty ones of what is missing."""
    paths = [*([work.artifact(stage.writes)] if stage.writes else []), *map(work.metric, stage.metrics)]
    return [_hash_files(path) if path.exists() else {} for path in paths]


def _hash_files(path: Path) -> dict[str, str]:
    """Return the sums of what a stage reads or writes; none of a model's card, to which the scores are added later."""
    return {name: "" if name == CARD else digest for name, digest in sha256_below(path).items()}
