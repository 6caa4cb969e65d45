"""The console scripts, as a user calls them: from an empty folder, with a local model and a local text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from replaceme.base.errors import ParameterError
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, read_params
from replaceme.cli import commands
from replaceme.cli.main import main
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.model import Model
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace
from tests.helpers import FAST, call
from tests.pipeline.conftest import Finished


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture
def arguments(tiny: Model, text_file: Path) -> list[str | Path]:
    """The model, the text, and settings for a small run without scores."""
    return ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]"]


@pytest.fixture
def errors(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Return a function that calls a command, which must refuse, and returns its sentences."""

    def refused(*more: str | Path, command: Callable[[], Any] = commands.run_replaceme) -> list[str]:
        call(command, *arguments, *more, code=2)
        said = capsys.readouterr().err
        # Only what the model is loaded for, or solved, is found later.
        assert "stage 4 " not in said or "singular" in said
        return [line for line in said.splitlines() if line.startswith("error: ")]

    return refused


def test_run_replaceme_works_from_an_empty_folder_with_published_keys(finished: Finished) -> None:
    assert "text perplexity" in finished.printed
    assert "select: layers" in finished.said
    model = AutoModelForCausalLM.from_pretrained(finished.result)
    assert model.config.num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(finished.result)
    assert tokenizer.chat_template
    generated = pipeline("text-generation", model=model, tokenizer=tokenizer)("the river", max_new_tokens=4)
    assert generated[0]["generated_text"].startswith("the river")
    card = (finished.result / "README.md").read_text(encoding="utf-8")
    assert "ReplaceMe (least squares)" in card
    assert "| text perplexity (seen) |" in card
    assert str(finished.folder) not in card
    metrics = json.loads((finished.work / "metrics" / "evaluation.json").read_text())
    assert metrics["perplexity"]["text"]["dense"] > 1
    cost = json.loads((finished.work / "metrics" / "compression.json").read_text())
    assert sum(cost["stage_seconds"].values()) == pytest.approx(cost["seconds"], rel=1e-3)


def test_a_task_on_the_calibration_text_is_marked_from_the_log_to_the_page(finished: Finished) -> None:
    assert "tasks: text is no unseen text: its source is the calibration text (text.txt)" in finished.said
    assert "other is no unseen text" not in finished.said
    assert "text perplexity (seen)" in finished.printed
    found = json.loads((finished.work / "metrics" / "evaluation.json").read_text())["calibration_text"]
    assert {task: figures["seen"] for task, figures in found.items()} == {"text": 1, "other": 0}
    assert "scored on calibration text" in (finished.work / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    # The dense model's scores know no calibration: all calibrations share them.
    assert "calibration_text" not in json.loads((finished.work / "artifacts" / "baseline" / "scores.json").read_text())


def test_the_settings_on_the_card_make_the_same_model(finished: Finished, tiny: Model, tmp_path: Path) -> None:
    card = (finished.result / "README.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", card)
    Path("settings.yaml").write_text(settings, encoding="utf-8")
    # The card names local files without their folder.
    text, other = finished.folder / "text.txt", finished.folder / "other.txt"
    tasks = f"{{{text}: {{fewshots: 0}}, {other}: {{fewshots: 0}}}}"
    places = ["--model_path", tiny.folder, "--dataset", text, "--tasks", tasks, "--save_path", tmp_path / "again"]
    call(commands.run_replaceme, "--config", "settings.yaml", *places)
    assert sha256_below(tmp_path / "again") == sha256_below(finished.result)


def test_speed_of_a_result_is_measured_against_the_model_it_was_made_from(
    finished: Finished, config: Path, tmp_path: Path, save_tiny: Callable[..., Model], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--config", config, "--threads", "1", "--eval_dtype", "float32"]
    call(main, "speed", *where, "--save_path", tmp_path / "none", code=2)
    assert "save_path: there is no pruned model in" in capsys.readouterr().err
    copy = finished.copy(tmp_path)
    call(main, "speed", *where, "--save_path", copy.result)
    times = json.loads((copy.work / "artifacts" / "speed" / "speed.json").read_text())
    assert times["weights"] == sha256_below(copy.result / "model.safetensors")
    assert set(times["decode_seconds_per_token"]) == {"dense", "pruned", "speedup"}
    other = save_tiny("mistral").folder
    call(main, "speed", *where, "--save_path", copy.result, "--model_path", other, code=2)
    assert "is not what" in capsys.readouterr().err


def test_a_share_of_the_parameters_goes_by_layers_and_channels(arguments: list[str | Path], tmp_path: Path) -> None:
    result = tmp_path / "result"
    share = ["--remove", "30%", "--layers", "1", "--transform", "channels", "--repair", "true", "--heal_tokens", "1k"]
    call(commands.run_replaceme, *arguments, *share, "--save_path", result)
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.num_hidden_layers == 5
    assert model.config.intermediate_size < 48
    figures = json.loads((tmp_path / "result.work" / "metrics" / "export.json").read_text())
    assert figures["parameters"] == pytest.approx(0.7 * figures["parameters_dense"], abs=0.01 * figures["parameters_dense"])
    card = (result / "README.md").read_text(encoding="utf-8")
    assert "without 1 of its 6 layers and" in card
    assert "MLP channels in every layer were removed" in card
    assert {"depth-pruning", "width-pruning"} <= {*re.findall(r"[\w-]+", card)}


def test_run_uidl_drops_the_block_and_changes_no_other_weight(arguments: list[str | Path], tiny: Model, tmp_path: Path) -> None:
    call(commands.run_uidl, *arguments, "--save_path", tmp_path / "result")
    pruned, dense = load_file(tmp_path / "result" / "model.safetensors"), load_file(tiny.folder / "model.safetensors")
    selected = json.loads((tmp_path / "result.work" / "metrics" / "select.json").read_text())
    for name, weight in pruned.items():
        if name.startswith("model.layers."):
            position = int(name.split(".")[2])
            name = name.replace(f".{position}.", f".{position + (2 if position >= selected['start'] else 0)}.", 1)
        assert torch.equal(weight, dense[name])


def test_get_lt_with_lstsq_saves_the_transform_and_no_model(
    arguments: list[str | Path], tiny: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.get_lt_with_lstsq, *arguments)
    folder = Path(f"{tiny.folder.name}-lstsq-2-transform")
    (name, transform), *rest = load_file(folder / "edits.safetensors").items()
    assert not rest
    assert name.startswith("transform.")
    assert transform.shape == (32, 32)
    assert not list(folder.glob("model*"))
    assert "no model was written" in capsys.readouterr().err


def test_get_lt_with_solvers_saves_the_transform_its_loss_curve_and_no_model(
    arguments: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--save_path", tmp_path / "map"]
    call(commands.get_lt_with_solvers, "--method", "cosine", "--alpha", "0.1", *arguments)
    work = tmp_path / "map.work"
    figures = json.loads((work / "metrics" / "solve.json").read_text())
    assert figures["loss_end"] < figures["loss_start"]
    assert {"iterations", "converged", "relative_residual", "mean_cosine", "rescaled_by"} <= figures.keys()
    curve = (tmp_path / "map" / "loss.csv").read_text(encoding="utf-8").splitlines()
    assert curve[0] == "iteration,loss"
    assert len(curve) >= 3
    (transform,) = load_file(tmp_path / "map" / "edits.safetensors").values()
    assert transform.shape == (32, 32)
    assert not list((tmp_path / "map").glob("model*"))
    # The plan has the same statistics as before, so the tokens are kept.
    capsys.readouterr()
    call(commands.get_lt_with_solvers, "--solver", "L-BFGS", "--max_iterations", "4", "--overwrite", *arguments)
    said = capsys.readouterr().err
    assert "activations: unchanged since an earlier run" in said
    assert "solver L-BFGS is read as lbfgs" in said
    call(commands.get_lt_with_solvers, "--loss", "mse", "--thri", "true", "--solver", "cg", "--overwrite", *arguments)
    assert "activations: unchanged" not in capsys.readouterr().err
    assert not list((work / "artifacts" / "statistics").glob("tokens*"))


def test_a_model_pruned_by_the_cosine_says_how_and_keeps_its_report(
    arguments: list[str | Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "cosine", "--accurate", "true", "--solver", "trust_region", "--max_iterations", "3", "--diag", "true"]
    call(commands.run_replaceme, *arguments, *given, "--tasks", text_file, "--save_path", tmp_path / "result")
    card = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert "ReplaceMe (cosine, accurate, diagonal, trust_region)" in card
    assert "max_iterations: 3" in card
    assert "learning_rate" not in card
    page = (tmp_path / "result.work" / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    assert "loss at the start" in page
    assert "diag is read as transform: diagonal" in capsys.readouterr().err


def test_4_bit_calibration_folds_into_the_original_weights(
    save_tiny: Callable[..., Model], arguments: list[str | Path], tmp_path: Path
) -> None:
    tiny = save_tiny(hidden_size=64, intermediate_size=128)  # NF4 works in blocks of 64
    packed = ["--model", tiny.folder, "--use_4bit", "true", "--save_path", tmp_path / "result"]
    call(commands.run_replaceme, *arguments, *packed)
    pruned, dense = load_file(tmp_path / "result" / "model.safetensors"), load_file(tiny.folder / "model.safetensors")
    assert torch.equal(pruned["model.layers.0.self_attn.q_proj.weight"], dense["model.layers.0.self_attn.q_proj.weight"])
    (transform,) = load_file(tmp_path / "result.work" / "artifacts" / "edits" / "edits.safetensors").values()
    host = json.loads((tmp_path / "result.work" / "metrics" / "select.json").read_text())["host"]
    name = f"model.layers.{host}.mlp.down_proj.weight"
    assert torch.equal(pruned[name], (transform.T @ dense[name].double()).float())


def test_get_distance_analysis_measures_all_pairs_and_each_size(
    tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.get_distance_analysis, "--model", tiny.folder, "--dataset", text_file, *FAST)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["layers", "less", "removed"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    pairs = Path(f"{tiny.folder.name}-distances", "distances.csv").read_text(encoding="utf-8").splitlines()
    assert len(pairs) == 1 + 6 * 5 // 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--layer_to_skip", "3"], "'--layer_to_skip' is not an option (did you mean 'layers_to_skip'?)"),
        (["--bar"], "'--bar' is not an option"),
        (["--alpha", "abc"], "alpha: must be a number, not 'abc'"),
        (["--alpha"], "command line: argument --alpha: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--method", "nothing"], "method: 'nothing' is not a method"),
        (["--model", "./nowhere"], "--model (model_path): there is no folder ./nowhere"),
        (["--model", "~nobody-here/x"], "--model (model_path): there is no folder ~nobody-here/x"),
        (["--revision", "main"], "revision: is for hub models"),
        (["--dataset", "nowhere.txt"], "dataset: there is no file nowhere.txt"),
        (["--dataset_column", "body"], "dataset_column: 'body' does not apply to"),
        (["--layers", "6"], "--layers (layers_to_skip): must be less than the model's 6 layers, not 6"),
        (["--min_distance_layer", "5"], "min_distance_layer: no block of 2 layers fits"),
        (["--tasks", "helaswag"], "tasks: 'helaswag' is no task (did you mean 'hellaswag' or"),
        (["--tasks", "piqa"], "tasks: 'piqa' needs the dataset baber/piqa, the hub can't be reached"),
        (["--tasks", "~nobody-here/x.txt"], "tasks: there is no file ~nobody-here/x.txt"),
        (["--device", "cuda:99"], "device: cuda:99 is asked for, but torch sees"),
        (["--dataset_size", "4", "--max_length", "8"], "alpha: 0 leaves the least squares singular (rank"),
        (["--dataset_size", "3", "--max_length", "8"], "dataset_size 3 times max_length 8 is less than the model"),
        (["--save_path", "~nobody-here/x"], "save_path: ~nobody-here is no user of this machine"),
        (["--save_path", "/proc/none/x"], "save_path: nothing can be written in /proc/none/x.work"),
        (["--save_path", "/"], "save_path: / can't be a result's folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(given: list[str], said: str, errors: Callable[..., list[str]]) -> None:
    (error,) = errors(*given)
    assert said in error
    assert len(error) <= 307


def test_mistakes_in_model_text_and_tasks_are_reported_together(errors: Callable[..., list[str]]) -> None:
    found = errors("--model", "./none", "--dataset", "none.txt", "--tasks", "none", "--device", "cuda:99")
    assert [line.split(": ")[1] for line in found] == ["device", "--model (model_path)", "dataset", "tasks"]


@pytest.mark.parametrize(
    ("settings", "works"),
    [
        ({"method": "lstsq", "transform": "dense"}, False),
        ({"method": "lstsq", "transform": "two_vectors"}, False),
        ({"method": "lstsq", "transform": "channels"}, False),
        ({"method": "ghosted"}, False),
        ({"method": "lstsq", "transform": "channels", "alpha": 1.0}, True),
        ({"method": "lstsq", "transform": "diagonal"}, True),
        ({"method": "cosine"}, True),
        ({"method": "cosine", "loss": "mse"}, False),
        ({"method": "uidl"}, True),
    ],
    ids=str,
)
def test_fewer_tokens_than_the_width_are_refused_before_any_work_where_they_leave_the_solution_open(
    settings: dict[str, Any], works: bool, params: Params, tmp_path: Path
) -> None:
    few = {key: getattr(params, key) for key in ("model_path", "dataset", "layers_to_skip", "device")}
    given = read_params(None, {**few, "dataset_size": 3, "max_length": 8, "tasks": [], **settings}, METHODS)
    if works:
        inspect_inputs(given, Workspace(tmp_path))
    else:
        with pytest.raises(ParameterError, match="alpha: 0 leaves the least squares singular: dataset_size 3"):
            inspect_inputs(given, Workspace(tmp_path))


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"dataset_size": 3, "repair": True}, True),
        ({"dataset_size": 4, "repair": True}, False),
        ({"dataset_size": 3, "repair": False}, False),
    ],
)
def test_too_little_text_for_the_width_of_a_model_is_said_before_any_work(
    settings: dict[str, Any], warned: bool, params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # An MLP of the tiny model has 48 channels.
    inspect_inputs(params.model_copy(update={**settings, "max_length": 48}), Workspace(tmp_path))
    said = "dataset_size: 144 tokens at most are 3.0 for each of an MLP's 48 channels"
    assert [said in message for message in caplog.messages if message.startswith("dataset_size")] == [True] * warned


def test_scores_replace_nothing_but_scores(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    arguments = ["--model_path", tiny.folder, "--tasks", text_file, *FAST]
    for name, content in (("thesis.md", "years of work"), ("package.json", '{"name": "left-pad"}'), ("list.json", "[1]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        call(commands.evaluate_model, *arguments, "--save_path", tmp_path / name, code=2)
        assert (tmp_path / name).read_text(encoding="utf-8") == content
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        call(commands.evaluate_model, *arguments, "--save_path", tmp_path / "folder")
    assert (tmp_path / "folder.evaluation.json").is_file()


def test_memory_that_runs_out_while_loading_is_said_as_such(
    errors: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("replaceme.models.model.AutoModelForCausalLM.from_pretrained", fail)
    (error,) = errors()
    assert error.startswith("error: memory ran out; lower batch_size")


def test_few_tokens_are_warned_of(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> None:
    call(commands.get_lt_with_lstsq, *arguments, "--dataset_size", "2", "--alpha", "1")
    assert "dataset_size: 96 tokens are few for a width of 32; the fit needs at least 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is not a model folder: it has no config.json"),
        ({"adapter_config.json": "{}"}, "holds only an adapter"),
        ({"config.json": '{"model_type": "llama"}'}, "has no safetensors weights"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": "x"}, "has pickled weights only"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "x"}, "has no tokenizer files"),
        ({"config.json": "{", "model.safetensors": "x", "tokenizer.json": "{}"}, "config.json of broken can't be read"),
        (
            {"config.json": '{"model_type": "gemma2"}', "model.safetensors": "x", "tokenizer.json": "{}"},
            "transform: dense does not fold into the norm after the MLP of the family 'gemma2'; use orthogonal.",
        ),
        (
            {"config.json": '{"model_type": "mamba"}', "model.safetensors": "x", "tokenizer.json": "{}"},
            "the family 'mamba' is not described, and was not recognised: its layers have no attention that ends in a linear.",
        ),
        (
            {"config.json": '{"model_type": "bert"}', "model.safetensors": "x", "tokenizer.json": "{}"},
            "the family 'bert' is not described, and was not recognised: ",
        ),
        (
            {"config.json": '{"model_type": "vit"}', "model.safetensors": "x", "tokenizer.json": "{}"},
            "'vit' is no causal language model that can be built here",
        ),
        (
            {"config.json": '{"model_type": "t5"}', "model.safetensors": "x", "tokenizer.json": "{}"},
            "broken is an encoder-decoder ('t5'), not a causal language model.",
        ),
    ],
)
def test_a_folder_that_is_no_usable_model_is_refused_before_any_work(
    files: dict[str, str], said: str, tmp_path: Path, errors: Callable[..., list[str]]
) -> None:
    (folder := tmp_path / "broken").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    (error,) = errors("--model", folder)
    assert said in error


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantized (gptq)"),
        ("config.json", {"num_hidden_layers": "six"}, "can't be read"),
        ("tokenizer.json", {"model": 3}, "the tokenizer of changed can't be read"),
        ("model.safetensors.index.json", {}, "model.safetensors.index.json of changed can't be read"),
        ("model.safetensors", "too short", "--model (model_path): model.safetensors of changed is damaged"),
        ("model.safetensors", "without a layer", "is missing from the weights of changed"),
    ],
)
def test_damaged_or_unsuitable_files_of_a_model_are_named_before_any_work(
    name: str, change: Any, said: str, tiny: Model, tmp_path: Path, errors: Callable[..., list[str]]
) -> None:
    path = tmp_path / "changed" / name
    path.parent.mkdir()
    for file in tiny.files():
        (path.parent / file.name).write_bytes(file.read_bytes())
    if change == "too short":
        path.write_bytes(path.read_bytes()[:1000])
    elif change == "without a layer":
        weights = {name: weight for name, weight in load_file(path).items() if ".layers.4." not in name}
        save_file(weights, path, {"format": "pt"})
    else:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    assert said in "".join(errors("--model", path.parent))


@pytest.mark.parametrize(
    "name", ["run_replaceme", "run_uidl", "evaluate_model", "get_distance_analysis", "get_lt_with_lstsq", "get_lt_with_solvers"]
)
def test_help_describes_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(getattr(commands, name), "--help")
    said = " ".join(capsys.readouterr().out.split())
    for key, field in FIELDS.items():
        assert f"--{key}" in said
        # A script that saves something else than a model says what.
        assert key == "save_path" or " ".join(str(field.description).split()[:3]) in said
    assert f"One of {', '.join(METHODS)}." in said
    assert "(solver adam of method cosine) [10]" in said


def test_the_scripts_are_installed_and_run_anywhere(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("run_replaceme")
    done = subprocess.run(
        [script, "--alpha", "x"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith("\nerror: command line: alpha: must be a number, not 'x'.\n")


@pytest.mark.parametrize("selection", ["angular", "residual", "loss"])
def test_each_criterion_takes_its_own_best_cut(selection: str, arguments: list[str | Path], tmp_path: Path) -> None:
    arguments += ["--batch_size", "4", "--selection", selection]
    call(commands.get_lt_with_lstsq, *arguments, "--save_path", tmp_path / "map")
    work = tmp_path / "map.work"
    selected = json.loads((work / "metrics" / "select.json").read_text())
    profile = json.loads((work / "artifacts" / "profile" / "profile.json").read_text())
    hosts = range(len(profile["residual"]) - 2)
    if selection == "loss":
        assert set(selected["losses"]) == {f"host{host}" for host in hosts}  # fewer cuts than the shortlist holds
        assert selected["losses"][f"host{selected['host']}"] == selected["loss"] == min(selected["losses"].values())
        call(commands.get_lt_with_lstsq, *arguments, "--tolerated_loss", "50", "--overwrite", "--save_path", tmp_path / "map")
        tolerated = json.loads((work / "metrics" / "select.json").read_text())
        assert tolerated.pop("rises") == {"layers2": pytest.approx(selected["loss"] - selected["dense_loss"], abs=1e-3)}
        assert tolerated == selected
    else:
        values = profile["angular_distance" if selection == "angular" else "residual"]
        assert selected["host"] == min(hosts, key=lambda host: values[host][host + 2])
    assert selected["end"] - selected["start"] == 2
    assert selected["residual"] == pytest.approx(profile["residual"][selected["host"]][selected["end"] - 1], rel=1e-4)


BLOCKS = ["--num_A", "2", "--layers_to_skip", "1", "--merge_consecutive", "false", "--min_distance_layer", "1"]


def test_several_blocks_and_repairs_run_from_end_to_end(arguments: list[str | Path], tmp_path: Path) -> None:
    joint = ["--transform", "joint", "--repair", "true", "--save_path", tmp_path / "result"]
    call(commands.run_replaceme, *arguments, *BLOCKS, *joint)
    metrics = tmp_path / "result.work" / "metrics"
    selected, repaired, solved = (
        json.loads((metrics / f"{name}.json").read_text(encoding="utf-8")) for name in ("select", "repair", "solve")
    )
    assert selected["block1"]["start"] > selected["end"]
    assert solved["removed_layers"] == 2
    assert repaired["block1"]["weighted_residual_joint"] < repaired["block1"]["weighted_residual_removed"]
    assert repaired["corrected_linears"] > 2
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "result").model.layers) == 4


def test_the_cosine_fits_a_later_block_too_and_the_transform_alone_is_saved(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    cosine = ["--alpha", "0.1", "--epochs", "2", "--method", "cosine", "--save_path", tmp_path / "result"]
    call(commands.get_lt_with_solvers, *arguments, *BLOCKS, *cosine)
    edits = json.loads((tmp_path / "result" / "edits.json").read_text(encoding="utf-8"))
    transforms = load_file(tmp_path / "result" / "edits.safetensors")
    assert len(transforms) == len(edits["removed_layers"]) == 2
    assert not list((tmp_path / "result.work").rglob("scratch-*"))
