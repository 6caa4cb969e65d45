"""A run without DVC repeats nothing that finished with the same key; and what a change, a kill or another machine asks for."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replaceme.base.entries import Task
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.cli import commands
from replaceme.models.model import Model
from replaceme.pipeline import export, runner
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.runner import STAGES, run_stages, stage_key
from replaceme.running import versions as versions_module
from replaceme.running.stage import FIT, ORDER
from replaceme.running.workspace import Workspace
from tests.conftest import made_text
from tests.helpers import call
from tests.interruption import KILLED, forked
from tests.pipeline.conftest import Finished

PASSES = ["profile", "select", "plan", "activations", "solve", "repair", "heal", "check", "export"]
BEFORE_SOLVE = ["generate", "calibrate", "profile", "select", "plan", "activations"]


@pytest.fixture
def run(config: Path, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Return a function that goes on in a copy of the finished run, and returns the stages that it skipped."""
    copy = finished.copy(tmp_path)

    def go_on(*arguments: str | Path, code: int = 0) -> list[str]:
        capsys.readouterr()
        call(commands.run_replaceme, "--config", config, *copy.arguments(), *arguments, code=code)
        said = capsys.readouterr()
        assert said.out == finished.printed or code or "--alpha" in arguments
        return [line.split(":")[0] for line in said.err.splitlines() if "unchanged since an earlier run" in line]

    return go_on


def test_a_second_run_repeats_nothing_and_a_new_alpha_what_it_changes(run: Callable[..., list[str]], tmp_path: Path) -> None:
    before = sha256_below(tmp_path / "result")
    assert run() == [*ORDER]
    assert sha256_below(tmp_path / "result") == before
    assert run("--alpha", "1e3", "--overwrite") == [*BEFORE_SOLVE, "baseline"]
    assert sha256_below(tmp_path / "result") != before


def test_what_was_deleted_or_changed_is_made_again_and_nothing_else(run: Callable[..., list[str]], tmp_path: Path) -> None:
    before = sha256_below(tmp_path / "result")
    for name in ("README.md", "model.safetensors"):
        (tmp_path / "result" / name).unlink()
        assert run() == [name for name in ORDER if name != "export"]
        assert sha256_below(tmp_path / "result") == before
    (tmp_path / "result.work" / "artifacts" / "solution" / "edits.safetensors").write_bytes(b"")
    (tmp_path / "result.work" / "stages" / "plan.json").write_text("{", encoding="utf-8")
    assert run() == [name for name in ORDER if name not in ("plan", "solve")]


@pytest.mark.parametrize("end", ["an interruption", "a kill"])
def test_a_run_that_is_ended_goes_on_where_it_stopped(
    end: str, run: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sha256_below(tmp_path / "result")

    def stop(*_: Any) -> None:
        if end == "a kill":
            os._exit(KILLED)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "verify_export", stop)
        if end == "a kill":
            assert forked(lambda: run("--alpha", "7", "--overwrite")) == KILLED
            assert list(tmp_path.glob("result.*.partial"))
        else:
            run("--alpha", "7", "--overwrite", code=130)
    # The earlier result is whole.
    assert sha256_below(tmp_path / "result") == before
    assert run("--alpha", "7") == [*FIT, "baseline"]
    assert sha256_below(tmp_path / "result") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "result.work"]


def test_the_log_says_how_far_a_run_is(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([100.0, 100.4, 225.0])
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(times)))
    work = Workspace(tmp_path)
    inspect_inputs(params, work)
    with caplog.at_level("INFO", "replaceme"):
        run_stages(params, work, ["generate", "calibrate"])
    assert [line for line in caplog.messages if line.startswith("stage")] == [
        "stage 1 of 2: generate", "stage 2 of 2: calibrate, 2:05 min so far"
    ]  # fmt: skip


@pytest.fixture
def keys(params: Params, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that inspects the inputs and returns each stage's key; all else that a stage reads stays."""
    work = Workspace(tmp_path / "run")

    def keys_of(setting: Params = params) -> dict[str, str]:
        inspect_inputs(setting, work)
        for stage in STAGES.values():
            for path in [*map(work.artifact, stage.reads), *map(work.metric, stage.figures)]:
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("read", encoding="utf-8")
        return {name: stage_key(stage, setting, work) for name, stage in STAGES.items() if not stage.always}

    return keys_of


def differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name, key in after.items() if key != before[name]]


@pytest.mark.parametrize(
    ("package", "repeated"),
    [
        ("lm-eval", ["baseline", "evaluate", "report"]),
        ("torch", [*ORDER]),
        ("tokenizers", ["generate", "calibrate", "heal", "check", "baseline", "evaluate", "report"]),
        ("bitsandbytes", []),
    ],
)
def test_another_version_repeats_the_stages_that_compute_with_the_package(
    package: str, repeated: list[str], keys: Any, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = params.model_copy(update={"use_4bit": True})
    before, before_packed = keys(), keys(packed)
    assert keys() == before
    monkeypatch.setattr(versions_module, "_version", lambda name: "99.1" if name == package else version(name))
    assert differing(before, keys()) == repeated
    if package == "bitsandbytes":
        assert differing(before_packed, keys(packed)) == ["generate", *PASSES, "report"]


@pytest.mark.parametrize("change", [("kind_of", lambda device: f"another {device}"), ("code_digest", lambda: "other code")])
def test_another_processor_and_changed_code_repeat_every_stage(change: Any, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(runner, *change)
    assert differing(before, keys()) == [*ORDER]


def test_the_dense_model_is_scored_once_for_all_results_and_known_by_content(
    params: Params, tiny: Model, save_tiny: Callable[..., Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, text = tmp_path / "model", tmp_path / "scored-once.txt"
    shutil.copytree(tiny.folder, source)
    # A text of its own, which no other test has scored.
    text.write_text(made_text(40, seed=77), encoding="utf-8")
    setting = params.model_copy(update={"model_path": str(source), "tasks": (Task(str(text)),)})

    def dense_score(name: str) -> tuple[dict[str, float], bool]:
        work = Workspace(tmp_path / name)
        inspect_inputs(setting, work)
        caplog.clear()
        with caplog.at_level("INFO", "replaceme"):
            run_stages(setting, work, ["baseline"])
        known = any(line.startswith("baseline: known from an earlier run") for line in caplog.messages)
        return json.loads((work.baseline / "scores.json").read_text())["perplexity"]["scored-once"], known

    first, known = dense_score("a")
    assert not known
    assert dense_score("b") == (first, True)
    shutil.rmtree(source)
    shutil.copytree(save_tiny("llama", rope_theta=77.0).folder, source)
    other, known = dense_score("c")
    assert not known
    assert other != first
