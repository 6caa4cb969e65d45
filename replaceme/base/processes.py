"""Start the processes that share a run, or take those that ``torchrun`` has started, and end all of them when one ends.

``processes: N`` starts the same command N times by torch's elastic launcher, as ``torchrun --nproc-per-node N`` does. The first
of them (rank 0) does the work as ever. The others serve it: they wait until it comes to a stage that is shared, run that stage
with it, read the same files, and write into a folder that is thrown away (checkpoints into the run's own).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Protocol

from replaceme.base.errors import ResourceError
from replaceme.base.files import temporary_folder
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.base.ranks import LAUNCHED, rank, started
from replaceme.base.workspace import Artifact, Workspace

# prctl(2): the signal for a process whose parent has ended.
PR_SET_PDEATHSIG = 1


class Step(Protocol):
    """What this module needs of a stage (``replaceme.base.stage``)."""

    @property
    def name(self) -> str: ...
    @property
    def run(self) -> Callable[[Params, Workspace], None]: ...
    @property
    def reads(self) -> tuple[Artifact, ...]: ...
    @property
    def shared(self) -> Callable[[Params, Workspace], bool]: ...


def in_processes(
    count: int, steps: Callable[[], Mapping[str, Step]], action: Callable[[], object], device: str = "auto"
) -> None:
    """Do the action, with so many processes for its shared stages.

    Args:
        count: the number of processes.
        steps: returns the stages that the action may run, by name.
        action: runs them by ``run_step``, in the first process.
        device: the parameter.
    """
    if started() == 1:
        logger.setLevel(logging.INFO)
        action() if count == 1 else launch(count)
        return
    from replaceme.base import group

    if LAUNCHED in os.environ and platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    with group.joined(device) as own:
        if own:
            _serve(steps())
            return
        logger.setLevel(logging.INFO)
        action()
        group.told(None)


def run_step(step: Step, params: Params, work: Workspace) -> None:
    """Run a stage, with all processes of the group if it is shared."""
    if started() == 1 or not step.shared(params, work):
        step.run(params, work)
        return
    from replaceme.base import group

    place = [str(path.absolute()) for path in (work.root, work.model)]
    logger.info("%s: shared by %d processes", step.name, started())
    group.told({"step": step.name, "params": params.model_dump_json(), "place": place})
    with group.sharing():
        step.run(params, work)


def _serve(steps: Mapping[str, Step]) -> None:
    """Run the shared stages that the first process names, until it is done."""
    from replaceme.base import group

    while (task := group.told()) is not None:
        step, params = steps[task["step"]], Params.model_validate_json(task["params"])
        root, model = map(Path, task["place"])
        with _elsewhere(Workspace(root, model), step) as own, group.sharing():
            step.run(params, own)


@contextmanager
def _elsewhere(work: Workspace, step: Step) -> Iterator[Workspace]:
    """Yield a workspace with the files that a stage reads, in a folder that is deleted after the block; nothing is printed."""
    folder = work.artifact("")
    with temporary_folder(f"rank{rank()}-", folder) as root:
        own = Workspace(root, served=work)
        for artifact in step.reads:
            place = own.path(artifact)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(work.path(artifact).absolute())
        # What a stage prints, the first process prints.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield own


def launch(count: int) -> None:
    """Run this process's command in so many processes on this machine, and exit with the code of the first one that failed.

    Raises:
        ResourceError: one was ended from outside; the others are ended too.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, logs_specs=DefaultLogsSpecs(os.devnull),
    )  # fmt: skip
    os.environ[LAUNCHED] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as ended:
        if ended.sigval == signal.SIGINT:
            raise KeyboardInterrupt from ended
        sys.exit(128 + ended.sigval)
    except ChildFailedError as failed:
        # The others have been ended by the launcher.
        own = [(number, each.exitcode) for number, each in failed.failures.items() if each.exitcode != -signal.SIGTERM]
        number, code = next(iter(own), (0, -signal.SIGTERM))
        if code > 0:  # it has said why
            sys.exit(code)
        raise ResourceError(
            f"processes: rank {number} of {count} was ended by {signal.Signals(-code).name}, perhaps for lack of memory; run "
            "again: finished stages are kept."
        ) from None
    finally:
        del os.environ[LAUNCHED]
