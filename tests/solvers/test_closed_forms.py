import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from replaceme.base.errors import SolveError
from replaceme.edits import edits
from replaceme.solvers.closed_forms import solve_closed_form, squared_error
from tests.helpers import elsewhere
from tests.solvers.helpers import made

WIDTHS, SEEDS, ALPHAS = st.integers(1, 9), st.integers(0, 500), st.sampled_from([0.0, 0.1, 3.0, 200.0])


def solved(M: torch.Tensor, Y: torch.Tensor, alpha: float, structure: str) -> np.ndarray:
    return solve_closed_form(M.T @ M, M.T @ Y, alpha, structure).numpy()


def ridge(columns: np.ndarray, target: np.ndarray, alpha: float) -> np.ndarray:
    """Solve one ridge regression as least squares on extended rows."""
    width = columns.shape[1]
    rows = np.vstack([columns, alpha**0.5 * np.eye(width)])
    return np.linalg.lstsq(rows, np.concatenate([target, np.zeros(width)]), rcond=None)[0]


@given(WIDTHS, SEEDS, ALPHAS)
@settings(max_examples=30, deadline=None)
def test_diagonal_equals_one_regression_a_dimension(width: int, seed: int, alpha: float) -> None:
    M, Y = made(8 * width + 5, width, seed)
    expected = [ridge(M[:, [j]].numpy(), Y[:, j].numpy(), alpha)[0] for j in range(width)]
    assert np.allclose(solved(M, Y, alpha, "diagonal"), np.diag(expected), rtol=1e-9, atol=1e-9)


@given(WIDTHS, SEEDS, ALPHAS)
@settings(max_examples=30, deadline=None)
def test_triangular_equals_one_regression_a_column_on_the_inputs_from_the_diagonal_down(
    width: int, seed: int, alpha: float
) -> None:
    M, Y = made(8 * width + 5, width, seed)
    expected = np.zeros((width, width))
    for j in range(width):
        expected[j:, j] = ridge(M[:, j:].numpy(), Y[:, j].numpy(), alpha)
    assert np.allclose(solved(M, Y, alpha, "triangular"), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 5.0, 100.0])
def test_two_vectors_are_no_worse_than_what_an_iterative_search_from_many_starts_finds(alpha: float) -> None:
    width = 5
    M, Y = (part.numpy() for part in made(60, width))

    def objective(T: np.ndarray) -> float:
        return float(((Y - M @ T) ** 2).sum() + alpha * ((T - np.eye(width)) ** 2).sum())

    found = solved(*map(torch.from_numpy, (M, Y)), alpha, "two_vectors")
    assert np.linalg.matrix_rank(found - np.eye(width), tol=1e-8) == 1
    chance = np.random.default_rng(0)
    searched = [
        minimize(lambda x: objective(np.eye(width) + np.outer(x[:width], x[width:])), chance.normal(size=2 * width)).fun
        for _ in range(8)
    ]
    assert objective(found) == pytest.approx(min(searched), rel=1e-6)


@given(WIDTHS, SEEDS, ALPHAS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_an_orthogonal_map_has_its_form_and_no_small_turn_or_stretch_of_it_fits_better(
    width: int, seed: int, alpha: float, after_norm: bool
) -> None:
    M, Y = made(8 * width + 5, width, seed)
    chance = torch.Generator().manual_seed(seed)
    gamma = torch.rand(width, generator=chance, dtype=torch.float64) + 0.5 if after_norm else None
    weight = torch.ones(width, dtype=torch.float64) if gamma is None else gamma
    T = solve_closed_form(M.T @ M, M.T @ Y, alpha, "orthogonal", gamma)
    Q, D = edits.rotation_and_gains(weight[:, None] * T)

    def objective(rotation: torch.Tensor, gains: torch.Tensor) -> float:
        map_ = rotation * gains / weight[:, None]
        return float((Y - M @ map_).square().sum() + alpha * map_.square().sum())

    lowest = objective(Q, D)
    # The best multiple of a rotation has a closed form, and is one of these maps.
    C, S = M.T @ Y / weight[:, None], (M.T @ M + alpha * torch.eye(width)) / weight / weight[:, None]
    U, singular, V = np.linalg.svd(C.numpy())
    scale = torch.full((width,), float(singular.sum() / S.trace()), dtype=torch.float64)
    assert lowest <= objective(torch.from_numpy(U @ V), scale) * (1 + 1e-9)
    for _ in range(20):
        skew = torch.randn(width, width, generator=chance, dtype=torch.float64)
        turned = Q @ torch.linalg.matrix_exp(1e-2 * (skew - skew.T))
        stretched = D * (1 + 1e-2 * torch.randn(width, generator=chance, dtype=torch.float64))
        assert objective(turned, D) >= lowest * (1 - 1e-3)
        assert objective(Q, stretched) >= lowest * (1 - 1e-3)


def test_a_huge_ridge_leaves_the_prior() -> None:
    M, Y = made(60, 6)
    for structure, prior in (("dense", 0), ("diagonal", 0), ("triangular", 0), ("two_vectors", 1)):
        assert np.allclose(solved(M, Y, 1e15, structure), prior * np.eye(6), atol=1e-9)


@pytest.mark.parametrize("structure", ["dense", "triangular", "two_vectors"])
def test_fewer_tokens_than_dimensions_without_ridge_is_an_error(structure: str) -> None:
    M, Y = made(5, 8)
    with pytest.raises(SolveError, match=r"alpha: 0 leaves the least squares singular \(rank 5 of 8\)"):
        solved(M, Y, 0.0, structure)
    assert np.isfinite(solved(M, Y, 0.1, structure)).all()


def test_a_dimension_that_is_always_zero_has_no_diagonal_fit_without_ridge() -> None:
    M, Y = made(20, 4)
    M[:, 2] = 0
    with pytest.raises(SolveError, match="alpha: 0 leaves the least squares singular"):
        solved(M, Y, 0.0, "diagonal")
    assert solved(M, Y, 1.0, "diagonal")[2, 2] == 0


def test_squared_error_is_that_of_the_tokens() -> None:
    M, Y = made(40, 5)
    T = torch.eye(5, dtype=torch.float64) * 0.5
    sums = {"gram": M.T @ M, "cross": M.T @ Y, "target_squares": Y.square().sum()}
    assert squared_error(sums, T) == pytest.approx(float((Y - M @ T).square().sum()))


@pytest.mark.parametrize("structure", ["dense", "diagonal", "two_vectors", "triangular", "orthogonal"])
def test_a_map_is_fitted_on_the_device_of_the_sums(structure: str) -> None:
    M, Y = made(60, 6)
    gram, cross, gamma = M.T @ M, M.T @ Y, torch.linspace(0.5, 2, 6)
    expected = solve_closed_form(gram, cross, 0.1, structure, gamma)
    with elsewhere():
        found = solve_closed_form(gram.to("meta"), cross.to("meta"), 0.1, structure, gamma)
        assert found.device.type == "meta"
        assert torch.equal(found.cpu(), expected)
