"""The command ``replaceme``: what its help shows, what it refuses, and that it does the scripts' work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import replaceme
from replaceme.base.fingerprints import sha256_below
from replaceme.base.published import RECOMMENDED
from replaceme.cli.commands import GROUPS, parse_option
from replaceme.cli.main import COMMANDS, OTHERS, main
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.model import Model
from replaceme.pipeline import evaluate, profile
from replaceme.pipeline.runner import STAGES
from replaceme.running.stage import ORDER
from tests.conftest import made_tokenizer
from tests.golden.cases import HEALED, family_settings
from tests.helpers import FAST, call
from tests.pipeline.closure import ROOT
from tests.pipeline.conftest import Finished

NAMES = [*COMMANDS, *OTHERS]
SCREEN = 52


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


def quote(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    call(main, *arguments)
    return capsys.readouterr().out


def test_every_parameter_stands_in_one_group() -> None:
    assert sorted(key for keys in GROUPS.values() for key in keys) == sorted(FIELDS)


@pytest.mark.parametrize(
    "arguments", [(), *((name,) for name in NAMES)], ids=lambda arguments: " ".join(arguments) or "replaceme"
)
def test_help_fits_a_screen_and_ends_with_an_example(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    lines = quote(capsys, *arguments, "--help").splitlines()
    assert len(lines) <= SCREEN
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  replaceme {' '.join(arguments)}".rstrip())


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom replaceme.cli.main import main\n"
        "for words in [[], *([name] for name in sys.argv[1:])]:\n"
        "    sys.argv = ['replaceme', *words, '--help']\n"
        "    try: main()\n    except SystemExit as ended: assert not ended.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, *NAMES], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_help_lists_every_command_method_and_choice_and_the_recommended_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overview = quote(capsys)
    assert all(re.search(rf"(?m)^  {name} ", overview) for name in NAMES)
    assert quote(capsys, "--version") == f"replaceme {replaceme.__version__}\n"
    said = " ".join(quote(capsys, "prune", "--help").split())
    assert f": {', '.join(METHODS)} [lstsq]" in said
    assert "--repair true|false" in said
    assert f"documents [{RECOMMENDED['dataset_size']}]" in said
    assert "own criterion [loss]" in said
    assert "--seed" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_all_options_are_those_that_the_command_uses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = quote(capsys, name, "--help-all")
    aliases = {"model_path": "model", "layers_to_skip": "layers"}
    for key in FIELDS:
        # With other names of the option, Python 3.13 writes its value after the last.
        option = re.search(rf"  --{aliases.get(key, key)}[ ,]", said)
        assert (option is not None) == (key in COMMANDS[name].keys), key


def test_the_options_are_those_that_the_stages_use() -> None:
    inputs = {"model_path", "revision", "dataset", "dataset_revision"}
    # A result doesn't depend on ``memory``, and on ``processes`` only by the order of sums, so they are parameters of no stage.
    stages = {key for stage in STAGES.values() for key in stage.params}
    assert set(COMMANDS["prune"].keys) == stages | {"memory", "processes", "save_path"}
    scored = set(evaluate.STAGE.params) - {"dataset_config", "dataset_split"}
    assert set(COMMANDS["evaluate"].keys) == scored | {"memory", "model_path", "revision", "save_path"}
    analysed = {key for name in ("generate", "calibrate", "profile") for key in STAGES[name].params} | inputs
    assert set(COMMANDS["profile"].keys) == analysed | {
        "min_distance_layer", "max_distance_layer", "memory", "processes", "save_path",
    }  # fmt: skip
    assert set(profile.STAGE.params) <= set(COMMANDS["profile"].keys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prun"], "command line: 'prun' is not a command (did you mean 'prune'?); use one of prune, evaluate, "),
        (["--layers", "3"], "command line: "),
        (["prune", "--layer", "3"], "command line: '--layer' is not an option (did you mean 'layers'?); see --help."),
        (["profile", "--tasks", "wikipedia"], "command line: tasks: replaceme profile has no use for it; see --help-all."),
        (["prune", "--layers", "x"], "command line: --layers (layers_to_skip): must be a whole number, not 'x'."),
        (["profile", "--model=no/where/at/all"], "--model (model_path): "),
        (["prune", "extra"], "command line: 'extra' belongs to no option; see --help."),
        (
            ["prune", "--preset", "paper"],
            "command line: preset: must be one of recommended, quick, healed, published, not 'paper'.",
        ),
        (["report", "--save_path", "nowhere"], "save_path: there is no pruned model in "),
        (
            ["evaluate", "--compare", "x"],
            "command line: '--compare' is not an option (did you mean 'compare_with'?); see --help.",
        ),
        (["push"], "command line: the following arguments are required: --repo_id."),
        (["speed", "--save_path", "nowhere"], "save_path: there is no pruned model in "),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(main, *arguments, code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("preset ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {said}")


@pytest.fixture
def given(tiny: Model, text_file: Path) -> list[str | Path]:
    fast = [word for at, word in enumerate(FAST) if "--eval_dtype" not in FAST[max(at - 1, 0) : at + 1]]
    return ["--model", tiny.folder, "--dataset", text_file, *fast, "--device", "cpu", "--pack", "false"]


def test_prune_speed_and_report_make_a_result_and_its_page(
    given: list[str | Path], tiny: Model, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healed = ["--heal_tokens", "400", "--heal_dataset", f"[{text_file}, self]", "--keep_if_better", "false"]
    call(main, "prune", *given, *healed, "--layers", "2", "--tasks", text_file, "--save_path", "r")
    said = capsys.readouterr()
    assert "text perplexity" in said.out
    assert "preset recommended (the default)" in said.err
    stages = re.findall(r"(?m)^stage (\d+) of 14: (\w+)", said.err)
    assert stages == [(str(number), name) for number, name in enumerate(ORDER, 1)]
    assert "\r" not in said.err
    assert json.loads(Path("r/config.json").read_text())["num_hidden_layers"] == tiny.config().num_hidden_layers - 2
    settings = Path("r/README.md").read_text(encoding="utf-8")
    assert "transform: channels" in settings
    assert f"heal_dataset:\n- {text_file.name}\n- self\n" in settings
    call(main, "report", "--save_path", "r", "--output", "page")
    assert "text perplexity" in capsys.readouterr().out
    page = Path("page/index.html").read_text(encoding="utf-8")
    assert "weights were trained on" in page
    assert "decoding, a token" not in page
    call(main, "speed", "--model", tiny.folder, "--save_path", "r", "--threads", "1", "--device", "cpu")
    call(main, "report", "--save_path", "r", "--output", "page")
    assert Path("page/index.html").read_text(encoding="utf-8") != page
    Path("mine").mkdir()
    call(main, "report", "--save_path", "r", "--output", "mine", code=2)
    assert "--output: mine exists and holds no report; choose another folder" in capsys.readouterr().err


def test_a_published_config_gives_what_the_published_script_gives(
    config: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "prune", "--config", config, *FAST, "--save_path", "again")
    assert f"preset published ({config} names only keys of the published program" in capsys.readouterr().err
    assert sha256_below(Path("again")) == sha256_below(finished.result)


@pytest.mark.parametrize(
    ("described_as", "kind"),
    [
        ("a norm after the MLP", "gemma2"),
        ("a mixture of experts", "mixtral"),
        ("Falcon", "falcon"),
        ("not described", "stablelm"),
    ],
)
def test_the_setting_for_a_family_is_that_of_the_goldens(described_as: str, kind: str) -> None:
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {described_as}") and "`--" in line]
    words = re.findall(r"`--([^`]*)`", row)[0].replace(" --", " ").split()
    setting = {key: parse_option(key, value) for key, value in zip(words[::2], words[1::2], strict=True)}
    (golden,) = family_settings(kind).values()
    # A training on fewer tokens is the same.
    assert (setting | HEALED if "heal_tokens" in setting else setting) == golden


def test_evaluate_beside_the_dense_model_says_what_the_pruning_said(
    finished: Finished, tiny: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ",".join(str(finished.folder / name) for name in ("text.txt", "other.txt"))
    where = ["--tasks", tasks, "--eval_tokens", "16384", "--eval_dtype", "float32", "--threads", "1", "--save_path", "s.json"]
    call(main, "evaluate", "--model", finished.result, *where, "--compare_with", tiny.folder)
    assert re.search(r"(?m)^text perplexity \(seen\) +[0-9.]+ +[0-9.]+ +x ", capsys.readouterr().out)
    scores = json.loads(Path("s.json").read_text())
    expected = json.loads((finished.work / "metrics" / "evaluation.json").read_text())
    # The folder names the text's source, and has nothing of the text itself.
    assert [text.pop("overlap") for text in expected["calibration_text"].values()]
    assert scores["comparison"] == expected
    assert {task: text["seen"] for task, text in expected["calibration_text"].items()} == {"text": 1, "other": 0}
    assert scores["continuations"] == json.loads((finished.work / "artifacts" / "continuations.json").read_text())
    assert scores["perplexity"]["text"]["token"] == scores["comparison"]["perplexity"]["text"]["pruned"]
    # A file of scores may be written anew.
    call(main, "evaluate", "--model", finished.result, *where)
    assert "comparison" not in json.loads(Path("s.json").read_text())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "there is no folder ./nowhere; give a model folder, a hub id or an embedded model's name."),
        ("", "must be a folder, a hub id or an embedded model's name, not ''."),
        ("result/../result", "is the model that is scored; name the one that it was made from."),
        ("words", "words has another tokenizer than result; name the model that it was made from."),
        ("broken", "model.safetensors of broken is damaged"),
    ],
)
def test_a_model_that_is_not_the_pruned_ones_dense_model_is_refused(
    name: str, said: str, finished: Finished, tiny: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("result").symlink_to(finished.result)
    shutil.copytree(tiny.folder, "words")
    tokenizer = made_tokenizer()
    tokenizer.add_tokens(["replaceme"])
    tokenizer.save_pretrained("words")
    shutil.copytree(tiny.folder, "broken")
    (weights,) = Path("broken").glob("*.safetensors")
    weights.write_bytes(b"")
    where = ["--tasks", finished.folder / "other.txt", "--threads", "1", "--save_path", "s.json"]
    call(main, "evaluate", "--model", "result", *where, "--compare_with", name, code=2)
    assert f"\nerror: compare_with: {said}" in capsys.readouterr().err
    assert not Path("s.json").exists()
