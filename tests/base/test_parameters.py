"""What a config and a command line say: each mistake is one sentence that names its place, and the last word counts."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks.parameter_page import render_reference
from replaceme.base.entries import Task
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, read_params
from replaceme.methods.registry import FIELDS, METHODS
from tests.pipeline.closure import ROOT


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Names.
        ("layers_to_skp: 3", "layers_to_skp: is not a parameter (did you mean 'layers_to_skip'?); docs/parameters."),
        ("method: lstq", "method: 'lstq' is not a method (did you mean 'lstsq'?); use one of average, cosine, "),
        ("selection: resid", "selection: 'resid' is not a criterion (did you mean 'residual'?); use one of angular, "),
        ("token: secret-value", "token: secrets don't belong in parameters"),
        # Types and ranges.
        ("layers_to_skip: 0", "layers_to_skip: must be at least 1, not 0."),
        ("layers_to_skip: 2.5", "layers_to_skip: must be a whole number, not 2.5."),
        ("layers_to_skip: true", "layers_to_skip: must be a whole number, not True."),
        ("seed: 99999999999999999999", "seed: must be at most 4.29497e+09, not 99999999999999999999."),
        ("alpha: .nan", "alpha: must be a finite number, not nan."),
        ("alpha: .inf", "alpha: must be a finite number, not inf."),
        ("alpha: high", "alpha: must be a number, not 'high'."),
        ("refit_ridge: 0", "refit_ridge: must be above 0, not 0."),
        ("pack: yes", "pack: must be true or false, not 'yes'."),
        ("device: tpu", "device: must be auto, cpu, cuda, mps, xpu, or one GPU as cuda:N, not 'tpu'."),
        ("memory: 6 gigs", "memory: must be auto, null, or a size such as 6GB or 500MiB, not '6 gigs'."),
        ("dtype: int8", "dtype: must be 'auto', 'bfloat16', 'float16' or 'float32', not 'int8'."),
        ("model_path: null", "model_path: must be a text, not null."),
        ("solver: sgd", "solver: must be 'adam', 'lbfgs', 'cg' or 'trust_region', not 'sgd'."),
        ("l1_ratio: 1.5", "l1_ratio: must be at most 1, not 1.5."),
        # Entries of the lists.
        ("tasks: {winogrande: {fewshots: many}}", "tasks: fewshots of winogrande must be a whole number, not 'many'."),
        ("tasks: [{piqa: {limit: 0}}]", "tasks: limit of piqa must be at least 1, not 0."),
        ("tasks: [{piqa: {fewshot: 5}}]", "tasks: piqa has no option 'fewshot' (did you mean 'fewshots'?); there are "),
        ("tasks: [{q.jsonl: {choices: [a]}}]", "tasks: choices of q.jsonl must be the name of a column or a list of such "),
        ("tasks: {gsm8k: 0}", "tasks: an entry must be a name, or one with options: {piqa: {fewshots: 5}}, not"),
        ("tasks: 3", "tasks: must be a list of task names, not 3."),
        ("dataset: 3", "dataset: must be a name, or a list of names with shares, not 3."),
        ("dataset: []", "dataset: must be a name, or a list of names with shares, not []."),
        ("dataset: [a, a]", "dataset: names a twice; keep one."),
        ("dataset: [{a: -1}]", "dataset: share of a must be above 0, not -1."),
        ("dataset: [{a: {splt: b}}]", "dataset: a has no option 'splt' (did you mean 'split'?); there are share, config, "),
        ("dataset: [{self: {split: b}}]", "dataset: split does not apply to self, which the model writes; leave it out."),
        ("dataset: [{a: {column: 1}}]", "dataset: column of a must be a text, not 1."),
        ("dataset: [{a: 1, b: 1}]", "dataset: an entry must be a name, or one with options: {notes.jsonl: 2}, not {'a': 1"),
        ("dataset: [3]", "dataset: an entry must be a name, or one with options: {notes.jsonl: 2}, not 3."),
        # Published names.
        ("diag: 1", "diag: must be true or false, not 1."),
        ("diag: true\nthri: true", "diag: is true and so is thri, but a transform has one structure; keep one."),
        ("thri: true\ntransform: dense", "thri: asks for transform triangular, and transform says 'dense'; keep one."),
        ("dataset_subset: train\ndataset_split: test", "dataset_subset: says 'train' and dataset_split 'test'; keep one."),
        ("solver: Newton-CG", "solver: Newton-CG is not offered; trust_region uses the same second derivatives"),
        # What doesn't go together.
        ("method: cosine\ntransform: joint", "transform: joint solves least squares for the last weights before the cut"),
        ("method: cosine\nloss: elastic_net\nsolver: CG", "solver: cg needs a smooth objective"),
        ("method: uidl\ntwo_vectors: true", "transform: two_vectors has no place in method uidl, which puts nothing in the "),
        ("method: slicegpt\nrepair: true", "repair: true has no place in method slicegpt, which removes "),
        ("method: slicegpt\nmin_distance_layer: 2", "min_distance_layer: method slicegpt slices all layers alike; use null."),
        ("tolerated_loss: 0.1", "tolerated_loss: needs selection: loss, which measures it, and that is null."),
        ("tolerated_loss: 0.1\nremove: 20%", "remove: and tolerated_loss each say how much goes; use one"),
        ("heal_tokens: 1k\nuse_4bit: true", "use_4bit: packs the weights that heal_tokens trains; use false."),
        ("heal_tokens: 1k\ndtype: float16", "dtype: float16 is too short for the gradients of heal_tokens"),
        ("processes: 2\ndevice: cuda:1", "device: cuda:1 is one GPU, and each process has its own"),
        # YAML.
        ("layers: 2\nlayers_to_skip: 3", "layers: says 2 and layers_to_skip 3; keep one."),
        ("alpha: 1\nalpha: 2", "alpha: is given twice, as 1 and as 2; keep one."),
        ("alpha: [", "isn't valid YAML: while parsing a flow node"),
        ("alpha: 1\n\tpack: true", "isn't valid YAML: while scanning for the next token found character '\\t'"),
        ("revision: 2024-99-99", "isn't valid YAML: month must be in 1..12."),
        ("- alpha", "must hold one `key: value` a line."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(written(tmp_path, text), methods=METHODS)
    (message,) = caught.value.problems
    assert message.startswith(f"{tmp_path / 'config.yaml'}: {said}")
    assert "secret-value" not in message


def test_all_mistakes_are_reported_at_once_each_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(written(tmp_path, "batch_size: 0\nfoo: 1\nmethod: foo\nnum_A: 0"), {"alpha": "x"}, METHODS)
    file = str(tmp_path / "config.yaml")
    assert sorted(problem.split(": ")[:2] for problem in caught.value.problems) == [
        [file, "batch_size"], [file, "foo"], [file, "method"], [file, "num_A"], ["command line", "alpha"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no such file"), (b"\x80\x02weights", "can't be read as UTF-8"), ("folder", "can't be read (Is a")],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes | str | None, said: str) -> None:
    path = tmp_path / "config.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(ParameterError) as caught:
        read_params(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "give the path of a YAML file" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "given", "key", "value"),
    [
        ("", {}, "alpha", 0.0),
        ("# nothing", {}, "alpha", 0.0),
        ("alpha: 1e-6", {}, "alpha", 1e-6),
        ("alpha: 1", {"alpha": 2.0}, "alpha", 2.0),
        ("dataset_config: no", {}, "dataset_config", "no"),
        ("tasks: [{piqa: &five {fewshots: 5}}, {boolq: *five}]", {}, "tasks", (Task("piqa", 5), Task("boolq", 5))),
        ("tasks: null", {}, "tasks", ()),
    ],
)
def test_the_file_is_yaml_1_2_and_the_command_line_wins(
    tmp_path: Path, text: str, given: dict[str, Any], key: str, value: Any
) -> None:
    assert getattr(read_params(written(tmp_path, text), given), key) == value


def test_equal_values_of_a_repeated_key_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "replaceme"):
        assert read_params(written(tmp_path, "layers_to_skip: 4\nalpha: 0\nlayers_to_skip: 4 # again")).layers_to_skip == 4
    assert "layers_to_skip is given twice with the same value" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("solver: lbfgs", "solver belongs to method cosine and is ignored"),
        ("method: cosine\nloss: mse\naccurate: true", "accurate belongs to loss cosine of method cosine and is ignored"),
        ("method: cosine\nmax_iterations: 3", "max_iterations belongs to solver lbfgs or cg or trust_region of method cosine "),
        ("method: uidl\nalpha: 1.0", "alpha belongs to methods cosine, ghosted and lstsq and is ignored"),
        ("refit_ridge: 1.0", "refit_ridge belongs to transform refit or joint or channels and is ignored"),
        ("heal_learning_rate: 1.0", "heal_learning_rate belongs to heal_tokens and is ignored"),
        ("method: cosine\nepochs: 3", ""),
        ("heal_tokens: 1k\nheal_learning_rate: 1.0", ""),
        ("method: lstsq\nsolver: adam\nloss: cosine\naccurate: false", ""),
    ],
)
def test_a_key_without_effect_is_noted(tmp_path: Path, text: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(written(tmp_path, text), methods=METHODS)
    ignored = [line for line in caplog.messages if not line.startswith("preset ")]
    assert [line.startswith(said) for line in ignored] == ([True] if said else [])


def test_parameters_survive_being_sent_to_another_process() -> None:
    given = {
        "dataset": ["a", {"b": 2}, {"c": {"split": "d"}}, "self"],
        "tasks": [{"q": {"choices": ["a", "b"]}}],
        "solver": "cg",
    }
    params = read_params(None, given, METHODS)
    assert Params.model_validate_json(params.model_dump_json()) == params


def test_params_yaml_holds_every_key_and_the_reference_describes_it() -> None:
    stated = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(stated) == set(FIELDS)
    assert all(field.description and field.description.endswith(".") for field in FIELDS.values())
    assert (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8") == render_reference()
