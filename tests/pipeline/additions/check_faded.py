"""The made-up method, as all that asks the registry finds it."""

from pathlib import Path

import pytest
import torch

from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json
from replaceme.base.parameters import read_params
from replaceme.cli import commands
from replaceme.cli.reference import reference
from replaceme.export.card import SETTINGS
from replaceme.methods.registry import METHODS, has_effect, read_by
from replaceme.models.model import Model
from replaceme.pipeline.runner import STAGES
from tests.helpers import FAST, call


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"faded_factor": -1.0}, "faded_factor: must be above 0"),
        ({"faded_factor": "large"}, "faded_factor: must be a number"),
        ({"faded_facter": 0.5}, "'faded_factor'"),
        ({}, "faded_factor: 1 changes nothing"),
        ({"faded_factor": 0.5, "transform": "joint"}, "method faded, which multiplies one output by a number"),
    ],
)
def test_what_it_refuses_is_said(given: dict[str, object], said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(None, {"method": "faded", **given}, METHODS)
    assert said in str(caught.value)


def test_its_parameter_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    params = read_params(None, {"method": "faded", "faded_factor": 0.5}, METHODS)
    assert params.model_dump()["faded_factor"] == 0.5
    assert has_effect("faded_factor", params.model_dump())
    with caplog.at_level("INFO", "replaceme"):
        other = read_params(None, {"faded_factor": 0.5}, METHODS)
    assert "faded_factor belongs to method faded" in caplog.text
    assert not has_effect("faded_factor", other.model_dump())


def test_its_stages_know_its_parameter() -> None:
    assert "faded_factor" in read_by("solve")
    readers = [name for name, stage in STAGES.items() if "faded_factor" in stage.params]
    assert readers == ["solve", "repair", "export", "report"]
    assert "faded_factor" in SETTINGS


def test_the_reference_and_help_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    page = reference()
    assert "| `faded` | A made-up method: the MLP output before the cut times a number | `faded_factor` |" in page
    assert "| `faded_factor` | 1.0 | 1.0 | The number that the MLP output before the cut is multiplied by. |" in page
    call(commands.run_replaceme, "--help")
    assert "--faded_factor X" in capsys.readouterr().out


def test_it_prunes_a_model_and_exports_it(
    tiny: Model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setting = ["--method", "faded", "--faded_factor", "0.5", "--layers", "2", "--tasks", "[]"]
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, *setting, *FAST, "--save_path", "faded")
    layer = read_json(Path("faded.work/metrics/select.json"))["host"]
    before, after = (
        model.load().model.layers[layer].mlp.down_proj.weight for model in (tiny, Model(tmp_path / "faded", "faded"))
    )
    assert torch.allclose(after, 0.5 * before)
    card = Path("faded/README.md").read_text(encoding="utf-8")
    assert "with a made-up method" in card
    assert "faded_factor: 0.5" in card
