"""What the environment says of the processes that have been started for a run, by ``torchrun`` or ``processes: N``."""

import os
from typing import Any

# In the environment of the processes that ``processes: N`` starts.
LAUNCHED = "REPLACEME_LAUNCHED"


def started() -> int:
    """Return how many there are, this one included; 1 if it was started alone."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return this process's number, from 0; 0 if it was started alone."""
    return int(os.environ["RANK"]) if started() > 1 else 0


def taken() -> dict[str, Any]:
    """Return the parameter ``processes`` if they have been started, to override what a file says."""
    return {"processes": started()} if started() > 1 else {}
