"""ReplaceMe with least squares (arXiv 2505.02819, section 3): one ridge regression a block, in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from replaceme.edits import Edits
from replaceme.methods.method import Method, Statistics
from replaceme.params import Params
from replaceme.plan import Plan
from replaceme.progress import logger
from replaceme.solver import RidgeSolution, solve_ridge


def solve(params: Params, plan: Plan, statistics: Statistics) -> tuple[Edits, dict[str, Any]]:
    """Return the removal with one transform a block, and how well each fits."""
    edits = Edits("ReplaceMe (least squares)", plan.removed_layers)
    figures: dict[str, Any] = {}
    for number, block in enumerate(plan.blocks):
        sums, sample = statistics("gram", number), statistics("sample", number)
        solution = solve_ridge(sums["gram"], sums["cross"], params.alpha)
        edits.transforms[block.host] = solution.transform
        fit = _quality(solution, sums, sample, params.alpha)
        figures = fit if len(plan.blocks) == 1 else {**figures, f"block{number}": fit}
        logger.info(
            "solve: host %d, %d tokens, relative residual %.4f (%.4f with nothing in the block's place), mean cosine %.4f",
            block.host, fit["tokens"], fit["relative_residual"], fit["relative_residual_removed"], fit["mean_cosine"],
        )  # fmt: skip
    return edits, figures


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
    return figures


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=-1).mean())


METHOD = Method(statistics=("gram", "sample"), solve=solve)
