"""Run an action in several copies of this process that form a group, as ``torchrun`` would start them."""

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.interruption import started


def in_ranks(count: int, action: Callable[[], Any], folder: Path) -> list[Any]:
    """Return what the action returns in each process (JSON), by rank; it finds the group in the environment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def one(rank: int) -> None:
        # As if each had a machine of its own: none then takes the others' threads, which hang in a copy of a process that has
        # used OpenMP.
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
        (folder / f"{rank}.json").write_text(json.dumps(action()), encoding="utf-8")

    children = [started(partial(one, rank)) for rank in range(count)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
