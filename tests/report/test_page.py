"""The report: what the page must and must not contain, and pictures that show the data."""

import json
import random
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from numpy.ma import masked

from replaceme.base.config import settings_yaml
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Block
from replaceme.base.workspace import Workspace
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.models.embedded import MODELS
from replaceme.pipeline import report as stage
from replaceme.report import page as page_module
from replaceme.report.figures import cut_map, layer_figures, residual_path, score_figure
from replaceme.report.page import Picture, render
from replaceme.report.published_table import LABEL, ROWS
from replaceme.report.tables import quantity
from replaceme.report.theme import DARK, LIGHT, png
from replaceme.report.tradeoff import Point, pareto_front, quality_against_size

LAYERS = 7
EVALUATION: dict[str, Any] = {
    "accuracy": {
        "piqa": {
            "dense": 0.7811, "pruned": 0.6982, "stderr_dense": 0.0113, "stderr_pruned": 0.0124,
            "stderr_diff": 0.0135, "p_value": 0.0021, "items": 1838, "chance": 0.5, "above_chance_percent": 70.5087,
        },
        "my_questions": {
            "dense": 0.4123, "pruned": 0.4266, "stderr_dense": 0.0217, "stderr_pruned": 0.0228,
            "stderr_diff": 0.0239, "p_value": 0.5371, "items": 507, "chance": 0.3777,
        },
    },
    "average_accuracy": {"dense": 0.5967, "pruned": 0.5624, "chance": 0.43885},
    "retention_percent": 94.2517,
    "retention_stderr": 1.8342,
    "retention_above_chance_percent": 78.2705,
    "retention_above_chance_stderr": 7.1,
    "perplexity": {
        "wikipedia": {
            "dense": 18.4171, "pruned": 135.1934, "ratio": 7.3406, "stderr_dense": 1.52, "stderr_pruned": 14.6,
            "stderr_ratio": 0.41,
        }
    },
    "word_perplexity": {"wikipedia": {"dense": 56.9363, "pruned": 904.7361, "ratio": 15.8903}},
    "byte_perplexity": {"wikipedia": {"dense": 1.8907, "pruned": 2.9236, "ratio": 1.5463}},
    "parameters": {"dense": 134515008, "pruned": 106194240, "removed_percent": 21.054},
    "disk_bytes": {"dense": 269060552, "pruned": 213419712, "removed_percent": 20.68},
    "kv_cache_bytes_per_token": {"dense": 23040, "pruned": 16896, "removed_percent": 26.667},
}  # fmt: skip
SHOWN = (
    "78.1 ± 1.1", "69.8 ± 1.2 *", "−8.3 ± 1.4", "0.002", "1838", "41.2 ± 2.2", "42.7 ± 2.3 °", "+1.4 ± 2.4", "0.537", "507",
    "59.7", "56.2", "−3.4", "94.3 ± 1.8",
    "78.3 ± 7.1", "89.4", "103.5", "70.5", "‡", "50.0", "37.8", "43.9",
    "18.42 ± 1.5", "135.2 ± 15", "× 7.341 ± 0.41", "56.94", "904.7", "× 15.89", "1.891",
    "2.924", "× 1.546", "134.5 M", "106.2 M", "21.1 %", "269.1 MB", "213.4 MB", "20.7 %", "23.04 kB", "16.9 kB", "26.7 %",
)  # fmt: skip
CONTINUATIONS = [
    {"kind": "prose", "prompt": "The river", "answer": "", "dense": " ran high.", "pruned": " river river"},
    {"kind": "question", "prompt": "Which capital?", "answer": "Paris", "dense": "Paris.", "pruned": " "},
]
SOLVED = {
    "removed_layers": 2, "tokens": 32768, "relative_residual": 0.4085, "relative_residual_removed": 0.9727,
    "mean_cosine": 0.6724, "mean_cosine_removed": 0.8543, "condition_number": 7883.24, "smallest_eigenvalue": 2055.85,
    "alpha_over_smallest_eigenvalue": 0.0, "distance_from_identity": 19.507, "distance_from_alpha_zero": 0.0,
}  # fmt: skip
EXPORT = {"hidden_error_mean": 0.0024, "hidden_error_max": 0.0154, "logits_error": 0.0026, "tolerance": 0.02}
RESIDUALS = "alpha,relative_residual\n0.0,0.4085\n100.0,0.41\n10000.0,0.44\n1000000.0,0.55\n"
SPEED = {
    "prefill_seconds": {"dense": 1.23, "pruned": 0.92, "speedup": 1.337},
    "decode_seconds_per_token": {"dense": 0.0457, "pruned": 0.0346, "speedup": 1.321},
    "prompt_tokens": 512, "new_tokens": 64, "batch_size": 1, "rounds": 5, "dtype": "bfloat16", "device": "cpu", "threads": 2,
}  # fmt: skip
UNMEASURED = (
    "Times vary from run to run, so they are not part of the cached results. Run measure_speed to measure them and get this "
    "page with them."
)
PICTURES = ("distances", "cut_residuals", "layers", "scores", "residuals")
Run = Callable[..., Workspace]


class Reader(HTMLParser):
    """The text, tables, pictures and loads of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alternatives: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text, self.in_cell = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag != "a"):
                self.loads.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")

    @property
    def cells(self) -> set[str]:
        return {cell for table in self.tables for row in table for cell in row}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def params() -> Params:
    return read_params(None, {"layers_to_skip": 2, "tasks": ["wikipedia", {"piqa": {"fewshots": 5}}]}, methods=METHODS)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that writes a run's results, some of them replaced by its arguments."""

    def write(
        evaluation: Any = EVALUATION,
        solved: Any = SOLVED,
        repaired: Any = {"corrected_linears": 0},  # noqa: B006
        healed: Any = {},  # noqa: B006
        residuals: str = RESIDUALS,
        title: str = "ReplaceMe (least squares)",
        blocks: tuple[tuple[int, int], ...] = ((3, 5),),
        parts: str = "",
        continuations: Any = CONTINUATIONS,
    ) -> Workspace:
        work = Workspace(tmp_path)
        for folder in (work.profile, work.solution, work.edits, work.metric("solve").parent, work.model_input.parent):
            folder.mkdir(parents=True, exist_ok=True)
        contents = {
            work.profile / "profile.json": {
                "angular_distance": made_distances(LAYERS),
                "residual": made_distances(LAYERS),
                "layers": made_layers(LAYERS),
            },
            work.blocks: [{"start": start, "end": end} for start, end in blocks],
            work.edits / "edits.json": {"title": title, "parts": parts},
            work.metric("evaluation"): evaluation,
            work.continuations: continuations,
            work.metric("solve"): solved,
            work.metric("repair"): repaired,
            work.metric("heal"): healed,
            work.metric("export"): EXPORT,
            work.metric("select"): {
                "losses": {"host2": 3.25, "host1": 4.5},
                "dense_loss": 2.75,
                "rises": {"layers11": 1.5, "layers2": 0.5},
            },
            work.text_versions: {"tokenizers": "3.2", "torch": "1.2"},
            work.model_versions: {"torch": "1.2"},
            work.score_versions: {"lm-eval": "2.3", "torch": "1.2"},
        }
        for path, content in contents.items():
            path.write_text(json.dumps(content), encoding="utf-8")
        (work.solution / "residuals.csv").write_text(residuals, encoding="utf-8")
        (work.solution / "loss.csv").write_text("iteration,loss\n", encoding="utf-8")
        (work.edits / "repairs.csv").write_text("layer,linear,residual_before,residual_after\n", encoding="utf-8")
        (work.edits / "loss.tsv").write_text("step\tloss\n", encoding="utf-8")
        (work.edits / "held_out_loss.tsv").write_text("step\theld_out_loss\n", encoding="utf-8")
        return work

    return write


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures: the test is about the text."""
    start = b"\x89PNG".ljust(16) + bytes([0, 0, 3, 192, 0, 0, 2, 88])
    monkeypatch.setattr(page_module, "_picture", lambda draw, words: Picture(start, start, words))


def made_distances(layers: int) -> list[list[float]]:
    return [[abs(a - b) / layers / 2 + (0.01 * min(a, b) if a != b else 0) for b in range(layers)] for a in range(layers)]


def made_layers(layers: int) -> dict[str, list[float]]:
    return {
        "block_influence": [0.9 / (layer + 1) for layer in range(layers)],
        "mean_norm": [50.0 + layer for layer in range(layers)],
        "max_norm": [100.0 * 3**layer for layer in range(layers)],
    }


# --- The page -----------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(params: Params, run: Run) -> None:
    page = Reader(html := render(params, run(), SPEED).html)
    assert len(page.loads) > len(page.alternatives) == 5
    assert all(source.startswith("data:") for source in page.loads)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\(|\son\w+=", html)


@pytest.mark.usefixtures("undrawn")
def test_every_figure_of_the_evaluation_is_in_a_table(params: Params, run: Run) -> None:
    cells = Reader(render(params, run()).html).cells
    assert [shown for shown in SHOWN if shown not in cells] == []


@pytest.mark.usefixtures("undrawn")
def test_the_page_names_the_versions_that_the_run_was_made_with(params: Params, run: Run) -> None:
    assert "Made with lm-eval 2.3, tokenizers 3.2, torch 1.2. Other versions" in Reader(render(params, run()).html).text


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_an_embedded_model_is(name: str, params: Params, run: Run) -> None:
    embedded, other = (params.model_copy(update={"model_path": path}) for path in (name, f"org/{name}"))
    assert f"{MODELS[name].original}, widened to bfloat16" in Reader(render(embedded, run()).html).text
    assert "widened" not in Reader(render(other, run()).html).text


@pytest.mark.usefixtures("undrawn")
def test_the_main_results_stand_first_and_the_unseen_texts_before_all(params: Params, run: Run) -> None:
    def tiles(evaluation: Any) -> list[str]:
        html = render(params, run(evaluation)).html
        assert html.index('class="tiles"') < html.index('class="lead"')
        return [" ".join(re.sub(r"<[^>]+>", "", item).split()) for item in re.findall(r"<li>(.*?)</li>", html)]

    others = ["94.3 % of the accuracy kept", "78.3 % of the accuracy above chance kept", "21.1 % smaller"]
    assert tiles(EVALUATION) == ["7.34 × the perplexity", *others]
    unseen = {"perplexity_ratio": 1.912, "stderr_perplexity_ratio": 0.023, "texts": 4}
    assert tiles({**EVALUATION, "unseen": unseen}) == ["1.91 × the perplexity on 4 unseen texts (geometric mean)", *others]


@pytest.mark.usefixtures("undrawn")
def test_what_counts_is_the_first_column_of_each_table(params: Params, run: Run) -> None:
    texts = {"wikipedia": {"seen": 0, "same_domain": 0, "overlap": 0.0}}
    figures = {"kl": 1.5, "agreement": 0.4}
    unseen = {"perplexity_ratio": 7.3406, "texts": 1, **figures}
    evaluation = {**EVALUATION, "divergence": {"wikipedia": figures}, "unseen": unseen, "calibration_text": texts}
    divergence, accuracy = Reader(render(params, run(evaluation)).html).tables[:2]
    assert divergence[1][:2] == ["unseen texts", "× 7.341"]
    assert accuracy[0] == ["", "average", "piqa", "my_questions"]


@pytest.mark.usefixtures("undrawn")
def test_of_a_task_that_the_dense_model_guesses_nothing_is_said_to_be_kept(params: Params, run: Run) -> None:
    page = Reader(render(params, run()).html)
    (row,) = [row for row in page.tables[0] if row[0] == "… above chance"]
    assert row[1:] == ["78.3 ± 7.1", "70.5", "‡"]
    assert "‡ the dense model isn't two standard errors above chance" in page.text


@pytest.mark.usefixtures("undrawn")
def test_continuations_of_both_models_stand_side_by_side(params: Params, run: Run) -> None:
    text = " ".join(Reader(render(params, run()).html).text.split())
    assert "Prose: The river dense ran high. pruned river river Question: Which capital? (known answer: Paris)" in text
    assert "dense Paris. pruned Nothing: it ends the text." in text
    assert "go on" not in render(params, run(continuations=[])).html


@pytest.mark.usefixtures("undrawn")
def test_a_continuation_is_text_whatever_it_holds(params: Params, run: Run) -> None:
    hostile = """</p><script>alert(1)</script><img src=x onerror="a()"> {{ 7 * 7 }} &lt; \u0000 'end'"""
    one = {"kind": hostile, "prompt": hostile, "answer": hostile, "dense": hostile, "pruned": hostile}
    harmless, page = (Reader(render(params, run(continuations=[{**one, **new}])).html) for new in (dict.fromkeys(one, "x"), {}))
    assert page.tags == harmless.tags
    assert page.loads == harmless.loads
    assert page.text.count("""</p><script>alert(1)</script><img src=x onerror="a()"> {{ 7 * 7 }} &lt;""") == 5


@pytest.mark.parametrize(("p_value", "mark", "other"), [(0.049, "* differs", "° no"), (0.05, "° no", "* differs")])
@pytest.mark.usefixtures("undrawn")
def test_only_marks_in_use_have_a_footnote(params: Params, run: Run, p_value: float, mark: str, other: str) -> None:
    task = {**EVALUATION["accuracy"]["piqa"], "p_value": p_value}
    text = Reader(render(params, run({"accuracy": {"piqa": task}})).html).text
    assert mark in text
    assert other not in text


@pytest.mark.parametrize("missing", [*combinations(EVALUATION, 1), ("perplexity", "word_perplexity", "byte_perplexity")])
@pytest.mark.usefixtures("undrawn")
def test_an_absent_group_is_left_out(params: Params, run: Run, missing: tuple[str, ...]) -> None:
    page = Reader(render(params, run({key: value for key, value in EVALUATION.items() if key not in missing})).html)
    assert all(len(table) > 1 and all(any(cells[1:]) for cells in table) for table in page.tables)
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)
    assert len(page.tables) == (4 if missing in (("accuracy",), ("perplexity", "word_perplexity", "byte_perplexity")) else 5)


@pytest.mark.usefixtures("undrawn")
def test_scores_on_calibration_text_are_marked_wherever_they_stand(params: Params, run: Run) -> None:
    texts = {name: {"seen": 0, "overlap": 0.02} for name in ("piqa", "my_questions", "wikipedia")}
    assert "calibration text, which" not in Reader(render(params, run({**EVALUATION, "calibration_text": texts})).html).text
    for name in ("my_questions", "wikipedia"):
        texts[name] = {"seen": 1, "overlap": 0.25}
    page = Reader(render(params, run({**EVALUATION, "calibration_text": texts})).html)
    accuracy, perplexity = page.tables[:2]
    assert accuracy[0][1:4] == ["average", "piqa", "my_questions †"]
    assert [row[0] for row in perplexity[1:]] == [f"wikipedia †, per {unit}" for unit in ("token", "word", "byte")]
    for name in ("my_questions", "wikipedia"):
        assert (
            "† scored on calibration text, which says nothing about other text (items with 13 of its words in a row: "
            f"25 % of {name})."
        ) in page.text
    for tile in ("accuracy kept (in part on calibration text)", "the perplexity (on calibration text)"):
        assert tile in page.text


@pytest.mark.usefixtures("undrawn")
def test_accuracy_without_uncertainty_stands_alone(params: Params, run: Run) -> None:
    bare = {
        "accuracy": {"piqa": {"dense": 0.7811, "pruned": 0.6982}},
        "perplexity": {"own": {"dense": 2.5, "pruned": 5, "ratio": 2}},
    }
    page = Reader(render(params, run(bare)).html)
    assert page.tables[0] == [
        ["", "piqa"], ["dense", "78.1"], ["pruned", "69.8"], ["% of dense", "89.4"], ["difference", "−8.3"]
    ]  # fmt: skip
    assert {"2.500", "5.000", "× 2.000"} <= page.cells


def test_a_run_without_tasks_says_so(params: Params, run: Run) -> None:
    page = render(params, run({}))
    assert "Nothing was scored." in page.html
    assert set(page.pictures) == {"distances", "cut_residuals", "layers", "residuals"}
    assert len(Reader(page.html).tables) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_method_without_a_fit_says_so(params: Params, run: Run) -> None:
    page = render(params, run(solved={"removed_layers": 2}, residuals="alpha,relative_residual\n", title="UIDL"))
    assert "there is no fit to judge" in page.html
    assert "residuals" not in page.pictures
    assert "were removed by UIDL" in page.html


def test_whole_layers_and_parts_of_the_others_are_told_together(params: Params, run: Run) -> None:
    parts = "16 of 48 MLP channels in every layer"
    repaired = {"corrected_linears": 3, "last_residual": 0.1, "removed_channels": 96, "block0": SOLVED}
    work = run(solved={"removed_layers": 2}, repaired=repaired, parts=parts)
    page = Reader(render(params, work).html)
    assert f"smollm2-135m-instruct without 2 of its 7 layers and {parts}" in page.text
    assert f"2 of 7 layers and {parts} of smollm2-135m-instruct were removed by" in page.text
    assert f"Beside whole layers, {parts} were removed." in page.text
    assert "MLP channels removed" in page.cells
    assert "Nothing was fitted" not in page.text


def test_parts_of_layers_are_told_when_no_whole_layer_is_removed(params: Params, run: Run) -> None:
    parts = "2 of 4 heads in every layer"
    repaired = {"removed_heads": 14, "parameters_removed": 123456, "calibration_loss": 2.5, "corrected_linears": 0}
    work = run(solved={"removed_layers": 0}, repaired=repaired, title="LLM-Pruner", blocks=(), parts=parts)
    work.metric("select").write_text("{}", encoding="utf-8")
    page = Reader(render(params, work).html)
    assert f"smollm2-135m-instruct without {parts}" in page.text
    assert f"{parts} of smollm2-135m-instruct were removed by LLM-Pruner." in page.text
    assert f"No whole layer was removed, but {parts}." in page.text
    assert {"heads removed", "14", "123,456", "2.5"} <= page.cells
    assert "Nothing was fitted in the place of the removed parts" in page.text
    assert "the state after the last layer differs by 0.0024" in page.text
    assert not re.search(r"Framed|Shaded|cut differs|removed layers and|of its 7", page.text + " ".join(page.alternatives))
    assert len(page.alternatives) == 4


def test_an_iterative_solver_shows_its_curve_and_a_closed_form_none(params: Params, run: Run) -> None:
    iterated = SOLVED | {"loss_start": 0.5, "loss_end": 0.25, "iterations": 9, "converged": 1, "rescaled_by": 1.5}
    work = run(solved=iterated, residuals="alpha,relative_residual\n")
    assert "loss" not in render(params, work).pictures
    (work.solution / "loss.csv").write_text("iteration,loss\n0,0.5\n5,0.25\n9,0.26\n", encoding="utf-8")
    page = render(params, work)
    words = "Objective per token by iteration: objective, from 0.5 at iteration 0 to 0.26 at iteration 9, lowest 0.25."
    assert page.pictures["loss"].words == words
    assert page.pictures["loss"].light.startswith(b"\x89PNG")
    assert {"loss at the start", "converged", "rescaled by"} <= Reader(page.html).cells


def test_repaired_linears_and_a_training_are_drawn_where_there_were_any(params: Params, run: Run) -> None:
    work = run()
    assert not {"repairs", "training"} & render(params, work).pictures.keys()
    rows = "layer,linear,residual_before,residual_after\n3,mlp_output,0.5,0.25\n4,mlp_output,0.5,0.375\n"
    (work.edits / "repairs.csv").write_text(rows, encoding="utf-8")
    (work.edits / "loss.tsv").write_text("step\tloss\n0\t2.0\n1\t1.5\n", encoding="utf-8")
    (work.edits / "held_out_loss.tsv").write_text("step\theld_out_loss\n0\t1.75\n", encoding="utf-8")
    page = render(params, work)
    repairs, training = page.pictures["repairs"], page.pictures["training"]
    assert "after each linear, from 0.25 at layer 3 to 0.375 at layer 4" in repairs.words
    assert "documents of the step, from 2 at step 0 to 1.5 at step 1" in training.words
    assert "held-out documents, from 1.75 at step 0" in training.words
    assert {repairs.words, training.words} <= set(Reader(page.html).alternatives)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("held_out", [True, False])
def test_healing_is_told(held_out: bool, params: Params, run: Run) -> None:
    healed = {"trained_parameters": 12345, "training_steps": 31, "training_loss_first": 0.5, "training_loss_last": 0.25}
    healed |= {"held_out_loss_first": 0.75, "held_out_loss_last": 0.625} if held_out else {}
    page = render(params, run(healed=healed)).html
    assert "12,345 weights from the first cut on were trained for 31 steps" in page
    told = "the KL divergence from them, on documents held out from it, went from 0.750 to 0.625 nats per token"
    assert (told in page) == held_out
    assert ("the KL divergence from them, on its own documents, went from 0.500 to 0.250" in page) != held_out
    assert "were trained" not in render(params, run()).html


@pytest.mark.usefixtures("undrawn")
def test_each_of_several_blocks_has_its_own_fit(params: Params, run: Run) -> None:
    later = {"block1": {**SOLVED, "tokens": 2222}, "corrected_linears": 0}
    page = render(params, run(solved={**SOLVED, "tokens": 1111}, repaired=later, blocks=((1, 2), (4, 6))))
    assert ["calibration tokens", "1,111", "2,222", "used for the fit"] in Reader(page.html).tables[-2]
    assert "block 0: the map brings" in page.html
    assert "block 1: the map brings" in page.html
    assert "3 of 7" in page.html


@pytest.mark.usefixtures("undrawn")
def test_a_refit_and_a_repair_are_told(params: Params, run: Run) -> None:
    refit = {
        "removed_layers": 2, "tokens": 32768, "weighted_residual": 0.3368, "weighted_residual_transform": 0.4066,
        "weighted_residual_removed": 0.6132, "distance_from_identity": 3.5,
    }  # fmt: skip
    repaired = {"corrected_linears": 18, "first_residual": 0.2, "last_residual": 0.229, "last_residual_before": 0.234}
    page = render(params, run(solved=refit, repaired=repaired, residuals="alpha,relative_residual\n"))
    assert "from 0.613 to 0.337; a map alone would reach 0.407." in page.html
    assert "Then 18 linears were solved again on the inputs that the shortened model gives them." in page.html
    assert "differs from the dense model&#39;s by 0.229" in page.html
    assert {"0.3368", "… with a map alone"} <= Reader(page.html).cells
    assert "residuals" not in page.pictures


@pytest.mark.usefixtures("undrawn")
def test_a_cut_is_compared_with_all_of_its_size(params: Params, run: Run) -> None:
    text = Reader(render(params, run(blocks=((3, 5),))).html).text
    # Distances of made_distances rise with the host: hosts 0 and 1 are nearer.
    assert "Layers 3–4 (after host layer 2) were removed" in text
    assert text.count("(rank 3 of 5, smallest first)") == 2
    assert "(rank 1 of 5, smallest first)" in Reader(render(params, run(blocks=((1, 3),))).html).text
    assert "chosen by the smallest angular distance" in text
    assert "in nats per token: 3.25 with host 2, 4.50 with host 1; the dense model has 2.75." in text
    assert "With the best block of each size, the loss rises by 0.500 without 2 layers, 1.500 without 11 layers." in text


@pytest.mark.usefixtures("undrawn")
def test_times_are_on_the_page_only_when_measured(params: Params, run: Run) -> None:
    without, timed = Reader(render(params, run()).html), Reader(render(params, run(), SPEED).html)
    assert UNMEASURED in without.text
    assert "Measured on" not in without.text
    assert UNMEASURED not in timed.text
    assert "Measured on cpu, 2 threads: bfloat16, batch of 1, 5 rounds" in timed.text
    assert {"1.23 s", "920 ms", "× 1.34", "45.7 ms", "34.6 ms", "× 1.32"} <= timed.cells


@pytest.mark.usefixtures("undrawn")
def test_the_cost_is_on_the_page_where_it_is_given_and_a_part_of_it_is_no_sum(params: Params, run: Run) -> None:
    parts: dict[str, Any] = {"stage_seconds": {"select": 78.06, "plan": 0.0176}, "trained": False}
    without = Reader(render(params, run()).html)
    cost = parts | {"seconds": 78.08, "peak_memory_bytes": 1474109440, "machines": ["Made Up 9000, 2 cores"]}
    whole = Reader(render(params, run(), SPEED | {"machine": "Other 7, 4 cores"}, cost).html)
    partial = Reader(render(params, run(), SPEED, parts | {"stages_not_measured": 7}).html)
    assert "Cost of the compression" not in without.text
    assert {"78.1 s", "17.6 ms", "1.474 GB"} <= whole.cells
    assert {"78.1 s", "17.6 ms", "7 stages"} <= partial.cells
    assert "all stages" in whole.text
    assert "Measured on Made Up 9000, 2 cores." in whole.text
    assert "Measured on Other 7, 4 cores." in whole.text
    assert "all stages" not in partial.text


@pytest.mark.usefixtures("undrawn")
def test_names_cannot_inject_html(run: Run) -> None:
    params = read_params(None, {"model_path": "a/<script>x</script>&"}, methods=METHODS)
    evaluation = {
        **EVALUATION,
        "accuracy": {'<img src="x_y">': EVALUATION["accuracy"]["piqa"]},
        "perplexity": {'"><script>': EVALUATION["perplexity"]["wikipedia"]},
    }
    page = Reader(render(params, run(evaluation, title="<b>M</b>")).html)
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("img") == 5
    assert "a/<script>x</script>&" in page.text
    assert {'<img src="x_y">', '"><script>, per token'} <= page.cells


@pytest.mark.usefixtures("undrawn")
def test_the_users_files_are_named_without_their_folders(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "private"
    for folder in (private / "my-model", private / "below"):
        folder.mkdir(parents=True)
    for file in ("notes.txt", "asked.jsonl", "below/other.txt"):
        (private / file).touch()
    monkeypatch.chdir(private)
    params = read_params(
        None,
        {
            "model_path": str(private / "my-model"),
            "dataset": str(private / "notes.txt"),
            "tasks": ["below/other.txt", {str(private / "asked.jsonl"): {"limit": 9}}, "/gone/away.txt"],
            "save_path": str(private / "chosen-place"),
        },
        methods=METHODS,
    )
    html = render(params, run()).html
    for path in (str(tmp_path), "private", "below/", "/gone", "chosen-place"):
        assert path not in html
    for shown in (
        "my-model without 2 of",
        "model_path: my-model",
        "dataset: notes.txt",
        "- other.txt",
        "- away.txt",
        "limit: 9",
    ):
        assert shown in html


def test_the_settings_repeat_the_run() -> None:
    given = {
        "dataset": "org/1e-6", "dataset_config": "no", "alpha": 1e-7, "layers_to_skip": 3, "eval_tokens": None,
        "tasks": ["wikipedia", {"winogrande": {"fewshots": 5, "limit": 200}}, {"q.jsonl": {"choices": ["a", "b"]}}],
    }  # fmt: skip
    params = read_params(None, given, methods=METHODS)
    file = Path("settings.yaml")
    file.write_text(settings_yaml(params, FIELDS), encoding="utf-8")
    assert read_params(file, methods=METHODS) == params


def test_the_settings_have_every_key_that_the_pipelines_file_must_have(params: Params) -> None:
    lines = settings_yaml(params, FIELDS).splitlines()
    assert {line.split(":")[0] for line in lines if line[0].isalpha()} == set(FIELDS)


def test_the_same_run_gives_the_same_bytes_whatever_matplotlib_is_set_to(params: Params, run: Run) -> None:
    first = render(params, run())
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 10, "axes.grid": True}):
        again = render(params, run())
        assert matplotlib.rcParams["font.size"] == 30
    assert again == first


def test_the_stage_writes_the_page_the_drawn_pictures_and_the_card(
    params: Params, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = run(solved={"removed_layers": 2}, residuals="alpha,relative_residual\n")
    monkeypatch.setattr(stage, "card_of", lambda params, work: "the card")
    stage.write_report(params, work)
    assert {path.name for path in work.report.iterdir()} == {"index.html", "params.yaml", "pictures", "model_card.md"}
    assert (work.report / "model_card.md").read_text(encoding="utf-8") == "the card"
    drawn = {path.name for path in (work.report / "pictures").iterdir()}
    assert drawn == {"distances.png", "cut_residuals.png", "layers.png", "scores.png"}
    page = render(params, work)
    assert (work.report / "index.html").read_text(encoding="utf-8") == page.html
    for name, picture in page.pictures.items():
        assert (work.report / "pictures" / f"{name}.png").read_bytes() == picture.light
        assert picture.light.startswith(b"\x89PNG")
        assert picture.light != picture.dark


@pytest.mark.usefixtures("undrawn")
def test_alternative_texts_describe_the_pictures(params: Params, run: Run) -> None:
    distances, cuts, layers, scores, residuals = (render(params, run()).pictures[name].words for name in PICTURES)
    assert "relative residual of a linear map from each host layer" in cuts
    assert "Framed: layers 3–4 at 0.163." in distances
    assert "Shaded: layers 3–4." in layers
    assert "perplexity of wikipedia: dense 18.42, pruned 135.2" in scores
    assert "from 0.408 at α = 0 to 0.550 at α = 1e+06" in residuals


@pytest.mark.usefixtures("undrawn")
def test_the_published_table_is_labelled_and_adds_up(params: Params, run: Run) -> None:
    page = Reader(render(params, run()).html)
    assert LABEL in page.text
    assert ["ReplaceMe, least squares", "91.9", "61.9", "71.5", "61.3", "69.8", "45.1"] in page.tables[-1]
    dense = sum(ROWS[0][1:5]) / 4
    for row in ROWS:
        assert sum(row[1:5]) / 4 == pytest.approx(row.average, abs=0.0006)
        assert 100 * sum(row[1:5]) / 4 / dense == pytest.approx(row.percent_of_dense, abs=0.1)


def test_quantities_have_decimal_prefixes() -> None:
    assert [quantity(value, "B") for value in (0, 999, 23040, 2.5e6, 1.5e10, 3e15)] == [
        "0 B", "999 B", "23.04 kB", "2.5 MB", "15 GB", "3000 TB",
    ]  # fmt: skip


# --- The pictures -------------------------------------------------------------------------------------------------------


def _frames(figure: Figure) -> set[tuple[float, float]]:
    """Centres of the frames on a distance map."""
    frames = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return {(frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2) for frame in frames}


def test_the_map_shows_the_pairs_above_the_diagonal_and_frames_the_blocks() -> None:
    distances = made_distances(LAYERS)
    figure = cut_map(distances, "distance", [Block(1, 2), Block(3, 5)], DARK)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None
    for host in range(LAYERS):
        for last in range(LAYERS):
            value = drawn[last, host]
            if last > host:
                assert value == distances[host][last]
            else:
                assert value is masked
    assert _frames(figure) == {(0, 1), (2, 4)}
    assert "2, 1 layers" in {text.get_text() for text in figure.axes[0].texts}


def test_removed_layers_are_shaded_and_a_zero_influence_is_drawn() -> None:
    layers = made_layers(LAYERS)
    layers["block_influence"][2] = 0.0
    figure = layer_figures(layers, [Block(3, 5)])
    spans = [patch for axes in figure.axes for patch in axes.patches]
    assert [(span.get_x(), span.get_x() + span.get_width()) for span in spans] == [(2.5, 4.5)] * 2
    assert png(figure)


def test_without_a_block_nothing_is_framed_shaded_or_named() -> None:
    figure = cut_map(made_distances(LAYERS), "distance", [], DARK)
    assert figure.axes[0].get_legend() is None
    assert _frames(figure) == set()
    assert not figure.axes[0].texts
    layers = layer_figures(made_layers(LAYERS), [])
    assert not [patch for axes in layers.axes for patch in axes.patches]
    assert [text.get_text() for text in layers.legends[0].get_texts()] == ["largest", "mean"]
    assert png(figure)
    assert png(layers)


@pytest.mark.parametrize(("accuracy", "perplexity"), [(0, 0), (1, 0), (0, 1), (3, 1), (10, 2)])
def test_the_scores_have_a_line_for_each_task(accuracy: int, perplexity: int) -> None:
    task = {"dense": 0.5, "pruned": 0.4, "stderr_dense": 0.5, "stderr_pruned": 0.1}
    groups = {
        "accuracy": {f"a{number}": task for number in range(accuracy)},
        "perplexity": {f"p{number}": task for number in range(perplexity)},
    }
    figure = score_figure(groups, LIGHT)
    if figure is None:
        assert accuracy == perplexity == 0
        return
    assert [len(axes.containers) for axes in figure.axes] == [2 * tasks for tasks in (accuracy, perplexity) if tasks]
    assert b"Software" not in png(figure)


def test_the_ridge_path_shows_alpha_zero() -> None:
    rows = [(0.0, 0.40), (10.0, 0.41), (1000.0, 0.5)]
    figure = residual_path(rows, (0.0, 0.40), 200.0)
    assert figure is not None
    axes = figure.axes[0]
    path, chosen, eigenvalue = axes.lines
    assert list(zip(*path.get_data(), strict=True)) == rows
    assert list(zip(*chosen.get_data(), strict=True)) == [(0.0, 0.40)]
    assert list(eigenvalue.get_xdata()) == [200.0, 200.0]
    assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]
    assert png(figure)


def test_a_path_without_a_positive_ridge_has_no_picture() -> None:
    assert residual_path([(0.0, 0.4)], (0.0, 0.4), 1.0) is None
    with_zero_eigenvalue = residual_path([(10.0, 0.4), (100.0, 0.5)], (10.0, 0.4), 0.0)
    assert with_zero_eigenvalue is not None
    assert len(with_zero_eigenvalue.axes[0].lines) == 2


# --- Experiments against each other -------------------------------------------------------------------------------------

SMALL = st.integers(0, 4).map(float)
POINTS = st.lists(st.builds(Point, st.just("x"), st.sampled_from("ab"), SMALL, SMALL), max_size=12)


@given(POINTS, st.booleans())
def test_the_front_is_the_points_that_no_other_beats(points: list[Point], higher_is_better: bool) -> None:
    def beats(a: Point, b: Point) -> bool:
        ahead = a.quality - b.quality if higher_is_better else b.quality - a.quality
        return a.removed_percent >= b.removed_percent and ahead >= 0 and (a.removed_percent > b.removed_percent or ahead > 0)

    expected = [point for point in points if not any(beats(other, point) for other in points)]
    front = pareto_front(points, higher_is_better)
    assert sorted(front, key=repr) == sorted(expected, key=repr)
    assert [point.removed_percent for point in front] == sorted(point.removed_percent for point in front)


def _labels(figure: Figure) -> Iterator[Annotation]:
    return (text for text in figure.axes[0].texts if isinstance(text, Annotation))


def _experiments(kind: str) -> list[Point]:
    chance = random.Random(kind)
    if kind == "chain":
        return [Point(f"cosine {n}, alpha 1000", "abc"[n % 3], 1.0 + n, 100 - 2.1 * n) for n in range(30)]
    count = {"few": 2, "some": 8, "many": 30}[kind]
    made = [(chance.choice([1, 2, 4, 8]), chance.choice(["lstsq", "uidl", "shortgpt"])) for _ in range(count)]
    return [Point(f"{method} {n}, α {n}000", method, 2.6 * n, 100 - n * chance.uniform(1, 8)) for n, method in made]


@pytest.mark.parametrize("kind", ["few", "some", "many", "chain"])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_labels_cover_neither_each_other_nor_the_frame(kind: str, higher_is_better: bool) -> None:
    points = _experiments(kind)
    if not higher_is_better:
        points = [Point(point.label, point.series, point.removed_percent, 100 / point.quality) for point in points]
    figure = quality_against_size(points, "quality", higher_is_better, DARK)
    before = png(figure)
    boxes = [super(Annotation, label).get_window_extent() for label in _labels(figure)]
    frame = figure.axes[0].get_window_extent()
    front = pareto_front(points, higher_is_better)
    assert len(boxes) == len(front) if kind != "chain" else len(boxes) > 10
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert png(quality_against_size(points, "quality", higher_is_better, DARK)) == before


def test_methods_differ_in_colour_and_shape() -> None:
    points = [Point(method, method, 10.0 + number, 50.0) for number, method in enumerate("abcdefg")]
    lines = [line for line in quality_against_size(points).axes[0].lines if line.get_label() in "abcdefg"]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines) == 7
