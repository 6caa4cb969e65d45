"""The cost of the compression: seconds and peak memory of each stage, written as an output of that stage.

A stage that DVC restores from its cache, or that several methods share, has the cost of the run that computed it. No stage of
the compression reads these files: times vary and must not cause a re-run.

The seconds run from reading the parameters to the last byte written; the start of the interpreter and the imports, some seconds
per process, are not included. The memory is the peak resident set of the process, with libraries and pages of mapped files; the
console scripts run all steps in one process, so there it is the peak so far. A stage that resumes after an interruption counts
only its last part.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replaceme.base.files import rounded, write_json

STATUS = Path("/proc/self/status")


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Write the cost of the block to ``path``, unless the block fails.

    The file has ``seconds``, ``peak_memory_bytes`` and, if CUDA was used, ``peak_cuda_bytes``: the peak of torch's allocated
    memory, summed over all devices.
    """
    began = time.perf_counter()
    yield
    figures = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(), **_peak_cuda()}
    write_json(path, rounded(figures, 4))


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
