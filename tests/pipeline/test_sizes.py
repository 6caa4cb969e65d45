"""How many layers: the share that goes where nobody says, and the table of what each number costs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import replaceme
from replaceme.base.documents import Documents, split_documents
from replaceme.base.parameters import Params, read_params
from replaceme.cli.main import COMMANDS, main
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.pipeline import sizes
from replaceme.pipeline.sizes import DEFAULT_SHARE, START_RISE, apply_default_size, choose_start
from replaceme.running.workspace import Workspace
from replaceme.selection.blocks import smallest_blocks
from tests.helpers import call

QUICK = ["--dtype", "float32", "--threads", "1", "--max_length", "48", "--dataset_size", "20"]


def test_profile_measures_what_each_size_costs_without_a_replacement(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", "--model", tiny.folder, "--dataset", text_file, *QUICK, "--save_path", tmp_path / "p"]
    call(main, *arguments)
    printed = capsys.readouterr().out
    work, table = Workspace.for_result(tmp_path / "p"), pd.read_csv(tmp_path / "p" / "sizes.csv")
    profile = json.loads((work.profile / "profile.json").read_text(encoding="utf-8"))
    _, held_out = split_documents(Documents.load(work.documents))
    assert table["layers"].tolist() == [0, 1, 2, 3]
    dense = _shortened_model(tiny, 0, 0)
    for _, row in table.iterrows():
        count, start = int(row["layers"]), int(row["start"])
        rankings = (profile["angular_distance"], profile["residual"])
        starts = range(1, 6 - count + 1)
        assert not count or start in {block.start for values in rankings for block in smallest_blocks(values, starts, count, 2)}
        model = _shortened_model(tiny, start, count)
        assert row["rise"] == pytest.approx(_mean_loss(model, held_out) - _mean_loss(dense, held_out), abs=1e-5)
        assert row["gigabytes"] == pytest.approx(2e-9 * model.num_parameters(), rel=1e-5)
        assert row["speedup"] == pytest.approx(_read_weights(dense) / _read_weights(model), rel=1e-5)
    # Random weights lose next to nothing, so that the largest size is the one to start at.
    assert [line.split()[0] for line in printed.splitlines() if "start here: 3" in line] == ["3"]
    assert (tmp_path / "p" / "sizes.png").is_file()
    call(main, *arguments)
    again = capsys.readouterr()
    assert again.out == printed
    assert "sizes: unchanged since an earlier run" in again.err


def _shortened_model(tiny: Model, start: int, count: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    del model.model.layers[start : start + count]
    return model


@torch.no_grad()
def _mean_loss(model: Any, documents: Documents) -> float:
    sums = [(len(ids) - 1) * float(model(ids[None], labels=ids[None], use_cache=False).loss) for ids in documents.documents]
    return sum(sums) / sum(len(ids) - 1 for ids in documents.documents)


def _read_weights(model: Any) -> int:
    """Return the number of weights that a token reads: all but an embedding that is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return int(model.num_parameters() - (0 if embedding is head else embedding.numel()))


def test_one_starts_at_the_largest_size_within_the_tolerated_rise() -> None:
    rises = [0.0, 0.5 * START_RISE, 2 * START_RISE, 0.9 * START_RISE, 3 * START_RISE]
    made = pd.DataFrame({"layers": range(5), "rise": rises})
    assert choose_start(made) == 3
    assert choose_start(made.loc[[0, 2]]) is None


@pytest.mark.parametrize(
    ("layers", "given", "count"),
    [(30, {}, 4), (12, {}, 2), (80, {}, 10), (3, {}, 1), (30, {"num_A": 2}, 2), (30, {"tolerated_loss": 0.2}, 15)],
)
def test_a_share_of_the_layers_goes_where_nothing_says_how_many(
    layers: int, given: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "find_model", lambda params: params)
    monkeypatch.setattr(sizes, "layer_count", lambda model: layers)
    params = Params.model_validate({**dict(read_params(None, {}, METHODS, "recommended")), **given})
    assert apply_default_size(params).layers_to_skip == count


@pytest.mark.parametrize(
    ("words", "config", "has_size"),
    [
        (["--preset", "quick"], "alpha: 0.1", False),
        (["--remove", "null"], "alpha: 0.1", False),
        (["--layers", "2"], "alpha: 0.1", True),
        (["--remove", "20%"], "alpha: 0.1", True),
        ([], "layers: 2", True),
        ([], "method: lstsq\nlayers_to_skip: 8", True),
    ],
)
def test_the_command_line_and_a_config_say_how_much_and_a_preset_does_not(
    words: list[str], config: str, has_size: bool, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(config, encoding="utf-8")
    command = COMMANDS["prune"]
    _, options = command.read_arguments(command.make_parser("p", full=True), ["--config", str(tmp_path / "c.yaml"), *words])
    assert options == {"has_size": has_size}


def test_a_command_and_a_call_without_a_number_say_how_many_layers_go(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "solve", "--help-all")
    assert f"[{DEFAULT_SHARE:.0%} of the layers]" in " ".join(capsys.readouterr().out.split())
    call(main, "solve", "--model", tiny.folder, "--dataset", text_file, *QUICK, "--save_path", tmp_path / "edits")
    assert capsys.readouterr().err.splitlines()[1].startswith("layers: 1 of 6 go (13 %), as nothing says how many; ")
    assert len(json.loads((tmp_path / "edits" / "edits.json").read_text(encoding="utf-8"))["removed_layers"]) == 1
    given = {"method": "uidl", "dtype": "float32", "threads": 1, "max_length": 48, "dataset_size": 20, "tasks": []}
    assert len(replaceme.prune(tiny.folder, text_file, save_path=tmp_path / "r", **given).removed_layers) == 1
