"""Single tokens on disk, for losses that no sum can stand for: bf16 shards of bounded size, real tokens only.

They are written while the documents pass and read one at a time, mapped into memory, so that neither side ever holds more
than one shard, whatever the number of tokens. A shard is ``tokens.<shard>.safetensors``; the statistic's own file
says how many tokens each has. The fast form of the cosine keeps M and Y of each token (4 bytes a dimension), the accurate
one M, h_host = Z + M and H (6 bytes): what passed, so that a bf16 walk loses nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from replaceme.base.scratch import require_space

# The budget of memory: what the writer collects before it writes, and what a reader has mapped.
SHARD_BYTES = 64 << 20
STORED = torch.bfloat16

# M, what is added to M T (nothing in the fast form), and what the sum is compared with: (n, d) each.
Tokens = tuple[Tensor, Tensor | None, Tensor]


class Shards(Protocol):
    """Tokens that are read in parts.

    Attributes:
        counts: the number of tokens of each shard.
    """

    counts: list[int]

    def read(self, shard: int) -> Tokens:
        """Return the tokens of one shard."""
        ...


class ShardWriter:
    """Collects rows and writes a shard as soon as it is full."""

    def __init__(self, folder: Path, names: tuple[str, ...], token_count: int):
        """Begin with no shard.

        Args:
            folder: where the shards go.
            names: of the tensors that each token has.
            token_count: how many tokens there will be.
        """
        self.folder, self.names, self.token_count = folder, names, token_count
        self.waiting: list[tuple[Tensor, ...]] = []
        self.counts: list[int] = []
        self.rows = 0

    def add(self, *rows: Tensor) -> None:
        """Take tokens, one tensor (n, d) a name.

        Raises:
            ResourceError: all of them together would not fit on the disk; said of the first ones.
        """
        if not self.rows:
            self._reserve(len(self.names) * rows[0].shape[1] * STORED.itemsize)
        self.waiting.append(tuple(part.to("cpu", STORED) for part in rows))
        while sum(len(parts[0]) for parts in self.waiting) >= self.rows:
            whole = self._joined()
            self._write(tuple(part[: self.rows] for part in whole))
            self.waiting = [tuple(part[self.rows :] for part in whole)]

    def finish(self) -> Tensor:
        """Write what is left, and return the number of tokens of each shard (int64)."""
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
    """The shards of one block, as the statistics of an earlier stage."""

    def __init__(self, counts: Tensor, read: Callable[[str], Mapping[str, Tensor]]):
        """Take the number of tokens of each shard, and what returns a statistic by its name, mapped into memory."""
        self.counts = [int(count) for count in counts]
        self._read = read

    def read(self, shard: int) -> Tokens:
        """Return M, Z (None in the fast form) and H (Y in the fast form)."""
        parts = self._read(shard_name(shard))
        if "left" not in parts:
            return parts["added"], None, parts["goal"]
        return parts["added"], parts["left"].float() - parts["added"].float(), parts["target"]


def shard_name(shard: int) -> str:
    """Return the name of a shard's statistic."""
    return f"tokens.{shard}"
