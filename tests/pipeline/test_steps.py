"""Which changes make a console script repeat a step."""

import shutil
from pathlib import Path

import pytest

from replaceme import steps
from replaceme.base.files import write_text
from replaceme.base.params import Params
from replaceme.base.stage import ORDER
from replaceme.base.workspace import Workspace
from replaceme.steps import STAGES
from tests.pipeline.closure import ROOT


def test_the_steps_are_the_stages_in_their_order() -> None:
    assert list(STAGES) == list(ORDER)


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
    assert repeated_by("evaluation/scores.py") == ["baseline", "evaluate"]
    assert repeated_by("observers/statistics.py") == ["select", "activations", "solve", "repair", "heal"]
    assert repeated_by("base/documents.py") == list(STAGES)
