"""Checkpoints of a training: a folder with tensors, state and a key, written atomically.

The key is a digest of everything that the training depends on. A checkpoint with another key belongs to another training and
is ignored.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.files import new_folder, read_remembered, write_json
from replaceme.base.fingerprints import sha256_below

TENSORS, STATE = "tensors.safetensors", "state.json"
# Bytes of a tensor that are hashed at once.
CHUNK = 1 << 26
# Time between checkpoints, at least: seconds, and a multiple of the time that the last one took.
CHECKPOINT_SECONDS, SAVING_SHARE = 60.0, 50


class CheckpointTimer:
    """Says when a checkpoint is due: ``CHECKPOINT_SECONDS``, or ``SAVING_SHARE`` times the last one's duration, after that."""

    def __init__(self) -> None:
        # When the last checkpoint was complete, and how long it took.
        self.last_saved, self.last_duration = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Return whether enough time has passed since the last checkpoint."""
        return time.monotonic() - self.last_saved >= max(CHECKPOINT_SECONDS, SAVING_SHARE * self.last_duration)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the block, which writes a checkpoint."""
        start = time.monotonic()
        yield
        self.last_saved = time.monotonic()
        self.last_duration = self.last_saved - start


def checkpoint_key(settings: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    """Return a digest (sha256, hex) of settings, which must fit JSON, and of the shapes, dtypes and values of tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {[*tensor.shape]}".encode())
        rows = tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, len(rows), CHUNK):
            digest.update(rows[start : start + CHUNK].cpu().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: Path, key: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; it replaces the last one."""
    with new_folder(folder) as new:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / TENSORS)
        write_json(new / STATE, {"key": key, "sums": hash_files(new), **state})


def load_checkpoint(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return state and tensors of the checkpoint in ``folder``, or None if there is no undamaged one with this key."""
    state = read_remembered(folder / STATE)
    try:
        whole = state.pop("key", None) == key and state.pop("sums", None) == hash_files(folder)
        return (state, load_file(folder / TENSORS)) if whole else None
    except (OSError, SafetensorError):
        return None


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sums of a checkpoint's files, by name, except that of the state, which records them."""
    return {name: digest for name, digest in sha256_below(folder).items() if name != STATE}
