"""How well a transform fits at the cut, whatever made it: the figures of metrics/solve.json that all methods share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from replaceme.closed_forms import squared_error


def fit_quality(transform: Tensor, sums: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tokens, relative residuals, mean cosines and the distance from the identity.

    Args:
        transform: T, (d, d) float64.
        sums: the statistic ``gram``: of all tokens.
        sample: the statistic ``sample``: M, Z and H of a few.
    """
    output_squares = float(sums["output_squares"])
    return {
        "tokens": int(sums["tokens"]),
        "relative_residual": (squared_error(sums, transform) / output_squares) ** 0.5,
        "relative_residual_removed": (float(sums["gap_squares"]) / output_squares) ** 0.5,
        "mean_cosine": _mean_cosine(sample["added"].double() @ transform + sample["rest"], sample["target"]),
        "mean_cosine_removed": _mean_cosine(sample["added"] + sample["rest"], sample["target"]),
        "distance_from_identity": float((transform - torch.eye(len(transform), dtype=torch.float64)).norm())
        / len(transform) ** 0.5,
    }


def ridge_figures(eigenvalues: Tensor, alpha: float) -> dict[str, float]:
    """Return how α compares with ``MᵀM``; what would be infinite is left out.

    Args:
        eigenvalues: (d,) of ``MᵀM``, ascending.
        alpha: ridge of a squared error.
    """
    smallest, largest = max(float(eigenvalues[0]), 0.0), float(eigenvalues[-1])
    figures = {"smallest_eigenvalue": smallest}
    if smallest > 0:
        figures["alpha_over_smallest_eigenvalue"] = alpha / smallest
    if smallest + alpha > 0:
        figures["condition_number"] = (largest + alpha) / (smallest + alpha)
    return figures


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=-1).mean())
