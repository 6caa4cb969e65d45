import os
from pathlib import Path

import pytest

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import parse_value, read_params
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.reference import reference
from tests.pipeline.closure import ROOT


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(ParameterError) as caught:
        read_params(written(tmp_path, text), methods=METHODS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers_to_skp: 3", "layers_to_skp: is not a parameter (did you mean 'layers_to_skip'?)"),
        ("layers_to_skip: 0", "layers_to_skip: must be at least 1, not 0"),
        ("layers_to_skip: 2.5", "layers_to_skip: must be a whole number, not 2.5"),
        ("layers_to_skip: true", "layers_to_skip: must be a whole number, not True"),
        ("alpha: -1", "alpha: must be at least 0, not -1"),
        ("alpha: .nan", "alpha: must be a finite number"),
        ("alpha: .inf", "alpha: must be a finite number"),
        ("alpha: high", "alpha: must be a number, not 'high'"),
        ("pack: yes", "pack: must be true or false, not 'yes'"),
        ("device: tpu", "device: must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("dtype: int8", "dtype: must be 'bfloat16', 'float16' or 'float32', not 'int8'"),
        ("model_path: null", "model_path: must be a text, not null"),
        (
            "method: lstq",
            f"method: 'lstq' is not a method (did you mean 'lstsq'?); use one of {', '.join(sorted(METHODS))}",
        ),
        ("num_A: 0", "num_A: must be at least 1, not 0"),
        ("refit_ridge: 0", "refit_ridge: must be above 0, not 0"),
        ("diag: 1", "diag: must be true or false, not 1"),
        ("diag: true\nthri: true", "diag: is true and so is thri, but a transform has one structure; keep one"),
        ("thri: true\ntransform: dense", "thri: asks for transform triangular, and transform says 'dense'; keep one"),
        ("solver: Newton-CG", "solver: Newton-CG is not offered; trust_region uses the same second derivatives"),
        ("solver: sgd", "solver: must be 'adam', 'lbfgs', 'cg' or 'trust_region', not 'sgd'"),
        ("loss: huber", "loss: must be 'cosine', 'mse' or 'elastic_net', not 'huber'"),
        ("learning_rate: 0", "learning_rate: must be above 0, not 0"),
        ("l1_ratio: 1.5", "l1_ratio: must be at most 1, not 1.5"),
        ("method: cosine\ntransform: joint", "transform: joint solves least squares for the host's own weights"),
        ("method: cosine\nloss: elastic_net\nsolver: CG", "solver: cg needs a smooth objective"),
        ("method: uidl\ntwo_vectors: true", "transform: two_vectors has no place in method uidl"),
        (
            "tasks: {winogrande: {fewshots: many}}",
            "tasks: fewshots of winogrande must be a whole number of at least 0, not 'many'",
        ),
        ("tasks: [{piqa: {limit: 0}}]", "tasks: limit of piqa must be a whole number of at least 1, not 0"),
        ("tasks: [{piqa: {fewshot: 5}}]", "tasks: piqa has no option 'fewshot' (did you mean 'fewshots'?)"),
        (
            "tasks: [{q.jsonl: {choices: [a]}}]",
            "tasks: choices of q.jsonl must be the name of a column or a list of such names",
        ),
        ("tasks: [3]", "tasks: an entry must be a name or one {name: {fewshots: 5}}, not 3"),
        ("tasks: 3", "tasks: must be a list of task names, not 3"),
        ("token: secret-value", "token: secrets don't belong in parameters"),
        ("alpha: 1\nalpha: 2", "alpha: is given twice, as 1 and as 2"),
        ("alpha: [", "isn't valid YAML"),
        ("revision: 2024-99-99", "isn't valid YAML"),
        ("seed: 99999999999999999999", "seed: must be at most"),
        ("tasks: {gsm8k: 0}", "tasks: gsm8k must have options like {fewshots: 0}, not 0"),
        ("tasks: {winogrande: 5}", "tasks: winogrande must have options like {fewshots: 0}, not 5"),
        ("- alpha", "must hold one `key: value` a line"),
        ("dataset_subset: train\ndataset_split: test", "dataset_subset: says 'train' and dataset_split 'test'"),
        ('model_path: "a\\0b"', "model_path: must be a text without control characters, not 'a\\x00b'"),
        ('tasks: ["a\\nb.txt"]', "tasks: a name must be a text without control characters, not 'a\\nb.txt'"),
        (f"dataset: {'x' * 2000}", "dataset: must be a text of at most 1000 characters, not 'xxx"),
        (
            f"model_path: there/{'é' * 128}",
            "model_path: must be a text of which no name of a file or folder is longer than 255",
        ),
        ("model_path: !!binary eA==", "model_path: must be a text, not b'x'"),
        ("alpha: !!float x", "isn't valid YAML"),
        ("seed: !!timestamp x", "isn't valid YAML"),
        (f"alpha: {'[' * 30}{']' * 30}", "nests more than 20 lists and mappings"),
        ("alpha: &a [*a]", "has the alias *a without a complete value before it"),
    ],
)
def test_each_mistake_is_named_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    message = problems_of(tmp_path, text)
    assert said in message
    assert "secret-value" not in message
    assert len(message.splitlines()) == 1
    assert message.startswith(str(tmp_path / "config.yaml"))


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    message = problems_of(tmp_path, "alpha: x\nbatch_size: 0\nfoo: 1\nmethod: foo\nnum_A: 0")
    assert sorted(line.split(": ")[1] for line in message.splitlines()) == ["alpha", "batch_size", "foo", "method", "num_A"]


def billion_laughs(levels: int) -> str:
    lines = [f"x{level + 1}: &x{level + 1} [{', '.join([f'*x{level}'] * 10)}]" for level in range(levels)]
    return "\n".join(["x0: &x0 [lol]", *lines])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (billion_laughs(30), "has more than 10000 values, aliases included"),
        ("alpha: " + "[" * 100_000, "nests more than 20"),
        ("alpha: " + "x" * 10_000_000, "is larger than 256 KiB"),
        ("# " + "x" * 10_000_000, "is larger than 256 KiB"),
        ("tasks: [" + "a, " * 50_000 + "]", "has more than 10000 values"),
    ],
    ids=["aliases of aliases", "brackets", "string", "comment", "list"],
)
def test_a_config_that_is_too_large_is_refused_before_anything_is_built_from_it(tmp_path: Path, text: str, said: str) -> None:
    message = problems_of(tmp_path, text)
    assert said in message
    assert len(message) < 300


def test_a_long_value_is_cut_wherever_it_stands(tmp_path: Path) -> None:
    long = "x" * 20_000
    for text in (
        f"{long}: 1", f"alpha: {long}", f"alpha: [{long}, [{long}]]", f"method: {long}", f"selection: {long}", f"diag: {long}",
        f"tasks: {{piqa: {long}}}", f"tasks: {{piqa: {{{long}: 1}}}}", f"tasks: [[{long}]]", f"tasks: [{long}]",
        f"diag: true\ntransform: {long}", f"alpha: 1\nalpha: {long}", f"alpha: '{long}",
        f"dataset_subset: {long}\ndataset_split: a",
    ):  # fmt: skip
        assert all(len(line) < 500 for line in problems_of(tmp_path, text).splitlines()), text[:20]


def test_aliases_are_allowed(tmp_path: Path) -> None:
    params = read_params(written(tmp_path, "tasks: [{piqa: &five {fewshots: 5}}, {boolq: *five}]"))
    assert [task.fewshots for task in params.tasks] == [5, 5]


def test_values_of_the_command_line_are_held_to_the_same_limits() -> None:
    assert parse_value("[" * 50_000) == "[" * 50_000
    assert parse_value(f"{{{billion_laughs(30)}}}".replace("\n", ", ")).startswith("{x0")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_config_that_is_no_regular_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml" if kind != "device" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ParameterError, match=f"{path}: is no regular file; give the path of a YAML file"):
        read_params(path)


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"config\.yaml: a key is no readable text \(.\); docs/parameters\.md lists"):
        read_params(written(tmp_path, '{"\\ud800": 1}'))


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"nowhere\.yaml: there is no such file"):
        read_params(tmp_path / "nowhere.yaml")


def test_numbers_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    assert read_params(written(tmp_path, "alpha: 1e-6")).alpha == 1e-6


def test_equal_values_of_a_repeated_key_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "replaceme"):
        assert read_params(written(tmp_path, "layers_to_skip: 4\nalpha: 0\nlayers_to_skip: 4 # again")).layers_to_skip == 4
    assert "layers_to_skip is given twice with the same value" in caplog.text


def test_a_file_with_only_published_keys_is_valid(tmp_path: Path) -> None:
    text = (
        "method: lstsq\nmodel_path: some/model\ndataset: Open-Orca/SlimOrca\ndataset_column: text\nbatch_size: 8\n"
        "max_length: 1024\nuse_4bit: True\nlayers_to_skip: 8\nmin_distance_layer: 20\nmerge_consecutive: True\nalpha: 0\n"
        "num_A: 1\nsave_path: null\nsave_transform_only: True\n"
    )
    params = read_params(written(tmp_path, text), methods=METHODS)
    assert (params.min_distance_layer, params.use_4bit, params.save_transform_only) == (20, True, True)


@pytest.mark.parametrize("name", ["lstsq", "uidl"])
def test_published_configs_are_read(name: str) -> None:
    params = read_params(ROOT / "reproduce" / f"{name}.yaml", methods=METHODS)
    assert (params.method, params.layers_to_skip, params.dataset_size, params.dataset_split) == (name, 8, 8000, "train")


def test_the_published_cosine_config_is_the_published_cosine() -> None:
    params = read_params(ROOT / "reproduce" / "cosine.yaml", methods=METHODS)
    assert (params.method, params.loss, params.accurate, params.transform) == ("cosine", "cosine", False, "dense")
    assert (params.solver, params.learning_rate, params.tokens_per_step, params.epochs) == ("adam", 1e-4, 1024, 10)
    assert params.start == "identity"


@pytest.mark.parametrize(("key", "transform"), [("diag", "diagonal"), ("two_vectors", "two_vectors"), ("thri", "triangular")])
def test_published_structures_are_transforms(tmp_path: Path, key: str, transform: str) -> None:
    for method in ("lstsq", "cosine"):
        assert read_params(written(tmp_path, f"method: {method}\n{key}: true"), methods=METHODS).transform == transform
    assert read_params(written(tmp_path, f"{key}: false\ntransform: diagonal")).transform == "diagonal"


@pytest.mark.parametrize(
    ("spelled", "solver"),
    [("Adam", "adam"), ("CG", "cg"), ("L-BFGS", "lbfgs"), ("l-bfgs-b", "lbfgs"), ("trust-ncg", "trust_region")],
)
def test_published_solvers_are_ours_in_scipys_spelling(
    tmp_path: Path, spelled: str, solver: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "replaceme"):
        assert read_params(written(tmp_path, f"method: cosine\nsolver: {spelled}"), methods=METHODS).solver == solver
    assert ("is read as" in caplog.text) == (spelled.lower() != solver)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("solver: lbfgs", "solver belongs to method cosine and is ignored"),
        ("method: cosine\nloss: mse\naccurate: true", "accurate belongs to loss cosine of method cosine and is ignored"),
        ("method: cosine\nsolver: cg\nepochs: 3", "epochs belongs to solver adam of method cosine and is ignored"),
        ("method: cosine\nmax_iterations: 3", "max_iterations belongs to solvers lbfgs, cg and trust_region"),
        ("method: cosine\nepochs: 3", ""),
        ("method: lstsq\nsolver: adam\nloss: cosine\naccurate: false", ""),
    ],
)
def test_a_key_without_effect_is_noted(tmp_path: Path, text: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "replaceme"):
        read_params(written(tmp_path, text), methods=METHODS)
    ignored = [line for line in caplog.messages if not line.startswith("preset ")]
    assert said in "\n".join(ignored)
    assert said or not ignored


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    assert read_params(written(tmp_path, "alpha: 1"), {"alpha": 2.0}).alpha == 2.0


def test_an_override_wins_over_a_published_key_of_the_file(tmp_path: Path) -> None:
    assert read_params(written(tmp_path, "dataset_subset: train"), {"dataset_split": "test"}).dataset_split == "test"


def test_a_mistake_is_blamed_on_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(written(tmp_path, "batch_size: 0"), {"alpha": "x"})
    assert sorted(line.split(": ")[:2] for line in caught.value.problems) == [
        [str(tmp_path / "config.yaml"), "batch_size"],
        ["command line", "alpha"],
    ]


def test_params_yaml_holds_every_key() -> None:
    from ruamel.yaml import YAML

    stated = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(stated) == set(FIELDS)


def test_the_reference_page_is_made_from_the_definitions() -> None:
    assert (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8") == reference()


def test_every_parameter_is_described() -> None:
    assert all(field.description and field.description.endswith(".") for field in FIELDS.values())


@pytest.mark.parametrize(
    ("text", "given", "transform"),
    [
        ("diag: true", {"diag": False}, "dense"),
        ("diag: true", {"thri": True}, "triangular"),
        ("transform: joint", {"diag": True}, "diagonal"),
        ("transform: joint", {"diag": False}, "joint"),
        ("two_vectors: true", {"transform": "refit"}, "refit"),
    ],
)
def test_the_command_line_wins_under_whatever_name(text: str, given: dict[str, object], transform: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert read_params(tmp_path / "config.yaml", given).transform == transform
