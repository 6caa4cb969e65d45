"""ReplaceMe with least squares (arXiv 2505.02819, section 3), in closed form: one ridge regression a block; or one over all
weights of the host's last linears (``replaceme.solvers.refit``)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from replaceme.base.combinations import TRANSFORMS, Values
from replaceme.base.errors import SolveError
from replaceme.base.params import Params
from replaceme.base.plan import Block, StandIn
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.solvers.closed_forms import STRUCTURES, Structure, closed_form, structure_words
from replaceme.solvers.quality import fit_quality, ridge_figures, ridge_path
from replaceme.solvers.refit import refit
from replaceme.solvers.ridge import RidgeSolution, solve_ridge

# The transforms that solve for more than a map, with the statistic that they want.
FEATURES = {"refit": "mlp_features", "joint": "features", "channels": "features"}


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    """Return what the host computes instead, and how well it fits."""
    if params.transform in FEATURES:
        return _refit(params, block, statistics)
    structure = STRUCTURES[params.transform]
    sums, sample = statistics("gram"), statistics("sample")
    path: list[tuple[float, float]] = []
    if structure == "dense":
        solution = solve_ridge(sums["gram"], sums["cross"], params.alpha)
        transform, of_ridge = solution.transform, _dense_figures(solution, params.alpha)
        path = ridge_path(solution, float(sums["target_squares"]), float(sums["output_squares"]))
    else:
        transform = closed_form(sums["gram"], sums["cross"], params.alpha, structure, sums.get("norm"))
        of_ridge = _structured_figures(transform, sums, params.alpha, structure)
    fit = fit_quality(transform, sums, sample) | of_ridge
    logger.info(
        "solve: host %d, %d tokens, relative residual %.4f (%.4f with nothing in the block's place), mean cosine %.4f",
        block.host, fit["tokens"], fit["relative_residual"], fit["relative_residual_removed"], fit["mean_cosine"],
    )  # fmt: skip
    title = f"ReplaceMe (least squares{structure_words(structure)})"
    if "norm" in sums:  # edits hold what the norm's output before its weight takes
        transform = sums["norm"][:, None] * transform
    return Solved(Edits(title, [], {block.host: transform}), fit, path)


def _refit(params: Params, block: Block, statistics: Statistics) -> Solved:
    edits = Edits(f"least squares over the host's last weights ({params.transform})", [])
    fit = refit(edits, block.host, statistics(FEATURES[params.transform]), params.alpha, params.refit_ridge)
    logger.info(
        "solve: host %d, %d tokens, weighted residual %.4f (%.4f with a transform alone, %.4f with nothing)",
        block.host, fit["tokens"], fit.get("weighted_residual", fit.get("weighted_residual_joint")),
        fit["weighted_residual_transform"], fit["weighted_residual_removed"],
    )  # fmt: skip
    return Solved(edits, fit)


def _statistics(params: Params) -> tuple[str, ...]:
    return (FEATURES[params.transform],) if params.transform in FEATURES else ("gram", "sample")


def _stand_in(params: Params) -> StandIn:
    # The first solution of channels is a joint one.
    return "refit" if params.transform == "refit" else "joint" if params.transform in FEATURES else "map"


def _dense_figures(solution: RidgeSolution, alpha: float) -> dict[str, Any]:
    figures: dict[str, Any] = ridge_figures(solution.eigenvalues, alpha)
    if solution.full_rank:
        figures["distance_from_alpha_zero"] = solution.change_from(alpha, 0.0)
    return figures


def _structured_figures(transform: Tensor, sums: Mapping[str, Tensor], alpha: float, structure: Structure) -> dict[str, Any]:
    figures: dict[str, Any] = ridge_figures(torch.linalg.eigvalsh(sums["gram"]), alpha)
    if structure == "orthogonal":  # a second search would cost as much as the first
        return figures
    try:
        plain = closed_form(sums["gram"], sums["cross"], 0.0, structure) if alpha else transform
    except SolveError:  # without the ridge there is no one solution to be far from
        return figures
    return figures | {"distance_from_alpha_zero": float((transform - plain).norm() / plain.norm())}


def _refusals(values: Values) -> list[str]:
    if values["transform"] == "channels" and values["use_4bit"]:
        return [
            "use_4bit: transform channels puts rows of several layers' weights together, and 4-bit ones are packed; use false."
        ]
    return []


METHOD = Method(
    stand_in=_stand_in,
    statistics=_statistics,
    solve=solve,
    words="fits what takes the block's place",
    transforms=TRANSFORMS,
    refusals=_refusals,
)
