"""A console script's place: one process at a time, never another's files, and a run that is killed goes on."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replaceme import actions, commands, places, steps
from replaceme.base.claims import claim, claim_only_what_is_there, foreign_file, in_use
from replaceme.base.errors import ParameterError
from replaceme.base.files import ASIDE, new_folder, partial_suffix, write_json, write_text
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.stage import Stage, run_stage
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.publish import push_to_hub
from tests.helpers import FAST, call
from tests.interruption import KILLED, died_at, ended_process, forked, started


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
    with places.claimed(params, "") as work:
        with new_folder(work.model) as folder:
            for name in ("config.json", "README.md"):
                (folder / name).write_text(f"{name} of {text}", encoding="utf-8")
            claim(work, sha256_below(folder))
        card = f"scores of {text}"
        claim(work, {"README.md": hashlib.sha256(card.encode()).hexdigest()})
        write_text(work.model / "README.md", card)
        claim_only_what_is_there(work)


def test_a_run_killed_at_any_operation_goes_on_in_its_place(placed: Params, tmp_path: Path) -> None:
    folder, number = tmp_path / "places", 0
    finish(placed, "the first")
    while died_at(number, lambda: finish(placed, "the killed one"), folder):
        number += 1
        finish(placed, "the last")
        assert sha256_below(folder / "r").keys() == {"config.json", "README.md"}
        assert (folder / "r" / "README.md").read_text(encoding="utf-8") == "scores of the last"
        left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert left == {"r", "r/config.json", "r/README.md", "r.work", "r.work/result.json"}
    assert number > 40


def test_a_run_killed_after_its_result_got_its_place_does_not_refuse_it(
    arguments: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed_when(owner: Any, name: str, condition: Callable[[Any], bool]) -> None:
        whole = getattr(owner, name)

        def stop(first: Any, *rest: Any) -> Any:
            return os._exit(KILLED) if condition(first) else whole(first, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert forked(lambda: call(commands.run_replaceme, *arguments)) == KILLED

    killed_when(steps, "write_json", lambda path: path.name == "export.json")
    assert (tmp_path / "r" / "config.json").is_file()
    killed_when(actions, "write_text", lambda path: path.name == "README.md")
    killed_when(actions, "claim_only_what_is_there", lambda work: True)
    call(commands.run_replaceme, *arguments)
    assert capsys.readouterr().err.count("unchanged since an earlier run") == len(steps.STAGES) - 3
    assert foreign_file(Workspace(tmp_path / "r.work", tmp_path / "r")) is None
    assert {path.name for path in tmp_path.iterdir()} == {"r", "r.work", "text.txt"}


def test_a_second_process_in_one_place_stops_and_names_the_first(
    arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workspace(tmp_path / "r.work", tmp_path / "r")
    place.root.mkdir()
    with in_use(place):
        before = {path: path.stat().st_mtime_ns for path in place.root.rglob("*")}
        for command in (commands.run_replaceme, commands.run_uidl, commands.get_lt_with_lstsq, commands.get_distance_analysis):
            call(command, *arguments, code=2)
            preset, error = capsys.readouterr().err.splitlines()
            assert preset == "preset published (the default here)"
            assert error.startswith(f"error: save_path: {tmp_path / 'r'} is in use by ")
            assert f", process {os.getpid()} on " in error
            assert error.endswith("; wait for it, or choose another folder.")
        assert {path: path.stat().st_mtime_ns for path in place.root.rglob("*")} == before
        # A result that is being replaced is neither measured nor uploaded.
        write_json(place.model_input, {})
        place.model.mkdir()
        call(commands.measure_speed, *arguments, code=2)
        assert "is in use by" in capsys.readouterr().err
        call(push_to_hub, "--repo_id", "you/r", "--save_path", tmp_path / "r", code=2)
        assert "is in use by" in capsys.readouterr().err
    assert not list(place.root.glob("in-use*"))


def test_of_many_processes_in_one_place_one_works_at_a_time(placed: Params, tmp_path: Path) -> None:
    busy = tmp_path / "busy"

    def work() -> None:
        for _ in range(4):
            try:
                with places.claimed(placed, "") as place:
                    busy.mkdir()  # it fails if another one is here
                    with new_folder(place.model) as folder:
                        (folder / f"{os.getpid()}").touch()
                        time.sleep(0.01)
                        claim(place, sha256_below(folder))
                    busy.rmdir()
            except ParameterError as refusal:
                assert "is in use by" in str(refusal)  # noqa: PT017
                time.sleep(0.005)

    children = [started(work) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(list((tmp_path / "places" / "r").iterdir())) == 1


def test_what_ended_runs_left_in_the_place_is_cleared(placed: Params, tmp_path: Path) -> None:
    folder = tmp_path / "places"
    finish(placed, "the first")
    process = ended_process()
    suffix, aside = (partial_suffix(kind).replace(f".{os.getpid()}-", f".{process}-") for kind in ("", ASIDE))
    artifacts = folder / "r.work" / "artifacts"
    for path in (folder / f"r{suffix}", artifacts / f"scratch-abc{suffix}", artifacts / f"healing.partial{suffix}"):
        path.mkdir(parents=True)
    (artifacts / "healing.partial").mkdir()
    (folder / "r").rename(folder / f"r{aside}")
    for path in (folder / "r.work" / "steps" / f"solve.json{suffix}", folder / f"r{aside}" / f"README.md{suffix}"):
        write_text(path, "half")
    with places.claimed(placed, ""):
        assert sha256_below(folder / "r").keys() == {"config.json", "README.md"}
        assert [path.name for path in artifacts.iterdir()] == ["healing.partial"]
    assert not [path for path in folder.rglob("*") if path.name.endswith((suffix, aside))]


@pytest.mark.parametrize(
    "harm", ["a file more", "a link", "a broken link", "a changed file", "an empty record", "a damaged record", "a file"]
)
def test_a_place_with_what_is_not_ours_is_refused_and_nothing_is_left(harm: str, placed: Params, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "places" / "r.work", tmp_path / "places" / "r")
    finish(placed, "the first")
    record = place.root / "result.json"
    if harm == "a file instead":
        for path in place.model.iterdir():
            path.unlink()
        place.model.rmdir()
        place.model.write_text("years of work", encoding="utf-8")
    elif harm in ("a link", "a broken link"):
        (place.model / "mine").symlink_to(place.model / ("config.json" if harm == "a link" else "nothing"))
    elif harm in ("a file more", "a changed file"):
        (place.model / ("mine" if harm == "a file more" else "README.md")).write_text("mine", encoding="utf-8")
    else:
        record.write_bytes(b"" if harm == "an empty record" else b'{"config.json": 3}')
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "places").rglob("*") if path != place.root}
    with pytest.raises(ParameterError, match="this program did not write; choose another folder"):
        finish(placed, "the second")
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "places").rglob("*") if path != place.root} == before


def test_a_record_of_an_earlier_version_is_read(placed: Params, tmp_path: Path) -> None:
    finish(placed, "the first")
    write_json(tmp_path / "places" / "r.work" / "result.json", sha256_below(tmp_path / "places" / "r"))
    finish(placed, "the second")


def test_a_refused_run_leaves_no_folder(
    arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, *arguments, "--dataset", "typo.txt", "--save_path", tmp_path / "new" / "deep" / "r", code=2)
    assert "dataset: there is no file typo.txt" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    call(commands.run_replaceme, *arguments, "--save_path", tmp_path / "mine", code=2)
    assert "mine holds thesis.txt" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "text.txt"}


@pytest.mark.parametrize("name", ["artifacts", "artifacts/model", "artifacts/a/b"])
def test_the_pipelines_artifacts_are_no_place_of_a_console_script(
    name: str, arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").touch()
    call(commands.run_replaceme, *arguments, "--save_path", tmp_path / name, code=2)
    assert f"save_path: {tmp_path / 'artifacts'} belongs to the pipeline" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()


def test_a_stage_clears_what_killed_stages_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("method: uidl\n", encoding="utf-8")
    ended = partial_suffix().replace(f".{os.getpid()}-", f".{ended_process()}-")
    left = [Path("artifacts", f"model{ended}"), Path("metrics", f"x.json{ended}")]
    living = Path("artifacts", f"model{partial_suffix().replace(f'.{os.getpid()}-', f'.{os.getppid()}-')}")
    for path in (*left, living):
        path.mkdir(parents=True)
    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name="baseline", run=lambda params, work: None, code=(), methods=METHODS))
    assert not any(path.exists() for path in left)
    assert living.exists()
