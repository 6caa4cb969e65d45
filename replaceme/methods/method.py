"""What a method is: the statistics it asks for, and the edits it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replaceme.base.combinations import Limits, Values
from replaceme.base.params import Params
from replaceme.base.plan import Block, Plan, StandIn
from replaceme.selection.criteria import CRITERIA, Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from replaceme.base.documents import Documents
    from replaceme.edits.edits import Edits
    from replaceme.models.families import Family

# Name of a statistic → its tensors.
Statistics = Callable[[str], Mapping[str, "Tensor"]]


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
class Bench:
    """What a method works with that works on the model itself.

    Attributes:
        params: the setting.
        model: the dense model, loaded for calibration; it is left as it was found.
        family: where its parts are.
        documents: calibration text.
        plan: what goes.
        edits: as solved so far; they are added to.
        folder: where scratch files may lie, and what an interrupted run goes on from.
        output: the folder of the edits, for what is to be kept with them.
    """

    params: Params
    model: Any
    family: Family
    documents: Documents
    plan: Plan
    edits: Edits
    folder: Path
    output: Path


@dataclass(frozen=True, kw_only=True)
class Method(Limits):
    """A pruning method; the settings that it takes stand in ``Limits``.

    A method's file declares it and loads what computes only where it is called, so that those who ask for words load no torch.

    Attributes:
        solve: turns the parameters, a block and its statistics into edits and what is to be known of them.
        stand_in: what takes the block's place while cuts are compared by their loss, with these parameters.
        statistics: names of the statistics (``replaceme.observers.statistics``) that it wants of each block, with these
            parameters.
        criterion: by which it chooses what goes, as published.
        work: runs on the model after solve, in the repair stage, for edits that statistics can't give: it adds to the edits and
            returns figures for the metrics.
        plain: whether the result has the family's own form, with these parameters.
        trained: whether it trains weights on the text; the others see each token once or twice, and solve.
        check: raises ParameterError, before any work, when a model (the second argument, without its weights) can't give what
            these parameters ask for.
        refuses: a sentence for each parameter that is not exact, or not derived, for a model family (values of all parameters,
            the family's name, its description).
    """

    selections: tuple[str, ...] = tuple(CRITERIA)

    solve: Callable[[Params, Block, Statistics], Solved]
    stand_in: Callable[[Params], StandIn] = lambda params: "nothing"
    statistics: Callable[[Params], tuple[str, ...]] = lambda params: ()
    criterion: Criterion = CRITERIA["angular"]
    work: Callable[[Bench], dict[str, Any]] | None = None
    plain: Callable[[Params], bool] = lambda params: True
    trained: bool = False
    check: Callable[[Params, Any, Family], None] | None = None
    refuses: Callable[[Values, str, Family], list[str]] = lambda values, kind, family: []


def drop(title: str) -> Callable[[Params, Block, Statistics], Solved]:
    """Return the solver of a method that puts nothing in the block's place."""

    def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
        from replaceme.edits.edits import Edits

        return Solved(Edits(title, []))

    return solve
