"""Which stages another version of a package, or another processor, repeats; and what says so."""

import ast
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from replaceme import steps
from replaceme.base import versions as versions_module
from replaceme.base.files import read_json, write_text
from replaceme.base.fingerprints import sha256_below
from replaceme.base.params import Params
from replaceme.base.stage import COMPRESSION
from replaceme.base.versions import MODEL, SCORES, TEXT
from replaceme.base.workspace import Workspace
from replaceme.evaluation.continuations import PROMPTS
from replaceme.evaluation.scores import Scores
from replaceme.pipeline import evaluate as stage
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.steps import STAGES
from tests.pipeline.closure import ROOT, import_closure

PASSES = ["profile", "select", "plan", "activations", "solve", "repair", "heal", "export"]
GROUPS = {Workspace.text_versions: TEXT, Workspace.model_versions: MODEL, Workspace.score_versions: SCORES}


def install(monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    """Pretend that packages have other versions."""
    known = {name.replace("_", "-"): other for name, other in others.items()}
    monkeypatch.setattr(versions_module, "version", lambda package: known.get(package) or version(package))


@pytest.fixture
def keys(params: Params, tmp_path: Path) -> Any:
    """Return a function that inspects the inputs and returns the key of each step's stamp."""
    work = Workspace(tmp_path / "run")

    def of(setting: Params = params) -> dict[str, str]:
        inspect_inputs(setting, work)
        artifacts = {work.path(artifact) for step in STAGES.values() for artifact in step.reads}
        metrics = {work.metric(name) for step in STAGES.values() for name in step.figures}
        for path in artifacts | metrics | {*map(work.cost, COMPRESSION)}:
            if not path.exists():
                write_text(path, "read")
        return {name: steps._key(setting, work, step) for name, step in STAGES.items()}

    return of


@pytest.mark.parametrize(
    ("package", "repeated"),
    [
        ("lm_eval", ["baseline", "evaluate", "report"]),
        ("torch", ["generate", "calibrate", *PASSES, "baseline", "evaluate", "report"]),
        ("transformers", ["generate", "calibrate", *PASSES, "baseline", "evaluate", "report"]),
        ("safetensors", ["generate", "calibrate", *PASSES, "baseline", "evaluate", "report"]),
        ("tokenizers", ["generate", "calibrate", "baseline", "evaluate", "report"]),
        ("datasets", ["generate", "calibrate", "baseline", "evaluate", "report"]),
        ("bitsandbytes", []),
        ("matplotlib", []),
    ],
)
def test_another_version_repeats_the_steps_that_compute_with_the_package(
    package: str, repeated: list[str], keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys()
    assert keys() == before
    install(monkeypatch, **{package: "99.1"})
    assert [name for name, key in keys().items() if key != before[name]] == repeated


def test_the_package_of_4_bit_linears_counts_where_they_are_used(
    keys: Any, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = params.model_copy(update={"use_4bit": True})
    before = keys(packed)
    install(monkeypatch, bitsandbytes="99.1")
    assert [name for name, key in keys(packed).items() if key != before[name]] == ["generate", *PASSES, "report"]


def test_another_processor_repeats_every_step(keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(steps, "kind_of", lambda device: f"another {device}")
    assert not [name for name, key in keys().items() if key == before[name]]


def test_the_inputs_have_the_same_bytes_until_a_version_changes(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path)
    inspect_inputs(params, work)
    before = sha256_below(tmp_path)
    inspect_inputs(params, work)
    assert sha256_below(tmp_path) == before
    install(monkeypatch, lm_eval="99.1")
    inspect_inputs(params, work)
    changed = {name for name, digest in sha256_below(tmp_path).items() if digest != before[name]}
    assert changed == {"artifacts/inputs/score_versions.json"}
    assert read_json(work.score_versions)["lm-eval"] == "99.1"
    assert read_json(work.model_versions)["torch"] == version("torch")


@pytest.mark.parametrize("name", [name for name in STAGES if name != "plan"])  # The plan computes nothing.
def test_a_stage_depends_on_the_version_of_each_listed_package_that_it_imports(name: str) -> None:
    listed = {"torch", "transformers", "safetensors", "datasets", "lm_eval", "numpy", "scipy", "mwparserfromhell"}
    declared = {package.replace("-", "_") for read in STAGES[name].reads for package in GROUPS.get(read, ())}
    imported = set()
    for file in import_closure(ROOT / "stages" / f"{name}.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.split(".")[0] for module in modules}
    assert "torch" in declared
    # models/hub.py imports datasets to resolve a data set, which these stages don't read.
    assert imported & listed - declared <= ({"datasets"} if name in PASSES else set())


MADE = {"processor": "one kind", "torch": "1", "lm-eval": "1"}


@pytest.mark.parametrize(
    ("device", "made_with", "said"),
    [
        ("cpu", MADE, ""),
        ("cuda", {**MADE, "processor": "other"}, "with device cpu, processor one kind, the pruned one with device cuda, "),
        ("cpu", {**MADE, "lm-eval": "2"}, "was scored with lm-eval 1, the pruned one with lm-eval 2;"),
        ("cpu", {**MADE, "processor": "other"}, "with processor one kind, the pruned one with processor other;"),
    ],
)
def test_scores_made_with_other_versions_are_warned_of(
    device: str,
    made_with: dict[str, str],
    said: str,
    params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = Workspace(tmp_path)
    write_text(work.tasks_input, "{}")
    work.baseline.mkdir(parents=True)
    empty: dict[str, Any] = {"perplexity": {}, "accuracy": {}, "parameters": 2}
    texts = [""] * len(PROMPTS)
    Scores({**empty, "device": "cpu", "made_with": MADE}, {}, texts).save(work.baseline)
    found = Scores({**empty, "device": device, "made_with": made_with}, {}, texts)
    monkeypatch.setattr(stage, "score_model", lambda *_: found)
    # What is compared with the tasks is no part of this test.
    write_text(work.dataset_input, "{}")
    monkeypatch.setattr(stage.Documents, "load", lambda _folder: None)
    monkeypatch.setattr(stage.CalibrationText, "of_documents", lambda *_: None)
    monkeypatch.setattr(stage.Model, "tokenizer", lambda _model: None)
    stage.evaluate(params, work)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(said)
    assert said in "".join(warned)
