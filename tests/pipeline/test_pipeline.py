"""The DVC pipeline: what dvc.yaml declares, and one real run of it on a tiny model."""

import io
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.cli import commands
from replaceme.cli.main import main
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.model import Model
from replaceme.pipeline.cost import STAGE as COST
from replaceme.pipeline.runner import STAGES
from replaceme.running.stage import COMPRESSION, ORDER
from replaceme.running.workspace import Workspace
from tests.helpers import call
from tests.pipeline.closure import ROOT, import_closure
from tests.pipeline.conftest import made_project
from tests.pipeline.helpers import Hub, dvc, served, shell

PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
DECLARED = {**STAGES, "cost": COST}
# They take seconds, and change nothing while nothing changed.
ALWAYS = ["inputs", "cost"]
# Blocks of the README that start with ```bash quick or ```python quick: run unchanged.
QUICK = re.findall(r"(?ms)^```(bash|python) quick\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_stage_has_a_script_and_a_description() -> None:
    assert list(PIPELINE) == list(DECLARED)
    for name, stage in PIPELINE.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert stage["desc"]


def code_of(name: str) -> list[str]:
    return [dep for dep in PIPELINE[name].get("deps", []) if dep.startswith("replaceme/")]


def outside(files: Iterable[str], name: str) -> list[str]:
    """Return the library's files outside of a stage's dependencies, except the ``__init__.py`` of rooms, which are empty."""
    ours = sorted(file for file in files if file.startswith("replaceme/") and not file.endswith("__init__.py"))
    return [file for file in ours if not any(below(file, dep) for dep in code_of(name))]


def below(file: str, dep: str) -> bool:
    return file == dep or file.startswith(f"{dep}/")


@pytest.mark.parametrize("name", ORDER)
def test_every_file_that_a_stage_imports_lies_below_its_dependencies_and_each_of_these_is_imported(name: str) -> None:
    loaded = import_closure(ROOT / "stages" / f"{name}.py")
    assert outside(loaded, name) == []
    assert [dep for dep in code_of(name) if not any(below(file, dep) for file in loaded)] == []


def test_every_file_that_a_stage_really_loads_lies_below_its_dependencies(project: Path) -> None:
    for name in ORDER:
        loaded = json.loads((project.parent / "loaded" / f"stages.{name}.json").read_text(encoding="utf-8"))
        assert f"replaceme/pipeline/{name}.py" in loaded
        assert outside(loaded, name) == [], name


def test_a_change_of_method_criterion_scores_or_page_repeats_no_pass() -> None:
    for name in ("calibrate", "profile", "activations"):
        assert not [dep for dep in code_of(name) if re.search("methods|evaluation|selection|report|export|solvers", dep)]


@pytest.mark.parametrize("name", DECLARED)
def test_a_stages_declaration_is_that_of_dvc_yaml(name: str) -> None:
    declared, stage, work = PIPELINE[name], DECLARED[name], Workspace()
    params = declared.get("params", [])
    if params != [{"params.yaml": None}]:
        assert params == sorted(set(stage.params), key=params.index)
    # The methods' own parameters are known where the methods are.
    assert stage.methods is METHODS or not {*stage.params} & (FIELDS.keys() - Params.model_fields.keys())
    read = {path.as_posix() for path in (*map(work.artifact, stage.reads), *map(work.metric, stage.figures))}
    assert {dep for dep in declared.get("deps", []) if not dep.startswith("replaceme/")} == read
    outputs = {*declared.get("outs", []), *(path for metric in declared.get("metrics", []) for path in metric)}
    written = {work.artifact(stage.writes).as_posix()} if stage.writes else set()
    assert outputs == written | {work.metric(metric).as_posix() for metric in stage.metrics}
    assert stage.always == declared.get("always_changed", False) == (name in ALWAYS)


def test_the_summary_with_the_cost_is_a_metric_and_neither_read_nor_declared_as_output_by_any_stage() -> None:
    assert yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["metrics"] == ["metrics/summary.json"]
    declared = [str(stage.get(kind)) for stage in PIPELINE.values() for kind in ("deps", "outs", "metrics")]
    assert not [files for files in declared if re.search(r"compression|summary|/cost/", files)]
    assert PIPELINE["cost"]["deps"] == ["artifacts/blocks.json", "metrics/check.json", "metrics/evaluation.json"]


def test_metrics_keep_the_run_cache() -> None:
    for stage in PIPELINE.values():
        # DVC restores no run with another output that has no cache.
        assert all(isinstance(out, str) for out in stage.get("outs", []))
        for metric in stage.get("metrics", []):
            assert list(metric.values()) == [{"cache": False}]


def numbers_of(content: Any) -> list[float]:
    """Return every value of nested metrics, which must all be numbers."""
    if isinstance(content, dict):
        return [number for entry in content.values() for number in numbers_of(entry)]
    assert isinstance(content, int | float)
    return [content]


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def measure(project: Path, *words: str) -> str:
    """Run a command of ``replaceme`` that times each model once."""
    return served(project, "replaceme", *words, SCRIPT_HOOK=str(project.parent / "one_round.py"))


def experiment(project: Path, *words: str) -> str:
    """Run an experiment, without drawing its pictures."""
    return dvc(project, "exp", "run", *words, STAGE_HOOK=str(project.parent / "quick.py"))


def go_back(project: Path) -> str:
    """Run the README's command that goes back to the committed settings."""
    (command,) = re.findall(r"(?m)^git checkout .*$", (ROOT / "README.md").read_text(encoding="utf-8"))
    checkout, repro = (shlex.split(part, comments=True) for part in command.split("&&"))
    shell(project, *checkout)
    return served(project, *repro)


def test_the_run_leaves_model_metrics_and_lock(project: Path) -> None:
    evaluation = json.loads((project / "metrics" / "evaluation.json").read_text())
    errors = {"stderr_dense", "stderr_pruned", "stderr_ratio"}
    assert set(evaluation["perplexity"]["held-out"]) == {"dense", "pruned", "ratio", *errors}
    assert evaluation["accuracy"]["questions"]["items"] == 25
    assert all(math.isfinite(value) and float(f"{value:.6g}") == value for value in numbers_of(evaluation))
    assert evaluation["parameters"]["pruned"] < evaluation["parameters"]["dense"]
    solve = json.loads((project / "metrics" / "solve.json").read_text())
    assert {"condition_number", "relative_residual", "mean_cosine"} <= set(solve)
    repaired = json.loads((project / "metrics" / "repair.json").read_text())
    assert repaired["corrected_linears"] > 0
    export = json.loads((project / "metrics" / "export.json").read_text())
    assert export["hidden_error_max"] < 1e-4
    cost = json.loads((project / "metrics" / "compression.json").read_text())
    assert set(cost["stage_seconds"]) == set(COMPRESSION)
    assert sum(cost["stage_seconds"].values()) == pytest.approx(cost["seconds"], rel=1e-3)
    assert cost["trained"] is False
    assert 100e6 < cost["peak_memory_bytes"] < 5e9
    summary = json.loads((project / "metrics" / "summary.json").read_text())
    assert (summary["removed_layers"], summary["seconds"]) == (2, cost["seconds"])
    lock = (project / "dvc.lock").read_text()
    assert str(project.parent) not in lock
    assert Model(project / "artifacts" / "model", "pruned").config().num_hidden_layers == 4


def test_the_readme_has_commands_that_are_run() -> None:
    assert {language for language, _ in QUICK} == {"bash", "python"}


@pytest.mark.parametrize(("language", "body"), QUICK)
def test_quick_commands_of_the_readme_run_as_they_stand(
    language: str, body: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    if language == "python":
        exec(body, {})
    assert shell(project, "bash", "-euc", body) if language == "bash" else capsys.readouterr().out


def test_a_second_run_runs_inputs_and_cost_alone_and_changes_no_byte(project: Path) -> None:
    output = dvc(project, "repro")
    assert ran(output) == ALWAYS
    assert shell(project, "git", "status", "--porcelain") == ""
    assert json.loads(dvc(project, "status", "--json")) == {name: ["always changed"] for name in ALWAYS}


def test_a_fresh_run_elsewhere_gives_the_same_lock_byte_for_byte(project: Path, tmp_path: Path, tiny: Model) -> None:
    folder = made_project(tmp_path / "elsewhere", tiny)
    hook = str(project.parent / "quick.py")
    dvc(folder, "repro", REPLACEME_CACHE=str(tmp_path / "cache"), STAGE_HOOK=hook)
    assert (folder / "dvc.lock").read_text() == shell(project, "git", "show", "HEAD:dvc.lock")


def test_the_console_script_gives_the_pipelines_model_to_the_last_bit_and_both_go_to_the_hub_with_their_scores(
    project: Path, tmp_path: Path, api: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    call(commands.run_replaceme, "--config", "params.yaml", "--save_path", tmp_path / "same")
    model, cards = project / "artifacts" / "model", {"README.md"}
    script, pipeline = sha256_below(tmp_path / "same"), sha256_below(model)
    assert script.keys() == pipeline.keys()
    assert {name for name in script if script[name] != pipeline[name]} == cards
    call(main, "push", "--repo_id", "me/small")
    assert api.files.keys() == {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert api.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    scores = {(each.dataset_name, each.metric_type) for each in ModelCard(api.files["README.md"].decode()).data.eval_results}
    assert scores == {("held-out", "perplexity"), ("questions", "accuracy")}
    assert "## Scores" not in (model / "README.md").read_text(encoding="utf-8")
    # A console script's folder has the same card, but its example loads that folder.
    of_script, of_report = tmp_path / "same" / "README.md", project / "artifacts" / "report" / "model_card.md"
    assert of_script.read_bytes() == of_report.read_bytes() == api.files["README.md"].replace(b'"me/small"', b'"."')
    assert shell(project, "git", "status", "--porcelain") == ""


def test_another_models_scores_are_not_put_on_the_hub(
    project: Path, api: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    settings = project / "params.yaml"
    before = settings.read_text(encoding="utf-8")
    settings.write_text(before.replace("layers_to_skip: 2", "layers_to_skip: 1"), encoding="utf-8")
    call(main, "push", "--repo_id", "me/small", code=2)
    settings.write_text(before, encoding="utf-8")
    assert "save_path: the stage export is not up to date" in capsys.readouterr().err
    assert not api.made


def test_an_experiment_with_alpha_repeats_only_what_alpha_changes_and_its_model_gives_way_to_the_first(project: Path) -> None:
    first, lock = sha256_below(project / "artifacts"), project / "dvc.lock"
    own = lock.read_text()
    output = experiment(project, "-S", "alpha=0.1", "--name", "weaker")
    assert ran(output) == ["inputs", "solve", "repair", "heal", "check", "export", "evaluate", "report", "cost"]
    difference = dvc(project, "metrics", "diff", "HEAD", "--targets", "metrics/summary.json")
    assert {"same_token", "unseen_ratio", "seconds"} <= {line.split()[1] for line in difference.splitlines()[1:]}
    assert "nan" not in difference.lower()
    assert sha256_below(project / "artifacts") != first
    # Where git has the results of another machine, going back keeps those of this one.
    experiments = lock.read_text()
    lock.write_text(re.sub(r"md5: \w{8}", "md5: 00000000", own))
    shell(project, "git", "commit", "-q", "dvc.lock", "-m", "another machine's run")
    lock.write_text(experiments)
    assert ran(go_back(project)) == ALWAYS
    assert sha256_below(project / "artifacts") == first
    assert lock.read_text() == own
    assert shell(project, "git", "status", "--porcelain").split() == ["M", "dvc.lock"]
    shell(project, "git", "reset", "-q", "--hard", "HEAD~1")


def test_an_experiment_with_another_block_does_not_profile_again(project: Path) -> None:
    # As in a queue, it runs in a folder of its own.
    output = experiment(project, "--temp", "-S", "layers_to_skip=1", "--name", "one-layer")
    assert ran(output) == [name for name in PIPELINE if name not in ("generate", "calibrate", "profile", "baseline")]
    shown = pd.read_csv(io.StringIO(dvc(project, "exp", "show", "--csv")), dtype={"rev": str}).set_index("Experiment")
    revisions = ("HEAD", shown.loc["one-layer", "rev"])
    cost = [json.loads(shell(project, "git", "show", f"{revision}:metrics/compression.json")) for revision in revisions]
    for figures in cost:
        assert set(figures["stage_seconds"]) == set(COMPRESSION)
    of_head, of_experiment = (figures["stage_seconds"] for figures in cost)
    assert {name for name in COMPRESSION if of_head[name] == of_experiment[name]} >= {"calibrate", "profile"}
    assert of_head["select"] != of_experiment["select"]
    assert shown.loc["one-layer", "seconds"] == cost[1]["seconds"]


def test_another_transform_changes_the_cut_and_no_pass_before_it(project: Path) -> None:
    shell(project, "sed", "-i", "s/^transform: .*/transform: joint/", "params.yaml")
    changed = json.loads(dvc(project, "status", "--json")).keys() - {*ALWAYS}
    shell(project, "git", "checkout", "-q", ".")
    assert changed >= {"select", "plan", "solve", "repair"}
    assert not changed & {"generate", "calibrate", "profile", "baseline"}


def test_the_experiments_are_compared_in_a_table_and_a_picture_and_their_models_are_measured_once(project: Path) -> None:
    printed, output = measure(project, "compare", "--speed"), project / "artifacts" / "experiments"
    table = pd.read_csv(output / "experiments.csv")
    assert {"experiment", "best", "method", "parameters.removed_percent", "retention_percent"} <= set(table)
    assert sorted(zip(table["alpha"], table["layers_to_skip"], strict=True)) == [(0.0, 1), (0.0, 2), (0.1, 2)]
    assert table["best"].any()
    assert (table[["prefill_speedup", "decode_speedup"]] > 0).all(axis=None)
    assert (output / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "alpha" in printed
    assert len(re.findall(r"(?m)^\|", (output / "experiments.md").read_text())) == len(table) + 2
    assert len(json.loads((output / "speed.json").read_text())) == printed.count(", measured") == 3
    again = measure(project, "compare", "--speed")
    assert (again.count(", measured"), again.count(", known")) == (0, 3)
    assert re.search(r"time +memory +prefill +decode\n", again)
    assert not list(project.glob("*.partial"))
    # The README's view of the same experiments fits a page.
    (view,) = (line for _, body in QUICK for line in body.splitlines() if line.startswith("dvc exp show"))
    rows = served(project, *shlex.split(view)).splitlines()
    assert {"unseen_ratio", "layers_to_skip", "seconds"} <= {*rows[0].replace("|", " ").split()}
    assert max(map(len, rows)) <= 120
    assert shell(project, "git", "status", "--porcelain") == ""


def test_plots_are_shown_and_compared(project: Path) -> None:
    names = dvc(project, "exp", "list", "--name-only").split()
    for command in (("show",), ("diff", "HEAD", names[0])):
        output = dvc(project, "plots", *command, "--out", "shown")
        assert "failed" not in output.lower()
        page = (project / "shown" / "index.html").read_text()
        for name in ("distances", "cut_residuals", "layers", "scores", "repairs"):
            assert f"pictures/{name}.png" in page
        assert not re.search("<script|<link|https?:", page)
        shutil.rmtree(project / "shown")


def test_results_and_experiments_are_shared_through_a_remote(project: Path, tmp_path: Path) -> None:
    shell(tmp_path, "git", "init", "-q", "--bare", "origin.git")
    shell(project, "git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    shell(project, "git", "push", "-q", "origin", "main")
    dvc(project, "push", "-q")
    dvc(project, "exp", "push", "-q", "origin", "weaker")
    shell(tmp_path, "git", "clone", "-q", "-b", "main", "origin.git", "clone")
    clone = tmp_path / "clone"
    dvc(clone, "pull", "-q")
    model = sha256_below(project / "artifacts" / "model")
    assert sha256_below(clone / "artifacts" / "model") == model
    assert json.loads(dvc(clone, "status", "--json")).keys() == {*ALWAYS}
    dvc(clone, "exp", "pull", "-q", "origin", "weaker")
    dvc(clone, "exp", "apply", "-q", "weaker")
    assert ran(dvc(clone, "repro")) == ALWAYS
    assert sha256_below(clone / "artifacts" / "model") != model
    shell(project, "git", "tag", "-a", "pruned-model@v1.0.0", "-m", "first")
    dvc(tmp_path, "artifacts", "get", "-q", str(project), "pruned-model", "--out", "model")
    assert sha256_below(tmp_path / "model") == model


def test_speed_is_measured_apart_from_the_lock(project: Path) -> None:
    printed = measure(project, "speed", "--config", "params.yaml")
    assert re.search(r"prefill +[\d.]+ ms +[\d.]+ ms +x [\d.]+", printed)
    speed = project / "artifacts" / "speed"
    times = json.loads((speed / "speed.json").read_text())
    assert times["prefill_seconds"]["speedup"] > 0
    assert times["weights"].keys() == {"model.safetensors"}
    page = (speed / "index.html").read_text()
    assert "Measured on cpu" in page
    assert re.search(r'<th scope="row">all stages</th><td>[\d.]+\s(s|min)</td>', page)
    # The settings are those that the model was made with.
    assert (speed / "params.yaml").read_text() == (project / "artifacts" / "report" / "params.yaml").read_text()
    assert shell(project, "git", "status", "--porcelain") == ""


def test_new_content_in_a_local_file_is_noticed(project: Path) -> None:
    text = project / "text.txt"
    before = text.read_text(encoding="utf-8")
    text.write_text(before.replace("river", "brook", 1), encoding="utf-8")
    # Once with a process for the stage, as DVC starts it.
    shell(project, "dvc", "repro", "inputs")
    status = json.loads(dvc(project, "status", "--json", "calibrate", "baseline"))
    assert {"calibrate"} == set(status) - {"inputs"}
    assert "modified" in json.dumps(status["calibrate"])
    text.write_text(before, encoding="utf-8")
    dvc(project, "repro", "inputs")


def test_a_mistake_in_params_yaml_stops_at_the_first_stage_with_a_sentence(project: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("alpha: 0.0", "alpha: 0.0\nalhpa: 1\nsave_path: elsewhere").replace("save_path: null", ""))
    output = dvc(project, "repro", code=255)
    path.write_text(before)
    assert "error: params.yaml: alhpa: is not a parameter (did you mean 'alpha'?)" in output
    assert ran(output) == ["inputs"]
    assert "Traceback" not in output


def test_a_stage_outside_of_the_environment_says_so(project: Path) -> None:
    output = shell(project, sys.executable, "-S", "-m", "stages.select", code=2)
    assert "lacks torch" in output
    assert "run `make`" in output
