"""Ridge regression from Gram matrices, in float64: ReplaceMe's transform, and the correction of a linear's weights.

    T = argmin ‖Y − M T‖² + α‖T‖² = (MᵀM + αI)⁻¹ MᵀY        (arXiv 2505.02819, section 3)

Solved by Cholesky, or by eigenvectors if rounding makes the matrix not positive definite; never by an explicit inverse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.solvers.cholesky import factorize, solve_factorized


def solve_correction(gram: Tensor, cross: Tensor, ridge: Tensor, *, overwrite: bool = False) -> Tensor:
    """Solve ``(S + Λ diag S) X = C``: the change of a linear's weights, with a ridge in the features' own units.

    ``C = Σ w gᵀe`` with the residuals ``e`` of the current weights, so the ridge penalises the change: the current weights are
    the prior.

    Args:
        gram: ``S = Σ w gᵀg`` (k, k) float64, symmetric positive semi-definite.
        cross: ``C`` (k, d) float64.
        ridge: (k,) float64, the diagonal of Λ: 0 for the column of ones, which is not penalised, above 0 for the others.
        overwrite: use the memory of ``gram``, which then holds nothing of use.

    Returns:
        X (k, d) float64; its row is 0 for a feature that is always zero.

    Raises:
        SolveError: the ridge is too small for the sums.
    """
    # With every feature scaled to a mean square of 1, the ridge is Λ itself, and the matrix is well scaled.
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    with torch.inference_mode():
        scaled = gram.mul_(scale) if overwrite else gram * scale
        scaled *= scale[:, None]
        # A feature of zeros has a row of zeros; the ridge makes it solvable.
        scaled.diagonal().add_(ridge.to(scaled))
        factor, failed = factorize(scaled)
    if failed:
        smallest = float(ridge[ridge > 0].min())
        # Callers put their parameter in place of ``ridge`` (``renaming``).
        raise SolveError(f"ridge: {smallest:g} leaves the least squares singular; raise it, or dataset_size.")
    return solve_factorized(factor, cross * scale[:, None]).mul_(scale[:, None])


@dataclass(frozen=True)
class RidgeSolution:
    """A solved ridge regression.

    Attributes:
        transform: (d, d) float64, for row vectors: ``Y ≈ M T``.
        eigenvalues: (d,) of ``MᵀM``, ascending, at least 0.
        projections: (d,) ``‖vᵢᵀ MᵀY‖²`` of each eigenvector vᵢ; with the eigenvalues, they give the figures of any other α.
        full_rank: whether α = 0 has a unique solution, to float64.
    """

    transform: Tensor
    eigenvalues: Tensor
    projections: Tensor
    full_rank: bool

    def squared_residual(self, alpha: float, target_squares: float) -> float:
        """Return ``‖Y − M T_α‖²`` for another ridge; ``target_squares`` is ``‖Y‖²``."""
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
        SolveError: the system is singular to float64, with this alpha.
    """
    gram, cross = gram.double(), cross.double()
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0)
    resolution = require_full_rank(eigenvalues, alpha)
    factor, failed = torch.linalg.cholesky_ex(gram + alpha * torch.eye(len(gram), dtype=torch.float64, device=gram.device))
    projected = vectors.T @ cross
    transform = vectors @ (projected / (eigenvalues + alpha)[:, None]) if failed else torch.cholesky_solve(cross, factor)
    projections = projected.square().sum(dim=1)
    return RidgeSolution(transform, eigenvalues, projections, float(eigenvalues[0]) > resolution)


def require_full_rank(eigenvalues: Tensor, alpha: float) -> float:
    """Require a regular ``MᵀM + αI``, and return the size up to which an eigenvalue of ``MᵀM`` is 0 to float64.

    Args:
        eigenvalues: (d,) of ``MᵀM``, ascending.
        alpha: ridge.

    Raises:
        SolveError: ``MᵀM + αI`` is singular to float64.
    """
    resolution = float(eigenvalues[-1]) * len(eigenvalues) * torch.finfo(torch.float64).eps
    if max(float(eigenvalues[0]), 0.0) + alpha <= resolution:
        rank = int((eigenvalues > resolution).sum())
        raise SolveError(
            f"alpha: {alpha:g} leaves the least squares singular (rank {rank} of {len(eigenvalues)}); "
            f"raise dataset_size, or set alpha well above {resolution:.1g}.",
        )
    return resolution
