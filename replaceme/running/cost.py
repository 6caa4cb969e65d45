"""The cost of a stage: seconds and peak memory.

Times vary, so they are no output of a stage: two runs on one machine write the same bytes. Without DVC, the cost of a stage
is in its record in the work folder (``replaceme.pipeline.runner``). A stage of the pipeline keeps it in the user's cache
folder, under a digest of its parameters and of all that it wrote: a stage that DVC restores has the cost of the run that
computed it, if that was here, and no setting is shown the cost of another.

The seconds run from the stage's begin to the last byte written, without the start of the interpreter and the imports; of
several processes, they are those of the first. The memory is the peak resident set of the process, with libraries and pages
of mapped files; without DVC, one process runs all stages, so there it is the peak so far. A stage that resumes after an
interruption counts only its last part.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from replaceme.base.files import cache_folder, round_floats, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.running.machine import machine

STATUS = Path("/proc/self/status")
Cost = dict[str, Any]


@contextmanager
def cost_measurement() -> Iterator[Cost]:
    """Yield a dict that has the cost of the block after its end.

    It has ``seconds``, ``peak_memory_bytes``, ``machine`` (in words) and, if an accelerator was used, ``peak_cuda_bytes``: the
    peak of torch's allocated memory there, summed over all devices.
    """
    cost: Cost = {}
    began = time.perf_counter()
    yield cost
    _synchronize()
    figures = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(), **_peak_cuda()}
    cost.update(round_floats(figures, 4), machine=machine())


def keep_cost(stage: str, params: Params, cost: Cost) -> None:
    """Keep the cost of a stage of the pipeline in the current folder, whose outputs are written."""
    try:
        write_json(_kept(stage, params), cost)
    except OSError as failure:  # the stage itself is done
        logger.warning("cost: that of the stage %s is not kept: %s", stage, failure)


def kept_cost(stage: str, params: Params) -> Cost | None:
    """Return the cost of the run that made a stage's outputs in the current folder; None if it was not here."""
    try:
        cost: Cost = json.loads(_kept(stage, params).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cost


def _kept(stage: str, params: Params) -> Path:
    """Return the file for a stage's cost. Raises OSError if an output is missing."""
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    outputs = [*declared["outs"], *(path for metric in declared.get("metrics", []) for path in metric)]
    content = {
        "params": params.model_dump(include=set(declared["params"])),
        "outputs": {path: sha256_below(Path(path)) for path in outputs},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "costs" / stage / f"{digest}.json"


def peak_memory() -> int:
    """Return the peak resident set of this process so far, in bytes."""
    try:  # On Linux, ru_maxrss includes the peak of the parent process.
        return 1024 * int(STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _synchronize() -> None:
    if "torch" in sys.modules:
        from replaceme.base.accelerators import synchronize_all

        synchronize_all()


def _peak_cuda() -> dict[str, int]:
    # Don't load torch for a stage that doesn't use it.
    if "torch" not in sys.modules:
        return {}
    from replaceme.base.accelerators import peak_bytes

    return {"peak_cuda_bytes": peak} if (peak := peak_bytes()) else {}
