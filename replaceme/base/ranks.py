"""Which of a run's processes this one is, as torch's launcher says in the environment (``torchrun``, or ``processes: N``).

Other programs set ``RANK`` and ``WORLD_SIZE`` too; ``TORCHELASTIC_RUN_ID`` is of torch's launcher, which waits until all are
there.
"""

import os


def world_size() -> int:
    """Return how many processes have been started for the run, this one included; 1 if it was started alone."""
    return int(os.environ["WORLD_SIZE"]) if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Return this process's number, from 0; 0 if it was started alone. The first process alone writes, logs and prints."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def launched_processes() -> dict[str, int]:
    """Return the parameter ``processes`` if torch's launcher has started some, to override what a file says."""
    return {"processes": world_size()} if world_size() > 1 else {}
