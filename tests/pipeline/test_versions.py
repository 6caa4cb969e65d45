"""Versions of packages: in the inputs, among what a stage depends on, and beside the scores."""

from importlib.metadata import version
from pathlib import Path

import pytest

from replaceme.base.files import read_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.pipeline.evaluate import _warn_of_differences
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.runner import STAGES
from replaceme.running import versions as versions_module
from replaceme.running.stage import ORDER
from replaceme.running.versions import MODEL, SCORES, TEXT
from replaceme.running.workspace import Workspace
from tests.pipeline.closure import ROOT, import_closure, imported_packages

GROUPS = {Workspace.text_versions: TEXT, Workspace.model_versions: MODEL, Workspace.score_versions: SCORES}


def test_the_inputs_have_the_same_bytes_until_a_version_changes(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path)
    inspect_inputs(params, work)
    before = sha256_below(tmp_path)
    inspect_inputs(params, work)
    assert sha256_below(tmp_path) == before
    monkeypatch.setattr(versions_module, "_version", lambda name: "99.1" if name == "lm-eval" else version(name))
    inspect_inputs(params, work)
    changed = {name for name, digest in sha256_below(tmp_path).items() if digest != before[name]}
    assert changed == {"artifacts/inputs/score_versions.json"}
    assert read_json(work.score_versions)["lm-eval"] == "99.1"
    assert read_json(work.model_versions)["torch"] == version("torch")


@pytest.mark.parametrize("name", [name for name in ORDER if name != "plan"])  # The plan computes nothing.
def test_a_stage_depends_on_the_version_of_each_listed_package_that_it_imports(name: str) -> None:
    listed = {"torch", "transformers", "safetensors", "datasets", "lm_eval", "numpy", "scipy", "mwparserfromhell"}
    declared = {package.replace("-", "_") for read in STAGES[name].reads for package in GROUPS.get(read, ())}
    files = import_closure(ROOT / "stages" / f"{name}.py")
    imported = {package for file in files for package in imported_packages(ROOT / file)}
    assert "torch" in declared
    # models/hub.py imports datasets to resolve a data set, which these stages don't read.
    assert imported & listed - declared <= ({"datasets"} if name in ORDER[2:11] else set())


MADE = {"processor": "one kind", "torch": "1", "lm-eval": "1"}


@pytest.mark.parametrize(
    ("device", "made_with", "said"),
    [
        ("cpu", MADE, ""),
        ("cuda", {**MADE, "processor": "other"}, "with device cpu, processor one kind, the pruned one with device cuda, "),
        ("cpu", {**MADE, "lm-eval": "2"}, "was scored with lm-eval 1, the pruned one with lm-eval 2;"),
    ],
)
def test_scores_made_with_other_versions_are_warned_of(
    device: str, made_with: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_differences({"device": "cpu", "made_with": MADE}, {"device": device, "made_with": made_with})
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
