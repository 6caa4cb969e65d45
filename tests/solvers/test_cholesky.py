"""Factors in the matrix's own memory: products, solutions and inverses."""

import pytest
import torch
from torch import Tensor

from replaceme.solvers.cholesky import factorize, inverse_diagonal, solve_factorized


def definite(size: int, dtype: torch.dtype) -> Tensor:
    g = torch.randn(2 * size, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    return g.T @ g


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 130])
def test_the_factor_solves_and_inverts(size: int, dtype: torch.dtype) -> None:
    matrix, right = definite(size, dtype), torch.ones(size, 3, dtype=dtype)
    tolerance = 1e3 * size * torch.finfo(dtype).eps
    expected = torch.linalg.inv(matrix.double())
    upper = matrix.triu()  # nothing below the diagonal is read
    factor, failed = factorize(upper)
    assert not failed
    assert torch.allclose(factor @ factor.T, matrix, rtol=tolerance, atol=tolerance)
    assert torch.allclose(solve_factorized(factor, right).double(), expected @ right.double(), rtol=tolerance, atol=tolerance)
    assert torch.allclose(inverse_diagonal(factor).double(), expected.diagonal(), rtol=tolerance, atol=tolerance)


def test_a_matrix_that_is_not_positive_definite_has_none() -> None:
    assert factorize(-torch.eye(3))[1]
