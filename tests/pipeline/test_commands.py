"""The console scripts, as a user calls them: from an empty folder, with a local model and a local text."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from replaceme import commands
from replaceme.arguments import parse, script_parser
from replaceme.base.errors import ParameterError
from replaceme.base.fingerprints import sha256_below
from replaceme.base.stage import FIT
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.model import Model
from replaceme.steps import STAGES
from tests.conftest import made_text
from tests.helpers import FAST, call


@pytest.fixture
def published(tiny: Model, text_file: Path, tmp_path: Path) -> Path:
    """A config with only published keys, and the current folder set to an empty one."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"method: lstsq\nmodel_path: {tiny.folder}\ndataset: {text_file}\ndataset_column: text\nbatch_size: 8\nmax_length: 48\n"
        f"use_4bit: false\nlayers_to_skip: 2\nmin_distance_layer: 2\nmerge_consecutive: true\nalpha: 0.1\nnum_A: 1\n"
        f"save_path: {tmp_path / 'result'}\nsave_transform_only: false\n"
        f"tasks: {{{text_file}: {{fewshots: 0}}}}\n",
        encoding="utf-8",
    )
    return config


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "empty")


def test_run_replaceme_works_from_an_empty_folder_with_published_keys(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, "--config", published, *FAST)
    said = capsys.readouterr()
    assert "text perplexity" in said.out
    assert "select: layers" in said.err
    result = tmp_path / "result"
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.num_hidden_layers == 4
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert tokenizer.chat_template
    generated = pipeline("text-generation", model=model, tokenizer=tokenizer)("the river", max_new_tokens=4)
    assert generated[0]["generated_text"].startswith("the river")
    card = (result / "README.md").read_text(encoding="utf-8")
    assert "ReplaceMe (least squares)" in card
    assert "| text perplexity (seen) |" in card
    assert str(tmp_path) not in card
    metrics = json.loads((tmp_path / "result.work" / "metrics" / "evaluation.json").read_text())
    assert metrics["perplexity"]["text"]["dense"] > 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_settings_on_the_card_make_the_same_model(published: Path, tiny: Model, text_file: Path, tmp_path: Path) -> None:
    call(commands.run_replaceme, "--config", published, *FAST)
    card = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", card)
    Path("settings.yaml").write_text(settings, encoding="utf-8")
    # The card names local files without their folder.
    places = ["--model_path", tiny.folder, "--dataset", text_file, "--tasks", f"{{{text_file}: {{fewshots: 0}}}}"]
    call(commands.run_replaceme, "--config", "settings.yaml", *places, "--save_path", tmp_path / "again")
    for name in sha256_below(tmp_path / "result"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "result" / name).read_bytes(), name


def test_a_card_that_is_gone_is_written_again_and_nothing_else(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, "--config", published, *FAST)
    card = tmp_path / "result" / "README.md"
    before = card.read_bytes()
    card.unlink()
    capsys.readouterr()
    call(commands.run_replaceme, "--config", published, *FAST)
    assert card.read_bytes() == before
    assert capsys.readouterr().err.count("unchanged since an earlier run") == len(STAGES)


def test_a_second_run_repeats_nothing_and_a_new_alpha_only_what_it_changes(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, "--config", published, *FAST)
    capsys.readouterr()
    call(commands.run_replaceme, "--config", published, *FAST)
    unchanged = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "unchanged" in line]
    assert unchanged == list(STAGES)
    call(commands.run_replaceme, "--config", published, *FAST, "--alpha", "1e3")
    unchanged = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "unchanged" in line]
    assert unchanged == ["generate", "calibrate", "profile", "select", "plan", "activations", "baseline"]


def test_an_interrupted_run_goes_on_where_it_stopped(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("replaceme.pipeline.export.verify_export", stop)
        call(commands.run_replaceme, "--config", published, *FAST, code=130)
    assert not (tmp_path / "result").exists()
    assert not list(tmp_path.glob("*.partial"))
    capsys.readouterr()
    call(commands.run_replaceme, "--config", published, *FAST)
    unchanged = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "unchanged" in line]
    assert unchanged == [*FIT]


@pytest.mark.parametrize("healed", ["0", "1"])
def test_a_share_of_the_parameters_goes_by_layers_and_channels(
    tiny: Model, text_file: Path, tmp_path: Path, healed: str
) -> None:
    result = tmp_path / "result"
    call(
        commands.run_replaceme, "--model_path", tiny.folder, "--dataset", text_file, "--tasks", text_file, "--max_length", "48",
        "--remove", "30%", "--layers", "1", "--transform", "channels", "--repair", "true", "--heal_epochs", healed,
        "--save_path", result, *FAST,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.num_hidden_layers == 5
    assert model.config.intermediate_size < 48
    figures = json.loads((tmp_path / "result.work" / "metrics" / "export.json").read_text())
    assert figures["parameters"] == pytest.approx(0.7 * figures["parameters_dense"], abs=0.01 * figures["parameters_dense"])
    card = (result / "README.md").read_text(encoding="utf-8")
    assert "without 1 of its 6 layers and" in card
    assert "MLP channels in every layer were removed" in card
    assert "depth-pruning" in card
    assert "width-pruning" in card


def test_run_uidl_drops_the_block_and_changes_no_other_weight(published: Path, tiny: Model, tmp_path: Path) -> None:
    call(commands.run_uidl, "--config", published, *FAST)
    pruned, dense = load_file(tmp_path / "result" / "model.safetensors"), load_file(tiny.folder / "model.safetensors")
    selected = json.loads((tmp_path / "result.work" / "metrics" / "select.json").read_text())
    for name, weight in pruned.items():
        if name.startswith("model.layers."):
            position = int(name.split(".")[2])
            name = name.replace(f".{position}.", f".{position + (2 if position >= selected['start'] else 0)}.", 1)
        assert torch.equal(weight, dense[name])


def test_get_lt_with_lstsq_saves_the_transform_and_no_model(
    tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.get_lt_with_lstsq, "--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST)
    folder = Path(f"{tiny.folder.name}-lstsq-2-transform")
    (name, transform), *rest = load_file(folder / "edits.safetensors").items()
    assert not rest
    assert name.startswith("transform.")
    assert transform.shape == (32, 32)
    assert not list(folder.glob("model*"))
    assert "no model was written" in capsys.readouterr().err


def test_get_lt_with_solvers_saves_the_transform_its_loss_curve_and_no_model(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--save_path", tmp_path / "map"]
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
    call(commands.get_lt_with_solvers, "--solver", "L-BFGS", "--max_iterations", "4", *arguments)
    said = capsys.readouterr().err
    assert "activations: unchanged since an earlier run" in said
    assert "solver L-BFGS is read as lbfgs" in said
    call(commands.get_lt_with_solvers, "--loss", "mse", "--thri", "true", "--solver", "cg", *arguments)
    said = capsys.readouterr().err
    assert "activations: unchanged" not in said
    assert not list((work / "artifacts" / "statistics").glob("tokens*"))


def test_a_model_pruned_by_the_cosine_says_how_and_keeps_its_report(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "cosine", "--accurate", "true", "--solver", "trust_region", "--max_iterations", "3"]
    call(commands.run_replaceme, "--config", published, *FAST, *given, "--diag", "true")
    card = (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert "ReplaceMe (cosine, accurate, diagonal, trust_region)" in card
    assert "max_iterations: 3" in card
    assert "learning_rate" not in card
    page = (tmp_path / "result.work" / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    assert "loss at the start" in page
    assert "diag is read as transform: diagonal" in capsys.readouterr().err


def test_4_bit_calibration_folds_into_the_original_weights(
    save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path
) -> None:
    tiny = save_tiny(hidden_size=64, intermediate_size=128)  # NF4 works in blocks of 64
    call(
        commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, "--layers", "2", "--use_4bit", "true", *FAST,
        "--tasks", "[]", "--save_path", tmp_path / "result",
    )  # fmt: skip
    pruned, dense = load_file(tmp_path / "result" / "model.safetensors"), load_file(tiny.folder / "model.safetensors")
    assert torch.equal(pruned["model.layers.0.self_attn.q_proj.weight"], dense["model.layers.0.self_attn.q_proj.weight"])
    (transform,) = load_file(tmp_path / "result.work" / "artifacts" / "edits" / "edits.safetensors").values()
    host = json.loads((tmp_path / "result.work" / "metrics" / "select.json").read_text())["host"]
    name = f"model.layers.{host}.mlp.down_proj.weight"
    assert torch.equal(pruned[name], (transform.T @ dense[name].double()).float())


def test_get_distance_analysis_lists_the_best_block_of_each_size(
    tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.get_distance_analysis, "--model", tiny.folder, "--dataset", text_file, *FAST)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["layers", "to", "skip"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    pairs = Path(f"{tiny.folder.name}-distances", "distances.csv").read_text(encoding="utf-8").splitlines()
    assert len(pairs) == 1 + 6 * 5 // 2


def test_evaluate_model_prints_the_scores_and_writes_them(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.evaluate_model, "--model_path", tiny.folder, "--tasks", text_file, "--save_path", tmp_path / "s.json", *FAST)
    assert "text perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["perplexity"]["text"]["token"] > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer_to_skip", "3"], "'--layer_to_skip' is not an option (did you mean 'layers_to_skip'?)"),
        (["--alpha", "abc"], "alpha: must be a number, not 'abc'"),
        (["--alpha"], "command line: argument --alpha: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--method", "nothing"], "method: 'nothing' is not a method"),
        (["--layers", "2", "--model_path", "./nowhere"], "model_path: there is no folder ./nowhere"),
        (["--layers", "2", "--dataset", "nowhere.txt"], "dataset: there is no file nowhere.txt"),
        (["--layers", "6"], "--layers (layers_to_skip): must be less than the model's 6 layers, not 6"),
        (["--layers", "2", "--model_path", "~nobody-here/x"], "model_path: there is no folder ~nobody-here/x"),
        (["--layers", "2", "--dataset", "~nobody-here/x.txt"], "dataset: there is no file ~nobody-here/x.txt"),
        (["--layers", "2", "--tasks", "~nobody-here/x.txt"], "tasks: there is no file ~nobody-here/x.txt"),
        (["--layers", "2", "--save_path", "~nobody-here/x"], "save_path: ~nobody-here is no user of this machine"),
        (["--layers", "2", "--dataset", "x" * 100_000], "dataset: must be a text of at most 1000 characters"),
        ([f"--{'x' * 100_000}"], "xxx' is not an option"),
        (["--layers", "2", "--min_distance_layer", "5"], "min_distance_layer: no block of 2 layers fits"),
        (["--layers", "2", "--tasks", "helaswag"], "tasks: 'helaswag' is no task (did you mean 'hellaswag' or"),
        (["--layers", "2", "--tasks", "piqa"], "tasks: 'piqa' needs the dataset baber/piqa, the hub can't be reached"),
        (["--layers", "2", "--device", "cuda:99"], "device: cuda:99 is asked for, but torch sees"),
        (["--layers", "2", "--dataset_size", "4", "--max_length", "8"], "alpha: 0 leaves the least squares singular (rank"),
        (
            ["--layers", "2", "--dataset_size", "3", "--max_length", "8"],
            "dataset_size 3 times max_length 8 is less than the model",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, *FAST, *arguments, code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert len(errors[0]) <= 307


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
    settings: dict[str, Any], works: bool, tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    few = ["--layers", "2", "--dataset_size", "3", "--max_length", "8", "--tasks", "[]", *options]
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, *FAST, *few, code=0 if works else 2)
    said = capsys.readouterr().err
    assert ("stage 1 " in said) == works
    assert ("error: alpha: 0 leaves the least squares singular: dataset_size 3" in said) != works


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "../../etc/passwd", "--model_path", "b"], "model_path: is given twice, as ../../etc/passwd and as b"),
        (["--alpha", "1", "--alpha", "2"], "alpha: is given twice, as 1 and as 2; keep one"),
        (["--config", "a", "--config", "b"], "config: is given twice, as a and as b; keep one"),
    ],
)
def test_an_option_with_two_values_is_refused_under_whichever_of_its_names(arguments: list[str], said: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"command line: {said}")):
        parse(script_parser(""), arguments)
    assert parse(script_parser(""), [*arguments[:2], arguments[2], arguments[1]])


def test_a_folder_that_is_no_earlier_result_is_never_replaced(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    arguments = ["--dataset", text_file, "--layers", "2", *FAST]
    for command in (commands.run_replaceme, commands.get_lt_with_lstsq, commands.get_distance_analysis):
        call(command, "--model", tiny.folder, *arguments, "--save_path", precious, code=2)
        assert "precious holds thesis.txt, which this program did not write" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    call(commands.run_replaceme, "--model", tiny.folder, *arguments, "--save_path", tiny.folder, code=2)
    assert "is the model that is to be pruned" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_a_device_or_pipe_is_no_place_for_a_result(
    place: str, tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe")
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, "--save_path", place, code=2)
    assert f"{place} exists and is no folder; choose another place." in capsys.readouterr().err


def test_a_loop_of_links_is_no_place(tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place := tmp_path / "loop").symlink_to("loop")
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, *FAST, "--save_path", place / "result", code=2)
    assert "is a link that leads nowhere; choose another place." in capsys.readouterr().err


def test_an_output_that_was_changed_is_made_again(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model",
        tiny.folder,
        "--dataset",
        text_file,
        "--layers",
        "2",
        *FAST,
        "--tasks",
        "[]",
        "--save_path",
        tmp_path / "r",
    ]
    call(commands.run_replaceme, *arguments)
    (tmp_path / "r" / "model.safetensors").unlink()
    call(commands.run_replaceme, *arguments)
    assert (tmp_path / "r" / "model.safetensors").is_file()
    (tmp_path / "r" / "notes.md").write_text("mine", encoding="utf-8")
    call(commands.run_replaceme, *arguments, "--alpha", "3", code=2)
    assert "r holds notes.md, which this program did not write" in capsys.readouterr().err
    (tmp_path / "r" / "notes.md").unlink()
    (tmp_path / "r" / "config.json").write_text("{}", encoding="utf-8")
    call(commands.run_replaceme, *arguments, code=2)
    assert "r holds config.json, which this program did not write" in capsys.readouterr().err


def test_a_failed_run_claims_no_folder(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", tiny.folder, "--layers", "2", *FAST, "--tasks", "[]", "--save_path", tmp_path / "r"]
    call(commands.run_replaceme, *arguments, "--dataset", "typo.txt", code=2)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine").write_text("mine", encoding="utf-8")
    call(commands.run_replaceme, *arguments, "--dataset", text_file, code=2)
    assert (tmp_path / "r" / "mine").is_file()


def test_a_second_run_prints_the_table_again(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for _ in range(2):
        call(commands.run_replaceme, "--config", published, *FAST)
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != ""


def test_transform_and_model_have_places_of_their_own(tiny: Model, text_file: Path) -> None:
    arguments = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]"]
    call(commands.get_lt_with_lstsq, *arguments)
    call(commands.run_replaceme, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--save_path", "/proc/none/x"], "save_path: nothing can be written in /proc/none/x.work"),
        (["--save_path", "/"], "save_path: / can't be a result's folder"),
        (["--revision", "main"], "revision: is for hub models"),
        (["--dataset_column", "body"], "dataset_column: 'body' does not apply to"),
        (["--foo", "1", "--bar"], "'--bar' is not an option"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    arguments: list[str], said: str, tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, *arguments, code=2)
    assert said in capsys.readouterr().err


def test_scores_replace_nothing_but_scores(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    arguments = ["--model_path", tiny.folder, "--tasks", text_file, *FAST]
    thesis = tmp_path / "thesis.md"
    thesis.write_text("years of work", encoding="utf-8")
    call(commands.evaluate_model, *arguments, "--save_path", thesis, code=2)
    assert thesis.read_text(encoding="utf-8") == "years of work"
    for content in ('{"name": "left-pad", "version": "1.0.0"}', "[" * 100_000, "[1]"):
        package = tmp_path / "package.json"
        package.write_text(content, encoding="utf-8")
        call(commands.evaluate_model, *arguments, "--save_path", package, code=2)
        assert package.read_text(encoding="utf-8") == content
    os.mkfifo(tmp_path / "pipe")
    call(commands.evaluate_model, *arguments, "--save_path", tmp_path / "pipe", code=2)
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        call(commands.evaluate_model, *arguments, "--save_path", tmp_path / "folder")
    assert (tmp_path / "folder.evaluation.json").is_file()


def test_memory_that_runs_out_while_loading_is_said_as_such(
    tiny: Model, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("replaceme.models.model.AutoModelForCausalLM.from_pretrained", fail)
    call(commands.run_replaceme, "--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, code=2)
    assert "error: memory ran out; lower batch_size" in capsys.readouterr().err


def test_few_tokens_are_warned_of(tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--dataset_size", "2", "--alpha", "1"]
    call(commands.get_lt_with_lstsq, *arguments)
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
    files: dict[str, str], said: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    call(commands.run_replaceme, "--model", folder, "--dataset", text_file, code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


def copied(tiny: Model, folder: Path) -> Path:
    folder.mkdir()
    for path in tiny.files():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_weights_that_the_checkpoint_lacks_are_not_made_up(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny, tmp_path / "lacking")
    weights = {name: weight for name, weight in load_file(folder / "model.safetensors").items() if ".layers.4." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    call(commands.run_replaceme, "--model", folder, "--dataset", text_file, "--layers", "2", *FAST, code=2)
    assert "is missing from the weights of lacking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantized (gptq)"),
        ("config.json", {"num_hidden_layers": "six"}, "can't be read"),
        ("tokenizer.json", {"model": 3}, "the tokenizer of changed can't be read"),
        ("model.safetensors.index.json", {}, "model.safetensors.index.json of changed can't be read"),
    ],
)
def test_damaged_or_unsuitable_files_of_a_model_are_named_before_any_work(
    name: str,
    change: dict[str, Any],
    said: str,
    tiny: Model,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(tiny, tmp_path / "changed") / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    call(commands.run_replaceme, "--model", path.parent, "--dataset", text_file, "--layers", "2", *FAST, code=2)
    errors = capsys.readouterr().err
    assert said in errors
    assert "calibrate:" not in errors


def test_a_damaged_weight_file_is_named(
    tiny: Model, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in tiny.files():
        (folder / path.name).write_bytes(path.read_bytes()[: 1000 if path.suffix == ".safetensors" else None])
    call(commands.run_replaceme, "--model", folder, "--dataset", text_file, "--layers", "2", *FAST, code=2)
    assert "--model (model_path): model.safetensors of damaged is damaged" in capsys.readouterr().err


def test_mistakes_in_model_text_and_tasks_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    call(commands.run_replaceme, "--model", "./none", "--dataset", "none.txt", "--tasks", "none", "--device", "cuda:99", code=2)
    errors = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["device", "--model (model_path)", "dataset", "tasks"]


@pytest.mark.parametrize(
    "name", ["run_replaceme", "run_uidl", "evaluate_model", "get_distance_analysis", "get_lt_with_lstsq", "get_lt_with_solvers"]
)
def test_help_describes_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(getattr(commands, name), "--help")
    said = " ".join(capsys.readouterr().out.split())
    for key, field in FIELDS.items():
        assert f"--{key}" in said
        assert " ".join(str(field.description).split()[:3]) in said
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


def test_the_dense_model_is_scored_once_for_all_results_and_known_by_content(
    published: Path, tiny: Model, save_tiny: Callable[..., Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny.folder, source)
    # A text of its own, which no other test has scored.
    text = tmp_path / "scored-once.txt"
    text.write_text(made_text(40, seed=77), encoding="utf-8")

    def dense_score(name: str) -> tuple[float, bool]:
        arguments = ["--model_path", source, "--tasks", text, "--save_path", tmp_path / name]
        call(commands.run_replaceme, "--config", published, *FAST, *arguments)
        known = "baseline: known from an earlier run" in capsys.readouterr().err
        metrics = json.loads((tmp_path / f"{name}.work" / "metrics" / "evaluation.json").read_text())
        return metrics["perplexity"]["scored-once"]["dense"], known

    first, known = dense_score("a")
    assert not known
    assert dense_score("b") == (first, True)
    shutil.rmtree(source)
    shutil.copytree(save_tiny("llama", rope_theta=77.0).folder, source)
    other, known = dense_score("c")
    assert not known
    assert other != first


def test_a_task_on_the_calibration_text_is_marked_from_the_log_to_the_page(
    published: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := tmp_path / "other.txt").write_text(made_text(40, seed=9), encoding="utf-8")
    call(commands.run_replaceme, "--config", published, *FAST, "--tasks", f"[{text_file}, {other}]")
    said = capsys.readouterr()
    assert f"tasks: text is no unseen text: its source is the calibration text ({text_file.name})" in said.err
    assert "other is no unseen text" not in said.err
    assert "text perplexity (seen)" in said.out
    work = tmp_path / "result.work"
    found = json.loads((work / "metrics" / "evaluation.json").read_text())["calibration_text"]
    assert {task: figures["seen"] for task, figures in found.items()} == {"text": 1, "other": 0}
    assert "text perplexity (seen)" in (tmp_path / "result" / "README.md").read_text(encoding="utf-8")
    assert "scored on calibration text" in (work / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    # The dense model's scores know no calibration: all calibrations share them.
    assert "calibration_text" not in json.loads((work / "artifacts" / "baseline" / "scores.json").read_text())


def test_speed_of_a_result_is_measured_against_the_model_it_was_made_from(
    published: Path, tmp_path: Path, save_tiny: Callable[..., Model], capsys: pytest.CaptureFixture[str]
) -> None:
    call(commands.measure_speed, "--config", published, *FAST, code=2)
    assert "save_path: there is no pruned model in" in capsys.readouterr().err
    call(commands.run_replaceme, "--config", published, *FAST)
    call(commands.measure_speed, "--config", published, *FAST)
    times = json.loads((tmp_path / "result.work" / "artifacts" / "speed" / "speed.json").read_text())
    assert times["weights"] == sha256_below(tmp_path / "result" / "model.safetensors")
    assert set(times["decode_seconds_per_token"]) == {"dense", "pruned", "speedup"}
    capsys.readouterr()
    call(commands.measure_speed, "--config", published, *FAST, "--model_path", save_tiny("mistral").folder, code=2)
    assert "is not what" in capsys.readouterr().err


@pytest.mark.parametrize("selection", ["angular", "residual", "loss"])
def test_each_criterion_takes_its_own_best_cut(selection: str, tiny: Model, text_file: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny.folder, "--dataset", text_file, "--layers", "2", *FAST, "--tasks", "[]", "--batch_size", "4"]
    call(commands.get_lt_with_lstsq, *arguments, "--selection", selection, "--save_path", tmp_path / "map")
    work = tmp_path / "map.work"
    selected = json.loads((work / "metrics" / "select.json").read_text())
    profile = json.loads((work / "artifacts" / "profile" / "profile.json").read_text())
    hosts = range(len(profile["residual"]) - 2)
    if selection == "loss":
        assert set(selected["losses"]) == {f"host{host}" for host in hosts}  # fewer cuts than the shortlist holds
        assert selected["losses"][f"host{selected['host']}"] == selected["loss"] == min(selected["losses"].values())
        arguments += ["--selection", selection, "--tolerated_loss", "50"]
        call(commands.get_lt_with_lstsq, *arguments, "--save_path", tmp_path / "another")
        tolerated = json.loads((tmp_path / "another.work" / "metrics" / "select.json").read_text())
        assert tolerated.pop("rises") == {"layers2": pytest.approx(selected["loss"] - selected["dense_loss"], abs=1e-3)}
        assert tolerated == selected
    else:
        values = profile["angular_distance" if selection == "angular" else "residual"]
        assert selected["host"] == min(hosts, key=lambda host: values[host][host + 2])
    assert selected["end"] - selected["start"] == 2
    assert selected["residual"] == pytest.approx(profile["residual"][selected["host"]][selected["end"] - 1], rel=1e-4)


def test_several_blocks_and_repairs_run_from_end_to_end(published: Path, tmp_path: Path) -> None:
    call(
        commands.run_replaceme, "--config", published, *FAST, "--num_A", "2", "--layers_to_skip", "1", "--transform", "joint",
        "--repair", "true", "--merge_consecutive", "false", "--min_distance_layer", "1",
    )  # fmt: skip
    metrics = tmp_path / "result.work" / "metrics"
    selected, repaired, solved = (
        json.loads((metrics / f"{name}.json").read_text(encoding="utf-8")) for name in ("select", "repair", "solve")
    )
    assert selected["block1"]["start"] > selected["end"]
    assert solved["removed_layers"] == 2
    assert repaired["block1"]["weighted_residual_joint"] < repaired["block1"]["weighted_residual_removed"]
    assert repaired["corrected_linears"] > 2
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "result").model.layers) == 4


def test_the_cosine_fits_a_later_block_too_and_the_transform_alone_is_saved(published: Path, tmp_path: Path) -> None:
    call(
        commands.get_lt_with_solvers, "--config", published, *FAST, "--num_A", "2", "--layers_to_skip", "1", "--alpha", "0.1",
        "--merge_consecutive", "false", "--min_distance_layer", "1", "--epochs", "2", "--method", "cosine",
    )  # fmt: skip
    edits = json.loads((tmp_path / "result" / "edits.json").read_text(encoding="utf-8"))
    transforms = load_file(tmp_path / "result" / "edits.safetensors")
    assert len(transforms) == len(edits["removed_layers"]) == 2
    assert not list((tmp_path / "result.work").rglob("scratch-*"))
