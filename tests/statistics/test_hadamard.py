"""Hadamard matrices at the widths of models: orthonormal rows, entries of one magnitude."""

import pytest
import torch

from replaceme.statistics.hadamard import hadamard

WIDTHS = [576, 640, 768, 896, 960, 1152, 1600, 2048, 2304, 2880, 3072, 3584]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 76, 84, 104, 148, 284])
def test_rows_are_orthonormal_and_entries_differ_in_sign_only(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert matrix.shape == (order, order)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-14)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_of_usual_models_have_one(width: int) -> None:
    matrix, vectors = hadamard(width), torch.randn(width, 3, dtype=torch.float64)
    assert matrix is not None
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5), rtol=1e-14)
    assert torch.allclose(matrix @ (matrix.T @ vectors), vectors, atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 18, 50, 52, 92, 577])
def test_an_order_without_a_construction_gives_none(order: int) -> None:
    assert hadamard(order) is None
