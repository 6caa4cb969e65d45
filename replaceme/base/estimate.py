"""How long a run will still take, from what its stages took before; nothing is said where nothing is known.

What each stage took on this machine is kept in the user's cache folder, apart for each load: the model, the text, and all else
that decides how much work there is. Where this machine has not run all the stages that are still to come, the times in the
repository's metrics/compression.json stand for them, if its run had the same load, at this machine's pace: the ratio of the
times of the stages that both have run.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from replaceme.base.files import cache_folder, rounded, write_json
from replaceme.base.machine import processor
from replaceme.base.parameters import Params
from replaceme.base.workspace import Workspace

LOAD = (
    "model_path", "revision", "dataset", "dataset_size", "max_length", "pack", "batch_size", "dtype", "device", "device_map",
    "threads", "processes", "use_4bit", "memory", "method", "transform", "selection", "layers_to_skip", "remove",
    "tolerated_loss", "min_distance_layer", "max_distance_layer", "num_A", "repair", "heal_epochs", "tasks", "eval_tokens",
    "eval_batch_size", "eval_dtype", "solver", "epochs", "max_iterations", "llm_streamline_epochs", "llm_streamline_form",
    "laco_interval",
)  # fmt: skip
# Seconds: a pace from less says little, and less than this is soon over.
LEAST = 60.0


def load_of(params: Params) -> str:
    """Return the digest of the parameters that decide how much work a run is."""
    values = params.model_dump(include=set(LOAD))
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def note(stage: str, params: Params, seconds: float) -> None:
    """Keep what a stage took on this machine."""
    times = times_here(params) | {stage: rounded(seconds, 4)}
    with suppress(OSError):  # nothing but an estimate is lost
        write_json(_file(params), {"settings": load_of(params), "stage_seconds": times})


def times_here(params: Params) -> dict[str, float]:
    """Return what the stages took on this machine with this load, as far as they have run."""
    return _times(_file(params), params)


def to_go(names: Sequence[str], before: Sequence[str], params: Params, work: Workspace) -> str:
    """Return how long these stages will take, in words; an empty text if that isn't known, or less than a minute.

    Args:
        names: the stages that are still to come.
        before: those of them that make the pruned model, if the times of all are not known.
        params: the run's.
        work: its folder.
    """
    here, there = times_here(params), _times(work.metric("compression"), params)
    shared = here.keys() & there.keys()
    measured, recorded = (sum(times[name] for name in shared) for times in (here, there))
    if recorded >= LEAST:
        here = {name: seconds * measured / recorded for name, seconds in there.items()} | here
    for wanted, goal in ((names, "to go"), (before, "to the pruned model")):
        if wanted and here.keys() >= set(wanted) and (seconds := sum(here[name] for name in wanted)) >= LEAST:
            return f"about {round(seconds / 60)} min {goal}, if no stage is skipped"
    return ""


def _file(params: Params) -> Path:
    key = hashlib.sha256(f"{load_of(params)} {processor()}".encode()).hexdigest()
    return cache_folder() / "times" / f"{key}.json"


def _times(path: Path, params: Params) -> dict[str, float]:
    """Return the seconds of each stage in a file, if it is of the same load; nothing from a file that can't be read."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("settings") != load_of(params):
        return {}
    times = [found.get(key) for key in ("stage_seconds", "judgement_seconds")]
    pairs = [pair for each in times if isinstance(each, dict) for pair in each.items()]
    return {name: value for name, value in pairs if isinstance(value, int | float) and 0 <= value < inf}
