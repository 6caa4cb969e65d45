"""The cost of the compression: seconds and peak memory of each of its stages.

Times vary, so they are no output of a stage: two runs on one machine write the same bytes. A stage of the pipeline keeps its
cost in the user's cache folder, under a digest of all that dvc.yaml says it depends on and writes. So a stage that DVC restores
has the cost of the run that computed it, if that was here, and no setting is shown the cost of another. A console script keeps
the cost of a step beside the step's output.

The seconds run from the stage's begin to the last byte written; the start of the interpreter and of other processes, and the
imports, some seconds per process, are not included. Of several processes, it is the cost of the first. The memory is the peak
resident set of the process, with libraries and pages of mapped files; the console scripts run all steps in one process, so
there it is the peak so far. A stage that resumes after an interruption counts only its last part.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from replaceme.base.files import cache_folder, rounded, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.machine import machine
from replaceme.base.parameters import Params
from replaceme.base.progress import logger

STATUS = Path("/proc/self/status")
PIPELINE_FILE = Path("dvc.yaml")
Cost = dict[str, Any]


@contextmanager
def measured() -> Iterator[Cost]:
    """Yield a dict that has the cost of the block after its end.

    It has ``seconds``, ``peak_memory_bytes``, ``machine`` (in words) and, if CUDA was used, ``peak_cuda_bytes``: the peak of
    torch's allocated memory, summed over all devices.
    """
    cost: Cost = {}
    began = time.perf_counter()
    yield cost
    figures = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(), **_peak_cuda()}
    cost.update(rounded(figures, 4), machine=machine())


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Write the cost of the block to ``path``, unless the block fails."""
    with measured() as cost:
        yield
    write_json(path, cost)


def keep(stage: str, params: Params, cost: Cost) -> None:
    """Keep the cost of a stage of the pipeline in the current folder, whose outputs are written."""
    try:
        write_json(kept(stage, params), cost)
    except OSError as failure:  # the stage itself is done
        logger.warning("cost: that of the stage %s is not kept: %s", stage, failure)


def kept(stage: str, params: Params) -> Path:
    """Return the file that has the cost of the run that made a stage's outputs in the current folder, if it was here.

    Its name is the digest of the parameters that dvc.yaml lists for the stage, and of the content of the files that it lists.

    Raises:
        OSError: one of these files is missing.
    """
    declared = _stages(PIPELINE_FILE.read_text(encoding="utf-8"))[stage]
    metrics = [path for metric in declared.get("metrics", []) for path in metric]
    files = {path: _content(Path(path)) for path in (*declared["deps"], *declared["outs"], *metrics)}
    content = {"params": params.model_dump(include=set(declared["params"])), "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "costs" / stage / f"{digest}.json"


@cache
def _stages(pipeline: str) -> dict[str, Any]:
    """Return the stages that dvc.yaml declares; read once for the costs of a run's dozen stages."""
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(pipeline)["stages"]
    return stages


def _content(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in sha256_below(path).items() if not name.endswith(".pyc")}


def known(path: Path) -> Cost | None:
    """Return a cost that was written to ``path``; None if there is no file, or none that holds a cost."""
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(cost, dict):
        return None
    # What was kept by an earlier version names no machine.
    numbers = all(isinstance(cost[key], int | float) and 0 <= cost[key] < inf for key in cost.keys() - {"machine"})
    return (
        cost
        if numbers and isinstance(cost.get("machine", ""), str) and {"seconds", "peak_memory_bytes"} <= cost.keys()
        else None
    )


def peak_memory() -> int:
    """Return the peak resident set of this process so far, in bytes."""
    try:  # On Linux, ru_maxrss includes the peak of the parent process.
        return 1024 * int(STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _peak_cuda() -> dict[str, Any]:
    # Don't load torch for a stage that doesn't use it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_cuda_bytes": sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))}
