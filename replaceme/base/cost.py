"""What the compression cost when it really ran: seconds and peak memory of each stage, as an output of that stage.

A stage that DVC restores, or that several methods share, so brings the cost of the run that made it. No stage of the
compression reads these files: times vary, and must make nothing run again.

The seconds go from the reading of the parameters to the last byte written; the interpreter's start and the imports, some
seconds of each process, are not in them. The memory is the largest resident set of the process, with the libraries and the
pages of mapped files in it; under the console scripts, which run all steps in one process, the largest so far.
A stage that goes on from where it was interrupted counts its last part alone.
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
    """Write to ``path`` what the block took, unless it fails.

    The file has ``seconds``, ``peak_memory_bytes`` and, where CUDA was used, ``peak_cuda_bytes``: what torch had allocated
    at most, over all devices.
    """
    began = time.perf_counter()
    yield
    figures = {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(), **_peak_cuda()}
    write_json(path, rounded(figures, 4))


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    try:  # Linux counts that of the process which started this one into ru_maxrss
        return 1024 * int(STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _peak_cuda() -> dict[str, Any]:
    # A stage that computes nothing need not load torch for this.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_cuda_bytes": sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))}
