"""Objectives against plain numpy, and their streamed derivatives against autograd of the plain sum, in float64."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from replaceme.solvers.objectives import CosineLoss, Problem, SquaredError
from replaceme.solvers.structures import parametrise
from replaceme.statistics.shards import Tokens
from tests.solvers.helpers import STRUCTURES, WIDTH, Held, made_sums, made_tokens, made_x

CPU, EYE = torch.device("cpu"), torch.eye(WIDTH, dtype=torch.float64)


def loss_and_plain(kind: str) -> tuple[SquaredError | CosineLoss, Callable[[Tensor], Tensor]]:
    """Return a loss, and a plain function of T that sums it over the tokens."""
    M, Z, H = made_tokens()
    Y = H - Z
    if kind == "mse":
        return SquaredError(made_sums(M, Z, H)), lambda T: (Y - M @ T).square().sum()
    if kind == "fast":
        return CosineLoss(Held(M, None, Y), CPU, torch.float64), lambda T: (1 - torch.cosine_similarity(M @ T, Y, dim=1)).sum()
    return CosineLoss(Held(M, Z, H), CPU, torch.float64), lambda T: (1 - torch.cosine_similarity(M @ T + Z, H, dim=1)).sum()


@pytest.mark.parametrize("kind", ["fast", "accurate", "mse"])
def test_the_objective_equals_numpy(kind: str) -> None:
    M, Z, H = (part.numpy() for part in made_tokens())
    problem = Problem(loss_and_plain(kind)[0], parametrise("dense", WIDTH, CPU, split=True), EYE, 0.7, lasso=0.4)
    T = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    a, b = (M @ T + Z, H) if kind == "accurate" else (M @ T, H - Z)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    loss = np.square(a - b).sum() if kind == "mse" else (1 - cosine).sum()
    expected = (loss + 0.7 * np.square(T - np.eye(WIDTH)).sum() + 0.4 * np.abs(T).sum()) / len(M)
    assert problem.value(problem.structure.vector(torch.from_numpy(T))) == pytest.approx(expected)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["fast", "accurate", "mse"])
def test_streamed_derivatives_equal_those_of_the_plain_sum(kind: str, structure: str, whitened: bool) -> None:
    loss, plain = loss_and_plain(kind)
    prior = torch.diag(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
    problem = Problem(loss, parametrise(structure, WIDTH, CPU), prior, 0.7)
    problem = problem.whitened(EYE) if whitened else problem

    def objective(x: Tensor) -> Tensor:
        T = problem.structure.transform(x)
        return (plain(T) + 0.7 * (T - prior).square().sum()) / loss.tokens

    x, step = made_x(structure), made_x(structure).flip(0)
    value, gradient = problem.value_and_gradient(x)
    assert value == pytest.approx(float(objective(x)))
    assert value == pytest.approx(problem.value(x))
    assert torch.allclose(gradient, torch.autograd.functional.jacobian(objective, x), rtol=1e-9, atol=1e-12)
    expected = torch.autograd.functional.hvp(objective, x, step)[1]
    assert torch.allclose(problem.hessian_product(x, step), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["fast", "accurate", "mse"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_epochs_minibatches_are_the_whole_objective_penalty_included(kind: str, size: int) -> None:
    problem = Problem(loss_and_plain(kind)[0], parametrise("dense", WIDTH, CPU), EYE, 40.0)
    x = made_x("dense")
    parts = [(share, float(part(x))) for share, part in problem.parts(size, torch.Generator().manual_seed(1))]
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert sum(share * value for share, value in parts) == pytest.approx(problem.value(x))


def test_tokens_of_zeros_have_no_direction_and_no_derivatives() -> None:
    M, _, H = made_tokens(20)
    M[3], H[7] = 0, 0
    kept = [row for row in range(20) if row not in (3, 7)]
    found, expected = (
        Problem(CosineLoss(Held(M[rows], None, H[rows]), CPU, torch.float64), parametrise("dense", WIDTH, CPU), EYE, 0.0)
        for rows in (slice(None), kept)
    )
    x, step = made_x("dense"), made_x("dense").flip(0)
    assert 20 * found.value(x) == pytest.approx(18 * expected.value(x) + 2)
    assert torch.allclose(20 * found.value_and_gradient(x)[1], 18 * expected.value_and_gradient(x)[1])
    assert torch.allclose(20 * found.hessian_product(x, step), 18 * expected.hessian_product(x, step))


def test_one_shard_is_in_memory_while_the_next_is_read() -> None:
    held, alive, most = Held(*made_tokens(200), rows=10), set[int](), []

    def read(shard: int) -> Tokens:
        M, Z, H = (part if part is None else part.clone() for part in held.parts[shard])
        most.append(len(alive))
        alive.add(shard)
        weakref.finalize(M, alive.discard, shard)
        return M, Z, H

    problem = Problem(
        CosineLoss(SimpleNamespace(counts=held.counts, read=read), CPU, torch.float64),
        parametrise("dense", WIDTH, CPU),
        EYE,
        0.1,
    )
    x = made_x("dense")
    problem.value_and_gradient(x)
    problem.hessian_product(x, x)
    assert sum(float(part(x)) for _, part in problem.parts(4, torch.Generator())) > 0
    problem.whitened(EYE)
    assert max(most) == 1


def test_the_cosines_metric_weighs_each_token_by_the_length_of_what_is_predicted() -> None:
    M, Z, H = made_tokens()
    weighted = M / (M @ (2 * EYE) + Z).norm(dim=1, keepdim=True)
    assert torch.allclose(CosineLoss(Held(M, Z, H), CPU, torch.float64).metric(2 * EYE), weighted.T @ weighted)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize(("structure", "split"), [*((name, False) for name in STRUCTURES), ("triangular", True)])
def test_a_transform_with_the_structure_comes_back_from_its_vector(structure: str, split: bool, whitened: bool) -> None:
    M, _, _ = made_tokens()
    plain, shape = parametrise(structure, WIDTH, CPU), parametrise(structure, WIDTH, CPU, split=split)
    shape = shape.whitened(M.T @ M) if whitened else shape
    for T in (plain.transform(made_x(structure)), EYE):
        assert torch.allclose(shape.transform(shape.vector(T)), T, atol=1e-12)
        assert structure != "triangular" or torch.equal(T, T.tril())
