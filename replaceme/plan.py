"""The plan: which blocks of layers go, and which statistics of them are wanted.

It names no method, so that methods that want the same statistics share them. It is a stage of its own behind the choice of the
blocks: what a method wants changes with settings of which that choice, and its measured losses, know nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from replaceme.files import read_json, write_json


@dataclass(frozen=True)
class Block:
    """Layers ``[start, end)`` (positions from 0), which are removed."""

    start: int
    end: int

    @property
    def host(self) -> int:
        """The kept layer in front of the block, whose MLP takes the transform."""
        return self.start - 1

    @property
    def layers(self) -> range:
        """The layers that go."""
        return range(self.start, self.end)

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """Blocks, first to last, and the names of the statistics (``replaceme.statistics``) wanted of each."""

    blocks: tuple[Block, ...]
    statistics: tuple[str, ...]

    @property
    def removed_layers(self) -> list[int]:
        """Positions of all layers that go."""
        return [layer for block in self.blocks for layer in block.layers]

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, {"blocks": [asdict(block) for block in self.blocks], "statistics": list(self.statistics)})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what ``save`` wrote."""
        content = read_json(path)
        return cls(tuple(Block(**block) for block in content["blocks"]), tuple(content["statistics"]))


def save_blocks(blocks: Sequence[Block], path: Path) -> None:
    """Write the chosen blocks as JSON."""
    write_json(path, [asdict(block) for block in blocks])


def load_blocks(path: Path) -> tuple[Block, ...]:
    """Read what ``save_blocks`` wrote."""
    return tuple(Block(**block) for block in read_json(path))
