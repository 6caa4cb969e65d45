"""Start the processes that share a run, or take those that ``torchrun`` has started.

``processes: N`` starts the same command N times by torch's elastic launcher, as ``torchrun --nproc-per-node N`` does. The first
process (rank 0) runs the program. Where it comes to a stage that can be shared, it broadcasts the stage's function and its
arguments, and all processes call it (``replaceme.base.group.sharing``). Such a function returns before it writes in all of them
but the first (``replaceme.base.ranks.rank``).
"""

import ctypes
import logging
import os
import platform
import signal
import sys
import uuid
from collections.abc import Callable
from typing import Any

from replaceme.base.errors import ResourceError
from replaceme.base.progress import logger
from replaceme.base.ranks import rank, world_size

# prctl(2): the signal for a process whose parent has ended.
PR_SET_PDEATHSIG = 1


def run_in_processes(count: int, action: Callable[[], object], device: str) -> None:
    """Do the action in the first of several processes; the others join it in each ``call_in_all``.

    Args:
        count: the number of processes on this machine, where torch's launcher has not started any.
        action: what the first process does.
        device: the parameter.
    """
    if world_size() == 1:
        action() if count == 1 else launch(count)
        return
    from replaceme.base.group import broadcast, process_group

    if platform.system() == "Linux":
        # The launcher ends all processes if one fails, and if it gets a signal; not if it is killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    with process_group(device):
        if rank() == 0:
            logger.setLevel(logging.INFO)
            action()
            broadcast(None)
        else:
            while call := broadcast():
                _call_sharded(*call)


def call_in_all(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in all processes, each on its own part of the work; the arguments are pickled."""
    from replaceme.base.group import broadcast

    _call_sharded(*broadcast((function, *arguments)))


def _call_sharded(function: Callable[..., None], *arguments: Any) -> None:
    from replaceme.base.group import sharing

    with sharing():
        function(*arguments)


def launch(count: int) -> None:
    """Run this process's command in so many processes on this machine, and exit with the code of the first one that failed.

    Raises:
        ResourceError: one was ended from outside; the launcher has ended the others.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What the launcher has to say, the processes or the error below say.
    logging.disable(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, logs_specs=DefaultLogsSpecs(os.devnull),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as ended:
        if ended.sigval == signal.SIGINT:
            raise KeyboardInterrupt from ended
        sys.exit(128 + ended.sigval)
    except ChildFailedError as failed:
        number, failure = failed.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        raise ResourceError(
            f"processes: rank {number} of {count} was ended by {signal.Signals(-failure.exitcode).name}, perhaps for lack of "
            "memory; run again: finished stages are kept."
        ) from None
