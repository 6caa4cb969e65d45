"""Experiments side by side: what DVC knows of them, the table, the pictures, and the speed of what is in DVC's cache."""

import json
import random
import subprocess
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.progress import align
from replaceme.cli import experiments
from replaceme.cli.main import main
from replaceme.models.model import Model
from replaceme.report.experiment_figures import draw_methods, draw_quality
from replaceme.report.experiment_table import (
    TABLE_WIDTH,
    UNSEEN,
    Experiment,
    format_comparison,
    format_markdown,
    format_setting,
    tabulate_experiments,
)
from replaceme.report.theme import to_png
from tests.helpers import call

DOZEN = (
    "uidl", "shortgpt", "sleb", "laco", "llm_streamline", "slicegpt", "llm_pruner", "lstsq", "cosine", "linearpatch",
    "prune_and_comp", "ghosted",
)  # fmt: skip
TRAINING = ("llm_streamline",)
SETTINGS = {
    "transform": "dense", "repair": False, "selection": None, "layers_to_skip": 8, "alpha": 0.0, "laco_layers": 7,
    "solver": "adam", "loss": "cosine", "accurate": False, "l1_ratio": 0.5, "heal_tokens": 0,
}  # fmt: skip


def made(
    method: str = "lstsq",
    number: int = 0,
    ratio: float | None = 1.8,
    kept: float | None = 77.2,
    removed: float = 21.05,
    figures: Any = (),
    **settings: Any,
) -> Experiment:
    """Return a finished experiment that is scored on one text and, unless nothing is kept, on one task."""
    accuracy = (
        {} if kept is None else {"retention_percent": kept, "retention_stderr": 2.3, "accuracy": {"last": {"pruned": 0.4}}}
    )
    perplexity = {} if ratio is None else {"perplexity": {"wiki": {"ratio": ratio, "pruned": 18.4152 * ratio}}}
    results = {
        "parameters": {"removed_percent": removed, "pruned": 106194240, "dense": 134515008},
        "summary": {"seconds": 130.4, "memory_gb": 1.917},
        **perplexity, **accuracy, **dict(figures),
    }  # fmt: skip
    return Experiment(
        f"gyral-le{number:02d}", f"{number:07x}", SETTINGS | {"method": method} | settings, results, f"sum {number}"
    )


def dozen() -> list[Experiment]:
    """Return what a comparison of all methods comes to, one of them with two settings."""
    chance = random.Random(0)
    ones = [made(method, n, chance.uniform(1.5, 9), chance.uniform(50, 90)) for n, method in enumerate(DOZEN)]
    return [*ones, made("lstsq", 12, 1.62, 81.3, transform="joint", repair=True)]


def table_of(*made: Experiment) -> tuple[list[dict[str, str]], list[str]]:
    """Return the cells by heading, and the notes."""
    (head, *rows), notes = format_comparison(tabulate_experiments(made))
    return [dict(zip(head, row, strict=True)) for row in rows], notes


def marks(**texts: tuple[int, int]) -> dict[str, Any]:
    """Return figures that say of each text whether it, or another of its domain, was calibrated on."""
    return {"calibration_text": {name: {"seen": seen, "same_domain": domain} for name, (seen, domain) in texts.items()}}


# --- What DVC knows -----------------------------------------------------------------------------------------------------


def test_experiments_are_read_from_git_with_their_settings_and_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call(main, "compare", code=2)
    assert "error: compare: DVC says: you are not inside of a DVC repository" in capsys.readouterr().err
    (tmp_path / "metrics").mkdir()
    texts = {
        "dvc.yaml": "metrics: [metrics/summary.json, metrics/evaluation.json]\nparams: [params.yaml]\n",
        "params.yaml": "loss: cosine\nalpha: 1e-6\nrepair: true\ntasks: [wikipedia]\n",
        "metrics/summary.json": '{"seconds": 12.5}',
        "metrics/evaluation.json": '{"perplexity": {"wiki": {"ratio": 1.5}}}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    # What ``dvc init`` makes.
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    for command in ("git init -q -b main", "git add .", "git -c user.name=a -c user.email=b commit -qm first"):
        subprocess.run(command.split(), check=True)
    (tmp_path / "metrics" / "evaluation.json").write_text('{"perplexity": {"wiki": {"ratio": 9.5}}}', encoding="utf-8")
    (found,) = experiments.read_experiments([], 1)
    assert found.name == "main"
    assert found.settings == {"loss": "cosine", "alpha": 1e-6, "repair": True, "tasks": ["wikipedia"]}
    assert found.figures == {"perplexity": {"wiki": {"ratio": 1.5}}, "summary": {"seconds": 12.5}}
    call(main, "compare", code=2)
    assert "error: compare: no experiment has scores yet; run some" in capsys.readouterr().err
    call(main, "compare", "--rev", "nowhere", code=2)
    assert "unknown Git revision 'nowhere'" in capsys.readouterr().err


def test_an_experiment_that_runs_is_left_out_with_the_scores_of_the_commit_it_started_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def state(name: str) -> dict[str, Any]:
        return {"rev": name * 10, "name": name, "data": {"params": {}, "metrics": {}, "outs": {}}}

    runs = [{"revs": [state(f"is-{word}")], "executor": {"state": word}} for word in ("queued", "running", "failed", "success")]
    shown = [state("workspace") | {"rev": "workspace", "experiments": None}, state("main") | {"experiments": runs}]
    done = subprocess.CompletedProcess([], 0, json.dumps(shown), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert [each.name for each in experiments.read_experiments([], 1)] == ["main", "is-success"]


# --- The table ----------------------------------------------------------------------------------------------------------


def test_a_row_says_what_was_removed_and_kept_and_what_it_cost() -> None:
    (row,), notes = table_of(made())
    assert row == {
        "experiment": "* gyral-le00", "method": "lstsq", "removed": "21.1 %", "params": "106.2 M", "kept": "77.2 ± 2.3 %",
        "perplexity": "33.15 × 1.80", "time": "2.17 min", "memory": "1.9 GB",
    }  # fmt: skip
    assert notes == []


def test_a_dozen_methods_fit_a_terminal_with_their_speed() -> None:
    comparison = tabulate_experiments(dozen())
    comparison.table["prefill_speedup"], comparison.table["decode_speedup"] = 1.3912, 1.284
    rows, notes = format_comparison(comparison)
    assert max(map(len, align(rows).splitlines())) <= TABLE_WIDTH
    assert [row[-2:] for row in rows] == [["prefill", "decode"], *[["× 1.39", "× 1.28"]] * 13]
    assert notes == ["transform: joint in gyral-le12, else dense", "repair: true in gyral-le12, else false"]


def test_values_are_as_params_yaml_writes_them_and_break_no_markdown_table() -> None:
    nested = ["it is", {"it's.txt": {"share": 0.5, "split": None}}]
    assert format_setting(nested) == "[it is, {it's.txt: {share: 0.5, split: null}}]"
    assert [format_setting(value) for value in (True, 1, 8.0, 0.25, None, "[odd")] == ["true", "1", "8", "0.25", "null", "[odd"]
    assert format_markdown([["a|b"], ["c"]], ["d: e"]) == "| a\\|b |\n| --- |\n| c |\n\nd: e\n"


def test_a_setting_counts_only_for_those_that_use_it() -> None:
    own = [
        made("laco", 0, laco_layers=2, kept=60.0), made("uidl", 1, kept=50.0), made("lstsq", 2),
        made("cosine", 3, solver="lbfgs", kept=78.0), made("cosine", 4, solver="cg", kept=79.0),
        made("cosine", 5, solver="cg", kept=80.0, loss="mse"),
    ]  # fmt: skip
    assert tabulate_experiments(own).settings == ["loss", "solver"]
    rows, _ = table_of(*own)
    assert [(row["method"], row["loss"], row["solver"]) for row in rows] == [
        ("cosine", "mse", "cg"), ("cosine", "cosine", "cg"), ("cosine", "cosine", "lbfgs"), ("lstsq", "", ""),
        ("laco", "", ""), ("uidl", "", ""),
    ]  # fmt: skip


def test_the_best_of_each_size_comes_first() -> None:
    own = [
        made("uidl", n, kept=90.0 - n, removed=size, layers_to_skip=size)
        for n, size in enumerate((10.5, 21.05, 20.4, 21.05, 10.5))
    ]
    assert [row["experiment"].strip(" *") for row in table_of(*own)[0]] == [f"gyral-le0{n}" for n in (0, 4, 1, 2, 3)]
    bare = [made("uidl", n, ratio=ratio, kept=None, alpha=float(n)) for n, ratio in enumerate((3.0, 2.0, 2500.0))]
    assert [row["perplexity"].split(" × ")[1] for row in table_of(*bare)[0]] == ["2.00", "3.00", "2,500"]


SMALL = st.integers(0, 4).map(float)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=9), st.booleans())
def test_a_star_marks_what_no_other_experiment_beats(points: list[tuple[float, float]], by_accuracy: bool) -> None:
    own = [
        made(number=n, ratio=1 + value, kept=value if by_accuracy else None, removed=removed, alpha=float(n))
        for n, (removed, value) in enumerate(points)
    ]
    sign = 1 if by_accuracy else -1
    beaten = {
        f"gyral-le{n:02}"
        for n, (removed, value) in enumerate(points)
        for other_removed, other in points
        if other_removed >= removed and sign * other >= sign * value and (other_removed, other) != (removed, value)
    }
    table = tabulate_experiments(own).table
    assert set(table.loc[~table["best"], "experiment"]) == beaten


def test_methods_are_compared_on_text_that_none_of_them_calibrated_on() -> None:
    news = {"wiki": {"ratio": 1.8}, "news": {"ratio": 3.0}}
    unseen = {"perplexity": news, **marks(news=(0, 0), wiki=(0, 0))}
    own = [
        made("lstsq", 1, dataset=["wiki", "self"], figures={"perplexity": news, **marks(news=(0, 0), wiki=(1, 0))}),
        made("lstsq", 2, dataset="self", figures={**unseen, "perplexity": {**news, "news": {"ratio": 2.0}}}),
        made("uidl", 3, figures=unseen),
    ]
    comparison = tabulate_experiments(own)
    assert comparison.quality == UNSEEN
    rows, notes = table_of(*own)
    assert [row["unseen perplexity"] for row in rows] == ["× 2.00", "× 3.00", "× 3.00"]
    assert {row["experiment"]: row["seen"] for row in rows}["  gyral-le01"] == "wiki"
    assert "seen: tasks that are scored on calibration text" in notes
    said = "unseen: news, which no experiment here has seen; unseen_ratio is over a run's own"
    assert said in notes
    assert said not in table_of(*(replace(each, figures={**each.figures, "unseen": {"texts": 1}}) for each in own))[1]
    assert list(comparison.name_series()) == [
        "lstsq, dataset self",
        "lstsq, dataset [wiki, self]",
        "uidl",
    ]


def test_each_text_and_what_is_kept_above_chance_has_a_column_and_the_file_has_all_figures() -> None:
    figures = {
        "retention_above_chance_percent": 61.25,
        "perplexity": {"wiki": {"ratio": 1.8}, "own": {"ratio": 1.2}},
        "word_perplexity": {"wiki": {"ratio": 2.5}, "harness": {"ratio": 1.5}},
        "accuracy": {"retrieval_exact": {"pruned": 0.125}},
    }
    (row,), _ = table_of(made(figures=figures))
    assert [row[f"{name} perplexity"] for name in ("wiki", "own", "harness")] == ["× 1.80", "× 1.20", "× 1.50"]
    assert row["above chance"] == "61.2 %"
    assert list(tabulate_experiments([made(figures=figures)]).table["accuracy.retrieval_exact.pruned"]) == [0.125]


def test_without_a_score_in_common_nothing_is_compared() -> None:
    with pytest.raises(ParameterError, match="no score in common"):
        tabulate_experiments([made(kept=None), made(kept=None, ratio=None, figures={"perplexity": {"own": {"ratio": 2.0}}})])


def test_what_trains_is_marked_in_all_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is exported counts: of three results that healing was asked for, one has its weights.
    outcomes = [{"heal": {"training_tokens": 2}}, {"heal": {"training_tokens": 0}}]
    outcomes += [outcomes[0] | {"check": {"plain_removal_is_exported": True}}]
    healed = [made(number=13 + n, ratio=1.7 + n, figures=figures, heal_tokens=2) for n, figures in enumerate(outcomes)]
    monkeypatch.setattr(experiments, "read_experiments", lambda revisions, number: [*dozen(), *healed])
    output = tmp_path / "experiments"
    experiments.compare(["--output", str(output)])
    assert {path.name for path in output.iterdir()} == {"experiments.csv", "experiments.md", "quality.png", "methods.png"}
    for text in (capsys.readouterr().out, (output / "experiments.md").read_text(encoding="utf-8")):
        assert text.count("(trained)") == len(TRAINING) + 1
        assert all(f"{method} (trained)" in text for method in (*TRAINING, "lstsq"))
    lines = [line.split(",") for line in (output / "experiments.csv").read_text(encoding="utf-8").splitlines()]
    assert lines[1][lines[0].index("parameters.pruned")] == "106194240"


# --- The pictures -------------------------------------------------------------------------------------------------------


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def names_of(figure: Figure) -> list[str]:
    """Return the methods' names in their picture, from top to bottom."""
    return [label.get_text().split("\n")[0].split(",")[0] for label in figure.axes[0].get_yticklabels()]


def test_experiments_that_differ_in_size_alone_are_a_series() -> None:
    ours = {"transform": "joint", "repair": True, "selection": "loss"}
    own = [
        made(method, n, layers / 4, kept=None, layers_to_skip=layers, removed=removed, **settings)
        for n, (method, settings) in enumerate((("lstsq", ours), ("lstsq", {}), ("uidl", {})))
        for layers, removed in ((4, 10.5), (8, 21.05))
    ]
    figure = draw_quality(tabulate_experiments(own))
    assert legend_of(figure)[2:] == [
        "lstsq, selection loss, transform joint, repair\ntrue", "lstsq, selection null, transform dense", "uidl"
    ]  # fmt: skip
    joined = [line for line in figure.axes[0].lines if len(line.get_path().vertices) == 2 and line.get_alpha()]
    assert len({line.get_color() for line in joined}) == 3
    assert {text.get_text() for text in figure.axes[0].texts} == {"layers 4", "layers 8"}


def test_methods_are_drawn_where_most_are_of_one_size_and_by_perplexity_where_all_have_it() -> None:
    smaller = [made("uidl", 20 + n, removed=10.5 + n / 2) for n in range(2)]
    comparison = tabulate_experiments([*dozen(), *smaller])
    figure = draw_methods(comparison)
    assert figure is not None
    ordered = sorted(dozen(), key=lambda each: each.figures["perplexity"]["wiki"]["ratio"])
    trained = {method: f"{method} (trained)" for method in TRAINING}
    assert names_of(figure) == [trained.get(method := each.settings["method"], method) for each in ordered]
    assert figure.axes[0].get_xlabel() == "perplexity of wiki (times dense)"
    assert draw_methods(tabulate_experiments([made(number=n, alpha=float(n)) for n in range(3)])) is None
    figure = draw_methods(tabulate_experiments([made("uidl"), made("lstsq", 1, ratio=None)]))
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "accuracy kept (% of dense)"


@pytest.mark.parametrize("widest", [400.0, 1.6])
def test_names_and_figures_of_the_methods_cover_nothing(widest: float) -> None:
    chance = random.Random(widest)
    own = [made(method, n, chance.uniform(0.97, widest), kept=None) for n, method in enumerate(DOZEN)]
    comparison = tabulate_experiments([*own, made("lstsq", 12, widest, kept=None, transform="joint", repair=True)])
    figure = draw_methods(comparison)
    assert figure is not None
    before = to_png(figure)
    texts = [*figure.axes[0].texts, *figure.axes[0].get_yticklabels()]
    boxes, edge = [text.get_window_extent() for text in texts], figure.bbox
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1 for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert (again := draw_methods(comparison)) is not None
    assert to_png(again) == before


# --- Speed --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models that were measured; nothing is computed, and DVC's cache has all but that of the ninth experiment."""
    models: list[Model] = []

    class Files:
        def __init__(self, rev: str) -> None:
            self.revision = rev

        def get(self, path: str, target: str, recursive: bool = False) -> None:
            if self.revision == f"{9:07x}":
                raise KeyError(path)

    def measure(params: Params, dense: Model, pruned: Model) -> dict[str, Any]:
        models.append(pruned)
        times = {"dense": 1.5, "pruned": 1.0, "speedup": 1.5}
        return {"prefill_seconds": times, "decode_seconds_per_token": times, "weights": {}}

    monkeypatch.setattr("dvc.api.DVCFileSystem", Files)
    monkeypatch.setattr("replaceme.pipeline.speed.measure_speed", measure)
    monkeypatch.setattr("replaceme.models.find.recorded_model", lambda params, path: Model(path, "dense"))
    return models


def test_only_new_models_are_measured_and_nothing_stays_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[Model],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("replaceme.cli.experiments.logger.propagate", True)
    own = [made("uidl", 1, device="cpu"), made("sleb", 2, device="cpu", trust_remote_code=True), made("laco", 9, device="cpu")]
    monkeypatch.setattr(experiments, "read_experiments", lambda revisions, number: own)
    output = tmp_path / "experiments"
    for arguments in (["--speed"], [], ["--speed"]):
        experiments.compare([*arguments, "--output", str(output)])
        printed = capsys.readouterr().out.splitlines()
        assert (printed[0].split()[-2:] == ["prefill", "decode"]) == bool(arguments)
        assert sum(line.endswith("× 1.50  × 1.50") for line in printed) == 2 * bool(arguments)
    assert [(model.name, model.trust_remote_code) for model in measured] == [("gyral-le01", False), ("gyral-le02", True)]
    assert (
        "gyral-le09: its speed is left out: its model is not in DVC's cache (KeyError); `dvc exp apply gyral-le09`"
        in caplog.text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]
    times = json.loads((output / "speed.json").read_text(encoding="utf-8"))
    assert [time["model"] for time in times] == ["sum 1", "sum 2"]
    # In another setting, the same model has other times.
    (output / "speed.json").write_text(json.dumps([{**time, "device": "NVIDIA H100"} for time in times]), encoding="utf-8")
    experiments.compare(["--speed", "--output", str(output)])
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
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
    call(main, "compare", *arguments, code=2)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {said}")
    assert len(error) < 310
