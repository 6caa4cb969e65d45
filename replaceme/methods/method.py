"""What a method is: the statistics it asks for, and the edits it makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from replaceme.edits import Edits
from replaceme.params import Params
from replaceme.plan import Block

# Name of a statistic → its tensors.
Statistics = Callable[[str], Mapping[str, Tensor]]


# By what a cut is chosen (``replaceme.selection``).
Criterion = Literal["angular", "residual", "loss", "influence", "greedy", "collapse"]
# What can take a block's place: nothing, a linear map, or new weights of the linear that ends the host's MLP.
StandIn = Literal["nothing", "map", "refit"]


@dataclass
class Solved:
    """What a method made of the statistics of one block.

    Attributes:
        edits: what is to be changed, beside the block that goes.
        figures: how well it fits, for the metrics.
        ridge_path: rows (α, relative residual): how well the fit would be with another ridge.
        loss_curve: rows (iteration, objective a token) of an iterative solver.
    """

    edits: Edits
    figures: dict[str, Any] = field(default_factory=dict)
    ridge_path: list[tuple[float, float]] = field(default_factory=list)
    loss_curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        stand_in: what takes the block's place while cuts are compared by their loss, with these parameters.
        statistics: names of the statistics (``replaceme.statistics``) that it wants of each block, with these parameters.
        solve: turns the parameters, a block and its statistics into edits and what is to be known of them.
        criterion: by which it chooses what goes, as published.
        trained: whether it trains weights on the text; the others see each token once or twice, and solve.
    """

    stand_in: Callable[[Params], StandIn]
    statistics: Callable[[Params], tuple[str, ...]]
    solve: Callable[[Params, Block, Statistics], Solved]
    criterion: Criterion = "angular"
    trained: bool = False


def drop(title: str) -> Callable[[Params, Block, Statistics], Solved]:
    """Return the solver of a method that puts nothing in the block's place."""
    return lambda params, block, statistics: Solved(Edits(title, []))
