"""Families with a norm after the MLP, or with experts: from statistics to a verified export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.cli import commands
from replaceme.edits.edits import rotation_and_gains
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.statistics.cut_statistics import take_statistics
from tests.conftest import EXPERTS, NORM_AFTER_MLP, OBSTACLES, made_model
from tests.helpers import call, many_documents, passing
from tests.methods.helpers import model_refusals

BLOCK = Block(2, 4)
OBSTRUCTED = NORM_AFTER_MLP + EXPERTS


def transform_of(kind: str) -> str:
    return "orthogonal" if kind in NORM_AFTER_MLP else "dense"


@pytest.mark.parametrize("kind", OBSTRUCTED)
def test_the_export_computes_the_solution(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source, documents = save_tiny(kind), many_documents()
    model, params = source.load(), read_params(None, {"transform": transform_of(kind), "alpha": 1.0})
    family = family_of(model.config)
    taken = take_statistics(ModelContext(model, family, documents, 4), BLOCK, METHODS["lstsq"].statistics(params))
    solved = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
    host, H = passing(model, BLOCK.layer_before_cut, documents), passing(model, BLOCK.end - 1, documents)["output"]
    T = solved.edits.transforms[BLOCK.layer_before_cut].numpy()
    if family.norm_after_mlp:
        T = T / family.norm_weight(family.decoder_layers(model)[BLOCK.layer_before_cut]).numpy()[:, None]
    left = np.linalg.norm(H - host["output"] + host["M"] - host["M"] @ T) / np.linalg.norm(H)
    assert solved.figures["relative_residual"] == pytest.approx(left, rel=1e-3)
    assert left < solved.figures["relative_residual_removed"]
    solved.edits.removed_layers = [*BLOCK.layers]
    save_pruned(source, solved.edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), solved.edits, documents)
    assert figures["hidden_error_mean"] < figures["tolerance"]
    # The shortened model's state at the cut is the one that the least squares predicts.
    now = passing(Model(tmp_path, "pruned").load(), BLOCK.layer_before_cut, documents)["output"]
    assert np.linalg.norm(H - now) / np.linalg.norm(H) == pytest.approx(left, rel=1e-3)


def test_the_fit_uses_the_norm_of_the_host(save_tiny: Callable[..., Model]) -> None:
    for kind in ("gemma2", "olmo2"):
        model = save_tiny(kind).load()
        family = family_of(model.config)
        host = family.decoder_layers(model)[BLOCK.layer_before_cut]
        params = read_params(None, {"transform": "orthogonal"})
        taken = take_statistics(ModelContext(model, family, many_documents(), 4), BLOCK, ["gram", "sample"])
        norm = taken["gram"]["norm"]
        assert torch.equal(norm, host.post_feedforward_layernorm.weight.double() + (1 if kind == "gemma2" else 0))
        solved = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
        rotation_and_gains(solved.edits.transforms[BLOCK.layer_before_cut])


@pytest.mark.parametrize("kind", ["gemma2", "qwen2_moe"])
def test_the_whole_command_prunes_them_calibrated_in_another_format_than_the_stored_one(
    kind: str, save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(kind)
    options = ["--model", source.folder, "--dataset", text_file, "--dataset_size", 20, "--max_length", 48]
    options += ["--dtype", "bfloat16"]
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
    options += ["--dtype", "float32", "--tasks", "[]", "--threads", 1, "--save_path", tmp_path / "pruned"]
    limits = ["--layers_to_skip", 1, "--min_distance_layer", first, "--max_distance_layer", first + 1]
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
        ("norm", {"transform": "orthogonal", "heal_tokens": 1}, []),
        ("experts", {"method": "uidl", "heal_tokens": 1}, []),
        ("undescribed", {"heal_tokens": 1}, []),
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
    found = model_refusals(OBSTACLES[obstacle] if obstacle else Family(), **options)
    assert len(found) == len(said)
    assert all(start in sentence for start, sentence in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"method": "ghosted"}, True),
        ({"method": "linearpatch"}, True),
        ({"method": "slicegpt", "layers_to_skip": 1}, True),
        ({"method": "slicegpt", "layers_to_skip": 1, "plain": True}, False),
        ({"method": "llm_pruner", "layers_to_skip": 1, "min_distance_layer": 1, "max_distance_layer": 5}, True),
        ({"method": "llm_pruner", "layers_to_skip": 1, "plain": True}, False),
        ({"method": "llm_streamline"}, False),
        ({"method": "llm_streamline", "llm_streamline_form": "mlp"}, True),
        ({"method": "llm_streamline", "llm_streamline_form": "mlp", "plain": True}, False),
        ({"method": "lstsq"}, False),
    ],
)
def test_a_form_of_our_own_is_not_built_on_a_models_own_code(options: dict[str, Any], refused: bool) -> None:
    model = made_model()
    model.config.auto_map = {"AutoConfig": "foreign.Config"}
    said = "method: the result of this method needs a modelling file of its own"
    assert [sentence.startswith(said) for sentence in model_refusals(model, **options)] == [True] * refused


def test_a_models_own_code_hides_no_other_reason() -> None:
    model = made_model("mixtral")
    model.config.auto_map = {"AutoConfig": "foreign.Config"}
    found = model_refusals(model, method="ghosted", repair=True)
    assert [sentence.split(":")[0] for sentence in found] == ["method", "repair"]


PARTS, MERGES = "which removes parts of layers, not whole layers", "which merges layers into the one before them"
MAPS, LONE = "which maps the whole state at the cut", "which trains one layer in the place of one block"


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "average",
            {"num_A": 2},
            "num_A: 2 has no place in method average, which averages one block with the layer before it; use 1.",
        ),
        ("ghosted", {"transform": "diagonal"}, f"transform: diagonal has no place in method ghosted, {MAPS}; use dense."),
        ("linearpatch", {"transform": "joint"}, f"transform: joint has no place in method linearpatch, {MAPS}; use dense."),
        ("linearpatch", {"linearpatch_form": "rotate"}, "linearpatch_form: must be 'hadamard' or 'diagonal', not 'rotate'."),
        ("laco", {"transform": "joint"}, f"transform: joint has no place in method laco, {MERGES}; use dense."),
        ("laco", {"selection": "loss"}, f"selection: loss has no place in method laco, {MERGES}; use null."),
        ("laco", {"num_A": 2}, f"num_A: 2 has no place in method laco, {MERGES}; use 1."),
        ("laco", {"laco_layers": 1}, "laco_layers: must be at least 2, not 1."),
        ("laco", {"laco_interval": 0}, "laco_interval: must be at least 1, not 0."),
        ("laco", {"laco_threshold": 1.5}, "laco_threshold: must be at most 1, not 1.5."),
        ("laco", {"laco_threshold": -2.0}, "laco_threshold: must be at least -1, not -2.0."),
        ("uidl", {"selection": "collapse"}, "selection: 'collapse' is not a criterion; use one of angular, residual"),
        ("llm_pruner", {"transform": "joint"}, f"transform: joint has no place in method llm_pruner, {PARTS}; use dense."),
        ("llm_pruner", {"selection": "loss"}, f"selection: loss has no place in method llm_pruner, {PARTS}; use null."),
        ("llm_pruner", {"repair": True}, f"repair: true has no place in method llm_pruner, {PARTS}; use false."),
        ("llm_pruner", {"use_4bit": True}, f"use_4bit: true has no place in method llm_pruner, {PARTS}; use false."),
        ("llm_pruner", {"dtype": "float16"}, "dtype: float16 is too short for the gradients of method llm_pruner; use bf"),
        ("llm_pruner", {"plain": True, "min_distance_layer": 3}, "min_distance_layer: with plain, method llm_pruner takes f"),
        ("llm_pruner", {"plain": True, "max_distance_layer": 3}, "max_distance_layer: with plain, method llm_pruner takes f"),
        ("llm_streamline", {"transform": "joint"}, f"transform: joint has no place in method llm_streamline, {LONE}; use d"),
        ("llm_streamline", {"repair": True}, f"repair: true has no place in method llm_streamline, {LONE}; use false."),
        ("llm_streamline", {"selection": "greedy"}, f"selection: greedy has no place in method llm_streamline, {LONE}; use"),
        ("llm_streamline", {"num_A": 2}, f"num_A: 2 has no place in method llm_streamline, {LONE}; use 1."),
        ("llm_streamline", {"use_4bit": True}, f"use_4bit: true has no place in method llm_streamline, {LONE}; use false."),
        ("llm_streamline", {"llm_streamline_form": "x"}, "llm_streamline_form: must be 'layer' or 'mlp', not 'x'."),
        ("llm_streamline", {"llm_streamline_epochs": 0}, "llm_streamline_epochs: must be at least 1, not 0."),
        ("llm_streamline", {"llm_streamline_learning_rate": 0.0}, "llm_streamline_learning_rate: must be above 0, not 0.0."),
        ("prune_and_comp", {"transform": "joint"}, "transform: joint has no place in method prune_and_comp, which replaces re"),
        ("slicegpt", {"transform": "joint"}, f"transform: joint has no place in method slicegpt, {PARTS}; use dense."),
        ("slicegpt", {"repair": True}, f"repair: true has no place in method slicegpt, {PARTS}; use false."),
        ("slicegpt", {"num_A": 2}, f"num_A: 2 has no place in method slicegpt, {PARTS}; use 1."),
        ("slicegpt", {"min_distance_layer": 3}, "min_distance_layer: method slicegpt slices all layers alike; use null."),
        ("slicegpt", {"heal_tokens": 2}, "heal_tokens: 2 has no place in method slicegpt"),
        ("llm_streamline", {"heal_tokens": 2}, "heal_tokens: 2 has no place in method llm_streamline"),
        ("lstsq", {"heal_tokens": 2, "device_map": "auto"}, "device_map: heal_tokens trains on one device; use null."),
        ("cosine", {"loss": "elastic_net", "solver": "trust_region"}, "solver: trust_region needs a smooth objective"),
        ("cosine", {"loss": "elastic_net", "transform": "two_vectors"}, "transform: two_vectors has no entries of its own"),
    ],
)
def test_settings_that_have_no_place_in_a_method_are_refused_in_one_sentence(
    method: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(None, {"method": method, **options}, METHODS)
    (problem,) = caught.value.problems
    assert problem.startswith(f"command line: {said}")


def test_keys_of_other_methods_are_ignored_and_named(caplog: pytest.LogCaptureFixture) -> None:
    given = {
        "laco_layers": 4, "laco_interval": 2, "laco_threshold": 0.6, "linearpatch_form": "diagonal", "ghosted_weighted": True,
        "llm_streamline_epochs": 4, "llm_streamline_form": "mlp",
    }  # fmt: skip
    with caplog.at_level("INFO", "replaceme"):
        read_params(None, {**given, "plain": True}, METHODS)
        read_params(None, {"method": "llm_streamline", "plain": True}, METHODS)
    plain = "plain belongs to methods llm_streamline (with llm_streamline_form mlp), llm_pruner and slicegpt and is ignored"
    said = [record.message for record in caplog.records if not record.message.startswith("preset")]
    # The names of these keys begin with their methods'.
    assert sorted(said) == sorted(
        [*(f"{key} belongs to method {key.rsplit('_', 1)[0]} and is ignored" for key in given), plain, plain]
    )
