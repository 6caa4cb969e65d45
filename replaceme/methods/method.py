"""The interface of a method: the statistics it needs, and the edits it makes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replaceme.base.combinations import Limits
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan, Surrogate
from replaceme.models.context import ModelContext
from replaceme.selection.criteria import CRITERIA, Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from replaceme.edits.edits import Edits
    from replaceme.models.families import Family
    from replaceme.models.model import Model

# Name of a statistic → its tensors.
Statistics = Callable[[str], Mapping[str, "Tensor"]]


@dataclass
class Solved:
    """The solution of one block.

    Attributes:
        edits: the changes, without the removal of the block.
        figures: how well it fits, for the metrics.
        ridge_path: rows (α, relative residual) of the fit with other ridges.
        loss_curve: rows (iteration, objective per token) of an iterative solver.
    """

    edits: Edits
    figures: dict[str, Any] = field(default_factory=dict)
    ridge_path: list[tuple[float, float]] = field(default_factory=list)
    loss_curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MethodContext(ModelContext):
    """The inputs of a method's ``fit_on_model``: the dense model, which is left unchanged, its calibration text, and these.

    Attributes:
        folder: for scratch files.
        params: the setting.
        plan: the removed blocks.
        edits: as solved so far; they are added to.
        output: the folder of the edits, for files to be kept with them.
        checkpoints: the folder of checkpoints, from which an interrupted run resumes.
    """

    folder: Path
    params: Params
    plan: Plan
    edits: Edits
    output: Path
    checkpoints: Path


@dataclass(frozen=True, kw_only=True)
class Method(Limits):
    """A pruning method; ``Limits`` holds the settings that it accepts.

    A method's file imports torch only inside the functions that compute, so that reading the declaration stays fast.

    Attributes:
        solve: makes edits and their figures from the parameters, a removed block and its statistics.
        surrogate: with these parameters, what takes the block's place while cuts are compared by their loss.
        statistics: with these parameters, names of the statistics that it needs of each block
            (``replaceme.statistics.cut_statistics``).
        criterion: the published criterion of what is removed.
        fit_on_model: runs on the model after solve, in the repair stage, for edits that statistics can't give: it adds a
            ``ModelEdit`` to the edits and returns figures for the metrics.
        operator: with these parameters, whether a layer of the result holds a matrix (d, d) more.
        trained: whether it trains weights on the text; other methods see each token once or twice, and solve.
        check: raises ParameterError, before any work, if a model can't meet the parameters: they are not exact or not derived
            for its family, or ask for more than it has. Its weights are not loaded.
    """

    selections: tuple[str, ...] = tuple(CRITERIA)

    solve: Callable[[Params, Block, Statistics], Solved]
    surrogate: Callable[[Params], Surrogate] = lambda params: "nothing"
    statistics: Callable[[Params], tuple[str, ...]] = lambda params: ()
    criterion: Criterion = CRITERIA["angular"]
    fit_on_model: Callable[[MethodContext], dict[str, Any]] | None = None
    operator: Callable[[Params], bool] = lambda params: False
    trained: bool = False
    check: Callable[[Params, Model, Family], None] = lambda params, model, family: None


def require_tokens(params: Params, model: Model) -> None:
    """Raise ParameterError if alpha is 0 and the settings allow fewer tokens than the model is wide: no map is unique then.

    The solve would say so after all the passes. That a text has fewer tokens than the settings allow is known only by then.
    """
    most, width = params.dataset_size * params.max_length, int(model.config().hidden_size)
    if not params.alpha and most < width:
        raise ParameterError(
            "alpha: 0 leaves the least squares singular: "
            f"dataset_size {params.dataset_size} times max_length {params.max_length} "
            f"is less than the model's width of {width}; raise one of them, or set alpha well above 0."
        )


def leave_empty(title: str) -> Callable[[Params, Block, Statistics], Solved]:
    """Return the ``solve`` of a method that puts nothing in the block's place."""

    def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
        from replaceme.edits.edits import Edits

        return Solved(Edits(title, []))

    return solve
