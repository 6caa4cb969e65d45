"""LinearPatch (arXiv 2505.24680), without its distillation: scale each channel of the state at the cut to its magnitude after
the block, in rotated coordinates, where no single channel is massive.

    P = R diag(s) Rᵀ,   s_k = mean over documents of (mean over tokens of |(H R)_k| / mean over tokens of |(h R)_k|)

for the states h before the block and H after it, with a Hadamard matrix R (the published ``rotate``), or R = I (its ``diag``),
which costs d parameters instead of d². All real tokens count, also those of massive norm: the rotation spreads them over the
channels. Any Hadamard matrix of the width works, but each gives another P; ours are those of ``replaceme.statistics.hadamard``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from replaceme.base.combinations import Settings, Use
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.selection.criteria import MEAN_COSINE

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


class Form(Settings):
    """Parameters of LinearPatch."""

    linearpatch_form: Annotated[Literal["hadamard", "diagonal"], Use(("plan", "solve", "repair"))] = "hadamard"
    """Scale channels in coordinates rotated by a Hadamard matrix (published as rotate; d × d parameters), or in the model's own
    (diagonal, published as diag; d parameters)."""


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the operator on the state at the cut, and its fit."""
    from replaceme.edits.edits import Edits
    from replaceme.solvers.quality import measure_operator_fit
    from replaceme.statistics.hadamard import hadamard

    form = Form.of(params).linearpatch_form
    magnitudes = statistics(_magnitudes(params))
    factors = magnitudes["ratios"] / magnitudes["documents"]
    if form == "hadamard":
        rotation = hadamard(len(factors))
        assert rotation is not None, "a width without a Hadamard matrix would have been refused"
        P = dense = (rotation * factors) @ rotation.T
    else:
        P, dense = factors, factors.diag()
    fit = measure_operator_fit(dense, statistics("stream"), statistics("sample"))
    fit |= {"smallest_factor": float(factors.min()), "largest_factor": float(factors.max())}
    logger.info(
        "solve: cut after layer %d, %d tokens, channels scaled by %.3g to %.3g, relative residual %.4f (%.4f with nothing in "
        "the block's place), mean cosine %.4f",
        block.layer_before_cut, fit["tokens"], fit["smallest_factor"], fit["largest_factor"], fit["relative_residual"],
        fit["relative_residual_removed"], fit["mean_cosine"],
    )  # fmt: skip
    return Solved(Edits(f"LinearPatch ({form})", [], operators={block.layer_before_cut: P}), fit)


def _is_rotated(params: Params) -> bool:
    return Form.of(params).linearpatch_form == "hadamard"


def _magnitudes(params: Params) -> str:
    return "magnitudes_rotated" if _is_rotated(params) else "magnitudes"


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse models that the operator can't be added to, and widths of which no Hadamard matrix is constructed here."""
    from replaceme.models.own_form import check_own_form
    from replaceme.statistics.hadamard import hadamard

    check_own_form(model.config())
    width = int(model.config().hidden_size)
    if _is_rotated(params) and hadamard(width) is None:
        raise ParameterError(
            f"linearpatch_form: hadamard needs a Hadamard matrix of the model's width, and of {width} none is constructed; use "
            "diagonal."
        )


METHOD = Method(
    settings=Form,
    statistics=lambda params: (_magnitudes(params), "stream", "sample"),
    solve=solve,
    operator=_is_rotated,
    criterion=MEAN_COSINE,
    words="maps the whole state at the cut",
    check=check,
)
