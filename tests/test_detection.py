"""Families that nobody described: what is recognised is exact, and what only looks alike is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme import commands
from replaceme.detection import proposed_family, prove
from replaceme.documents import Documents
from replaceme.errors import ModelError
from replaceme.families import FAMILIES, family_of
from replaceme.models import Model
from tests.conftest import LAYERS, PLAIN, made_model
from tests.test_commands import call

UNDESCRIBED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0, "layer_norm_eps": 1e-5},
    "gemma": {"head_dim": 8},
    "olmo": {},
    "stablelm": {"use_parallel_residual": False},
    "starcoder2": {"use_bias": True},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_recognised_of_a_described_family_is_its_description(kind: str) -> None:
    model = made_model(kind)
    described = family_of(model.config)
    if described.mlp == described.mlp_output:  # OPT's layers hold their MLP's linears themselves
        with pytest.raises(
            ModelError, match="the family 'opt' is not described, and was not recognised: its layers have no MLP"
        ):
            proposed_family(model)
        return
    found = proposed_family(model)
    for part in ("layers", "attention", "attention_output", "mlp", "mlp_output"):
        assert getattr(found, part) == getattr(described, part)


@pytest.mark.parametrize("kind", ["olmo2", "gemma2", "granite", "falcon"])
def test_parts_that_are_not_all_that_a_layer_adds_are_refused(kind: str, documents: Documents) -> None:
    # A norm behind the MLP, a factor, a sum in place: the structure alone looks plain.
    model = made_model(kind)
    with pytest.raises(ModelError, match="adds something else than what its attention and its MLP return"):
        prove(model, proposed_family(model), documents)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_not_recognised(kind: str) -> None:
    with pytest.raises(ModelError, match="weights of three dimensions, as a mixture of experts does"):
        proposed_family(made_model(kind))


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_an_undescribed_family_is_pruned_when_the_proof_passes(
    kind: str, save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind not in FAMILIES
    source = save_tiny(kind, **UNDESCRIBED[kind])
    options = ["--model", source.folder, "--dataset", text_file, "--dataset_size", 20, "--max_length", 48, "--dtype", "float32"]
    options += ["--layers_to_skip", 2, "--tasks", "[]", "--save_path", tmp_path / "pruned", "--threads", 1]
    call(commands.run_replaceme, *options, "--transform", "joint", "--repair", "true", code=2)
    said = capsys.readouterr().err
    assert f"transform: joint is not derived for a family that nobody described, '{kind}'; use refit." in said
    assert "repair: is not derived" in said
    call(commands.run_replaceme, *options, "--transform", "refit")
    said = capsys.readouterr().err
    assert f"the family '{kind}' is not described; its layers (model.layers)" in said
    assert f"{kind}: in each of the {LAYERS} layers, the parts that were recognised are all that it adds" in said
    pruned = Model(tmp_path / "pruned", "pruned").load()
    assert pruned.config.num_hidden_layers == LAYERS - 2
    assert torch.isfinite(pruned(torch.arange(2, 12)[None]).logits).all()
