"""Method cosine: every combination of loss, form, structure and solver minimises the named objective, or is refused by name."""

from collections.abc import Mapping
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.methods.cosine import Objective, build_problem, least_squares_scale
from replaceme.methods.method import Solved
from replaceme.methods.registry import METHODS
from replaceme.solvers.closed_forms import solve_closed_form, squared_error
from tests.solvers.helpers import STRUCTURES, WIDTH, made_sums, made_tokens

BLOCK = Block(2, 4)
M, Z, H = made_tokens(80)
SUMS = made_sums(M, Z, H)
# Settings with which Adam converges on so few tokens.
PACE = {"learning_rate": 0.015, "epochs": 120, "tokens_per_step": 8, "max_iterations": 500}
SOLVERS = ["adam", "lbfgs", "cg", "trust_region"]


def made_statistics(M: Tensor, *, accurate: bool = False) -> dict[str, Mapping[str, Tensor]]:
    return {
        "gram": made_sums(M, Z[: len(M)], H[: len(M)]),
        "sample": {"added": M, "rest": Z[: len(M)], "target": H[: len(M)]},
        "tokens_accurate" if accurate else "tokens": {"counts": torch.tensor([len(M)])},
        "tokens.0": {"added": M, "left": Z + M, "target": H} if accurate else {"added": M, "goal": H - Z},
    }


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def solved(**given: object) -> Solved:
    params = read_params(
        None, {"method": "cosine", "device": "cpu", "alpha": 0.5, "start": "identity", **PACE, **given}, methods=METHODS
    )
    statistics = made_statistics(M, accurate=Objective.of(params).accurate)
    return METHODS["cosine"].solve(params, BLOCK, statistics.__getitem__)


def transform_of(result: Solved) -> Tensor:
    return result.edits.transforms[BLOCK.layer_before_cut]


def has_structure(T: np.ndarray, structure: str) -> bool:
    if structure == "two_vectors":
        return int(np.linalg.matrix_rank(T - np.eye(WIDTH), tol=1e-9)) <= 1
    return structure == "dense" or np.array_equal(T, np.tril(T) if structure == "triangular" else np.diag(np.diag(T)))


@pytest.mark.parametrize(("structure", "solver"), list(product(STRUCTURES, SOLVERS)))
def test_squared_error_reaches_the_closed_form_from_the_identity(structure: str, solver: str) -> None:
    result = solved(loss="mse", transform=structure, solver=solver)
    best = solve_closed_form(SUMS["gram"], SUMS["cross"], 0.5, structure)
    prior = torch.eye(WIDTH) if structure == "two_vectors" else torch.zeros(WIDTH, WIDTH)
    expected = (float(squared_error(SUMS, best)) + 0.5 * float((best - prior).square().sum())) / len(M)
    assert result.figures["loss_end"] == pytest.approx(expected, rel=1e-4)
    assert result.figures["loss_start"] > 1.01 * expected
    assert has_structure(transform_of(result).numpy(), structure)
    assert result.figures["converged"] == 1


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("accurate", [False, True])
def test_all_solvers_find_the_same_cosine(accurate: bool, structure: str) -> None:
    results = {name: solved(loss="cosine", accurate=accurate, transform=structure, solver=name) for name in SOLVERS}
    found = {name: result.figures["loss_end"] for name, result in results.items()}
    assert found["lbfgs"] < 0.97 * results["lbfgs"].figures["loss_start"]
    # A cosine is not convex: of a triangular transform there are two minima, a thousandth apart.
    near = 2e-3 if structure == "triangular" else 1e-5
    assert found["cg"] == pytest.approx(found["lbfgs"], rel=near)
    assert found["trust_region"] == pytest.approx(found["lbfgs"], rel=near)
    # Steps of constant length, of eight tokens each, end near the minimum but not at it.
    assert found["adam"] == pytest.approx(found["lbfgs"], rel=3e-2)
    assert all(results[name].figures["converged"] for name in SOLVERS if name != "adam")


@pytest.mark.parametrize("structure", ["dense", "diagonal", "triangular"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_elastic_net_meets_its_optimality_conditions(structure: str, ratio: float) -> None:
    """At a minimum the smooth part's slope is −αρ sign(T) where T isn't 0, and within ±αρ where it is."""
    result = solved(loss="elastic_net", transform=structure, solver="lbfgs", l1_ratio=ratio, alpha=60.0)
    T = transform_of(result)
    slope = 2 * (SUMS["gram"] @ T - SUMS["cross"]) + 60 * (1 - ratio) * T
    free = {"dense": T == T, "diagonal": torch.eye(WIDTH) > 0, "triangular": torch.ones(WIDTH, WIDTH).tril() > 0}[structure]
    size = float(SUMS["cross"].abs().max())
    assert float((slope + 60 * ratio * T.sign())[free & (T != 0)].abs().max()) < 1e-3 * size
    assert bool((slope[free & (T == 0)].abs() <= 60 * ratio + 1e-3 * size).all())
    assert has_structure(T.numpy(), structure)
    if ratio == 1.0 and structure == "dense":
        assert int((T == 0).sum()) > 0


@pytest.mark.parametrize("structure", ["dense", "diagonal", "triangular"])
def test_adam_finds_the_elastic_nets_minimum_too(structure: str) -> None:
    given = {"loss": "elastic_net", "transform": structure, "alpha": 60.0}
    adam, other = (solved(solver=solver, **given).figures["loss_end"] for solver in ("adam", "lbfgs"))
    assert adam == pytest.approx(other, rel=1e-4)


def test_the_fast_cosine_is_scaled_by_least_squares_at_the_end() -> None:
    result = solved(loss="cosine", solver="lbfgs")
    T, Y = transform_of(result).numpy(), (H - Z).numpy()
    P = M.numpy() @ T
    assert (P * Y).sum() / (P * P).sum() == pytest.approx(1)
    assert least_squares_scale(transform_of(result) * 3, SUMS) == pytest.approx(1 / 3)
    assert "rescaled_by" not in solved(loss="cosine", accurate=True, solver="lbfgs").figures


@pytest.mark.parametrize("given", [{}, {"accurate": True}, {"loss": "mse"}, {"transform": "two_vectors", "loss": "mse"}])
def test_a_huge_penalty_leaves_the_prior(given: dict[str, object]) -> None:
    result = solved(solver="lbfgs", alpha=1e9, **given)
    to_identity = not given or "transform" in given
    expected = torch.eye(WIDTH, dtype=torch.float64) * float(to_identity) * result.figures.get("rescaled_by", 1.0)
    assert torch.allclose(transform_of(result), expected, atol=1e-4)


def test_a_solver_starts_at_the_closed_form_which_is_a_minimum_already() -> None:
    for solver in SOLVERS:
        figures = solved(loss="mse", solver=solver, start="closed_form").figures
        assert figures["loss_end"] == pytest.approx(figures["loss_start"], rel=1e-9)
        assert figures["converged"] == 1
    expected = solve_closed_form(SUMS["gram"], SUMS["cross"], 0.5, "dense")
    assert torch.allclose(transform_of(solved(loss="mse", solver="cg", start="closed_form")), expected, atol=1e-9)


def test_the_curve_goes_from_the_start_to_the_end_and_the_best_is_kept() -> None:
    result = solved(loss="cosine", accurate=True, solver="adam", learning_rate=0.3, epochs=8)
    losses = [loss for _, loss in result.loss_curve]
    assert result.loss_curve[0] == (0, result.figures["loss_start"])
    assert result.figures["loss_end"] == min(losses)
    assert result.figures["iterations"] == result.loss_curve[-1][0] == 8 * 10
    params = read_params(
        None, {"method": "cosine", "accurate": True, "alpha": 0.5, "device": "cpu", "solver": "lbfgs"}, methods=METHODS
    )
    problem = build_problem(params, SUMS, made_statistics(M, accurate=True).__getitem__)
    assert problem.value(transform_of(result).reshape(-1)) == pytest.approx(min(losses), rel=1e-5)


def test_a_solver_that_does_not_converge_warns(caplog: pytest.LogCaptureFixture) -> None:
    solved.cache_clear()
    with caplog.at_level("INFO", "replaceme"):
        assert solved(loss="mse", solver="lbfgs", max_iterations=2).figures["converged"] == 0
        assert solved(loss="mse", solver="adam", epochs=2, learning_rate=1e-3).figures["converged"] == 0
    assert "max_iterations: lbfgs did not converge within 2; raise it" in caplog.text
    assert "epochs: adam did not converge within 2; raise it or change learning_rate" in caplog.text


@pytest.mark.parametrize(
    ("given", "tokens"),
    [({}, ["tokens"]), ({"accurate": True}, ["tokens_accurate"]), ({"loss": "mse"}, []), ({"loss": "elastic_net"}, [])],
)
def test_only_the_cosine_needs_single_tokens(given: dict[str, object], tokens: list[str]) -> None:
    params = read_params(None, {"method": "cosine", **given}, methods=METHODS)
    assert METHODS["cosine"].statistics(params) == ("gram", "sample", *tokens)


@pytest.mark.parametrize("given", [{}, {"accurate": True}, {"start": "identity"}, {"solver": "lbfgs"}])
def test_an_mlp_that_adds_nothing_is_named_and_no_parameter_without_effect(given: dict[str, object]) -> None:
    params = read_params(None, {"method": "cosine", "device": "cpu", **given}, methods=METHODS)
    statistics = made_statistics(torch.zeros_like(M), accurate="accurate" in given)
    with pytest.raises(SolveError, match=f"^method: the MLP of layer {BLOCK.layer_before_cut} adds nothing to any token"):
        METHODS["cosine"].solve(params, BLOCK, statistics.__getitem__)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_least_squares_with_a_ridge_map_an_mlp_that_adds_nothing_to_nothing(structure: str) -> None:
    statistics = made_statistics(torch.zeros_like(M))
    params = read_params(None, {"alpha": 1.0, "transform": structure}, methods=METHODS)
    found = METHODS["lstsq"].solve(params, BLOCK, statistics.__getitem__)
    assert found.figures["relative_residual"] == pytest.approx(found.figures["relative_residual_removed"])
    assert found.ridge_path == []
