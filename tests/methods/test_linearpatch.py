"""LinearPatch, against its formula in numpy on the activations themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from replaceme import commands
from replaceme.base.documents import Documents
from replaceme.base.errors import ParameterError, ReplaceMeError
from replaceme.base.files import read_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Block
from replaceme.base.workspace import Workspace
from replaceme.edits.edits import Edits
from replaceme.methods.method import Solved
from replaceme.methods.registry import METHODS
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.observers.hadamard import hadamard
from replaceme.observers.statistics import take_statistics
from replaceme.pipeline.inputs import inspect_inputs
from tests.conftest import KINDS, LAYERS, WIDTH, made_model
from tests.helpers import call, passing
from tests.methods.helpers import assert_saved_computes_edits

BLOCK = Block(2, 4)
FORMS = ["hadamard", "diagonal"]
TEXT = torch.arange(2, 42)[None]


def solved(model: Any, documents: Documents, form: str, block: Block = BLOCK, batch_size: int = 4) -> Solved:
    params, method = read_params(None, {"method": "linearpatch", "linearpatch_form": form}), METHODS["linearpatch"]
    taken = take_statistics(model, family_of(model.config), documents, block, method.statistics(params), batch_size)
    made = method.solve(params, block, taken.__getitem__)
    made.edits.removed_layers = [*block.layers]
    return made


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
    made = solved(model, documents, form, batch_size=batch_size)
    R, ratios = rotation_of(form), []
    for document in documents.documents:
        h, H = (passing(model, layer, Documents([document]))["output"] @ R for layer in (BLOCK.host, BLOCK.end - 1))
        ratios.append(np.abs(H).mean(axis=0) / np.abs(h).mean(axis=0))
    expected = R @ np.diag(np.mean(ratios, axis=0)) @ R.T
    (operator,) = made.edits.operators.values()
    assert operator.ndim == (2 if form == "hadamard" else 1)
    assert np.allclose(dense_of(operator), expected, rtol=1e-5, atol=1e-6)
    h, H = (passing(model, layer, documents)["output"] for layer in (BLOCK.host, BLOCK.end - 1))
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
    (operator,) = solved(model, text, form).edits.operators.values()
    h, H = (passing(model, layer, text)["output"] for layer in (BLOCK.host, BLOCK.end - 1))
    R = rotation_of(form)
    patched, target = (np.abs(states @ R).mean(axis=0) for states in (h @ dense_of(operator), H))
    assert np.allclose(patched, target, rtol=1e-4)
    assert not np.allclose(np.abs(h @ R).mean(axis=0), target, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_changes_nothing_gets_the_identity(form: str, documents: Documents) -> None:
    model = made_model()
    with torch.no_grad():
        for layer in model.model.layers[BLOCK.start : BLOCK.end]:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.bias.zero_()
    made = solved(model, documents, form)
    (operator,) = made.edits.operators.values()
    assert np.allclose(dense_of(operator), np.eye(WIDTH), atol=1e-12)
    assert made.figures["relative_residual"] < 1e-7


def test_a_channel_of_zeros_is_unchanged(documents: Documents) -> None:
    model = made_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0
        for layer in model.model.layers[: BLOCK.start]:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[5] = 0
                linear.bias[5] = 0
    (operator,) = solved(model, documents, "diagonal").edits.operators.values()
    assert operator[5] == 1
    assert bool(torch.isfinite(operator).all())


def test_sums_of_disjoint_documents_add_up_and_padding_does_not_count(documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    parts = [Documents(documents.documents[:4]), Documents(documents.documents[4:])]
    for name in ("magnitudes", "magnitudes_rotated"):
        whole, first, second = (
            take_statistics(model, Family(), each, BLOCK, [name], size)[name]
            for each, size in ((documents, 9), (parts[0], 1), (parts[1], 5))
        )
        assert all(torch.allclose(whole[key], first[key] + second[key], rtol=1e-5) for key in ("ratios", "documents"))


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "hadamard") for kind in KINDS), *((kind, "diagonal") for kind in ("llama", "falcon", "olmo2"))]
)
def test_every_family_is_patched_saved_and_verified(
    kind: str, form: str, save_tiny: Callable[..., Model], tmp_path: Path, documents: Documents
) -> None:
    source = save_tiny(kind)
    edits = solved(source.load(), documents, form).edits
    assert_saved_computes_edits(source, edits, documents, tmp_path)


def test_the_whole_command_patches_the_state(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    options = ["--model", tiny.folder, "--dataset", text_file, "--dataset_size", 20, "--max_length", 48, "--dtype", "float32"]
    options += ["--layers_to_skip", 2, "--tasks", f"[{text_file}]", "--eval_tokens", 200, "--threads", 1]
    call(commands.run_replaceme, "--method", "linearpatch", *options, "--save_path", tmp_path / "pruned")
    work = tmp_path / "pruned.work"
    edits = Edits.load(work / "artifacts" / "edits")
    (host,) = edits.operators
    assert edits.operators[host].shape == (WIDTH, WIDTH)
    assert edits.removed_layers == [host + 1, host + 2]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert loaded.config.num_hidden_layers == LAYERS - 2
    figures = read_json(work / "metrics" / "export.json")
    assert figures["parameters"] == loaded.num_parameters()
    card = (tmp_path / "pruned" / "README.md").read_text(encoding="utf-8")
    assert "with LinearPatch (hadamard)." in card
    assert f"A linear map was added after layer {host}; it multiplies the whole hidden state." in card
    assert "linearpatch_form: hadamard" in card
    page = (work / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    assert "The map brings the relative residual from" in page
    assert "largest factor" in page


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


@pytest.mark.parametrize("method", ["linearpatch", "ghosted"])
@pytest.mark.parametrize("transform", ["diagonal", "joint"])
def test_a_transform_can_not_be_combined_with_an_operator(method: str, transform: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(None, {"method": method, "transform": transform}, METHODS)
    assert caught.value.problems == [
        f"command line: transform: {transform} has no place in method {method}, which maps the whole state after the host; "
        "use dense."
    ]


def test_the_keys_belong_to_their_methods_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(None, {"linearpatch_form": "diagonal", "ghosted_weighted": True}, METHODS)
    assert [record.message for record in caplog.records if not record.message.startswith("preset")] == [
        "linearpatch_form belongs to method linearpatch and is ignored",
        "ghosted_weighted belongs to method ghosted and is ignored",
    ]
    with pytest.raises(ParameterError, match="linearpatch_form: must be 'hadamard' or 'diagonal', not 'rotate'"):
        read_params(None, {"method": "linearpatch", "linearpatch_form": "rotate"}, METHODS)
