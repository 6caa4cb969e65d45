"""Iterative solvers on badly scaled and singular problems, and on another device."""

import pytest
import torch

from replaceme.base.errors import SolveError
from replaceme.solvers.closed_forms import solve_closed_form, squared_error
from replaceme.solvers.minimisers import minimise_by_adam, minimise_by_scipy
from replaceme.solvers.objectives import CosineLoss, Problem, SquaredError
from replaceme.solvers.structures import parametrise
from tests.helpers import elsewhere
from tests.solvers.helpers import STRUCTURES, WIDTH, Held, made_sums, made_tokens

CPU, EYE = torch.device("cpu"), torch.eye(WIDTH, dtype=torch.float64)
SOLVERS = ["adam", "lbfgs", "cg", "trust_region"]
UNEVEN = torch.logspace(-3, 2, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["lbfgs", "cg", "trust_region"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_dimensions_a_hundred_thousand_times_apart_are_fitted_in_a_few_iterations(structure: str, solver: str) -> None:
    M, Z, H = made_tokens(80)
    M = M * UNEVEN
    sums, prior = made_sums(M, Z, H), EYE * float(structure == "two_vectors")
    problem = Problem(SquaredError(sums), parametrise(structure, WIDTH, CPU), prior, 1e-6)
    found = minimise_by_scipy(problem, EYE, solver, 60)
    best = solve_closed_form(sums["gram"], sums["cross"], 1e-6, structure)
    expected = float(squared_error(sums, best) + 1e-6 * (best - prior).square().sum()) / len(M)
    assert found.lowest == pytest.approx(expected, rel=1e-4)
    assert found.converged


def test_a_step_that_makes_the_loss_overflow_is_named() -> None:
    problem = Problem(SquaredError(made_sums(*made_tokens())), parametrise("dense", WIDTH, CPU), 0 * EYE, 0.0)
    with pytest.raises(SolveError, match=r"^learning_rate: 1e\+200 makes the loss overflow; lower it"):
        minimise_by_adam(problem, EYE, 1e200, 1, 50)


@pytest.mark.parametrize(
    ("kind", "structure", "solver"),
    [
        *(("cosine", "dense", solver) for solver in SOLVERS), ("cosine", "two_vectors", "trust_region"),
        ("mse", "triangular", "cg"), ("elastic net", "dense", "adam"), ("elastic net", "diagonal", "lbfgs"),
    ],
)  # fmt: skip
def test_all_that_a_solver_makes_lies_on_the_device_of_the_sums(kind: str, structure: str, solver: str) -> None:
    M, Z, H = made_tokens(20)

    def solved(device: torch.device) -> torch.Tensor:
        eye = EYE.to(device)
        sums = {name: total.to(device) for name, total in made_sums(M, Z, H).items()}
        loss = CosineLoss(Held(M, Z, H), device, torch.float64) if kind == "cosine" else SquaredError(sums)
        problem = Problem(loss, parametrise(structure, WIDTH, device, split=kind == "elastic net"), eye, 0.1, lasso=0.1)
        minimum = minimise_by_adam(problem, eye, 0.1, 2, 8) if solver == "adam" else minimise_by_scipy(problem, eye, solver, 3)
        assert minimum.transform.device.type == device.type
        return minimum.transform.cpu()

    expected = solved(CPU)
    with elsewhere():
        assert torch.equal(solved(torch.device("meta")), expected)
