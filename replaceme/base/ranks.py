"""What the environment says of the processes that have been started for a run, by ``torchrun`` or ``processes: N``.

Other programs set ``RANK`` and ``WORLD_SIZE`` too. A group is what torch's launcher has started, which waits until all are
there.
"""

import os
from typing import Any

# In the environment of the processes that ``processes: N`` starts.
LAUNCHED = "REPLACEME_LAUNCHED"


def started() -> int:
    """Return how many there are, this one included; 1 if it was started alone."""
    return int(os.environ["WORLD_SIZE"]) if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Return this process's number, from 0; 0 if it was started alone."""
    return int(os.environ["RANK"]) if started() > 1 else 0


def taken() -> dict[str, Any]:
    """Return the parameter ``processes`` if they have been started, to override what a file says."""
    return {"processes": started()} if started() > 1 else {}
