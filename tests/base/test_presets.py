"""The presets: where the recommended values stand, what a config is read as, and what the log says of it."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, read_params
from replaceme.base.presets import OF_THE_METHOD, PROGRAM_KEYS, RECOMMENDED, Preset
from replaceme.methods.registry import FIELDS, METHODS
from tests.pipeline.closure import ROOT

PUBLISHED_PROGRAM = (
    "method: lstsq\nmodel_path: some/model\ndataset: Open-Orca/SlimOrca\ndataset_column: text\nbatch_size: 8\n"
    "max_length: 1024\nuse_4bit: false\nlayers_to_skip: 8\nmin_distance_layer: 20\nmerge_consecutive: true\nalpha: 0\n"
    "num_A: 1\nsave_path: null\nsave_transform_only: true\ndistances_path: null\ndiag: false\n"
    "dataset_size: 8000\ndataset_subset: train\n"
)


def read(tmp_path: Path, text: str, preset: Preset | None, given: dict[str, Any] | None = None) -> Params:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return read_params(tmp_path / "config.yaml", given, METHODS, preset)


def cut(params: Params) -> tuple[Any, ...]:
    return params.selection, params.transform, params.repair


def test_params_yaml_is_the_recommended_preset() -> None:
    stated = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert read_params(ROOT / "params.yaml", methods=METHODS) == read_params(None, methods=METHODS, preset="recommended")
    assert {key: stated[key] for key in RECOMMENDED} == RECOMMENDED


def test_every_recommended_value_differs_from_the_published_one() -> None:
    published, recommended = (read_params(None, preset=preset) for preset in ("published", "recommended"))
    assert {key for key in RECOMMENDED if getattr(published, key) != getattr(recommended, key)} == RECOMMENDED.keys()
    assert published == Params()


def test_the_recommended_cut_belongs_to_the_recommended_method() -> None:
    assert cut(read_params(None, methods=METHODS, preset="recommended")) == ("loss", "channels", True)
    for method in METHODS.keys() - {"lstsq"}:
        params = read_params(None, {"method": method}, METHODS, "recommended")
        assert cut(params) == (None, "dense", False)
        assert params.dataset_size == RECOMMENDED["dataset_size"]
    assert set(OF_THE_METHOD) < RECOMMENDED.keys()


@pytest.mark.parametrize(
    ("text", "preset", "given", "expected", "why"),
    [
        (PUBLISHED_PROGRAM, None, {}, "published", "config.yaml names only keys of the published program"),
        (PUBLISHED_PROGRAM, None, {"alpha": 1.0}, "published", "config.yaml names only keys of the published program"),
        ("method: lstsq\npack: false", None, {}, "recommended", "(the default)"),
        ("model_path: some/model\nlayers_to_skip: 4", None, {}, "recommended", "(the default)"),
        ("preset: published\npack: true", None, {}, "published", "config.yaml says so"),
        (f"preset: recommended\n{PUBLISHED_PROGRAM}", None, {}, "recommended", "config.yaml says so"),
        (PUBLISHED_PROGRAM, None, {"preset": "recommended"}, "recommended", "command line says so"),
        ("preset: published", None, {"preset": "recommended"}, "recommended", "command line says so"),
        ("pack: true", "published", {}, "published", "the default here"),
        ("preset: recommended", "published", {}, "recommended", "config.yaml says so"),
        (PUBLISHED_PROGRAM, "recommended", {}, "recommended", "the default here"),
    ],
)
def test_the_log_names_the_preset_and_why(
    text: str, preset: Preset | None, given: dict[str, Any], expected: str, why: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level("INFO", "replaceme"):
        params = read(tmp_path, text, preset, given)
    assert cut(params) == (("loss", "channels", True) if expected == "recommended" else (None, "dense", False))
    (line,) = [line for line in caplog.messages if line.startswith("preset ")]
    assert line.startswith(f"preset {expected} (")
    assert why in line


def test_a_file_that_states_all_that_a_preset_sets_takes_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(ROOT / "params.yaml", methods=METHODS, preset=None)
    assert not caplog.messages
    with pytest.raises(ParameterError, match=r"preset: published would set nothing, as .* states all of dataset, "):
        read_params(ROOT / "params.yaml", {"preset": "published"}, METHODS)


@pytest.mark.parametrize("name", ["paper", 3, ["published"]])
def test_another_preset_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="preset: must be recommended or published, not"):
        read(tmp_path, f"preset: {name}", None)


def test_a_preset_is_no_reason_to_speak_of_parameters_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(None, {"method": "llm_pruner"}, METHODS, "recommended")
    assert "ignored" not in caplog.text


@pytest.mark.parametrize("path", sorted((ROOT / "reproduce").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_published_configs_say_so(path: Path) -> None:
    assert "\npreset: published\n" in path.read_text(encoding="utf-8")
    assert read_params(path, methods=METHODS, preset=None) == read_params(path, methods=METHODS, preset="published")


def test_the_keys_of_the_published_program_are_read() -> None:
    assert {key for key in PROGRAM_KEYS if key in FIELDS} >= {"method", "solver", "loss", "accurate", "tasks", "save_path"}
