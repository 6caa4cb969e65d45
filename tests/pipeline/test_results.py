"""The folder of a result without DVC: one process at a time, never another's files, and a run that is killed goes on."""

import os
from pathlib import Path

import pytest

from replaceme.base.errors import ParameterError
from replaceme.base.files import new_folder, write_json, write_text
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.cli import commands
from replaceme.cli.main import main
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.pipeline.results import (
    MADE_OF,
    check_finished,
    exclusive_result,
    publish_file,
    publish_folder,
    result_lock,
    result_name,
    result_paths,
)
from replaceme.running.stage import Stage, run_stage
from replaceme.running.workspace import Workspace
from tests.conftest import made_text
from tests.helpers import FAST, call
from tests.interruption import died_at, ended_process


@pytest.fixture
def arguments(tiny: Model, text_file: Path, tmp_path: Path) -> list[str | Path]:
    """Arguments of a run without scores."""
    return [
        "--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]", "--save_path", tmp_path / "r",
    ]  # fmt: skip


@pytest.fixture
def placed(params: Params, tmp_path: Path) -> Params:
    return params.model_copy(update={"save_path": str(tmp_path / "places" / "r")})


def finish(params: Params, text: str) -> None:
    """Write a result as the commands do, without computing anything."""
    with exclusive_result(params, "") as work:
        with new_folder(work.profile) as folder:
            (folder / "config.json").write_text(f"config of {text}", encoding="utf-8")
        publish_folder(work, work.profile)
        write_text(work.report / "card.md", f"scores of {text}")
        publish_file(work, work.report / "card.md", "README.md")


def test_a_run_killed_at_a_file_operation_goes_on_in_its_folder(placed: Params, tmp_path: Path) -> None:
    folder, number = tmp_path / "places", 0
    finish(placed, "the first")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    while died_at(number, lambda: finish(placed, "the killed one"), folder):
        number += 3
        finish(placed, "the last")
        assert (folder / "r" / "README.md").read_text(encoding="utf-8") == "scores of the last"
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == left
    assert number > 20


def test_a_second_process_in_one_folder_stops(
    arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workspace(tmp_path / "r.work", tmp_path / "r")
    place.root.mkdir()
    # A result that is being replaced is neither measured nor uploaded.
    write_json(place.model_input, {})
    place.model.mkdir()
    with result_lock(place):
        before = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
        for command in (commands.run_replaceme, commands.get_lt_with_lstsq, commands.get_distance_analysis):
            call(command, *arguments, code=2)
            error = capsys.readouterr().err.splitlines()[-1]
            assert error == (
                f"error: save_path: {tmp_path / 'r'} is in use by another process; wait for it, or choose another folder."
            )
        call(main, "speed", "--save_path", tmp_path / "r", code=2)
        assert "is in use by" in capsys.readouterr().err
        call(main, "push", "--repo_id", "you/r", "--save_path", tmp_path / "r", code=2)
        assert "is in use by" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in place.root.rglob("*")} == before


def test_what_ended_runs_left_is_cleared_and_checkpoints_stay(placed: Params, tmp_path: Path) -> None:
    folder, end = tmp_path / "places", f"{ended_process()}.partial"
    finish(placed, "the first")
    before = {*folder.rglob("*")}
    artifacts = folder / "r.work" / "artifacts"
    for path in (folder / f"r.abcdefgh.{end}", artifacts / f"scratch-abcdefgh.{end}", artifacts / "checkpoints.partial"):
        path.mkdir(parents=True)
    write_text(folder / "r.work" / "stages" / f"solve.json.{end}", "half")
    with exclusive_result(placed, ""):
        pass
    assert {*folder.rglob("*")} - before == {artifacts / "checkpoints.partial", folder / "r.work" / "stages"}


@pytest.mark.parametrize("harm", ["a file more", "a link", "a broken link", "a changed file", "no record", "a damaged record"])
def test_a_folder_with_another_programs_file_is_refused_and_left_alone(harm: str, placed: Params, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "places" / "r.work", tmp_path / "places" / "r")
    finish(placed, "the first")
    if harm in ("a link", "a broken link"):
        (place.model / "mine").symlink_to(place.model / ("config.json" if harm == "a link" else "nothing"))
    elif harm in ("a file more", "a changed file"):
        (place.model / ("mine" if harm == "a file more" else "README.md")).write_text("mine", encoding="utf-8")
    elif harm == "no record":
        (place.root / "claims.json").unlink()
    else:
        (place.root / "claims.json").write_text("[", encoding="utf-8")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "places").rglob("*") if path != place.root}
    with pytest.raises(ParameterError, match="this program did not write; choose another folder"):
        finish(placed, "the second")
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "places").rglob("*") if path != place.root} == before


def test_a_finished_result_is_kept_unless_it_is_made_of_the_same_or_overwritten(
    arguments: list[str | Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[str, str]:
        return sha256_below(tmp_path / "r") | sha256_below(tmp_path / "r.work")

    # Without what belongs to scores.
    own = [*arguments[:6], *FAST[:2], *FAST[4:], *arguments[-2:], "--method", "uidl"]
    call(main, "solve", *own)
    call(main, "solve", *own, "--threads", "2")
    before = files()
    for option, difference in (
        (("--method", "average"), "method 'uidl', not 'average'"),
        (("--seed", "7"), "seed 42, not 7"),
        (("--dataset", "wikipedia-sample"), "another text"),
    ):
        call(main, "solve", *own, *option, code=2)
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == (
            f"error: save_path: {tmp_path / 'r'} is finished, and was made with {difference}; choose another folder, or "
            "replace it: --overwrite, in Python overwrite=True."
        )
        assert files() == before
    text_file.write_text("Another text. " * 200, encoding="utf-8")
    call(main, "solve", *own, code=2)
    assert "was made with another text; choose" in capsys.readouterr().err
    call(main, "solve", *own, "--overwrite")
    assert files() != before


def test_a_finished_result_that_was_trained_on_another_text_is_kept(
    arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "training.txt"
    text.write_text(made_text(300, seed=3), encoding="utf-8")
    healing = ["--method", "uidl", "--heal_dataset", text, "--heal_tokens", "400", "--heal_tokens_per_step", "200"]
    own = [*arguments[:6], *FAST[:2], *FAST[4:], *arguments[-2:], *healing]
    call(main, "solve", *own)
    text = text.rename(tmp_path / "renamed.txt")
    own[own.index("--heal_dataset") + 1] = text
    # Another name of the same text is the same.
    call(main, "solve", *own)
    text.write_text(made_text(300, seed=4), encoding="utf-8")
    call(main, "solve", *own, code=2)
    assert "was made with another heal_dataset; choose" in capsys.readouterr().err


def test_a_result_without_a_record_of_a_healing_text_had_none(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    write_json(work.root / MADE_OF, {"alpha": 0.0, "heal_dataset": None})
    check_finished(work, {"alpha": 0.0, "heal_dataset": {}})
    with pytest.raises(ParameterError, match="another heal_dataset"):
        check_finished(work, {"alpha": 0.0, "heal_dataset": {"notes": "sum"}})


def test_a_folder_that_is_no_result_is_refused_and_nothing_is_written(
    arguments: list[str | Path], tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str | Path) -> str:
        call(commands.run_replaceme, *arguments, *more, code=2)
        return capsys.readouterr().err

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "mine holds thesis.txt, which this program did not write" in refused("--save_path", tmp_path / "mine")
    assert "thesis.txt exists and is no folder" in refused("--save_path", tmp_path / "mine" / "thesis.txt")
    (tmp_path / "mine" / "loop").symlink_to("loop")
    assert "loop exists and is no folder" in refused("--save_path", tmp_path / "mine" / "loop")
    assert "is the model that is to be pruned" in refused("--save_path", tiny.folder)
    (tmp_path / "dvc.yaml").touch()
    for name in ("artifacts", "artifacts/model"):
        assert f"save_path: {tmp_path / 'artifacts'} belongs to the pipeline" in refused("--save_path", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "text.txt", "dvc.yaml"}
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_each_kind_of_result_has_a_folder_of_its_own(params: Params) -> None:
    settings = [{}, {"layers_to_skip": 3}, {"tolerated_loss": 0.5}, {"remove": "20%"}, {"save_transform_only": True}]
    others = [params.model_copy(update=setting) for setting in settings]
    places = [result_paths(each, result_name(each)).model for each in others]
    assert [place.name for place in places][::4] == ["llama-lstsq-2", "llama-lstsq-2-transform"]
    assert len({*places}) == len(settings)
    assert {place.parent for place in places} == {Path.cwd()}


def test_a_stage_of_the_pipeline_clears_what_killed_stages_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("method: uidl\n", encoding="utf-8")
    ended = f"{ended_process()}.partial"
    left = [Path("artifacts", f"model.abcdefgh.{ended}"), Path("metrics", f"x.json.{ended}")]
    living = Path("artifacts", f"model.abcdefgh.{os.getppid()}.partial")
    for path in (*left, living):
        path.mkdir(parents=True)
    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name="baseline", run=lambda params, work: None, methods=METHODS))
    assert not any(path.exists() for path in left)
    assert living.exists()


def test_the_path_of_the_pipelines_result_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("save_path: elsewhere\nsave_transform_only: true\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        run_stage(Stage(name="baseline", run=lambda params, work: None, methods=METHODS))
    said = capsys.readouterr().err
    assert "params.yaml: save_path: the pipeline writes to artifacts/model, not to 'elsewhere'; use null here" in said
    assert "save_transform_only: only the console scripts can stop at the transform" in said
