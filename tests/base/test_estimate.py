"""How long a run will still take: from this machine's times, or the repository's at this machine's pace, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from replaceme.base.estimate import LOAD, load_of, note, times_here
from replaceme.base.files import cache_folder, write_json, write_text
from replaceme.base.parameters import Params, read_params
from replaceme.base.stage import COMPRESSION, JUDGEMENT, ORDER, Stage, run_stage, still_to_go
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import FIELDS

# Seconds by stage: 20 min for the model and 7 for its scores.
MODEL, SCORES = dict.fromkeys(COMPRESSION, 120.0), {"baseline": 180.0, "evaluate": 240.0}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    return read_params(None, {"method": "lstsq"})


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def committed(work: Workspace, params: Params, **others: Any) -> None:
    """Write the figures of the repository's own run."""
    write_json(work.metric("compression"), {"settings": load_of(params), "stage_seconds": MODEL, **others})


def test_nothing_is_said_where_nothing_is_known(params: Params, work: Workspace) -> None:
    assert still_to_go("generate", params, work) == ""
    committed(work, params)
    assert still_to_go("generate", params, work) == ""  # this machine's pace is not known


def test_what_ran_here_before_takes_as_long_again(params: Params, work: Workspace) -> None:
    for name, seconds in (MODEL | SCORES).items():
        note(name, params, seconds)
    committed(work, params)
    assert still_to_go("generate", params, work) == "about 27 min to go, if no stage is skipped"
    assert still_to_go("export", params, work) == "about 9 min to go, if no stage is skipped"
    assert still_to_go("export", params, work, COMPRESSION) == "about 2 min to go, if no stage is skipped"
    assert still_to_go("report", params, work) == still_to_go("cost", params, work) == ""


def test_a_first_run_goes_at_this_machines_pace(params: Params, work: Workspace) -> None:
    committed(work, params, judgement_seconds=SCORES)
    note("generate", params, 360.0)  # three times as long as there
    assert still_to_go("calibrate", params, work) == "about 75 min to go, if no stage is skipped"


def test_where_the_scores_times_are_not_known_the_model_is_the_goal(params: Params, work: Workspace) -> None:
    committed(work, params)
    note("generate", params, 240.0)
    assert still_to_go("calibrate", params, work) == "about 36 min to the pruned model, if no stage is skipped"
    assert still_to_go("baseline", params, work) == ""


def test_another_load_says_nothing_of_this_one(params: Params, work: Workspace) -> None:
    for name, seconds in (MODEL | SCORES).items():
        note(name, params, seconds)
    committed(work, params)
    longer, weaker = (params.model_copy(update=other) for other in ({"heal_epochs": 2}, {"alpha": 9.0}))
    assert still_to_go("calibrate", longer, work) == ""
    assert still_to_go("calibrate", weaker, work) == still_to_go("calibrate", params, work) != ""


def test_a_short_rest_is_not_worth_a_line(params: Params, work: Workspace) -> None:
    for name in (*COMPRESSION, *JUDGEMENT):
        note(name, params, 4.0)
    assert still_to_go(ORDER[0], params, work) == ""


@pytest.mark.parametrize("content", ["", "[1]", '{"settings": 1}', '{"settings": "S", "stage_seconds": {"solve": "1"}}'])
def test_a_damaged_record_is_none(content: str, params: Params, work: Workspace) -> None:
    note("solve", params, 7.0)
    (file,) = (cache_folder() / "times").iterdir()
    write_text(file, content.replace("S", load_of(params)))
    assert times_here(params) == {}
    note("solve", params, 8.0)
    assert times_here(params) == {"solve": 8.0}


def test_a_stage_of_the_pipeline_says_it_and_keeps_its_own_time(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    write_text(Path("params.yaml"), "preset: published\nmethod: lstsq\n")
    for name, seconds in SCORES.items():
        note(name, params, seconds)
    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name="baseline", run=lambda params, work: None, code=()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "stage 11 of 13: baseline"
    assert "about 7 min to go, if no stage is skipped" in lines
    assert times_here(params)["baseline"] < SCORES["baseline"]


def test_the_load_is_made_of_parameters() -> None:
    assert set(LOAD) <= FIELDS.keys()
