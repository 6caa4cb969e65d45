"""The plan: which blocks of layers go, what their hosts take in of them, and which statistics of them are wanted.

It names no method, so that methods that want the same statistics share them. It is a stage of its own behind the choice of the
blocks: what a method wants changes with settings of which that choice, and its measured losses, know nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from replaceme.base.files import read_json, write_json

# What can take a block's place: nothing, a factor, a linear map, or new weights of the linear that ends the host's MLP, or of
# its attention's too.
StandIn = Literal["nothing", "scalar", "map", "refit", "joint"]


@dataclass(frozen=True)
class Block:
    """Layers ``[start, end)`` (positions from 0), which are removed.

    Attributes:
        start: the first of them.
        end: the layer behind the last.
        coefficients: where the layers are merged into the host, the parts of the host's own linears and of theirs, in order,
            that the host's linears become; else empty.
        scale: where the state behind the host is multiplied by a number, that number; else None.
    """

    start: int
    end: int
    coefficients: tuple[float, ...] = ()
    scale: float | None = None

    @property
    def host(self) -> int:
        """The kept layer in front of the block, whose MLP takes the transform."""
        return self.start - 1

    @property
    def layers(self) -> range:
        """The layers that go."""
        return range(self.start, self.end)

    @property
    def mixture(self) -> dict[int, float]:
        """Layer → its part of what the host's linears become; empty where the host stays."""
        return dict(zip(range(self.host, self.end), self.coefficients, strict=True)) if self.coefficients else {}

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """Blocks, first to last, and the names of the statistics (``replaceme.observers.statistics``) wanted of each."""

    blocks: tuple[Block, ...]
    statistics: tuple[str, ...]

    @property
    def removed_layers(self) -> list[int]:
        """Positions of all layers that go."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def mixtures(self) -> dict[int, dict[int, float]]:
        """Host → what its linears become (``Block.mixture``), where that is not what they are."""
        return {block.host: block.mixture for block in self.blocks if block.coefficients}

    @property
    def scales(self) -> dict[int, float]:
        """Host → what the state behind it is multiplied by, where it is."""
        return {block.host: block.scale for block in self.blocks if block.scale is not None}

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, {"blocks": _plain(self.blocks), "statistics": list(self.statistics)})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what ``save`` wrote."""
        content = read_json(path)
        return cls(_blocks(content["blocks"]), tuple(content["statistics"]))


def save_blocks(blocks: Sequence[Block], path: Path) -> None:
    """Write the chosen blocks as JSON."""
    write_json(path, _plain(blocks))


def load_blocks(path: Path) -> tuple[Block, ...]:
    """Read what ``save_blocks`` wrote."""
    return _blocks(read_json(path))


def _plain(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Return the blocks for JSON; a block that is merged into nothing, and not scaled, says nothing of it."""
    return [{key: value for key, value in asdict(block).items() if value not in ((), None)} for block in blocks]


def _blocks(plain: Sequence[dict[str, Any]]) -> tuple[Block, ...]:
    return tuple(Block(each["start"], each["end"], tuple(each.get("coefficients", ())), each.get("scale")) for each in plain)


def runs(layers: Sequence[int]) -> list[Block]:
    """Return the blocks that single layers make."""
    blocks: list[Block] = []
    for layer in sorted(layers):
        if blocks and blocks[-1].end == layer:
            blocks[-1] = Block(blocks[-1].start, layer + 1)
        else:
            blocks.append(Block(layer, layer + 1))
    return blocks
