"""The closed form of ReplaceMe's transform, from Gram statistics, in float64.

    T = argmin ‖Y − M T‖² + α‖T‖² = (MᵀM + αI)⁻¹ MᵀY        (arXiv 2505.02819, section 3)

Solved by Cholesky, never by an explicit inverse; by eigenvectors where rounding leaves the matrix not quite positive.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from replaceme.errors import SolveError


@dataclass(frozen=True)
class RidgeSolution:
    """A solved ridge regression.

    Attributes:
        transform: (d, d) float64, for row vectors: ``Y ≈ M T``.
        smallest_eigenvalue: of ``MᵀM``; what α is to be compared with.
        condition_number: of ``MᵀM + αI``.
    """

    transform: Tensor
    smallest_eigenvalue: float
    condition_number: float


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
    smallest, largest = max(float(eigenvalues[0]), 0.0), float(eigenvalues[-1])
    resolution = largest * len(gram) * torch.finfo(torch.float64).eps
    if smallest + alpha <= resolution:
        rank = int((eigenvalues > resolution).sum())
        raise SolveError(
            f"alpha: {alpha:g} leaves the least squares singular (rank {rank} of {len(gram)}); "
            f"raise dataset_size for more tokens, or set alpha well above {resolution:.1g}."
        )
    factor, failed = torch.linalg.cholesky_ex(gram + alpha * torch.eye(len(gram), dtype=torch.float64))
    if failed:
        shifted = (eigenvalues.clamp_min(0) + alpha)[:, None]
        transform = vectors @ ((vectors.T @ cross) / shifted)
    else:
        transform = torch.cholesky_solve(cross, factor)
    return RidgeSolution(transform, smallest, (largest + alpha) / (smallest + alpha))
