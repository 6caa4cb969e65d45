"""The published program's configs mean what its author meant, and the presets set what nobody names."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from replaceme.base.entries import Task
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, read_params
from replaceme.base.published import OF_THE_METHOD, PROGRAM_KEYS, PUBLISHED_TASKS, RECOMMENDED, Preset
from replaceme.methods.registry import FIELDS, METHODS
from tests.pipeline.closure import ROOT

PUBLISHED_PROGRAM = (
    "method: lstsq\nmodel_path: some/model\ndataset: Open-Orca/SlimOrca\ndataset_column: text\nbatch_size: 8\n"
    "max_length: 1024\nuse_4bit: True\nlayers_to_skip: 8\nmin_distance_layer: 20\nmerge_consecutive: True\nalpha: 0\n"
    "num_A: 1\nsave_path: null\nsave_transform_only: True\ndistances_path: null\ndiag: false\n"
    "dataset_size: 8000\ndataset_subset: train\n"
)


def read(tmp_path: Path, text: str, preset: Preset | None = "published", given: dict[str, Any] | None = None) -> Params:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return read_params(tmp_path / "config.yaml", given, METHODS, preset)


def cut(params: Params) -> tuple[Any, ...]:
    return params.selection, params.transform, params.repair


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lstsq", {"method": "lstsq", "layers_to_skip": 8, "dataset_size": 8000, "dataset_split": "train"}),
        ("uidl", {"method": "uidl", "layers_to_skip": 8, "dataset_size": 8000, "dataset_split": "train"}),
        (
            "cosine",
            {
                "method": "cosine", "loss": "cosine", "accurate": False, "transform": "dense", "solver": "adam",
                "learning_rate": 1e-4, "tokens_per_step": 1024, "epochs": 10, "start": "identity",
            },
        ),
    ],
)  # fmt: skip
def test_the_published_configs_are_read_as_published(name: str, expected: dict[str, Any]) -> None:
    path = ROOT / "reproduce" / f"{name}.yaml"
    params = read_params(path, methods=METHODS, preset=None)
    assert {key: getattr(params, key) for key in expected} == expected
    assert params == read_params(path, methods=METHODS)


@pytest.mark.parametrize(
    ("text", "given", "key", "value", "noted"),
    [
        (PUBLISHED_PROGRAM, {}, "save_transform_only", True, "dataset_subset is read as dataset_split"),
        (PUBLISHED_PROGRAM, {"dataset_split": "test"}, "dataset_split", "test", ""),
        ("layers: 3", {}, "layers_to_skip", 3, ""),
        ("layers: 3", {"layers_to_skip": 2}, "layers_to_skip", 2, ""),
        ("diag: true", {}, "transform", "diagonal", "diag is read as transform: diagonal"),
        ("method: cosine\nthri: true", {}, "transform", "triangular", "thri is read as transform: triangular"),
        ("diag: false\ntransform: diagonal", {}, "transform", "diagonal", ""),
        ("diag: true", {"diag": False}, "transform", "dense", ""),
        ("diag: true", {"thri": True}, "transform", "triangular", ""),
        ("transform: joint", {"diag": True}, "transform", "diagonal", ""),
        ("transform: joint", {"diag": False}, "transform", "joint", ""),
        ("two_vectors: true", {"transform": "refit"}, "transform", "refit", ""),
        ("method: cosine\nsolver: L-BFGS", {}, "solver", "lbfgs", "solver L-BFGS is read as lbfgs"),
        ("method: cosine\nsolver: trust-ncg", {}, "solver", "trust_region", "solver trust-ncg is read as trust_region"),
        ("method: cosine\nsolver: Adam", {}, "solver", "adam", ""),
        ("solver: null\nloss: null", {}, "solver", "adam", ""),
        ("distances_path: d.pth", {}, "alpha", 0.0, "distances_path is ignored: results are cached by content"),
        ("tasks: default", {}, "tasks", tuple(map(Task, PUBLISHED_TASKS)), ""),
        ("tasks: {a: {fewshots: 5}, b: null}", {}, "tasks", (Task("a", 5), Task("b")), ""),
    ],
)
def test_published_names_and_values_are_ours_and_the_command_line_wins_under_whatever_name(
    text: str, given: dict[str, Any], key: str, value: Any, noted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "replaceme"):
        assert getattr(read(tmp_path, text, given=given), key) == value
    assert noted in caplog.text


def test_params_yaml_is_the_recommended_preset() -> None:
    stated = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert read_params(ROOT / "params.yaml", methods=METHODS) == read_params(None, methods=METHODS, preset="recommended")
    assert {key: stated[key] for key in RECOMMENDED} == RECOMMENDED


def test_every_recommended_value_differs_from_the_published_one() -> None:
    published, recommended = (read_params(None, preset=preset) for preset in ("published", "recommended"))
    assert {key for key in RECOMMENDED if getattr(published, key) != getattr(recommended, key)} == RECOMMENDED.keys()
    assert published == Params()
    assert {key for key in PROGRAM_KEYS if key in FIELDS} >= {"method", "solver", "loss", "accurate", "tasks", "save_path"}


def test_a_quick_run_takes_less_text_and_a_healed_one_trains() -> None:
    recommended, quick, healed = (
        read_params(None, {"preset": name}, METHODS).model_dump() for name in ("recommended", "quick", "healed")
    )
    assert {key for key in recommended if quick[key] != recommended[key]} == {"dataset_size", "tasks", "eval_tokens"}
    changed = {key for key in recommended if healed[key] != recommended[key]}
    assert changed == {"dataset", "heal_dataset", "heal_tokens", "heal_tokens_per_step", "heal_learning_rate"}


def test_a_healed_run_on_a_text_of_ones_own_trains_on_it() -> None:
    own, embedded = (read_params(None, {"preset": "healed", **given}) for given in ({"dataset": "mine.txt"}, {}))
    assert own.heal_dataset is None
    assert own.dataset == "mine.txt"
    assert embedded.heal_dataset is not None
    # A model is not trained on its own text alone.
    for text in ("self", ["self"], ("self",), [{"self": 1}]):
        assert read_params(None, {"preset": "healed", "dataset": text}).heal_dataset == embedded.heal_dataset


def test_the_recommended_cut_belongs_to_the_recommended_method(caplog: pytest.LogCaptureFixture) -> None:
    assert cut(read_params(None, methods=METHODS, preset="recommended")) == ("loss", "channels", True)
    with caplog.at_level("INFO", "replaceme"):
        for method in METHODS.keys() - {"lstsq"}:
            params = read_params(None, {"method": method}, METHODS, "recommended")
            assert cut(params) == (None, "dense", False)
            assert params.dataset_size == RECOMMENDED["dataset_size"]
    assert set(OF_THE_METHOD) < RECOMMENDED.keys()
    # Nobody named what a preset sets.
    assert "ignored" not in caplog.text


@pytest.mark.parametrize(
    ("text", "preset", "given", "said"),
    [
        (PUBLISHED_PROGRAM, None, {}, "published (config.yaml names only keys of the published program"),
        (PUBLISHED_PROGRAM, None, {"alpha": 1.0}, "published (config.yaml names only keys of the published program"),
        ("method: lstsq\npack: false", None, {}, "recommended (the default)"),
        ("model_path: some/model\nlayers_to_skip: 4", None, {}, "recommended (the default)"),
        ("preset: published\npack: true", None, {}, "published (config.yaml says so)"),
        (f"preset: recommended\n{PUBLISHED_PROGRAM}", None, {}, "recommended (config.yaml says so)"),
        (PUBLISHED_PROGRAM, None, {"preset": "recommended"}, "recommended (command line says so)"),
        ("preset: published", None, {"preset": "recommended"}, "recommended (command line says so)"),
        ("pack: true", "published", {}, "published (the default here)"),
        ("preset: recommended", "published", {}, "recommended (config.yaml says so)"),
        (PUBLISHED_PROGRAM, "recommended", {}, "recommended (the default here)"),
    ],
)
def test_the_log_names_the_preset_and_why(
    text: str, preset: Preset | None, given: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "replaceme"):
        params = read(tmp_path, text.replace("use_4bit: True", "use_4bit: false"), preset, given)
    assert cut(params) == (("loss", "channels", True) if said.startswith("recommended") else (None, "dense", False))
    (line,) = [line for line in caplog.messages if line.startswith("preset ")]
    assert line.replace(f"{tmp_path}/", "").startswith(f"preset {said}")


def test_a_file_that_states_all_that_a_preset_sets_takes_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(ROOT / "params.yaml", methods=METHODS, preset=None)
    assert not caplog.messages
    with pytest.raises(ParameterError, match=r"preset: published would set nothing, as .* states all of dataset, "):
        read_params(ROOT / "params.yaml", {"preset": "published"}, METHODS)


@pytest.mark.parametrize("name", ["paper", 3, ["published"]])
def test_another_preset_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="preset: must be one of recommended, quick, healed, published, not"):
        read(tmp_path, f"preset: {name}", None)
