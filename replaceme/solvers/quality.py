"""Quality of a fit at the cut: the figures of metrics/solve.json that methods share.

Residuals e (rows are tokens) come from sums alone. With features g, ``S = gᵀg`` and ``C = gᵀe``, a change X of the map changes
the sum of their squares by

    ‖e − g X‖² − ‖e‖² = tr(Xᵀ S X) − 2 tr(Xᵀ C),    negative if it fits better

and the relative residual is ``√(‖e‖² / ‖H‖²)``, H the state at the cut. Cosines need single tokens: they are those of a sample.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from replaceme.base.errors import SolveError
from replaceme.solvers.closed_forms import solve_closed_form, squared_error
from replaceme.solvers.ridge import RidgeSolution

# Ridges for which a residual is computed at once.
PATH_POINTS = 33


def measure_fit(transform: Tensor, sums: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tokens, relative residuals, mean cosines and the distance from the identity.

    Args:
        transform: T, (d, d) float64.
        sums: the statistic ``gram``, of all tokens.
        sample: the statistic ``sample``: M, Z and H of a few tokens.
    """
    output_squares = float(sums["output_squares"])
    return {
        "tokens": int(sums["tokens"]),
        "relative_residual": relative_residual(float(squared_error(sums, transform)), output_squares),
        "relative_residual_removed": relative_residual(float(sums["gap_squares"]), output_squares),
        "mean_cosine": _mean_cosine(sample["added"].double() @ transform + sample["rest"], sample["target"]),
        "mean_cosine_removed": _mean_cosine(sample["added"] + sample["rest"], sample["target"]),
        "distance_from_identity": distance_from_identity(transform),
    }


def measure_operator_fit(
    P: Tensor, sums: Mapping[str, Tensor], sample: Mapping[str, Tensor], *, weighted: bool = False
) -> dict[str, Any]:
    """Return the figures of ``measure_fit`` for an operator P on the state h before the cut: how far ``h P`` is from H.

    Args:
        P: (d, d) float64.
        sums: the statistic ``stream``, or ``stream_weighted``.
        sample: the statistic ``sample``.
        weighted: whether ``sums`` is ``stream_weighted``; the residuals are then relative per token, and named weighted.
    """
    gap, whole = float(sums["gap_squares"]), float(sums["output_squares"])
    change = sse_change(sums["gram"], sums["cross"], P - torch.eye(len(P)).to(P))
    kind = "weighted" if weighted else "relative"
    h = (sample["added"] + sample["rest"]).double()
    return {
        "tokens": int(sums["tokens"]),
        f"{kind}_residual": relative_residual(gap + change, whole),
        f"{kind}_residual_removed": relative_residual(gap, whole),
        "mean_cosine": _mean_cosine(h @ P, sample["target"]),
        "mean_cosine_removed": _mean_cosine(h, sample["target"]),
        "distance_from_identity": distance_from_identity(P),
    }


def distance_from_identity(transform: Tensor) -> float:
    """Return ``‖T − I‖ / √d`` of a map (d, d)."""
    return float((transform - torch.eye(len(transform)).to(transform)).norm()) / len(transform) ** 0.5


def ridge_path(solution: RidgeSolution, target_squares: float, output_squares: float) -> list[tuple[float, float]]:
    """Return rows (α, relative residual) for ridges from a hundredth of the smallest eigenvalue to the largest.

    For dense maps only: their eigenvectors give all ridges at once.

    Args:
        solution: the solved least squares.
        target_squares: ``‖Y‖²`` of its target.
        output_squares: ``‖H‖²``, the denominator of the residual.
    """
    largest = float(solution.eigenvalues[-1])
    if not largest:  # M is always 0, with every ridge
        return []
    lowest = max(float(solution.eigenvalues[0]) / 100, largest * 1e-12)
    alphas = torch.logspace(math.log10(lowest), math.log10(largest), PATH_POINTS, dtype=torch.float64).tolist()
    return [(alpha, (solution.squared_residual(alpha, target_squares) / output_squares) ** 0.5) for alpha in alphas]


def sse_change(gram: Tensor, cross: Tensor, change: Tensor) -> float:
    """Return the change ``tr(Xᵀ S X) − 2 tr(Xᵀ C)`` of a sum of squared errors; negative is good."""
    return float((change * (gram @ change)).sum() - 2 * (change * cross).sum())


def sse_change_of_correction(diagonal: Tensor, cross: Tensor, change: Tensor, ridge: Tensor, scale: float = 1.0) -> float:
    """Return ``sse_change`` for ``scale`` times the solution of ``replaceme.solvers.ridge.solve_correction``.

    There ``S X = C − Λ diag S X``, so the diagonal of S is enough.
    """
    linear = float((change * cross).sum())
    squared = linear - float((change.square() * (ridge.to(diagonal) * diagonal)[:, None]).sum())
    return scale**2 * squared - 2 * scale * linear


def relative_residual(squares: float, output_squares: float) -> float:
    """Return ``√(squares / output_squares)``."""
    # Rounding can take a perfect fit below zero.
    return (max(squares, 0.0) / output_squares) ** 0.5


def describe_ridge(eigenvalues: Tensor, alpha: float) -> dict[str, float]:
    """Return figures that compare α with ``MᵀM``, without those that would be infinite.

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


def describe_dense_ridge(solution: RidgeSolution, alpha: float) -> dict[str, Any]:
    """Return figures that compare α with ``MᵀM``, and a dense map's distance from that of α = 0, if that is unique."""
    figures: dict[str, Any] = describe_ridge(solution.eigenvalues, alpha)
    if solution.full_rank:
        figures["distance_from_alpha_zero"] = solution.change_from(alpha, 0.0)
    return figures


def describe_structured_ridge(transform: Tensor, sums: Mapping[str, Tensor], alpha: float, structure: str) -> dict[str, Any]:
    """Return the figures of ``describe_dense_ridge`` for a map of another structure."""
    figures: dict[str, Any] = describe_ridge(torch.linalg.eigvalsh(sums["gram"]), alpha)
    if structure == "orthogonal":  # a second fit would cost as much as the first
        return figures
    try:
        plain = solve_closed_form(sums["gram"], sums["cross"], 0.0, structure) if alpha else transform
    except SolveError:  # no unique solution without the ridge
        return figures
    return figures | {"distance_from_alpha_zero": float((transform - plain).norm() / plain.norm())}


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=-1).mean())
