"""The made-up criterion, as all that asks the table finds it."""

from pathlib import Path

import pytest

from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json
from replaceme.base.parameters import read_params
from replaceme.cli import commands
from replaceme.cli.reference import reference
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.model import Model
from tests.helpers import FAST, call


@pytest.mark.parametrize("method", ["lstsq", "uidl", "shortgpt"])
def test_methods_that_remove_layers_take_it(method: str) -> None:
    params = read_params(None, {"method": method, "selection": "last"}, METHODS)
    assert criterion_of(params).words == "its place, the last one allowed"


def test_others_refuse_it_and_a_misspelled_name_is_told_of_it() -> None:
    with pytest.raises(ParameterError, match=r"selection: last .* slicegpt"):
        read_params(None, {"method": "slicegpt", "selection": "last"}, METHODS)
    with pytest.raises(ParameterError, match=r"selection: .*'last'"):
        read_params(None, {"selection": "lst"}, METHODS)


def test_the_reference_lists_it() -> None:
    assert "| `last` | its place, the last one allowed |" in reference()


def test_it_chooses_and_the_page_says_so(tiny: Model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setting = ["--method", "uidl", "--selection", "last", "--layers", "2", "--tasks", text_file, "--eval_tokens", "200"]
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, *setting, *FAST, "--save_path", "last")
    assert read_json(Path("last.work/metrics/select.json"))["end"] == tiny.config().num_hidden_layers
    page = Path("last.work/artifacts/report/index.html").read_text(encoding="utf-8")
    assert "chosen by its place, the last one allowed" in page
