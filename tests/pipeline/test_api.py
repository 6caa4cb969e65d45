"""``replaceme.prune``: the commands' work for those without files."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import replaceme
from replaceme.base.fingerprints import sha256_below
from replaceme.calibration.sources import read_record
from replaceme.cli import commands
from replaceme.models.model import Model
from replaceme.running.stage import ANALYSIS
from tests.conftest import made_text
from tests.helpers import FAST, call
from tests.pipeline.closure import ROOT

SMALL: dict[str, Any] = {
    "dtype": "float32", "eval_dtype": "float32", "threads": 1, "max_length": 48, "dataset_size": 20, "device": "cpu",
    "pack": False,
}  # fmt: skip
TEXTS = [made_text(20, seed=seed) for seed in range(20)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


def test_a_list_of_texts_gives_a_model_and_its_figures_and_a_second_call_repeats_what_changed(
    tiny: Model, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {**SMALL, "tasks": [str(text_file)]}
    pruned = replaceme.prune(tiny.folder, TEXTS, layers=2, save_path=tmp_path / "r", **given)
    assert pruned.path == tmp_path / "r"
    assert len(pruned.removed_layers) == 2
    model, tokenizer = pruned.model(dtype=torch.float32), pruned.tokenizer()
    assert model.config.num_hidden_layers == tiny.config().num_hidden_layers - 2
    assert tokenizer("the river").input_ids
    assert pruned.scores["perplexity"]["text"]["ratio"] > 0
    assert pruned.figures["export"]
    assert pruned.figures["compression"]["seconds"] > 0
    # The recommended setting, if nobody says otherwise.
    assert (pruned.settings["selection"], pruned.settings["transform"], pruned.settings["repair"]) == ("loss", "channels", True)
    assert pruned.report is not None
    assert pruned.report.is_file()
    card = (pruned.path / "README.md").read_text(encoding="utf-8")
    assert "texts.jsonl" in card
    assert str(tmp_path) not in card
    with caplog.at_level("INFO", "replaceme"):
        again = replaceme.prune(tiny.folder, TEXTS, 2, tmp_path / "r", **{**given, "alpha": 10.0, "tasks": []}, overwrite=True)
    assert (again.scores, again.report) == ({}, None)
    unchanged = [line.split(":")[0] for line in caplog.messages if "unchanged since" in line]
    assert unchanged == [*ANALYSIS, "select", "plan", "activations"]


def test_it_is_the_commands_work_and_leaves_a_loaded_model_as_it_was(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]", "--device", "cpu"]
    call(commands.run_replaceme, *arguments, "--save_path", tmp_path / "command")
    given: dict[str, Any] = {**SMALL, "texts": text_file, "layers": 2, "preset": "published"}
    replaceme.prune(tiny.folder, **given, save_path=tmp_path / "folder", tasks=[])
    assert sha256_below(tmp_path / "folder") == sha256_below(tmp_path / "command")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.folder), AutoTokenizer.from_pretrained(tiny.folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    given["save_path"] = tmp_path / "loaded"
    with pytest.raises(ValueError, match="tokenizer: is missing"):
        replaceme.prune(model, **given)
    replaceme.prune(model, **given, tokenizer=tokenizer, tasks=[])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sha256_below(tmp_path / "loaded" / "model.safetensors") == sha256_below(tmp_path / "command" / "model.safetensors")


def test_a_model_that_is_pruned_again_is_known_by_the_text_of_both(tiny: Model, tmp_path: Path) -> None:
    given: dict[str, Any] = {**SMALL, "method": "uidl", "tasks": []}
    (first := tmp_path / "first.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    once = replaceme.prune(tiny.folder, str(first), 1, tmp_path / "once", **given)
    for number, (model, tokenizer) in enumerate([(once.path, None), (once.model(), once.tokenizer())]):
        twice = replaceme.prune(model, TEXTS, 1, tmp_path / f"twice-{number}", tokenizer=tokenizer, **given)
        assert [source.name for source, _ in read_record(twice.path)] == ["texts.jsonl", "first.txt"]
    with pytest.raises(ValueError, match="is the model that is to be pruned"):
        replaceme.prune(once.path, TEXTS, 1, once.path, **given)


def test_without_texts_the_model_writes_them(tiny: Model, tmp_path: Path) -> None:
    given = {**SMALL, "method": "uidl", "tasks": [], "dataset_size": 4}
    pruned = replaceme.prune(tiny.folder, layers=2, save_path=tmp_path / "r", **given)
    assert pruned.settings["dataset"] == ["self"]
    assert len(pruned.removed_layers) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"transfrm": "dense"}, "transfrm: is not a parameter (did you mean 'transform'?)"),
        ({"layers": 0}, "layers_to_skip: must be at least 1, not 0"),
        ({"layers_to_skip": 3}, "layers_to_skip: is set by the call itself; use model and layers"),
        ({"texts": []}, "texts: must be a list of texts that aren't empty, one a document, not []"),
        ({"texts": ["a", " "]}, "texts: must be a list of texts that aren't empty, one a document, not ' '"),
        ({"model": 3}, "model: must be a path, a hub id or a model of transformers, not 3"),
        ({"preset": "paper"}, "preset: must be one of recommended, quick, healed, published, not 'paper'"),
    ],
)
def test_a_mistake_is_a_value_error_that_says_what_would_be_right(given: dict[str, Any], said: str, tiny: Model) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replaceme.prune(**{"model": tiny.folder, "texts": ["a"], **given})
    assert not list(Path().iterdir())


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, replaceme; sys.exit(bool({'torch', 'pydantic', 'replaceme.api'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        replaceme.prun  # type: ignore[attr-defined]  # noqa: B018


def test_three_short_documents_go_through_the_whole_pipeline(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    """Holding out every fifth document, they would leave none for the choice of the cut."""
    texts = [made_text(30, seed=seed) for seed in range(3)]
    pruned = replaceme.prune(
        tiny.folder, texts, layers=2, save_path=tmp_path / "r", **{**SMALL, "max_length": 512}, tasks=[str(text_file)]
    )
    assert pruned.figures["select"]["loss"] > 0
    assert pruned.scores["perplexity"]["text"]["ratio"] > 0
