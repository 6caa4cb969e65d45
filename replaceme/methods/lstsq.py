"""ReplaceMe with least squares (arXiv 2505.02819, section 3), in closed form: one ridge regression a block; or one over all
weights of the host's last linears (``replaceme.refit``)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from replaceme.edits import Edits
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.params import Params
from replaceme.plan import Plan
from replaceme.progress import logger
from replaceme.refit import refit
from replaceme.solver import RidgeSolution, solve_ridge

RIDGES = 33
# The transforms that solve for more than a map, with the statistic that they want.
FEATURES = {"refit": "mlp_features", "joint": "features"}


def solve(params: Params, plan: Plan, statistics: Statistics) -> Solved:
    """Return the removal with one transform a block, and how well each fits."""
    if params.transform in FEATURES:
        return _refit(params, plan, statistics)
    solved = Solved(Edits("ReplaceMe (least squares)", plan.removed_layers))
    for number, block in enumerate(plan.blocks):
        sums, sample = statistics("gram", number), statistics("sample", number)
        solution = solve_ridge(sums["gram"], sums["cross"], params.alpha)
        solved.edits.transforms[block.host] = solution.transform
        fit = _quality(solution, sums, sample, params.alpha)
        solved.figures |= fit if len(plan.blocks) == 1 else {f"block{number}": fit}
        solved.ridge_path += [(block.host, alpha, residual) for alpha, residual in _ridge_path(solution, sums)]
        logger.info(
            "solve: host %d, %d tokens, relative residual %.4f (%.4f with nothing in the block's place), mean cosine %.4f",
            block.host, fit["tokens"], fit["relative_residual"], fit["relative_residual_removed"], fit["mean_cosine"],
        )  # fmt: skip
    return solved


def _refit(params: Params, plan: Plan, statistics: Statistics) -> Solved:
    solved = Solved(Edits(f"least squares over the host's last weights ({params.transform})", plan.removed_layers))
    for number, block in enumerate(plan.blocks):
        sums = statistics(FEATURES[params.transform], number)
        fit = refit(solved.edits, block.host, sums, params.alpha, params.refit_ridge)
        solved.figures |= fit if len(plan.blocks) == 1 else {f"block{number}": fit}
        logger.info(
            "solve: host %d, %d tokens, weighted residual %.4f (%.4f with a transform alone, %.4f with nothing)",
            block.host, fit["tokens"], fit["weighted_residual"], fit["weighted_residual_transform"],
            fit["weighted_residual_removed"],
        )  # fmt: skip
    return solved


def _statistics(params: Params) -> tuple[str, ...]:
    return (FEATURES[params.transform],) if params.transform in FEATURES else ("gram", "sample")


def _quality(solution: RidgeSolution, sums: Any, sample: Any, alpha: float) -> dict[str, Any]:
    T, output_squares = solution.transform, float(sums["output_squares"])
    # ‖Y − M T‖² from the sums alone; rounding can take a perfect fit below zero.
    residual = float(sums["target_squares"] - 2 * (T * sums["cross"]).sum() + (T * (sums["gram"] @ T)).sum())
    figures = {
        "tokens": int(sums["tokens"]),
        "relative_residual": (max(residual, 0.0) / output_squares) ** 0.5,
        "relative_residual_removed": (float(sums["gap_squares"]) / output_squares) ** 0.5,
        "mean_cosine": _mean_cosine(sample["added"].double() @ T + sample["rest"], sample["target"]),
        "mean_cosine_removed": _mean_cosine(sample["added"] + sample["rest"], sample["target"]),
        "condition_number": solution.condition_number,
        "smallest_eigenvalue": solution.smallest_eigenvalue,
        "distance_from_identity": float((T - torch.eye(len(T), dtype=T.dtype)).norm() / len(T) ** 0.5),
    }
    if solution.smallest_eigenvalue > 0:
        figures["alpha_over_smallest_eigenvalue"] = alpha / solution.smallest_eigenvalue
    if solution.full_rank:
        figures["distance_from_alpha_zero"] = solution.change_from(alpha, 0.0)
    return figures


def _ridge_path(solution: RidgeSolution, sums: Any) -> list[tuple[float, float]]:
    """Return the relative residual for ridges between the smallest and the largest eigenvalue, and somewhat below."""
    largest = float(solution.eigenvalues[-1])
    lowest = max(solution.smallest_eigenvalue / 100, largest * 1e-12)
    alphas = torch.logspace(math.log10(lowest), math.log10(largest), RIDGES, dtype=torch.float64).tolist()
    target, output = float(sums["target_squares"]), float(sums["output_squares"])
    return [(alpha, (solution.squared_residual(alpha, target) / output) ** 0.5) for alpha in alphas]


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=-1).mean())


METHOD = Method(fits=True, statistics=_statistics, solve=solve)
