import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replaceme.base.errors import SolveError
from replaceme.solvers.ridge import solve_ridge
from tests.solvers.helpers import made


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_transform_equals_numpy_lstsq(width: int, seed: int) -> None:
    M, Y = made(10 * width + 5, width, seed)
    expected = np.linalg.lstsq(M.numpy(), Y.numpy(), rcond=None)[0]
    assert np.allclose(solve_ridge(M.T @ M, M.T @ Y, 0.0).transform.numpy(), expected, rtol=1e-8, atol=1e-8)


@given(st.integers(1, 12), st.integers(1, 30), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_ridge_equals_least_squares_on_extended_rows(width: int, tokens: int, alpha: float) -> None:
    M, Y = made(tokens, width)
    rows = np.vstack([M.numpy(), alpha**0.5 * np.eye(width)])
    targets = np.vstack([Y.numpy(), np.zeros((width, width))])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    assert np.allclose(solve_ridge(M.T @ M, M.T @ Y, alpha).transform.numpy(), expected, rtol=1e-7, atol=1e-7)


def test_a_ridge_below_the_rounding_is_as_singular_as_none() -> None:
    M, Y = made(5, 8)
    with pytest.raises(SolveError, match="alpha: 1e-30 leaves the least squares singular"):
        solve_ridge(M.T @ M, M.T @ Y, 1e-30)


def test_where_rounding_leaves_the_matrix_not_quite_positive_eigenvectors_solve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    M, Y = made(50, 8)
    expected = solve_ridge(M.T @ M, M.T @ Y, 0.5).transform
    failed = torch.linalg.cholesky_ex(-torch.eye(2, dtype=torch.float64))
    assert failed.info > 0
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda _matrix: failed)
    assert torch.allclose(solve_ridge(M.T @ M, M.T @ Y, 0.5).transform, expected, rtol=1e-9)


@given(st.integers(2, 10), st.floats(0, 1e4), st.floats(1e-3, 1e4))
@settings(max_examples=40, deadline=None)
def test_any_other_ridge_is_known_from_the_eigenvalues(width: int, alpha: float, other: float) -> None:
    M, Y = made(10 * width, width)
    gram, cross = M.T @ M, M.T @ Y
    solution = solve_ridge(gram, cross, alpha)
    transforms = {value: solve_ridge(gram, cross, value).transform for value in (0.0, alpha, other)}
    residual = float((Y - M @ transforms[other]).square().sum())
    assert solution.squared_residual(other, float(Y.square().sum())) == pytest.approx(residual, rel=1e-8)
    change = float((transforms[alpha] - transforms[0.0]).norm() / transforms[0.0].norm())
    assert solution.change_from(alpha, 0.0) == pytest.approx(change, rel=1e-6, abs=1e-12)
    assert solution.full_rank
