"""Checkpoints of a repair: an interrupted one goes on after its last checkpoint and ends with the same result.

A checkpoint is a folder for each process that shares the repair: its states of both models after the last finished layer (raw
bytes, in pieces, since they may exceed the memory), and a file with everything else, the key of the repair, and the sums of the
other files; the edits so far are in the first one's. An older checkpoint goes when all processes have the new one.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from replaceme.base.checkpoints import STATE, CheckpointTimer, hash_files
from replaceme.base.errors import ResourceError, resource_failure
from replaceme.base.files import new_folder, read_json, remove, write_json
from replaceme.base.group import all_gather, shard
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.repair.state import RepairState

STATES = ("dense", "shortened")
# Rows written at once.
ROWS = 2048


class Checkpoints:
    """The checkpoints of one repair.

    Args:
        folder: for all of them, which all processes see.
        key: a digest of everything that the repair depends on. A checkpoint with another key, or another number of processes,
            is ignored.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key, self.timer = folder, key, CheckpointTimer()

    def save_if_due(self, state: RepairState, finished: int) -> None:
        """Write a checkpoint after ``finished`` layers, if the last one is old enough. A full disk is no error."""
        if not all_gather(self.timer.is_due())[0]:
            return
        with self.timer.saving():
            try:
                self._save(state, finished)
                saved = True
            except (OSError, SafetensorError) as failure:
                if not resource_failure(failure):
                    raise
                saved = False
            if not all(all_gather(saved)):
                logger.warning(
                    "repair: the disk has no space for a checkpoint; an interrupted run goes on at the last one, if any"
                )
                remove(self._folder_after(finished))
                with suppress(OSError):  # unless it is empty
                    self.folder.rmdir()
            elif shard().rank == 0:
                kept = {self._folder_after(finished, rank) for rank in range(shard().size)}
                for other in {*self.folder.iterdir()} - kept:
                    remove(other)

    def resume(self, state: RepairState) -> int:
        """Continue from the last whole checkpoint, if there is one with this key; return how many layers are finished."""
        contents = self._read_whole(len(state.kept))
        finished = max(set.intersection(*map(set, all_gather([*contents]))), default=0)
        # What not all processes have is of an earlier run, and must not be completed by a later one.
        for other in contents.keys() - {finished}:
            remove(self._folder_after(other))
        if not finished:
            return 0
        for name in STATES:
            tensor: Tensor = getattr(state, name)
            file = str(self._folder_after(finished) / name)
            read = torch.from_file(file, shared=False, size=tensor.numel(), dtype=tensor.dtype)
            tensor.copy_(read.view_as(tensor))
        edits = Edits.load(self._folder_after(finished, 0))
        # What is mapped from the checkpoint is copied before a later one replaces it: corrections one at a time, to the disk.
        mapped: tuple[dict[Any, Tensor], ...] = (edits.transforms, edits.operators, edits.channels)
        for tensors in mapped:
            tensors.update({key: tensor.clone() for key, tensor in tensors.items()})
        vars(state.edits).update(vars(edits))
        state.offload_corrections()
        state.restore(contents[finished]["repairs"], contents[finished]["figures"])
        logger.info("repair: resumed after %d of %d layers", finished, len(state.kept))
        return finished

    def _folder_after(self, finished: int, rank: int | None = None) -> Path:
        """Return the folder of a process (None: this one) after so many layers."""
        number, size = shard()
        return self.folder / f"{finished}-{number if rank is None else rank}-of-{size}"

    def _read_whole(self, layers: int) -> dict[int, Mapping[str, Any]]:
        """Return what this process's whole checkpoints with this key say, by the number of finished layers."""
        whole = {}
        for finished in range(1, layers):
            folder = self._folder_after(finished)
            with suppress(ResourceError, ValueError, KeyError, TypeError, OSError):
                content = read_json(folder / STATE)
                if content["key"] == self.key and content["sums"] == hash_files(folder):
                    whole[finished] = content
        return whole

    def _save(self, state: RepairState, finished: int) -> None:
        with new_folder(self._folder_after(finished)) as new:
            for name in STATES:
                with (new / name).open("wb") as stream:
                    for rows in getattr(state, name).split(ROWS):
                        stream.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)
            if shard().rank == 0:
                state.edits.save(new)
            content = {"repairs": [asdict(each) for each in state.repairs], "figures": state.figures}
            write_json(new / STATE, {"key": self.key, "sums": hash_files(new), **content})
