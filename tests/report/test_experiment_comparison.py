"""Experiments side by side: the table, what stands in it for people, the pictures, and the speed of what is in DVC's cache."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from replaceme import experiments
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.progress import align
from replaceme.methods.method import Method, drop
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from replaceme.report.experiment_comparison import UNSEEN, cell, comparison_of
from replaceme.report.experiment_table import COLUMNS, markdown, shown
from replaceme.report.methods_figure import ROWS, Row, methods_figure
from replaceme.report.theme import DARK, png
from replaceme.report.tradeoff import Point, quality_against_size
from tests.helpers import call

DOZEN = (
    "uidl", "shortgpt", "sleb", "laco", "llm_streamline", "slicegpt", "llm_pruner", "lstsq", "cosine", "linearpatch",
    "prune_and_comp", "ghosted",
)  # fmt: skip
TRAINING = ("llm_streamline", "llm_pruner", "ghosted")
Record = dict[str, Any]


def record(method: str = "lstsq", number: int = 0, ratio: float = 1.8, kept: float | None = 77.2, **others: Any) -> Record:
    """Return an experiment as ``dvc.api.exp_show`` does: numbers as floats, truth values and null as words."""
    accuracy = {} if kept is None else {"retention_percent": kept, "retention_stderr": 2.3, "accuracy.last.pruned": 0.4}
    return {
        "Experiment": f"gyral-le{number:02d}", "rev": f"{number:07x}", "State": None, "method": method, "transform": "dense",
        "repair": "False", "selection": "None", "layers_to_skip": 8.0, "alpha": 0.0, "laco_layers": 7.0, "solver": "adam",
        "metrics/select.json:loss": 3.5, "params.yaml:loss": "cosine", "accurate": "False", "l1_ratio": 0.5,
        "parameters.removed_percent": 21.05, "parameters.pruned": 106194240.0, "parameters.dense": 134515008.0,
        "perplexity.wiki.ratio": ratio, "perplexity.wiki.pruned": 18.4152 * ratio, "word_perplexity.wiki.ratio": 2 * ratio,
        "seconds": 130.4, "peak_memory_bytes": 1.917e9, "trained": str(method in TRAINING), **accuracy, **others,
    }  # fmt: skip


def dozen() -> list[Record]:
    """Return what a comparison of all methods comes to, one of them with two settings."""
    chance = random.Random(0)
    made = [record(method, n, chance.uniform(1.5, 9), chance.uniform(50, 90)) for n, method in enumerate(DOZEN)]
    made[7] |= {"selection": "loss"}
    return [*made, record("lstsq", 12, 1.62, 81.3, transform="joint", repair="True", selection="loss", seconds=7260.0)]


def table_of(records: list[Record]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the cells by heading, and the notes."""
    (head, *rows), notes = shown(comparison_of(records))
    return [dict(zip(head, row, strict=True)) for row in rows], notes


def test_a_record_has_the_summary_from_dvc_and_all_other_figures_from_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    texts = {
        "dvc.yaml": "metrics: [metrics/summary.json]\nparams: [params.yaml]\n",
        "params.yaml": "trained: setting\n",
        "metrics/summary.json": '{"retention": 80.5}',
        "metrics/evaluation.json": '{"perplexity": {"wiki": {"ratio": 1.5}}}',
        "metrics/compression.json": '{"seconds": 12.5, "trained": true}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    dvc = f"{sys.executable} -m dvc init -q"
    for command in ("git init -q -b main", dvc, "git add .", "git -c user.name=a -c user.email=b commit -qm first"):
        subprocess.run(command.split(), check=True)
    (tmp_path / "metrics" / "evaluation.json").write_text('{"perplexity": {"wiki": {"ratio": 9.5}}}', encoding="utf-8")
    (found,) = (each for each in experiments._recorded(None, 1) if each["rev"] != "workspace")
    assert (found["retention"], found["perplexity.wiki.ratio"], found["seconds"]) == (80.5, 1.5, 12.5)
    assert found["trained"] == "setting"  # what DVC says of a name goes first


# --- The table ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_above_chance_and_exact_answers_are_compared_too() -> None:
    others = {"retention_above_chance_percent": 61.25, "accuracy.retrieval_exact.pruned": 0.125}
    comparison = comparison_of([record(number=n, alpha=float(n), **others) for n in range(2)])
    assert list(comparison.table["retrieval_exact"]) == [0.125] * 2
    rows, _ = shown(comparison)
    assert [row[rows[0].index("above chance")] for row in rows[1:]] == ["61.2 %"] * 2


def test_a_row_says_what_was_removed_and_kept_and_what_it_cost() -> None:
    (row,), notes = table_of([record()])
    assert row == {
        "experiment": "* gyral-le00", "method": "lstsq", "removed": "21.1 %", "params": "106.2 M", "kept": "77.2 ± 2.3 %",
        "perplexity": "33.15 × 1.80", "time": "2.2 min", "memory": "1.9 GB",
    }  # fmt: skip
    assert notes == []


def test_a_dozen_methods_fit_a_terminal_with_their_speed() -> None:
    comparison = comparison_of(dozen())
    comparison.table["prefill_speedup"], comparison.table["decode_speedup"] = 1.3912, 1.284
    rows, notes = shown(comparison)
    text = align(rows)
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert rows[0][-2:] == ["prefill", "decode"]
    assert all(row[-2:] == ["× 1.39", "× 1.28"] for row in rows[1:])
    assert notes == [
        "selection: loss in lstsq, else null",
        "transform: joint in gyral-le12, else dense",
        "repair: true in gyral-le12, else false",
    ]


def test_settings_make_columns_where_there_is_room() -> None:
    plain = [{key: value for key, value in each.items() if key not in ("seconds", "peak_memory_bytes")} for each in dozen()]
    rows, notes = table_of(plain)
    assert {row["experiment"].strip(" *"): row["transform"] for row in rows}["gyral-le12"] == "joint"
    assert notes == ["selection: loss in lstsq, else null"]


def test_a_wide_setting_leaves_the_others_their_columns() -> None:
    texts = str([f"text-{number:03}" for number in range(12)])
    made = [record(number=1, dataset=texts, repair="True"), record(number=2, dataset="self", kept=None), record("uidl", 3)]
    rows, notes = table_of([each | {"retention_percent": None} for each in made])
    assert "dataset" not in rows[0]
    assert {row["repair"] for row in rows if row["method"] == "lstsq"} == {"true", "false"}
    assert any(note.startswith("dataset: ") and texts.replace("'", "") in note for note in notes)
    assert "kept" not in rows[0]


def test_a_cell_is_as_params_yaml_writes_it() -> None:
    assert cell("['it is', {\"it's.txt\": {'share': 0.5, 'split': None}}]") == "[it is, {it's.txt: {share: 0.5, split: null}}]"
    assert [cell(value) for value in ("True", True, 0.25, None, "[odd")] == ["true", "true", "0.25", "", "[odd"]


def test_of_one_method_every_setting_that_differs_is_a_column() -> None:
    rows, notes = table_of([record(number=n, alpha=10.0**n, ratio=2.0 + n, kept=80.0 - n) for n in range(3)])
    assert [row["alpha"] for row in rows] == ["1", "10", "100"]
    assert notes == []


def test_a_setting_counts_only_for_those_that_use_it() -> None:
    made = [
        record("laco", 0, laco_layers=2.0, kept=60.0), record("uidl", 1, kept=50.0), record("lstsq", 2),
        record("cosine", 3, solver="lbfgs", kept=78.0), record("cosine", 4, solver="cg", kept=79.0),
        record("cosine", 5, solver="cg", kept=80.0, **{"params.yaml:loss": "mse"}),
    ]  # fmt: skip
    comparison = comparison_of(made)
    assert comparison.settings == ("loss", "solver")
    rows, _ = table_of(made)
    assert [(row["method"], row["loss"], row["solver"]) for row in rows] == [
        ("cosine", "mse", "cg"), ("cosine", "cosine", "cg"), ("cosine", "cosine", "lbfgs"), ("lstsq", "", ""),
        ("laco", "", ""), ("uidl", "", ""),
    ]  # fmt: skip


def test_the_best_of_each_size_comes_first() -> None:
    sizes = [10.5, 21.05, 20.4, 21.05, 10.5]
    made = [
        record("uidl", n, kept=90.0 - n, **{"parameters.removed_percent": size, "layers_to_skip": size})
        for n, size in enumerate(sizes)
    ]
    rows, _ = table_of(made)
    assert [row["experiment"].strip(" *") for row in rows] == [f"gyral-le0{n}" for n in (0, 4, 1, 2, 3)]
    bare = [record("uidl", n, ratio=ratio, kept=None, alpha=float(n)) for n, ratio in enumerate((3.0, 2.0, 2500.0))]
    rows, _ = table_of(bare)
    assert [row["perplexity"].split(" × ")[1] for row in rows] == ["2.00", "3.00", "2,500"]


def test_an_experiment_that_runs_is_left_out_with_the_scores_of_the_commit_it_started_from() -> None:
    rows, _ = table_of(
        [record(number=1), record("uidl", 2), record("laco", 3, State="Running"), record(number=4, State="Failed")]
    )
    assert {row["method"] for row in rows} == {"lstsq", "uidl"}


def test_methods_are_compared_on_unseen_text_where_there_is_some() -> None:
    unseen = {f"calibration_text.{task}.{mark}": 0.0 for task in ("news", "wiki") for mark in ("seen", "same_domain")}
    seen = unseen | {"calibration_text.wiki.seen": 1.0}
    lists = {
        "dataset": "['wiki', 'self']",
        "tasks": "['news', 'wiki']",
        "perplexity.news.ratio": 3.0,
        "perplexity.news.pruned": 60.0,
    }
    other = lists | {"dataset": "self", "tasks": "['wiki', 'news']", "perplexity.news.ratio": 2.0}
    made = [record("lstsq", 1, **lists, **seen), record("lstsq", 2, **other, **unseen), record("uidl", 3, **lists, **unseen)]
    rows, column = comparison_of(made).same_size()
    assert column == UNSEEN
    assert [row.quality for row in rows] == pytest.approx([2.0, 3.0, 3.0])
    assert sorted(row.settings for row in rows) == ["", "dataset [wiki, self]", "dataset self"]


def test_experiments_that_differ_in_size_alone_are_a_series() -> None:
    sizes = {4.0: 10.5, 8.0: 21.05}
    ours: Record = {"transform": "joint", "repair": "True", "selection": "loss"}
    records = [
        record(method, kept=None, layers_to_skip=layers, **{"parameters.removed_percent": percent}, **settings)
        for method, settings in (("lstsq", ours), ("lstsq", {}), ("uidl", {}))
        for layers, percent in sizes.items()
    ]
    points = comparison_of([each | {"rev": f"{number:07x}"} for number, each in enumerate(records)]).points()
    named = {"lstsq, selection loss, transform joint, repair true", "lstsq, selection null, transform dense", "uidl"}
    assert {(point.series, point.label) for point in points} == {
        (series, label) for series in named for label in ("layers 4", "layers 8")
    }
    figure = quality_against_size(points, higher_is_better=False)
    colours = [line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_alpha()]
    assert len(set(colours)) == len(named)
    # Of one size, the settings stand at the points, as before.
    assert {point.label for point in comparison_of(records[:4:2]).points()} == {
        "selection loss, transform joint, repair true", "selection null, transform dense",
    }  # fmt: skip


def test_several_texts_have_a_column_each() -> None:
    rows, _ = table_of([record(**{"perplexity.own.ratio": 1.2, "perplexity.own.pruned": 12.0})])
    assert (rows[0]["wiki perplexity"], rows[0]["own perplexity"]) == ("× 1.80", "× 1.20")


def test_times_tell_no_experiment_from_the_commit_it_started_from() -> None:
    comparison = comparison_of([record(), record(number=1, seconds=99.0, peak_memory_bytes=5e9)])
    assert list(comparison.table["experiment"]) == ["gyral-le01"]
    assert comparison.settings == ()


def test_experiments_without_a_record_of_their_cost_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Method(solve=drop("x"), trained=True)
    monkeypatch.setitem(METHODS, "uidl", nothing)
    cost = ("seconds", "peak_memory_bytes", "trained")
    old = [{key: value for key, value in record(method).items() if key not in cost} for method in ("lstsq", "uidl")]
    rows, _ = table_of(old)
    assert set(rows[0]) == {"experiment", "method", "removed", "params", "kept", "perplexity"}
    assert {row["method"] for row in rows} == {"lstsq", "uidl (trained)"}
    rows, _ = table_of([*old, record("cosine")])
    assert sorted(row["time"] for row in rows) == ["", "", "2.2 min"]


def test_memory_is_cudas_where_all_used_it() -> None:
    made = [record(number=n, alpha=float(n), peak_cuda_bytes=4.2e9) for n in range(2)]
    rows, _ = table_of(made)
    assert rows[0]["GPU"] == "4.2 GB"
    assert "memory" not in rows[0]
    rows, _ = table_of([*made, record(number=2, alpha=2.0)])
    assert {"GPU", "memory"} <= set(rows[0])


def test_without_a_score_in_common_nothing_is_compared() -> None:
    with pytest.raises(ParameterError, match="no experiment has scores yet"):
        comparison_of([record() | {"parameters.removed_percent": None}])
    other = {key.replace("wiki", "own"): value for key, value in record(kept=None).items()}
    with pytest.raises(ParameterError, match="no score in common"):
        comparison_of([record(kept=None), other])


def test_training_methods_are_marked_in_all_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "_recorded", lambda revisions, number: dozen())
    experiments._compare(None, 1, output := tmp_path / "experiments")
    assert {path.name for path in output.iterdir()} == {"experiments.csv", "experiments.md", "quality.png", "methods.png"}
    for text in (capsys.readouterr().out, (output / "experiments.md").read_text(encoding="utf-8")):
        assert text.count("(trained)") == len(TRAINING)
        assert all(f"{method} (trained)" in text for method in TRAINING)
    lines = [line.split(",") for line in (output / "experiments.csv").read_text(encoding="utf-8").splitlines()]
    method, trained = (lines[0].index(name) for name in ("method", "trained"))
    assert {line[method] for line in lines[1:] if line[trained] == "trained"} == set(TRAINING)
    assert lines[1][lines[0].index("parameters")] == "106194240"
    assert "\nselection: loss in lstsq, else null\n" in (output / "experiments.md").read_text(encoding="utf-8")


def test_a_cell_cannot_break_the_markdown_table() -> None:
    assert markdown([["a|b"], ["c"]], ["d: e"]) == "| a\\|b |\n| --- |\n| c |\n\nd: e\n"


# --- The pictures -------------------------------------------------------------------------------------------------------


def test_methods_are_compared_where_most_are_of_one_size() -> None:
    made = dozen() + [record("uidl", 20 + n, **{"parameters.removed_percent": 10.5 + n}) for n in range(2)]
    rows, column = comparison_of(made).same_size()
    assert column == "wiki perplexity"
    assert {row.method for row in rows} == set(DOZEN)
    assert {row.method for row in rows if row.trained} == set(TRAINING)
    assert {row.settings for row in rows if row.method == "lstsq"} == {"transform dense", "transform joint, repair true"}
    assert all(row.settings == "" for row in rows if row.method not in ("lstsq", "uidl"))
    assert comparison_of([record(alpha=float(n), number=n) for n in range(3)]).same_size() == ([], "")
    rows, column = comparison_of([record("uidl"), record("lstsq") | {"perplexity.wiki.ratio": None}]).same_size()
    assert column == "retention_percent"


def _texts(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


@pytest.mark.parametrize("kind", ["wide", "narrow", "accuracy", "one"])
def test_names_and_figures_of_the_methods_cover_nothing(kind: str) -> None:
    quality = {"wide": (1.2, 400.0), "narrow": (0.97, 1.6), "accuracy": (20.0, 103.0), "one": (2.0, 2.0)}[kind]
    chance = random.Random(kind)
    rows = [
        Row(
            method, 21.05, chance.uniform(*quality), method in TRAINING, "transform joint, repair True, layers 8" * (n % 4 == 0)
        )
        for n, method in enumerate([*DOZEN, "lstsq"])
    ][: 1 if kind == "one" else None]
    figure = methods_figure(rows, "quality", kind == "accuracy", DARK)
    before = png(figure)
    texts = _texts(figure)
    boxes = [super(Annotation, text).get_window_extent() for text in texts]
    edge = figure.bbox
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1 for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    names = [text.get_text() for text in texts if text.get_text() in DOZEN]
    ordered = sorted(rows, key=lambda row: row.quality, reverse=kind == "accuracy")
    assert names == [row.method for row in ordered]
    assert sum("trained" in text.get_text() for text in texts) == sum(row.trained for row in rows)
    assert png(methods_figure(rows, "quality", kind == "accuracy", DARK)) == before


def test_a_sweep_leaves_each_methods_best_in_the_picture() -> None:
    rows = [Row("lstsq", 21.0, 1.5 + n / 100, settings=f"alpha {n}") for n in range(40)]
    rows += [Row(method, 21.0, 5.0) for method in ("uidl", "sleb")]
    names = [text.get_text() for text in _texts(methods_figure(rows, "quality")) if text.get_text() in DOZEN]
    assert names == ["lstsq"] * (ROWS - 2) + ["uidl", "sleb"]


def test_the_legend_of_a_dozen_methods_stays_within_the_picture() -> None:
    points = [Point(method, f"{method} (trained)", 21.0, 50.0 + n) for n, method in enumerate(DOZEN)]
    figure = quality_against_size(points)
    png(figure)
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().height > 400


# --- Speed --------------------------------------------------------------------------------------------------------------


class Cache:
    """Files of experiments as DVC shows them; the sums of a weights file are its content."""

    def __init__(self, models: dict[str, str]) -> None:
        self.models, self.revision = models, ""
        self.taken: list[str] = []

    def open(self, revision: str) -> "Cache":
        self.revision = revision
        return self

    def find(self, path: str) -> list[str]:
        if self.revision not in self.models:
            raise KeyError(path)
        return [f"{path}/{name}" for name in ("README.md", "config.json", "model.safetensors")]

    def info(self, path: str) -> dict[str, str]:
        return {"md5": f"{path}{self.models[self.revision]}"}

    def get(self, path: str, target: str, recursive: bool = False) -> None:
        self.taken.append(f"{self.revision} {path}")
        Path(target).write_text("eval_dtype: float32\ndevice: cpu\n" if path == "params.yaml" else "", encoding="utf-8")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were measured; nothing is computed."""
    names: list[str] = []

    def measure(params: Params, dense: Model, pruned: Model) -> Record:
        names.append(pruned.name)
        times = {"dense": 1.5, "pruned": 1.0, "speedup": 1.5}
        return {"prefill_seconds": times, "decode_seconds_per_token": times, "weights": {}}

    monkeypatch.setattr("replaceme.speed.measure_speed", measure)
    monkeypatch.setattr("replaceme.models.find.recorded_model", lambda params, path: Model(path, "dense"))
    return names


def _opening(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> Cache:
    cache = Cache(models)
    monkeypatch.setattr(experiments, "_opened", cache.open)
    return cache


def test_tasks_that_are_scored_on_calibration_text_have_a_column() -> None:
    texts = {
        f"calibration_text.{task}.{key}": value
        for task in ("wiki", "last")
        for key, value in (("seen", 0.0), ("overlap", 0.01))
    }
    rows, notes = table_of([record(number=1, **texts), record("uidl", 2, **texts)])
    assert not any("seen" in row for row in rows)
    marked = texts | {"calibration_text.wiki.seen": 1.0}
    rows, notes = table_of([record(number=1, **texts), record("uidl", 2, **marked), record("laco", 3)])
    assert {row["method"]: row["seen"] for row in rows} == {"lstsq": "", "uidl": "wiki", "laco": ""}
    assert "seen: tasks that are scored on calibration text" in notes


def test_only_new_models_are_measured_and_nothing_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("replaceme.experiments.logger.propagate", True)
    cache = _opening(monkeypatch, {"1": "one", "2": "two", "3": "one"})
    (output := tmp_path / "experiments").mkdir()
    rows = [{"experiment": f"exp-{n}", "revision": str(n)} for n in (1, 2, 3, 4)]
    with caplog.at_level("INFO"):
        found = experiments.speeds_of(rows, output / "speed.json")
    assert measured == ["exp-1", "exp-2"]
    assert [bool(each) for each in found] == [True, True, True, False]
    assert "exp-4: its speed is left out: its model is not in DVC's cache (KeyError); `dvc exp apply exp-4`" in caplog.text
    cache.taken.clear()
    experiments.speeds_of(rows, output / "speed.json")
    assert measured == ["exp-1", "exp-2"]
    assert not [path for path in cache.taken if "artifacts/model" in path]
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]
    assert len(json.loads((output / "speed.json").read_text(encoding="utf-8"))) == 2


def test_another_setting_is_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    _opening(monkeypatch, {"1": "one"})
    rows, memory = [{"experiment": "exp", "revision": "1"}], tmp_path / "out" / "speed.json"
    experiments.speeds_of(rows, memory)
    (known,) = json.loads(memory.read_text(encoding="utf-8"))
    memory.write_text(json.dumps([known | {"device": "NVIDIA H100"}]), encoding="utf-8")
    experiments.speeds_of(rows, memory)
    assert measured == ["exp", "exp"]


def test_the_speed_stands_in_the_table_and_survives_a_comparison_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "_recorded", lambda revisions, number: [record("uidl", 1), record("lstsq", 2)])
    _opening(monkeypatch, {f"{1:07x}": "one"})
    output = tmp_path / "experiments"
    experiments._compare(None, 1, output, speed=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[-2:] == ["prefill", "decode"]
    assert sum(line.endswith("× 1.50  × 1.50") for line in printed) == 1
    experiments._compare(None, 1, output)
    assert "prefill" not in capsys.readouterr().out
    experiments._compare(None, 1, output, speed=True)
    assert measured == ["gyral-le01"]


def test_the_option_is_off_unless_given() -> None:
    options: Callable[..., Any] = experiments.parser().parse_args
    assert not options([]).speed
    assert options(["--speed"]).speed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num", "x" * 10_000], "command line: argument --num: invalid int value: 'xxx"),
        (["--outputs", "there"], "command line: unrecognized arguments: --outputs there."),
        (
            ["--output", "x" * 150],
            f"--output: {'x' * 150} exists and holds no comparison of experiments; choose another folder.",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x" * 150).mkdir()
    call(experiments.compare_experiments, *arguments, code=2)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {said}")
    assert len(error) < 310
