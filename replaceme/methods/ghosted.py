"""Ghosted Layers (arXiv 2605.15491): the best linear map of the whole state at the cut, in closed form.

    W = I + M,   M = argmin Σ w ‖h M − (H − h)‖² + α‖M‖²

over all real tokens, with the states h before the block and H after it; the penalty pulls toward an empty cut, W = I. As
published, w = 1 and α is negligible (1e-6); with w = 1/‖H‖² every token counts by its relative error, so that a few of massive
norm don't dominate the fit. A transform (``replaceme.methods.lstsq``) maps only the MLP output before the cut; this maps the
whole state, and costs d² parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from replaceme.base.combinations import Settings, Use
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.base.progress import logger
from replaceme.methods.method import Method, Solved, Statistics, require_tokens
from replaceme.selection.criteria import MEAN_COSINE

if TYPE_CHECKING:
    from replaceme.models.families import Family
    from replaceme.models.model import Model


class Weighting(Settings):
    """Parameters of Ghosted Layers."""

    ghosted_weighted: Annotated[bool, Use(("plan", "solve", "repair"))] = False
    """Weight every token by 1/‖H‖², so that relative errors count; false is the published form."""


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return the operator on the state at the cut, and its fit."""
    import torch

    from replaceme.edits.edits import Edits
    from replaceme.solvers.quality import describe_ridge, measure_operator_fit, ridge_path
    from replaceme.solvers.ridge import solve_ridge

    weighted = Weighting.of(params).ghosted_weighted
    sums, sample = statistics(_stream(params)), statistics("sample")
    solution = solve_ridge(sums["gram"], sums["cross"], params.alpha)
    W = solution.transform + torch.eye(len(solution.transform), dtype=torch.float64)
    kind = "weighted" if weighted else "relative"
    fit = measure_operator_fit(W, sums, sample, weighted=weighted)
    fit |= describe_ridge(solution.eigenvalues, params.alpha)
    logger.info(
        "solve: cut after layer %d, %d tokens, %s residual %.4f (%.4f with nothing in the block's place), mean cosine %.4f",
        block.layer_before_cut, fit["tokens"], kind, fit[f"{kind}_residual"], fit[f"{kind}_residual_removed"],
        fit["mean_cosine"],
    )  # fmt: skip
    path = ridge_path(solution, float(sums["gap_squares"]), float(sums["output_squares"]))
    title = f"Ghosted Layers{' (weighted)' if weighted else ''}"
    return Solved(Edits(title, [], operators={block.layer_before_cut: W}), fit, path)


def _stream(params: Params) -> str:
    return "stream_weighted" if Weighting.of(params).ghosted_weighted else "stream"


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse models that the operator can't be added to, and text with fewer tokens than the model is wide."""
    from replaceme.models.own_form import check_own_form

    check_own_form(model.config())
    require_tokens(params, model)


METHOD = Method(
    settings=Weighting,
    common={"alpha": Use(("solve", "repair"))},
    surrogate=lambda params: "map",
    statistics=lambda params: (_stream(params), "sample"),
    solve=solve,
    operator=lambda params: True,
    check=check,
    criterion=MEAN_COSINE,
    words="maps the whole state at the cut",
)
