"""Ghosted Layers, against numpy's least squares on the activations themselves."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.errors import SolveError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, Plan
from replaceme.edits.unfused import unfused
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.families import family_of
from replaceme.models.model import Model
from replaceme.repair.repair import repair_layers
from tests.conftest import LAYERS, PLAIN_REPRESENTATIVES, WIDTH, made_model
from tests.helpers import many_documents, passing
from tests.methods.helpers import BLOCK, NO_CHECKPOINTS, assert_repaired_and_exported, solved_alone

solved = partial(solved_alone, "ghosted")


def states(model: Any, documents: Documents, block: Block = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    return passing(model, block.layer_before_cut, documents)["output"], passing(model, block.end - 1, documents)["output"]


def least_squares(h: np.ndarray, H: np.ndarray, weighted: bool = False, alpha: float = 0.0) -> np.ndarray:
    """Return W, by stacking the ridge toward the identity below the tokens."""
    root = 1 / np.linalg.norm(H, axis=1, keepdims=True) if weighted else np.ones((len(H), 1))
    root = root / np.sqrt(np.mean(root**2))
    identity = np.eye(h.shape[1])
    rows, goal = np.vstack([root * h, alpha**0.5 * identity]), np.vstack([root * H, alpha**0.5 * identity])
    return np.asarray(np.linalg.lstsq(rows, goal, rcond=None)[0])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 50.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_equals_numpys_least_squares(weighted: bool, alpha: float, batch_size: int, documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    made = solved(model, documents, batch_size=batch_size, ghosted_weighted=weighted, alpha=alpha)
    h, H = states(model, documents)
    W = least_squares(h, H, weighted, alpha)
    (operator,) = made.edits.operators.values()
    assert np.allclose(operator.numpy(), W, rtol=1e-8, atol=1e-8)
    w = np.square(H).sum(1, keepdims=True) ** -1.0 if weighted else 1.0
    kind = "weighted" if weighted else "relative"
    cosine = (h @ W * H).sum(1) / np.linalg.norm(h @ W, axis=1) / np.linalg.norm(H, axis=1)
    figures = {
        "tokens": len(H),
        f"{kind}_residual": np.sqrt((w * (H - h @ W) ** 2).sum() / (w * H**2).sum()),
        f"{kind}_residual_removed": np.sqrt((w * (H - h) ** 2).sum() / (w * H**2).sum()),
        "mean_cosine": cosine.mean(),
        "mean_cosine_removed": ((h * H).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(H, axis=1)).mean(),
        "distance_from_identity": np.linalg.norm(W - np.eye(WIDTH)) / WIDTH**0.5,
    }
    assert {name: made.figures[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    # The last row of the ridge path has a ridge as large as the largest eigenvalue.
    strongest, residual = made.ridge_path[-1]
    error = np.sqrt(w) * (H - h @ least_squares(h, H, weighted, strongest))
    assert residual == pytest.approx(np.linalg.norm(error) / np.linalg.norm(np.sqrt(w) * H), rel=1e-6)


@pytest.mark.parametrize("form", ["hadamard", "diagonal"])
def test_no_symmetric_operator_fits_better(form: str, documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    other = solved_alone("linearpatch", model, documents, linearpatch_form=form).figures["relative_residual"]
    assert solved(model, documents).figures["relative_residual"] < other


@pytest.mark.parametrize(
    ("method", "options"),
    [("ghosted", {}), ("linearpatch", {"linearpatch_form": "hadamard"}), ("linearpatch", {"linearpatch_form": "diagonal"})],
)
def test_a_block_that_changes_nothing_gets_the_identity(method: str, options: dict[str, Any], documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[BLOCK.start : BLOCK.end]:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    made = solved_alone(method, model, documents, **options)
    (operator,) = made.edits.operators.values()
    dense = operator if operator.ndim == 2 else operator.diag()
    assert torch.allclose(dense, torch.eye(WIDTH, dtype=torch.float64), atol=1e-10)
    assert made.figures["relative_residual"] < 1e-7


def test_too_little_text_is_named() -> None:
    model = made_model()
    text = Documents([torch.arange(2, 2 + WIDTH // 2)])
    with pytest.raises(SolveError, match=r"alpha: 0 leaves the least squares singular"):
        solved(model, text)
    assert solved(model, text, alpha=1.0).edits.operators


@pytest.mark.parametrize("kind", ["llama", "falcon", "gemma2", "mixtral"])
def test_each_later_block_is_fitted_on_states_of_the_shortened_model(kind: str) -> None:
    model, documents = made_model(kind, torch.float64, layers=8), many_documents()
    blocks, family = (Block(1, 2), Block(3, 5)), family_of(model.config)
    first = solved(model, documents, blocks[0])
    edits = deepcopy(first.edits)
    edits.removed_layers = [1, 3, 4]
    params = read_params(None, {"method": "ghosted", "batch_size": 4})
    plan = Plan(blocks, METHODS["ghosted"].statistics(params))
    _, figures = repair_layers(params, ModelContext(model, family, documents, params.batch_size), edits, plan, NO_CHECKPOINTS)
    _, H = states(model, documents, blocks[1])
    with unfused(model, family, first.edits):
        h = passing(model, blocks[1].layer_before_cut, documents)["output"]
    assert torch.equal(edits.operators[0], first.edits.operators[0])
    W = least_squares(h, H)
    assert np.allclose(edits.operators[2].numpy(), W, rtol=1e-5, atol=1e-5)
    assert figures["block1"]["relative_residual"] == pytest.approx(np.linalg.norm(H - h @ W) / np.linalg.norm(H), rel=1e-4)


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_repair_follows_an_operator(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = save_tiny(kind)
    edits = solved(source.load(), many_documents(12)).edits
    assert assert_repaired_and_exported(source, edits, Plan((BLOCK,), ()), tmp_path, "ghosted") == {*range(BLOCK.end, LAYERS)}
