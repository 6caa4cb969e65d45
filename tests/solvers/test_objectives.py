"""Losses and their derivatives against autograd and plain numpy, on random tokens in float64."""

import numpy as np
import pytest
import torch

from replaceme.solvers.objectives import CosineLoss, Loss, Problem, SquaredError
from replaceme.solvers.structures import parametrisation
from tests.solvers.helpers import STRUCTURES, WIDTH, Held, made_sums, made_tokens, some_x

LOSSES = ["fast", "accurate", "mse"]


def loss_and_plain(kind: str) -> tuple[Loss, object]:
    """Return a loss, and a plain function of T that sums it over the tokens."""
    M, Z, H = made_tokens()
    Y = H - Z
    if kind == "mse":
        return SquaredError(made_sums(M, Z, H)), lambda T: (Y - M @ T).square().sum()
    if kind == "fast":
        return CosineLoss(Held(M, None, Y)), lambda T: (1 - torch.cosine_similarity(M @ T, Y, dim=1)).sum()
    return CosineLoss(Held(M, Z, H)), lambda T: (1 - torch.cosine_similarity(M @ T + Z, H, dim=1)).sum()


def made_problem(kind: str, structure: str, ridge: float = 0.7) -> tuple[Problem, object]:
    """Return a problem with a prior that is neither 0 nor the identity, and the same as a plain function of x."""
    loss, plain = loss_and_plain(kind)
    shape = parametrisation(structure, WIDTH)
    prior = torch.diag(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
    problem = Problem(loss, shape, prior, ridge)
    return problem, lambda x: (plain(shape.build(x)) + ridge * (shape.build(x) - prior).square().sum()) / loss.tokens


def test_the_cosine_losses_equal_numpy() -> None:
    M, Z, H = (part.numpy() for part in made_tokens())
    T = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    for kind, (a, b) in {"fast": (M @ T, H - Z), "accurate": (M @ T + Z, H)}.items():
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert loss_and_plain(kind)[0].value_and_gradient(torch.from_numpy(T))[0] == pytest.approx((1 - cosine).sum())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_gradient_and_hessian_equal_autograds(kind: str, structure: str) -> None:
    problem, plain = made_problem(kind, structure)
    x, step = some_x(structure), some_x(structure).flip(0)
    value, gradient = problem.smooth(x)
    assert value == pytest.approx(float(plain(x)))
    assert torch.allclose(gradient, torch.func.grad(plain)(x), rtol=1e-9, atol=1e-12)
    expected = torch.func.jvp(torch.func.grad(plain), (x,), (step,))[1]
    assert torch.allclose(problem.hessian_product(x, step), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_minibatches_shares_add_up_to_the_whole_gradient_penalty_included(kind: str, size: int) -> None:
    problem, _ = made_problem(kind, "dense", ridge=40.0)
    x, total, tokens = some_x("dense"), torch.zeros(WIDTH**2, dtype=torch.float64), 0
    counts = [count for count, _ in problem.loss.minibatches(size, torch.Generator().manual_seed(1))]
    steps = list(problem.steps(size, torch.Generator().manual_seed(1)))
    for count, gradient in zip(counts, steps, strict=True):
        total, tokens = total + count * gradient(x), tokens + count
    assert tokens == problem.loss.tokens
    assert torch.allclose(total / tokens, problem.smooth(x)[1], rtol=1e-9)


def test_a_minibatch_is_of_the_size_asked_for_and_the_same_twice() -> None:
    M, Z, H = made_tokens(64)
    loss = CosineLoss(Held(M, Z, H, rows=32))
    runs = [list(loss.minibatches(8, torch.Generator().manual_seed(0))) for _ in range(2)]
    assert [count for count, _ in runs[0]] == [8] * 8
    T = torch.eye(WIDTH, dtype=torch.float64)
    assert all(torch.equal(a(T), b(T)) for (_, a), (_, b) in zip(*runs, strict=True))
    other = list(loss.minibatches(8, torch.Generator().manual_seed(1)))
    assert not torch.equal(other[0][1](T), runs[0][0][1](T))


def test_tokens_of_length_zero_have_no_direction_and_no_gradient() -> None:
    M, _, H = made_tokens(20)
    M[3], H[7] = 0, 0
    value, gradient = CosineLoss(Held(M, None, H)).value_and_gradient(torch.eye(WIDTH, dtype=torch.float64))
    kept = [row for row in range(20) if row not in (3, 7)]
    expected = CosineLoss(Held(M[kept], None, H[kept])).value_and_gradient(torch.eye(WIDTH, dtype=torch.float64))
    assert value == pytest.approx(expected[0] + 2)
    assert torch.allclose(gradient, expected[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_transform_with_the_structure_comes_back_from_its_vector(structure: str) -> None:
    shape = parametrisation(structure, WIDTH)
    T = shape.build(some_x(structure))
    for transform in (T, torch.eye(WIDTH, dtype=torch.float64)):
        assert torch.allclose(shape.build(shape.start(transform)), transform, atol=1e-12)
    if structure == "triangular":
        assert torch.equal(T, T.tril())
