"""Cholesky factors in the memory of the matrix itself, which can be the largest thing that a stage holds.

torch's routines copy what is not column-major. A symmetric matrix that is row-major is column-major transposed.
"""

import torch
from torch import Tensor


def factorize(matrix: Tensor) -> tuple[Tensor, bool]:
    """Return L (k, k), lower, with ``LLᵀ = matrix``, and whether there is none.

    Args:
        matrix: (k, k) float32 or float64, row-major, symmetric; read above the diagonal only. L is written over it.
    """
    factor, info = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, bool(info)


def solve_factorized(factor: Tensor, right: Tensor) -> Tensor:
    """Return ``(LLᵀ)⁻¹ right`` (k, d); the factor is not copied."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True, out=half)


def inverse_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal of ``(LLᵀ)⁻¹`` (k,); the inverse is written over the factor."""
    return torch.cholesky_inverse(factor, out=factor).diagonal()
