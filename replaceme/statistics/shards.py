"""Activations of every token on disk, for losses that need more than sums: bf16 shards of bounded size, real tokens only.

Shards are written during the walk and read one at a time, mapped into memory: writer and reader hold at most one shard,
whatever the number of tokens. A shard is ``tokens.<shard>.safetensors``; the statistic's own file has the number of tokens of
each. The fast form of the cosine loss keeps M and Y of each token (4 bytes per dimension). The accurate form keeps M,
h_host = Z + M and H (6 bytes), which are activations of the model, so a bf16 walk loses nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from replaceme.base.scratch import require_space

# Size of a shard: memory of the writer, and of a reader.
SHARD_BYTES = 64 << 20
STORED = torch.bfloat16

# M, Z and H, (n, d) each; in the fast form None for Z, and Y for H.
Tokens = tuple[Tensor, Tensor | None, Tensor]


class ShardWriter:
    """Collects tokens and writes each shard as soon as it is full."""

    def __init__(self, folder: Path, names: tuple[str, ...], token_count: int):
        """Start with no shard.

        Args:
            folder: for the shards.
            names: of the tensors in a shard.
            token_count: number of tokens that will be added.
        """
        self.folder, self.names, self.token_count = folder, names, token_count
        self.waiting: list[tuple[Tensor, ...]] = []
        self.counts: list[int] = []
        self.rows = 0

    def add(self, *rows: Tensor) -> None:
        """Add tokens: one tensor (n, d) for each name.

        Raises:
            ResourceError: at the first call, if ``token_count`` tokens do not fit on the disk.
        """
        if not self.rows:
            self._reserve(len(self.names) * rows[0].shape[1] * STORED.itemsize)
        self.waiting.append(tuple(part.to("cpu", STORED) for part in rows))
        while sum(len(parts[0]) for parts in self.waiting) >= self.rows:
            whole = self._joined()
            self._write(tuple(part[: self.rows] for part in whole))
            self.waiting = [tuple(part[self.rows :] for part in whole)]

    def finish(self) -> Tensor:
        """Write the last shard, and return the number of tokens of each, (shards,) int64."""
        if any(len(parts[0]) for parts in self.waiting):
            self._write(self._joined())
        self.waiting = []
        return torch.tensor(self.counts)

    def _reserve(self, token_bytes: int) -> None:
        self.rows = max(SHARD_BYTES // token_bytes, 1)
        require_space(
            self.folder, token_bytes * self.token_count, "loss cosine keeps {} of tokens there",
            "; lower dataset_size or max_length, or set loss to mse, which keeps none",
        )  # fmt: skip

    def _joined(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*self.waiting, strict=True))

    def _write(self, parts: tuple[Tensor, ...]) -> None:
        tensors = {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}
        save_file(tensors, self.folder / f"{shard_name(len(self.counts))}.safetensors")
        self.counts.append(len(parts[0]))


class StoredShards:
    """The shards of one block, read one at a time from the statistics of an earlier stage.

    Attributes:
        counts: the number of tokens of each shard.
    """

    def __init__(self, counts: Tensor, read: Callable[[str], Mapping[str, Tensor]]):
        """Take the number of tokens of each shard, and a function that maps a statistic into memory, by name."""
        self.counts = [int(count) for count in counts]
        self._read = read

    def read(self, shard: int) -> Tokens:
        """Return M, Z (None in the fast form) and H (Y in the fast form), (n, d) each."""
        parts = self._read(shard_name(shard))
        if "left" not in parts:
            return parts["added"], None, parts["goal"]
        return parts["added"], parts["left"].float() - parts["added"].float(), parts["target"]


def shard_name(shard: int) -> str:
    """Return the name of the statistic that is a shard."""
    return f"tokens.{shard}"
