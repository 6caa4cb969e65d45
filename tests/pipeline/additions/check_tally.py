"""The made-up stage, run by the console scripts and by its own script, as DVC runs it."""

import shutil
import sys
from pathlib import Path

import pytest

from replaceme.base.files import read_json
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan
from replaceme.pipeline.runner import run_stages
from replaceme.running.workspace import Workspace
from tests.pipeline.closure import ROOT
from tests.pipeline.helpers import shell


def test_it_runs_once_and_again_when_its_parameter_changes(params: Params, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    Plan((Block(2, 4),), ()).save(work.plan)
    assert run_stages(params, work, ["tally"]) == ["tally"]
    assert read_json(work.metric("tally")) == {"blocks": 1, "seed": 42}
    assert run_stages(params, work, ["tally"]) == []
    assert run_stages(params.model_copy(update={"alpha": 1.0}), work, ["tally"]) == []
    assert run_stages(params.model_copy(update={"seed": 1}), work, ["tally"]) == ["tally"]


def test_its_script_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    Plan((Block(2, 4),), ()).save(Workspace(tmp_path).plan)
    shell(tmp_path, sys.executable, "-m", "stages.tally", PYTHONPATH=str(ROOT))
    assert read_json(Workspace(tmp_path).metric("tally")) == {"blocks": 1, "seed": 42}
