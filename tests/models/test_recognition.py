"""Undescribed families: recognised parts are exact, and structures that only look similar are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from replaceme.base.documents import Documents
from replaceme.base.errors import ModelError
from replaceme.cli import commands
from replaceme.models.families import FAMILIES, family_of
from replaceme.models.model import Model
from replaceme.models.recognition import check_cut, recognise_family
from replaceme.statistics.proof import prove
from tests.conftest import LAYERS, PLAIN, UNDESCRIBED, WIDTH, made_model
from tests.helpers import call


@pytest.mark.parametrize("kind", PLAIN)
def test_recognition_of_a_described_family_gives_its_description(kind: str) -> None:
    model = made_model(kind)
    described = family_of(model.config)
    if described.mlp == described.mlp_output:  # OPT's layers hold their MLP's linears themselves
        with pytest.raises(
            ModelError, match="the family 'opt' is not described, and was not recognised: its layers have no MLP"
        ):
            recognise_family(model)
        return
    recognised = recognise_family(model)
    for part in ("layers", "attention", "attention_output", "mlp", "mlp_output"):
        assert getattr(recognised, part) == getattr(described, part)


@pytest.mark.parametrize("kind", ["olmo2", "gemma2", "granite", "falcon"])
def test_a_layer_that_adds_more_than_its_parts_return_is_refused(kind: str, documents: Documents) -> None:
    # A norm after the MLP, a factor, an in-place sum: the module structure doesn't show these.
    model = made_model(kind)
    with pytest.raises(ModelError, match="adds something else than what its attention and its MLP return"):
        prove(model, recognise_family(model), documents)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_not_recognised(kind: str) -> None:
    with pytest.raises(ModelError, match="weights of three dimensions, as a mixture of experts does"):
        recognise_family(made_model(kind))


def test_an_mlp_that_does_not_end_with_its_last_linear_is_refused(documents: Documents) -> None:
    model = made_model()
    family, mlp = recognise_family(model), model.model.layers[3].mlp
    whole = mlp.forward
    mlp.forward = lambda states: 0.9 * whole(states)
    with pytest.raises(ModelError, match="the MLP of layer 3 returns something else than its last linear"):
        prove(model, family, documents)


def test_a_token_of_huge_norm_hides_no_difference(documents: Documents) -> None:
    model = made_model("gemma2", torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight[documents.documents[0][0]] *= 1000
    with pytest.raises(ModelError, match="adds something else"):
        prove(model, recognise_family(model), documents)


def test_layers_that_return_more_than_their_states_are_refused(documents: Documents) -> None:
    model = made_model("falcon_sequential")
    with pytest.raises(ModelError, match="its layers return more than their states"):
        prove(model, recognise_family(model), documents)


def test_a_list_of_experts_is_refused() -> None:
    model = made_model()
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    with pytest.raises(ModelError, match="its MLP is a list of them"):
        recognise_family(model)


def test_a_family_whose_layers_depend_on_their_position_is_refused_before_any_work(save_tiny: Callable[..., Model]) -> None:
    source = save_tiny("diffllama")
    with pytest.raises(ModelError, match=r"can't lose a layer: self_attn\.lambda_init of layer 1"):
        check_cut(source.skeleton, source.config(), source.family())


def test_layers_of_different_kinds_are_not_recognised() -> None:
    model = made_model("lfm2", layer_types=["full_attention", "conv"] * (LAYERS // 2))
    with pytest.raises(ModelError, match="its layers are not all alike"):
        recognise_family(model)


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_an_undescribed_family_is_pruned_if_the_proof_passes(
    kind: str, save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind not in FAMILIES
    source = save_tiny(kind, **UNDESCRIBED[kind])
    options = ["--model", source.folder, "--dataset", text_file, "--dataset_size", 20, "--max_length", 48, "--dtype", "float32"]
    options += ["--layers_to_skip", 2, "--tasks", "[]", "--save_path", tmp_path / "pruned", "--threads", 1]
    call(commands.run_replaceme, *options, "--transform", "joint", "--repair", "true", code=2)
    said = capsys.readouterr().err
    assert f"transform: joint is not derived for the undescribed family '{kind}'; use refit." in said
    assert "repair: is not derived" in said
    call(commands.run_replaceme, *options, "--transform", "channels", code=2)
    said = capsys.readouterr().err
    assert f"transform: channels is not derived for the undescribed family '{kind}'; use refit." in said
    assert said.count("transform: channels") == 1
    call(commands.run_replaceme, *options, "--transform", "refit")
    said = capsys.readouterr().err
    assert f"the family '{kind}' is not described; its layers (model.layers)" in said
    assert f"{kind}: in each of the {LAYERS} layers, the parts that were recognised are all that it adds" in said
    pruned = Model(tmp_path / "pruned", "pruned").load()
    assert pruned.config.num_hidden_layers == LAYERS - 2
    assert torch.isfinite(pruned(torch.arange(2, 12)[None]).logits).all()
