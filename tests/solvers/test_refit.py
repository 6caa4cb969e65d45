"""New weights of the host's last linears, against plain ridge regressions in numpy."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replaceme.base.documents import Documents
from replaceme.base.errors import SolveError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.repair.repair import repair_layers
from replaceme.solvers.quality import sse_change_of_correction
from replaceme.solvers.ridge import solve_correction, solve_ridge
from replaceme.statistics.cut_statistics import FeatureGram, take_statistics
from replaceme.statistics.features import Features
from tests.conftest import PLAIN_REPRESENTATIVES, WIDTH, made_model
from tests.helpers import many_documents, passing, ridge
from tests.methods.helpers import NO_CHECKPOINTS

BLOCK = Block(2, 4)


def at_cut(model: Any, documents: Documents) -> dict[str, np.ndarray]:
    """Return the host's signals, and H."""
    return passing(model, BLOCK.layer_before_cut, documents) | {"H": passing(model, BLOCK.end - 1, documents)["output"]}


def solved(model: Any, documents: Documents, **options: Any) -> tuple[Edits, dict[str, Any]]:
    params = read_params(None, options)
    family = family_of(model.config)
    taken = take_statistics(ModelContext(model, family, documents, 4), BLOCK, METHODS["lstsq"].statistics(params))
    found = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
    return found.edits, found.figures


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transform", ["refit", "joint"])
def test_the_solution_equals_a_direct_ridge_regression_toward_the_fold(transform: str, biased: bool) -> None:
    model, documents = made_model(dtype=torch.float64, mlp_bias=biased, attention_bias=biased), many_documents()
    edits, figures = solved(model, documents, transform=transform, alpha=2.0, refit_ridge=0.3)
    states, host = at_cut(model, documents), model.model.layers[BLOCK.layer_before_cut]
    A, G, M, x, h, H = (states[name] for name in ("A", "G", "M", "input", "output", "H"))
    w = 1 / np.square(H).sum(1)
    w *= len(w) / w.sum()
    T = np.linalg.solve((M.T * w) @ M + 2 * np.eye(WIDTH), (M.T * w) @ (H - h + M))
    rows = [host.mlp.down_proj.weight.detach().numpy().T @ T]
    if biased:
        rows.append(host.mlp.down_proj.bias.detach().numpy()[None] @ T)
    ones = np.ones((len(G), 1))
    g = np.hstack([G, ones]) if biased else G
    W = ridge(g, H - (h - M), w, np.vstack(rows), 0.3, biased)
    expected = {"mlp": W}
    if transform == "joint":
        b = host.self_attn.o_proj.bias.detach().numpy() if biased else 0
        prior = np.vstack([host.self_attn.o_proj.weight.detach().numpy().T, W])
        g = np.hstack([A, g])
        both = ridge(g, H - x - b, w, prior, 0.3, biased)
        expected = {"attention": both[: A.shape[1]], "mlp": both[A.shape[1] :]}
        error = H - x - b - g @ both
    else:
        error = H - (h - M) - g @ W
    found = figures["weighted_residual_joint" if transform == "joint" else "weighted_residual"]
    assert found == pytest.approx(np.sqrt((np.square(error).sum(1) * w).sum() / len(w) / w_unit(H)), rel=1e-4)
    apply_edits(model, Family(), edits)
    host = model.model.layers[BLOCK.layer_before_cut]
    close = {"rtol": 1e-3, "atol": 1e-4}
    assert np.allclose(host.mlp.down_proj.weight.detach().numpy().T, expected["mlp"][: G.shape[1]], **close)
    if biased:
        assert np.allclose(host.mlp.down_proj.bias.detach().numpy(), expected["mlp"][-1], **close)
    if transform == "joint":
        assert np.allclose(host.self_attn.o_proj.weight.detach().numpy().T, expected["attention"], **close)


def w_unit(H: np.ndarray) -> float:
    """Return the mean of w‖H‖², with w scaled to a mean of 1."""
    w = 1 / np.square(H).sum(1)
    return float(1 / w.mean())


@pytest.mark.parametrize("transform", ["refit", "joint"])
def test_an_infinite_ridge_leaves_the_weighted_transform_alone(transform: str) -> None:
    model, documents = made_model(mlp_bias=False, attention_bias=False), many_documents()
    edits, figures = solved(model, documents, transform=transform, refit_ridge=1e14)
    states = at_cut(model, documents)
    M, h, H = states["M"], states["output"], states["H"]
    w = 1 / np.square(H).sum(1)
    T = np.linalg.solve((M.T * w) @ M, (M.T * w) @ (H - h + M))
    assert np.allclose(edits.transforms[BLOCK.layer_before_cut].numpy(), T, rtol=1e-3, atol=1e-3)
    assert all(weight.abs().max() < 1e-9 for weight, _ in edits.corrections.values())
    found = figures.get("weighted_residual", figures.get("weighted_residual_joint"))
    assert found == pytest.approx(figures["weighted_residual_transform"], rel=1e-9)


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_the_residual_of_a_refit_is_what_the_shortened_model_leaves(kind: str, documents: Documents) -> None:
    model = made_model(kind, torch.float64)
    family, H = family_of(model.config), passing(model, BLOCK.end - 1, documents)["output"]
    edits, figures = solved(model, documents, transform="refit", alpha=1.0)
    edits.removed_layers = [*BLOCK.layers]
    apply_edits(model, family, edits)
    left = H - passing(model, BLOCK.layer_before_cut, documents)["output"]
    assert figures["weighted_residual"] == pytest.approx(
        np.sqrt((np.square(left).sum(1) / np.square(H).sum(1)).mean()), rel=1e-3
    )


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_more_weights_never_fit_worse(kind: str, documents: Documents) -> None:
    model = made_model(kind)
    residuals = []
    for transform in ("refit", "joint"):
        for size in (10.0, 0.3, 0.01):
            _, figures = solved(model, documents, transform=transform, alpha=1e-6, refit_ridge=size)
            found = figures.get("weighted_residual", figures.get("weighted_residual_joint"))
            assert found <= figures["weighted_residual_transform"] <= figures["weighted_residual_removed"]
            residuals.append(found)
    assert residuals[:3] == sorted(residuals[:3], reverse=True)
    assert all(joint < refit for refit, joint in zip(residuals[:3], residuals[3:], strict=True))


@given(st.integers(1, 8), st.integers(1, 4), st.booleans(), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_correction_is_the_minimum_of_its_objective(
    features: int, width: int, constant: bool, size: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    g = chance.normal(size=(20, features)) * chance.uniform(1e-3, 1e3, size=features)
    g = np.hstack([g, np.ones((20, 1))]) if constant else g
    e = chance.normal(size=(20, width))
    penalty = np.sqrt(size) * np.linalg.norm(g, axis=0)
    if constant:
        penalty[-1] = 0
    expected = np.linalg.lstsq(np.vstack([g, np.diag(penalty)]), np.vstack([e, np.zeros((g.shape[1], width))]), rcond=None)[0]
    ridges = torch.full((g.shape[1],), size, dtype=torch.float64)
    if constant:
        ridges[-1] = 0
    found = solve_correction(torch.from_numpy(g.T @ g), torch.from_numpy(g.T @ e), ridges)
    assert np.allclose(
        found.numpy() * np.linalg.norm(g, axis=0)[:, None], expected * np.linalg.norm(g, axis=0)[:, None], atol=1e-8
    )
    less = np.square(e - g @ expected).sum() - np.square(e).sum()
    sums = torch.from_numpy(g.T @ g), torch.from_numpy(g.T @ e)
    assert sse_change_of_correction(sums[0].diagonal(), sums[1], found, ridges) == pytest.approx(less, abs=1e-8)
    assert torch.equal(solve_correction(*sums, ridges, overwrite=True), found)


def test_a_feature_that_is_always_zero_gets_nothing() -> None:
    g = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    found = solve_correction(g.T @ g, g.T @ g[:, :1], torch.full((2,), 0.5))
    assert found.tolist() == [[pytest.approx(1 / 1.5)], [0.0]]


def test_a_ridge_that_is_too_small_for_so_few_tokens_is_named() -> None:
    g = torch.randn(20, 60, dtype=torch.float64)
    with pytest.raises(SolveError, match=r"^ridge: 1e-18 leaves the least squares singular; raise it, or dataset_size"):
        solve_correction(g.T @ g, g.T @ g[:, :3], torch.full((60,), 1e-18, dtype=torch.float64))


def test_the_parameter_that_is_too_small_is_named_and_no_other() -> None:
    model, few = made_model(mlp_bias=False, attention_bias=False), many_documents(1)
    for key, options in {"alpha": {"alpha": 0.0}, "refit_ridge": {"alpha": 1.0, "refit_ridge": 1e-18}}.items():
        with pytest.raises(SolveError) as caught:
            solved(model, few, transform="refit", **options)
        sentence = f"^{key}: {options[key]:g} leaves the least squares singular.*raise .*dataset_size"
        assert re.search(sentence, str(caught.value))
        assert ("alpha" in str(caught.value)) == (key == "alpha")


@pytest.mark.parametrize("linear", ["attention", "mlp"])
def test_a_repair_names_the_smaller_of_its_ridges(linear: str, tmp_path: Path) -> None:
    model, few = made_model("gpt_neox"), many_documents(1)
    ridges = {"repair_ridge_attention": 1e-17, "repair_ridge_mlp": 1e-17, f"repair_ridge_{linear}": 1e-18}
    params = read_params(None, {"method": "uidl", "repair": True, "batch_size": 4, **ridges})
    family = family_of(model.config)
    assert family.parallel
    edits, plan = Edits("test", [*BLOCK.layers]), Plan((BLOCK,), ())
    with pytest.raises(SolveError, match=f"^repair_ridge_{linear}: 1e-18 leaves the least squares singular; raise it, or data"):
        repair_layers(params, ModelContext(model, family, few, params.batch_size, tmp_path), edits, plan, NO_CHECKPOINTS)


def test_the_map_is_solved_from_exact_sums() -> None:
    # Singular values over five decades: products in float32 would lose the smallest.
    chance = torch.Generator().manual_seed(0)
    M = torch.randn(4000, 64, generator=chance) * torch.logspace(0, -5, 64)
    H = torch.randn(4000, 8, generator=chance) @ torch.randn(8, 64, generator=chance)
    statistic = FeatureGram(BLOCK, Features({"mlp_output": 64}, None))
    for part in range(0, 4000, 500):
        rows = slice(part, part + 500)
        statistic.take(M[rows], M[rows], M[rows], H[rows], None)
    sums = statistic.tensors()
    w = 1 / H.double().square().sum(1)
    w = w / w.mean()
    root = w.sqrt()[:, None]
    expected = np.linalg.lstsq((M.double() * root).numpy(), (H.double() * root).numpy(), rcond=None)[0]
    found = solve_ridge(sums["added_gram"], sums["added_cross"] + sums["added_gram"], 0.0).transform
    assert np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
