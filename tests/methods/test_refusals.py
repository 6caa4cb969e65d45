"""Families with a norm after the MLP, or with experts: from statistics to a verified export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replaceme import commands
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.edits.edits import rotation_and_gains
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.refusals import family_refusals
from replaceme.methods.registry import METHODS
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.observers.statistics import take_statistics
from tests.conftest import EXPERTS, NORM_AFTER_MLP, OBSTACLES
from tests.helpers import call, many_documents, passing

BLOCK = Block(2, 4)
OBSTRUCTED = NORM_AFTER_MLP + EXPERTS


def transform_of(kind: str) -> str:
    return "orthogonal" if kind in NORM_AFTER_MLP else "dense"


@pytest.mark.parametrize("kind", OBSTRUCTED)
def test_the_export_computes_the_solution(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source, documents = save_tiny(kind), many_documents()
    model, params = source.load(), read_params(None, {"transform": transform_of(kind), "alpha": 1.0})
    family = family_of(model.config)
    taken = take_statistics(model, family, documents, BLOCK, METHODS["lstsq"].statistics(params), 4)
    solved = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
    host, H = passing(model, BLOCK.host, documents), passing(model, BLOCK.end - 1, documents)["output"]
    T = solved.edits.transforms[BLOCK.host].numpy()
    if family.norm_after_mlp:
        T = T / family.norm_weight(family.decoder_layers(model)[BLOCK.host]).numpy()[:, None]
    left = np.linalg.norm(H - host["output"] + host["M"] - host["M"] @ T) / np.linalg.norm(H)
    assert solved.figures["relative_residual"] == pytest.approx(left, rel=1e-3)
    assert left < solved.figures["relative_residual_removed"]
    solved.edits.removed_layers = [*BLOCK.layers]
    save_pruned(source, solved.edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), solved.edits, documents)
    assert figures["hidden_error_mean"] < figures["tolerance"]
    # The shortened model's state at the cut is the one that the least squares predicts.
    now = passing(Model(tmp_path, "pruned").load(), BLOCK.host, documents)["output"]
    assert np.linalg.norm(H - now) / np.linalg.norm(H) == pytest.approx(left, rel=1e-3)


def test_the_fit_uses_the_norm_of_the_host(save_tiny: Callable[..., Model]) -> None:
    for kind in ("gemma2", "olmo2"):
        model = save_tiny(kind).load()
        family = family_of(model.config)
        host = family.decoder_layers(model)[BLOCK.host]
        params = read_params(None, {"transform": "orthogonal"})
        taken = take_statistics(model, family, many_documents(), BLOCK, ["gram", "sample"], 4)
        norm = taken["gram"]["norm"]
        assert torch.equal(norm, host.post_feedforward_layernorm.weight.double() + (1 if kind == "gemma2" else 0))
        solved = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
        rotation_and_gains(solved.edits.transforms[BLOCK.host])


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "qwen2_moe"])
def test_the_whole_command_prunes_them_calibrated_in_another_format_than_the_stored_one(
    kind: str, save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(kind)
    options = [
        "--model",
        source.folder,
        "--dataset",
        text_file,
        "--dataset_size",
        20,
        "--max_length",
        48,
        "--dtype",
        "bfloat16",
    ]
    options += ["--layers_to_skip", 1, "--num_A", 2, "--tasks", "[]", "--save_path", tmp_path / "pruned", "--threads", 1]
    call(commands.run_replaceme, *options, "--transform", transform_of(kind), "--selection", "residual")
    assert Model(tmp_path / "pruned", "pruned").config().num_hidden_layers == 4
    call(commands.get_distance_analysis, "--model", source.folder, *options[2:8], "--save_path", tmp_path / "distances")


@pytest.mark.parametrize(("first", "warned"), [(2, True), (5, False)])
def test_a_cut_that_breaks_the_pattern_of_a_family_is_reported(
    first: int,
    warned: bool,
    save_tiny: Callable[..., Model],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model", save_tiny("gemma2").folder, "--dataset", text_file, "--dataset_size", 5, "--max_length", 48]
    options += [
        "--dtype",
        "float32",
        "--layers_to_skip",
        1,
        "--tasks",
        "[]",
        "--save_path",
        tmp_path / "pruned",
        "--threads",
        1,
    ]
    limits = ["--min_distance_layer", first, "--max_distance_layer", first + 1]
    call(commands.run_replaceme, *options, *limits, "--method", "uidl")
    assert ("layer_types no longer follows the family's pattern" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("obstacle", "options", "said"),
    [
        ("norm", {}, ["transform: dense does not fold into the norm after the MLP of the family 'x'; use orthogonal."]),
        ("norm", {"transform": "orthogonal"}, []),
        ("norm", {"method": "uidl"}, []),
        ("norm", {"method": "cosine"}, ["method: cosine makes maps that do not fold into the norm after the MLP"]),
        ("norm", {"transform": "joint"}, ["transform: joint does not fold"]),
        ("norm", {"transform": "orthogonal", "repair": True}, ["repair: is not derived for the norm after the MLP"]),
        ("norm", {"transform": "orthogonal", "heal_epochs": 1}, []),
        ("experts", {"method": "uidl", "heal_epochs": 1}, ["heal_epochs: is not derived for the mixture of experts"]),
        ("undescribed", {"heal_epochs": 1}, ["heal_epochs: is not derived for the undescribed family"]),
        ("experts", {}, []),
        ("experts", {"method": "cosine"}, []),
        ("experts", {"transform": "refit"}, ["transform: refit is not derived for the mixture of experts of the family 'x'"]),
        (
            "experts",
            {"transform": "joint", "repair": True},
            ["transform: joint is not derived for the mixture of experts", "repair: is not derived for the mixture of experts"],
        ),
        ("undescribed", {"transform": "refit"}, []),
        ("undescribed", {"transform": "joint"}, ["transform: joint is not derived for the undescribed family 'x'"]),
        (None, {"transform": "joint", "repair": True}, []),
    ],
)
def test_settings_that_are_not_exact_or_not_derived_for_a_family_are_refused(
    obstacle: Any, options: dict[str, Any], said: list[str]
) -> None:
    found = family_refusals(read_params(None, options).model_dump(), "x", OBSTACLES[obstacle] if obstacle else Family())
    assert len(found) == len(said)
    assert all(start in sentence for start, sentence in zip(said, found, strict=True))
