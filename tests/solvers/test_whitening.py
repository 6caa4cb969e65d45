import pytest
import torch

from replaceme.solvers.closed_forms import closed_form, squared_error
from replaceme.solvers.minimisers import Budget, minimise
from replaceme.solvers.objectives import CosineLoss, Problem, SquaredError
from replaceme.solvers.structures import parametrisation
from replaceme.solvers.whitening import Whitening
from tests.solvers.helpers import STRUCTURES, WIDTH, Held, made_sums, made_tokens, some_x

UNEVEN = torch.logspace(-3, 2, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_coordinates_come_back_and_gradients_follow_the_chain_rule(structure: str) -> None:
    M, _, _ = made_tokens()
    whitening = Whitening(parametrisation(structure, WIDTH), (M * UNEVEN).T @ (M * UNEVEN))
    x, gradient = some_x(structure), some_x(structure).flip(0)
    assert torch.allclose(whitening.leave(whitening.enter(x)), x)
    expected = torch.func.vjp(whitening.leave, whitening.enter(x))[1](gradient)[0]
    assert torch.allclose(whitening.pull_back(gradient), expected)


@pytest.mark.parametrize("solver", ["lbfgs", "cg", "trust_region"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_dimensions_a_hundred_thousand_times_apart_are_fitted_in_a_few_iterations(structure: str, solver: str) -> None:
    M, Z, H = made_tokens(80)
    M = M * UNEVEN
    sums, shape = made_sums(M, Z, H), parametrisation(structure, WIDTH)
    prior = torch.eye(WIDTH, dtype=torch.float64) * float(structure == "two_vectors")
    problem = Problem(SquaredError(sums), shape, prior, 1e-6)
    found = minimise(problem, shape.start(torch.eye(WIDTH, dtype=torch.float64)), solver, Budget(max_iterations=60))
    best = closed_form(sums["gram"], sums["cross"], 1e-6, structure)
    expected = (squared_error(sums, best) + 1e-6 * float((best - prior).square().sum())) / len(M)
    assert found.lowest == pytest.approx(expected, rel=1e-4)
    assert found.converged


def test_a_singular_metric_gives_bounded_solutions() -> None:
    M, Z, H = made_tokens(2)
    shape = parametrisation("dense", WIDTH)
    problem = Problem(SquaredError(made_sums(M, Z, H)), shape, torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0)
    found = minimise(problem, torch.zeros(WIDTH**2, dtype=torch.float64), "lbfgs", Budget())
    assert found.lowest == pytest.approx(0, abs=1e-6)
    assert float(found.x.abs().max()) < 100


def test_the_cosines_metric_weighs_each_token_by_the_length_of_what_is_predicted() -> None:
    M, Z, H = made_tokens()
    T = torch.eye(WIDTH, dtype=torch.float64) * 2
    weighted = M / (M @ T + Z).norm(dim=1, keepdim=True)
    assert torch.allclose(CosineLoss(Held(M, Z, H)).metric(T), weighted.T @ weighted)
