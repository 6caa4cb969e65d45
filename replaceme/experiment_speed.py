"""How fast the pruned models of experiments are: each taken out of DVC's cache, and measured against its dense model.

A model is known by DVC's own sums of its weights, config and code, so that one that was measured before is not even taken out.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from replaceme.errors import ReplaceMeError, ResourceError
from replaceme.files import PARTIAL, read_json, rounded, write_json
from replaceme.methods import METHODS
from replaceme.models import WEIGHT_FILES, Model, recorded_model
from replaceme.params import Params, read_params
from replaceme.progress import logger
from replaceme.speed import measure_speed, setting_of
from replaceme.workspace import Workspace

Record = dict[str, Any]
PLACE = Workspace()
# What is taken out: the model, what it was made from, and the settings.
MODEL, DENSE, PARAMS = PLACE.model.as_posix(), PLACE.model_input.as_posix(), "params.yaml"


def speeds_of(experiments: Sequence[Mapping[str, Any]], memory: Path) -> list[Record | None]:
    """Return the times of each experiment as ``measure_speed`` does; None, and a sentence, where there is no model to measure.

    Args:
        experiments: ``experiment`` (its name) and ``revision``.
        memory: JSON file of what was measured before, in this setting and on this device; each new time is added at once.
    """
    known: list[Record] = read_json(memory) if memory.is_file() else []
    found: list[Record | None] = []
    for number, each in enumerate(experiments, 1):
        name = each["experiment"]
        try:
            record, new = _speed(str(each["revision"]), str(name), known, memory.parent)
        except ReplaceMeError as problem:
            logger.warning("%s: its speed is left out: %s", name, problem)
            found.append(None)
            continue
        if new:
            known.append(record)
            write_json(memory, known)
        found.append(record)
        speedups = record["prefill_seconds"]["speedup"], record["decode_seconds_per_token"]["speedup"]
        how = "measured" if new else "known"
        logger.info("%s (%d of %d): prefill × %.2f, decoding × %.2f, %s", name, number, len(experiments), *speedups, how)
    return found


def _speed(revision: str, name: str, known: Sequence[Record], beside: Path) -> tuple[Record, bool]:
    """Return the times of one experiment, and whether they are new."""
    files = _opened(revision)
    with TemporaryDirectory(dir=beside.absolute().parent, prefix=f"{beside.name}-", suffix=PARTIAL) as folder:
        place = Path(folder)
        sums = _of_cache(lambda: _sums(files), name)
        _of_cache(lambda: files.get(PARAMS, str(place / PARAMS)), name)
        params = read_params(place / PARAMS, methods=METHODS)
        wanted = {"files": sums, **setting_of(params)}
        for record in known:
            if {key: record.get(key) for key in wanted} == wanted:
                return record, False
        _of_cache(lambda: files.get(MODEL, str(place / "model"), recursive=True), name)
        _of_cache(lambda: files.get(DENSE, str(place / "dense.json")), name)
        times = _measured(params, place, name)
    return rounded({"experiment": name, **times, **wanted}, 4), True


def _measured(params: Params, place: Path, name: str) -> Record:
    return measure_speed(params, recorded_model(params, place / "dense.json"), Model(place / "model", name))


def _opened(revision: str) -> Any:
    """Return the files of a revision: what git has, and what DVC's cache has."""
    from dvc.api import DVCFileSystem

    return DVCFileSystem(rev=revision)


def _sums(files: Any) -> dict[str, str]:
    """Return DVC's sums of what a model computes with: file → MD5."""
    inside = {path: Path(path).name for path in files.find(MODEL)}
    return {
        name: files.info(path)["md5"]
        for path, name in sorted(inside.items())
        if any(Path(name).match(pattern) for pattern in WEIGHT_FILES)
    }


def _of_cache(work: Callable[[], Any], name: str) -> Any:
    try:
        return work()
    except Exception as failure:  # DVC has errors of many kinds for what its cache lacks
        raise ResourceError(
            f"its model is not in DVC's cache ({type(failure).__name__}); `dvc exp apply {name}` and `dvc repro` make it again."
        ) from failure
