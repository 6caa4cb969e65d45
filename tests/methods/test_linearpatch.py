"""LinearPatch, against its formula in numpy on the activations themselves."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.errors import ReplaceMeError
from replaceme.base.parameters import Params
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace
from replaceme.statistics.hadamard import hadamard
from tests.conftest import WIDTH, made_model
from tests.helpers import TEXT, passing
from tests.methods.helpers import BLOCK, solved_alone

solved = partial(solved_alone, "linearpatch")
FORMS = ["hadamard", "diagonal"]


def rotation_of(form: str) -> np.ndarray:
    matrix = hadamard(WIDTH) if form == "hadamard" else torch.eye(WIDTH, dtype=torch.float64)
    assert matrix is not None
    return matrix.numpy()


def dense_of(operator: torch.Tensor) -> np.ndarray:
    return (operator.diag() if operator.ndim == 1 else operator).numpy()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_is_the_papers_formula_on_the_activations(form: str, batch_size: int, documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    made = solved(model, documents, batch_size=batch_size, linearpatch_form=form)
    R, ratios = rotation_of(form), []
    for document in documents.documents:
        h, H = (passing(model, layer, Documents([document]))["output"] @ R for layer in (BLOCK.layer_before_cut, BLOCK.end - 1))
        ratios.append(np.abs(H).mean(axis=0) / np.abs(h).mean(axis=0))
    expected = R @ np.diag(np.mean(ratios, axis=0)) @ R.T
    (operator,) = made.edits.operators.values()
    assert operator.ndim == (2 if form == "hadamard" else 1)
    assert np.allclose(dense_of(operator), expected, rtol=1e-5, atol=1e-6)
    h, H = (passing(model, layer, documents)["output"] for layer in (BLOCK.layer_before_cut, BLOCK.end - 1))
    state = h @ expected
    cosine = (state * H).sum(1) / np.linalg.norm(state, axis=1) / np.linalg.norm(H, axis=1)
    figures = {
        "tokens": len(H),
        "relative_residual": np.linalg.norm(H - state) / np.linalg.norm(H),
        "relative_residual_removed": np.linalg.norm(H - h) / np.linalg.norm(H),
        "mean_cosine": cosine.mean(),
        "distance_from_identity": np.linalg.norm(expected - np.eye(WIDTH)) / WIDTH**0.5,
        "smallest_factor": np.mean(ratios, axis=0).min(),
        "largest_factor": np.mean(ratios, axis=0).max(),
    }
    assert {name: made.figures[name] for name in figures} == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_patched_state_has_the_magnitudes_of_the_state_after_the_block(form: str) -> None:
    model, text = made_model(), Documents([TEXT[0]])
    (operator,) = solved(model, text, linearpatch_form=form).edits.operators.values()
    h, H = (passing(model, layer, text)["output"] for layer in (BLOCK.layer_before_cut, BLOCK.end - 1))
    R = rotation_of(form)
    patched, target = (np.abs(states @ R).mean(axis=0) for states in (h @ dense_of(operator), H))
    assert np.allclose(patched, target, rtol=1e-4)
    assert not np.allclose(np.abs(h @ R).mean(axis=0), target, rtol=1e-2)


def test_a_channel_of_zeros_is_unchanged(documents: Documents) -> None:
    model = made_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0
        for layer in model.model.layers[: BLOCK.start]:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[5] = 0
                linear.bias[5] = 0
    (operator,) = solved(model, documents, linearpatch_form="diagonal").edits.operators.values()
    assert operator[5] == 1
    assert bool(torch.isfinite(operator).all())


def test_a_width_without_a_hadamard_matrix_is_refused_before_any_work(
    save_tiny: Callable[..., Model], params: Params, tmp_path: Path
) -> None:
    source = save_tiny(hidden_size=36, num_attention_heads=2, num_key_value_heads=1)
    given = {"model_path": str(source.folder), "method": "linearpatch"}
    inspect_inputs(params.model_copy(update=given), Workspace(tmp_path / "fine"))
    source = save_tiny(hidden_size=52, num_attention_heads=2, num_key_value_heads=1)
    narrow = params.model_copy(update={**given, "model_path": str(source.folder)})
    said = "linearpatch_form: hadamard needs a Hadamard matrix of the model's width, and of 52 none is constructed; use d"
    with pytest.raises(ReplaceMeError, match=said):
        inspect_inputs(narrow, Workspace(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    inspect_inputs(narrow.model_copy(update={"linearpatch_form": "diagonal"}), Workspace(tmp_path / "diagonal"))
