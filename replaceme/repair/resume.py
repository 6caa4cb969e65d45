"""Checkpoints of a repair: an interrupted one goes on after its last checkpoint and ends with the same result.

A checkpoint is a folder: the edits so far, the states of both models after the last finished layer (raw bytes, in pieces,
since they may exceed the memory), and a file with everything else, the key of the repair, and the sums of the other files.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from replaceme.base.errors import ResourceError, resource_failure
from replaceme.base.files import new_folder, read_json, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.repair.state import State
from replaceme.training.checkpoints import Pace

STATE, STATES = "state.json", ("dense", "shortened")
# Rows written at once.
ROWS = 2048


class Checkpoints:
    """The checkpoints of one repair.

    Args:
        folder: of the last checkpoint.
        key: a digest of everything that the repair depends on; a checkpoint with another key is ignored.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key, self.pace = folder, key, Pace()

    def offer(self, state: State, finished: int) -> None:
        """Write a checkpoint after ``finished`` layers, if the last one is old enough. A full disk is no error."""
        if not self.pace.is_due():
            return
        with self.pace.measured():
            try:
                self._save(state, finished)
            except (OSError, SafetensorError) as failure:
                if not resource_failure(failure):
                    raise
                logger.warning("repair: the disk has no space for a checkpoint; if interrupted, it would begin anew")

    def resume(self, state: State) -> int:
        """Continue from the last checkpoint, if there is a whole one with this key; return how many layers are finished."""
        try:
            content = read_json(self.folder / STATE)
            if content["key"] != self.key or content["sums"] != _sums(self.folder):
                return 0
            edits = Edits.load(self.folder)
        except (ResourceError, ValueError, KeyError, TypeError, OSError, SafetensorError):
            return 0
        for name in STATES:
            tensor: Tensor = getattr(state, name)
            read = torch.from_file(str(self.folder / name), shared=False, size=tensor.numel(), dtype=tensor.dtype)
            tensor.copy_(read.view_as(tensor))
        vars(state.edits).update(vars(edits))
        state.restore(content["repairs"], content["figures"])
        finished = int(content["finished"])
        logger.info("repair: resumed after %d of %d layers", finished, len(state.kept))
        return finished

    def _save(self, state: State, finished: int) -> None:
        with new_folder(self.folder) as new:
            for name in STATES:
                with (new / name).open("wb") as stream:
                    for rows in getattr(state, name).split(ROWS):
                        stream.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)
            state.edits.save(new)
            content = {"repairs": [asdict(each) for each in state.repairs], "figures": state.figures, "finished": finished}
            write_json(new / STATE, {"key": self.key, "sums": _sums(new), **content})


def _sums(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in sha256_below(folder).items() if name != STATE}
