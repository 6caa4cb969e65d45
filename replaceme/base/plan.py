"""The plan: the blocks of layers to remove, how each is merged into the layer before it, and the statistics to take.

The plan names no method, so that methods with the same statistics share them. It is a stage of its own, after select: some
settings change the statistics only; the choice of blocks, which can cost passes, is then not repeated.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from replaceme.base.files import read_json, write_json

# What replaces a block: nothing, a factor, a linear map, or new weights of the layer before it: of the last linear of its MLP,
# or of that and of the output projection of its attention.
Surrogate = Literal["nothing", "scalar", "map", "refit", "joint"]


@dataclass(frozen=True)
class Block:
    """Layers ``[start, end)`` to remove (positions from 0).

    Attributes:
        start: the first removed layer.
        end: the layer after the last removed one.
        coefficients: if the layers are merged into the one before them, the coefficients of the linear combination that
            replaces its linears: first its own, then the removed layers', in order; else empty.
        scale: the factor that multiplies the state at the cut; None without one.
    """

    start: int
    end: int
    coefficients: tuple[float, ...] = ()
    scale: float | None = None

    @property
    def layer_before_cut(self) -> int:
        """The kept layer before the block; the transform is folded into its MLP."""
        return self.start - 1

    @property
    def layers(self) -> range:
        """The removed layers."""
        return range(self.start, self.end)

    @property
    def mixture(self) -> dict[int, float]:
        """Layer → its coefficient in the combination that replaces the linears before the cut; empty without a merge."""
        return dict(zip(range(self.layer_before_cut, self.end), self.coefficients, strict=True)) if self.coefficients else {}

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """What goes, and what is measured for it.

    Attributes:
        blocks: first to last.
        statistics: names of the statistics (``replaceme.statistics.cut_statistics``) to take of each.
        mlp_width: the number of channels that stay in each kept layer's MLP; None keeps them all. With fewer, the states change
            from the first layer on, and all blocks are fitted in the repair stage.
    """

    blocks: tuple[Block, ...]
    statistics: tuple[str, ...]
    mlp_width: int | None = None

    @property
    def removed_layers(self) -> list[int]:
        """Positions of all removed layers."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def mixtures(self) -> dict[int, dict[int, float]]:
        """Layer before a cut → its ``Block.mixture``, for those that layers are merged into."""
        return {block.layer_before_cut: block.mixture for block in self.blocks if block.coefficients}

    @property
    def scales(self) -> dict[int, float]:
        """Layer before a cut → the factor of the state after it, for those that have one."""
        return {block.layer_before_cut: block.scale for block in self.blocks if block.scale is not None}

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        width = {} if self.mlp_width is None else {"mlp_width": self.mlp_width}
        write_json(path, {"blocks": _plain(self.blocks), "statistics": list(self.statistics), **width})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what ``save`` wrote."""
        content = read_json(path)
        return cls(_blocks(content["blocks"]), tuple(content["statistics"]), content.get("mlp_width"))


def save_blocks(blocks: Sequence[Block], path: Path) -> None:
    """Write the chosen blocks as JSON."""
    write_json(path, _plain(blocks))


def load_blocks(path: Path) -> tuple[Block, ...]:
    """Read what ``save_blocks`` wrote."""
    return _blocks(read_json(path))


def _plain(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Return the blocks for JSON; empty coefficients and a missing scale are left out."""
    return [{key: value for key, value in asdict(block).items() if value not in ((), None)} for block in blocks]


def _blocks(plain: Sequence[dict[str, Any]]) -> tuple[Block, ...]:
    return tuple(Block(each["start"], each["end"], tuple(each.get("coefficients", ())), each.get("scale")) for each in plain)


def group_adjacent(layers: Sequence[int]) -> list[Block]:
    """Group single layers into blocks of adjacent ones."""
    blocks: list[Block] = []
    for layer in sorted(layers):
        if blocks and blocks[-1].end == layer:
            blocks[-1] = Block(blocks[-1].start, layer + 1)
        else:
            blocks.append(Block(layer, layer + 1))
    return blocks
