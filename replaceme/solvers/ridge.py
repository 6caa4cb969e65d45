"""Closed forms from Gram statistics, in float64: ReplaceMe's transform, and the correction of a linear's weights.

    T = argmin ‖Y − M T‖² + α‖T‖² = (MᵀM + αI)⁻¹ MᵀY        (arXiv 2505.02819, section 3)

Solved by Cholesky, never by an explicit inverse; by eigenvectors where rounding leaves the matrix not quite positive.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from replaceme.solvers.arguments import ArgumentError


def solve_correction(gram: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """Solve ``(S + Λ diag S) X = C``: the change of a linear's weights that a ridge in the features' own units allows.

    With residuals ``e`` of the present weights, ``C = Σ w gᵀe`` makes ``X`` the change toward least squares that is pulled
    back to no change; so the prior is whatever the present weights are.

    Args:
        gram: ``S = Σ w gᵀg`` (k, k) float64, symmetric positive semi-definite.
        cross: ``C`` (k, d) float64.
        ridge: (k,) float64, the diagonal of Λ: 0 for a column of ones, which is not penalised, above 0 for the others.

    Returns:
        X (k, d) float64; a feature that is always zero gets nothing.

    Raises:
        ArgumentError: the sums are not finite, or the ridge is too small for them.
    """
    # In units where every feature has a mean square of 1, the ridge is all that is added, and the matrix well scaled.
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    scaled = gram * scale
    scaled *= scale[:, None]
    # A feature of zeros has a row of zeros, which the ridge alone makes solvable.
    scaled.diagonal().add_(ridge.to(scaled))
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not bool(torch.isfinite(factor).all() & torch.isfinite(cross).all()):
        raise ArgumentError("{sums}: the sums over the features are not finite; use float32 or bfloat16.")
    if failed:
        smallest = float(ridge[ridge > 0].min())
        raise ArgumentError(f"{{ridge}}: {smallest:g} leaves the least squares singular; raise it, or {{tokens}}.")
    del scaled
    return torch.cholesky_solve(cross * scale[:, None], factor).mul_(scale[:, None])


@dataclass(frozen=True)
class RidgeSolution:
    """A solved ridge regression.

    Attributes:
        transform: (d, d) float64, for row vectors: ``Y ≈ M T``.
        smallest_eigenvalue: of ``MᵀM``; what α is to be compared with.
        eigenvalues: (d,) of ``MᵀM``, ascending, none below 0.
        full_rank: whether α = 0 has one solution, to float64.
        projections: (d,) ``‖vᵢᵀ MᵀY‖²`` for each eigenvector: with the eigenvalues, all that is needed to know any other α.
    """

    transform: Tensor
    smallest_eigenvalue: float
    eigenvalues: Tensor
    projections: Tensor
    full_rank: bool

    def squared_residual(self, alpha: float, target_squares: float) -> float:
        """Return ``‖Y − M T_α‖²`` of another ridge, where ``target_squares`` is ``‖Y‖²``."""
        explained = self.projections * (self.eigenvalues + 2 * alpha) / (self.eigenvalues + alpha).square()
        # Rounding can take a perfect fit below zero.
        return max(target_squares - float(explained.sum()), 0.0)

    def change_from(self, alpha: float, other: float) -> float:
        """Return ``‖T_α − T_other‖ / ‖T_other‖`` (Frobenius) of two ridges."""
        change = 1 / (self.eigenvalues + alpha) - 1 / (self.eigenvalues + other)
        size = (self.projections / (self.eigenvalues + other).square()).sum()
        return float(((self.projections * change.square()).sum() / size).sqrt())


def solve_ridge(gram: Tensor, cross: Tensor, alpha: float) -> RidgeSolution:
    """Solve ``(gram + alpha I) T = cross``.

    Args:
        gram: ``MᵀM``, (d, d), symmetric positive semi-definite.
        cross: ``MᵀY``, (d, k).
        alpha: ridge, in the units of ``gram``.

    Raises:
        ArgumentError: the system is singular to float64, with this alpha.
    """
    gram, cross = gram.double(), cross.double()
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0)
    smallest = float(eigenvalues[0])
    resolution = require_full_rank(eigenvalues, alpha)
    factor, failed = torch.linalg.cholesky_ex(gram + alpha * torch.eye(len(gram), dtype=torch.float64))
    projected = vectors.T @ cross
    transform = vectors @ (projected / (eigenvalues + alpha)[:, None]) if failed else torch.cholesky_solve(cross, factor)
    projections = projected.square().sum(dim=1)
    return RidgeSolution(transform, smallest, eigenvalues, projections, smallest > resolution)


def require_full_rank(eigenvalues: Tensor, alpha: float) -> float:
    """Return the size below which float64 can't tell an eigenvalue from 0.

    Args:
        eigenvalues: (d,) of ``MᵀM``, ascending.
        alpha: ridge.

    Raises:
        ArgumentError: ``MᵀM + αI`` is singular to float64.
    """
    resolution = float(eigenvalues[-1]) * len(eigenvalues) * torch.finfo(torch.float64).eps
    if max(float(eigenvalues[0]), 0.0) + alpha <= resolution:
        rank = int((eigenvalues > resolution).sum())
        raise ArgumentError(
            f"{{alpha}}: {alpha:g} leaves the least squares singular (rank {rank} of {len(eigenvalues)}); "
            f"raise {{tokens}}, or set {{alpha}} well above {resolution:.1g}."
        )
    return resolution
