"""Which changes make a console script repeat a step."""

import shutil
from pathlib import Path

import pytest

from replaceme import steps
from replaceme.base.estimate import note, times_here
from replaceme.base.files import write_json, write_text
from replaceme.base.parameters import Params
from replaceme.base.stage import ORDER, Stage
from replaceme.base.workspace import Workspace
from replaceme.steps import STAGES, Course
from tests.pipeline.closure import ROOT


def test_the_steps_are_the_stages_in_their_order() -> None:
    assert list(STAGES) == list(ORDER)


def test_the_log_says_how_far_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(ORDER, began=100.0)
    times = iter([100.4, 225.0])
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(times))
    assert course.place_of("generate") == "stage 1 of 13: generate"
    assert course.place_of("profile") == "stage 3 of 13: profile, 2:05 min so far"


def test_a_script_says_how_long_it_will_still_take(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(steps.STAGES, "solve", Stage(name="solve", run=lambda params, work: None, code=()))  # type: ignore[index]
    note("solve", params, 120.0)
    with caplog.at_level("INFO", "replaceme"):
        steps.run_steps(params, Workspace(tmp_path), ["solve"], Course(["solve"]))
    assert [record.getMessage() for record in caplog.records] == [
        "stage 1 of 1: solve", "about 2 min to go, if no stage is skipped"
    ]  # fmt: skip
    assert times_here(params)["solve"] < 120.0


def test_a_changed_file_repeats_the_steps_that_load_it_and_no_others(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, work = tmp_path / "replaceme", Workspace(tmp_path)
    shutil.copytree(ROOT / "replaceme", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(steps, "PACKAGE", package)
    for stage in STAGES.values():
        for path in [*map(work.path, stage.reads), *map(work.metric, stage.figures)]:
            write_text(path, "read")

    def keys() -> dict[str, str]:
        return {name: steps._key(params, work, stage) for name, stage in STAGES.items()}

    def repeated_by(*files: str) -> list[str]:
        before = keys()
        for file in files:
            with (package / file).open("a", encoding="utf-8") as stream:
                stream.write("\n# Changed.\n")
        return [name for name, key in keys().items() if key != before[name]]

    assert repeated_by("commands.py", "steps.py", "pipeline/inputs.py") == []
    assert repeated_by("report/page.html") == ["report"]
    assert repeated_by("pipeline/solve.py") == ["solve"]
    assert repeated_by("evaluation/scores.py") == ["baseline", "evaluate", "report"]
    assert repeated_by("observers/statistics.py") == ["select", "activations", "solve", "repair", "heal"]
    assert repeated_by("base/documents.py") == list(STAGES)


def test_a_baseline_of_the_users_cache_that_was_changed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def scores_for(result: str) -> str:
        output = tmp_path / result

        def score() -> None:
            made.append(output)
            write_text(output / "scores.json", "12.5")

        steps._run_once_for_all("baseline", "key", output, score)
        return (output / "scores.json").read_text(encoding="utf-8")

    assert [scores_for("a"), scores_for("b")] == ["12.5", "12.5"]
    assert made == [tmp_path / "a"]
    (tmp_path / "cache" / "baselines" / "key" / "scores.json").write_text("12.4", encoding="utf-8")
    assert [scores_for("c"), scores_for("d")] == ["12.5", "12.5"]
    assert made == [tmp_path / "a", tmp_path / "c"]


def test_a_damaged_stamp_is_none(tmp_path: Path) -> None:
    stamp = tmp_path / "solve.json"
    assert not steps._is_stamped(stamp, ["key", []])
    write_json(stamp, ["key", []])
    assert steps._is_stamped(stamp, ["key", []])
    for content in (b"", b'["key", [', b"\xff", b'["key"]'):
        stamp.write_bytes(content)
        assert not steps._is_stamped(stamp, ["key", []])
