"""The report: what the page must and must not contain."""

import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from replaceme.base.parameters import Params, read_params
from replaceme.methods.registry import METHODS
from replaceme.models.embedded import MODELS
from replaceme.pipeline import report as stage
from replaceme.report import page as page_module
from replaceme.report.page import render
from replaceme.running.workspace import Workspace
from tests.report.helpers import LAYERS, made_distances, made_layers

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
TABLES = [
    [
        ["", "dense", "pruned", "saved"],
        ["parameters", "134.5 M", "106.2 M", "21.1 %"],
        ["size on disk", "269.1 MB", "213.4 MB", "20.7 %"],
        ["KV cache per token", "23.04 kB", "16.9 kB", "26.7 %"],
    ],
    [
        ["", "average", "piqa", "my_questions"],
        ["dense", "59.7", "78.1 ± 1.1", "41.2 ± 2.2"],
        ["pruned", "56.2", "69.8 ± 1.2 *", "42.7 ± 2.3 °"],
        ["% of dense", "94.3 ± 1.8", "89.4", "103.5"],
        ["… above chance", "78.3 ± 7.1", "70.5", "‡"],
        ["difference", "−3.4", "−8.3 ± 1.4", "+1.4 ± 2.4"],
        ["p", "", "0.002", "0.537"],
        ["chance", "43.9", "50.0", "37.8"],
        ["items", "", "1838", "507"],
    ],
    [
        ["", "ratio", "dense", "pruned"],
        ["wikipedia, per token", "× 7.341 ± 0.41", "18.42 ± 1.5", "135.2 ± 15"],
        ["wikipedia, per word", "× 15.89", "56.94", "904.7"],
        ["wikipedia, per byte", "× 1.546", "1.891", "2.924"],
    ],
]
CONTINUATIONS = [
    {"kind": "prose", "prompt": "The river", "answer": "", "dense": " ran high.", "pruned": " river river"},
    {"kind": "question", "prompt": "Which capital?", "answer": "Paris", "dense": "Paris.", "pruned": " "},
]
SOLVED = {
    "removed_layers": 2, "tokens": 32768, "relative_residual": 0.4085, "relative_residual_removed": 0.9727,
    "mean_cosine": 0.6724, "mean_cosine_removed": 0.8543, "condition_number": 7883.24, "smallest_eigenvalue": 2055.85,
    "alpha_over_smallest_eigenvalue": 0.0, "distance_from_identity": 19.507, "distance_from_alpha_zero": 0.0,
}  # fmt: skip
SELECTED = {"losses": {"host2": 3.25, "host1": 4.5}, "dense_loss": 2.75, "rises": {"layers11": 1.5, "layers2": 0.5}}
EXPORT = {"hidden_error_mean": 0.0024, "hidden_error_max": 0.0154, "logits_error": 0.0026, "tolerance": 0.02}
RESIDUALS = "alpha,relative_residual\n0.0,0.4085\n100.0,0.41\n10000.0,0.44\n1000000.0,0.55\n"
SPEED = {
    "prefill_seconds": {"dense": 1.23, "pruned": 0.92, "speedup": 1.337},
    "decode_seconds_per_token": {"dense": 0.0457, "pruned": 0.0346, "speedup": 1.321},
    "prompt_tokens": 512, "new_tokens": 64, "batch_size": 1, "rounds": 5, "dtype": "bfloat16", "device": "cpu", "threads": 2,
    "machine": "Other 7, 4 cores",
}  # fmt: skip


class Reader(HTMLParser):
    """The text, tables, pictures and loads of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alternatives: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text, self.in_cell = "", False
        self.feed(html)
        self.text = " ".join(self.text.split())
        self.cells = {cell for table in self.tables for row in table for cell in row}

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
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def params() -> Params:
    return read_params(None, {"layers_to_skip": 2, "tasks": ["wikipedia", {"piqa": {"fewshots": 5}}]}, methods=METHODS)


def write_run(
    folder: Path,
    evaluation: Any = EVALUATION,
    solved: Any = SOLVED,
    repaired: Any = {"corrected_linears": 0},  # noqa: B006
    healed: Any = {},  # noqa: B006
    selected: Any = SELECTED,
    residuals: str = RESIDUALS,
    title: str = "ReplaceMe (least squares)",
    blocks: tuple[tuple[int, int], ...] = ((3, 5),),
    parts: str = "",
    continuations: Any = CONTINUATIONS,
) -> Workspace:
    """Write a run's results, some of them replaced by the arguments."""
    work = Workspace(folder)
    for place in (work.profile, work.solution, work.repaired, work.edits, work.metric("solve").parent, work.model_input.parent):
        place.mkdir(parents=True, exist_ok=True)
    distances = made_distances(LAYERS)
    contents = {
        work.profile / "profile.json": {
            "angular_distance": distances, "residual": distances, "layers": made_layers(LAYERS)
        },
        work.blocks: [{"start": start, "end": end} for start, end in blocks],
        work.edits / "edits.json": {"title": title, "parts": parts},
        work.metric("evaluation"): evaluation,
        work.continuations: continuations,
        work.metric("solve"): solved,
        work.metric("repair"): repaired,
        work.metric("heal"): healed,
        work.metric("check"): {},
        work.metric("export"): EXPORT,
        work.metric("select"): selected,
        work.text_versions: {"tokenizers": "3.2", "torch": "1.2"},
        work.model_versions: {"torch": "1.2"},
        work.score_versions: {"lm-eval": "2.3", "torch": "1.2"},
    }  # fmt: skip
    for path, content in contents.items():
        path.write_text(json.dumps(content), encoding="utf-8")
    (work.solution / "residuals.csv").write_text(residuals, encoding="utf-8")
    (work.solution / "loss.csv").write_text("iteration,loss\n", encoding="utf-8")
    (work.repaired / "repairs.csv").write_text("layer,linear,residual_before,residual_after\n", encoding="utf-8")
    (work.edits / "loss.tsv").write_text("step\tloss\n", encoding="utf-8")
    (work.edits / "held_out_loss.tsv").write_text("step\theld_out_loss\n", encoding="utf-8")
    return work


@pytest.fixture
def show(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reader]:
    """Return a function that reads the page, without pictures, of a run with some results replaced."""
    monkeypatch.setattr(page_module, "draw_pictures", lambda *arguments: {})

    def read(own: Params = params, speed: Any = None, cost: Any = None, **results: Any) -> Reader:
        return Reader(render(own, write_run(tmp_path, **results), speed, cost).html)

    return read


Show = Callable[..., Reader]


# --- Scores -------------------------------------------------------------------------------------------------------------


def test_every_figure_of_the_evaluation_is_in_a_table_and_the_average_before_the_tasks(show: Show) -> None:
    page = show()
    assert page.tables[:3] == TABLES
    assert re.findall("<h2>(.*?)</h2>", page.html)[:3] == ["How both models go on", "Size and speed", "Scores"]


def test_the_main_results_stand_first_and_the_unseen_texts_before_all(show: Show) -> None:
    def tiles(evaluation: Any) -> list[str]:
        html = show(evaluation=evaluation).html
        assert html.index('class="tiles"') < html.index('class="lead"')
        return [" ".join(re.sub(r"<[^>]+>", "", item).split()) for item in re.findall(r"<li>(.*?)</li>", html)]

    others = ["94.3 % of the accuracy kept", "78.3 % of the accuracy above chance kept", "21.1 % smaller"]
    assert tiles(EVALUATION) == ["7.34 × the perplexity", *others]
    unseen = {"perplexity_ratio": 1.912, "stderr_perplexity_ratio": 0.023, "texts": 4}
    assert tiles({**EVALUATION, "unseen": unseen}) == ["1.91 × the perplexity on 4 unseen texts (geometric mean)", *others]


def test_the_distance_from_the_dense_model_is_given_for_each_text_and_first_for_the_unseen_ones(show: Show) -> None:
    figures = {"kl": 1.5, "agreement": 0.4, "stderr_kl": 0.01}
    page = show(
        evaluation={
            **EVALUATION,
            "divergence": {"wikipedia": figures},
            "unseen": {"perplexity_ratio": 7.3406, "texts": 1, "kl": 1.5, "agreement": 0.4},
            "calibration_text": {"wikipedia": {"seen": 0, "same_domain": 1, "overlap": 0.0}},
        }
    )
    assert page.tables[1][1:] == [
        ["unseen texts", "× 7.341", "no", "1.500", "40.0"],
        ["wikipedia", "× 7.341 ± 0.41", "its domain", "1.500 ± 0.010", "40.0"],
    ]


@pytest.mark.parametrize("missing", [*combinations(EVALUATION, 1), ("perplexity", "word_perplexity", "byte_perplexity")])
def test_what_is_absent_is_left_out(show: Show, missing: tuple[str, ...]) -> None:
    page = show(evaluation={key: value for key, value in EVALUATION.items() if key not in missing})
    assert all(len(table) > 1 and all(any(cells[1:]) for cells in table) for table in page.tables)
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)
    assert len(page.tables) == (3 if missing in (("accuracy",), ("perplexity", "word_perplexity", "byte_perplexity")) else 4)


def test_scores_on_calibration_text_are_marked_wherever_they_stand(show: Show) -> None:
    texts = {name: {"seen": 0, "overlap": 0.02} for name in ("piqa", "my_questions", "wikipedia")}
    assert "calibration text, which" not in show(evaluation={**EVALUATION, "calibration_text": texts}).text
    for name in ("my_questions", "wikipedia"):
        texts[name] = {"seen": 1, "overlap": 0.25}
    page = show(evaluation={**EVALUATION, "calibration_text": texts})
    accuracy, perplexity = page.tables[1:3]
    assert accuracy[0][1:4] == ["average", "piqa", "my_questions †"]
    assert [row[0] for row in perplexity[1:]] == [f"wikipedia †, per {unit}" for unit in ("token", "word", "byte")]
    said = "† scored on calibration text, which says nothing about other text (items with 13 of its words in a row: 25 % of "
    assert all(f"{said}{name})." in page.text for name in ("my_questions", "wikipedia"))
    for tile in ("accuracy kept (in part on calibration text)", "the perplexity (on calibration text)"):
        assert tile in page.text


# --- What was done ------------------------------------------------------------------------------------------------------


def test_a_cut_is_compared_with_all_of_its_size(show: Show) -> None:
    text = show().text
    # Distances of made_distances rise with the layer before the block: after layers 0 and 1 they are smaller.
    assert "Layers 3–4 (after layer 2) were removed, chosen by the smallest angular distance." in text
    assert text.count("(rank 3 of 5, smallest first)") == 2
    assert "(rank 1 of 5, smallest first)" in show(blocks=((1, 3),)).text
    losses = "3.25 with the cut after layer 2, 4.50 with the cut after layer 1; the dense model has 2.75."
    assert f"in nats per token: {losses}" in text
    assert "With the best block of each size, the loss rises by 0.500 without 2 layers, 1.500 without 11 layers." in text


def test_without_a_fit_the_page_says_so_and_with_several_each_has_a_column(show: Show) -> None:
    html = show(solved={"removed_layers": 2}, residuals="alpha,relative_residual\n", title="UIDL").html
    assert "there is no fit to judge" in html
    assert "were removed by UIDL" in html
    later = {"block1": {**SOLVED, "tokens": 2222}, "corrected_linears": 18, "last_residual": 0.229}
    page = show(solved={**SOLVED, "tokens": 1111}, repaired=later, blocks=((1, 2), (4, 6)))
    assert page.tables[-1][0] == ["", "block 0", "block 1", "meaning"]
    assert ["calibration tokens", "1,111", "2,222", "used for the fit"] in page.tables[-1]
    assert "3 of 7" in page.text
    assert "Then 18 linears were solved again on the inputs that the shortened model gives them." in page.text
    assert "differs from the dense model's by 0.229" in page.text


def test_removed_parts_of_layers_are_described_with_and_without_whole_layers(show: Show) -> None:
    parts = "16 of 48 MLP channels in every layer"
    repaired = {"corrected_linears": 3, "last_residual": 0.1, "removed_channels": 96, "block0": SOLVED}
    page = show(solved={"removed_layers": 2}, repaired=repaired, parts=parts)
    assert f"smollm2-135m-instruct without 2 of its 7 layers and {parts}" in page.text
    assert f"2 of 7 layers and {parts} of smollm2-135m-instruct were removed by" in page.text
    assert f"Beside whole layers, {parts} were removed." in page.text
    assert "MLP channels removed" in page.cells
    assert "Nothing was fitted" not in page.text
    parts, repaired = "2 of 4 heads in every layer", {"removed_heads": 14, "parameters_removed": 123456, "corrected_linears": 0}
    page = show(solved={"removed_layers": 0}, repaired=repaired, title="LLM-Pruner", blocks=(), parts=parts, selected={})
    assert f"smollm2-135m-instruct without {parts}" in page.text
    assert f"No whole layer was removed, but {parts}." in page.text
    assert {"heads removed", "14", "123,456"} <= page.cells
    assert "the state after the last layer differs by 0.0024" in page.text
    assert not re.search(r"cut differs|removed layers and|of its 7", page.text)


def test_times_and_costs_are_on_the_page_only_when_measured(show: Show) -> None:
    stages: dict[str, Any] = {"stage_seconds": {"select": 78.06, "plan": 0.0176}, "trained": False}
    cost = stages | {"seconds": 78.08, "peak_memory_bytes": 1474109440, "machines": ["Made Up 9000, 2 cores"]}
    without, whole = show(), show(speed=SPEED, cost=cost)
    unmeasured = "Run replaceme speed to measure them and get this page with them."
    assert unmeasured in without.text
    assert not re.search("Measured on|Cost of the compression", without.text)
    assert unmeasured not in whole.text
    assert "Measured on cpu, 2 threads: bfloat16, batch of 1, 5 rounds" in whole.text
    assert "1.32 × as fast per new token (1.34 × in the prefill)" in whole.text
    assert {"1.23 s", "920 ms", "× 1.34", "45.7 ms", "34.6 ms", "× 1.32", "1.30 min", "17.6 ms", "1.474 GB"} <= whole.cells
    assert all(f"Measured on {machine}." in whole.text for machine in ("Made Up 9000, 2 cores", "Other 7, 4 cores"))
    # A part of the stages has no sum.
    partial = show(cost=stages | {"stages_not_measured": 7})
    assert {"1.30 min", "7 stages"} <= partial.cells
    assert "all stages" in whole.cells - partial.cells


def test_the_page_names_the_versions_and_says_what_an_embedded_model_is(params: Params, show: Show) -> None:
    assert "Made with lm-eval 2.3, tokenizers 3.2, torch 1.2. Other versions" in show().text
    for name, model in MODELS.items():
        embedded, other = (params.model_copy(update={"model_path": path}) for path in (name, f"org/{name}"))
        assert f"{model.original}, widened to bfloat16" in show(embedded).text
        assert "widened" not in show(other).text


# --- What the page must not contain -------------------------------------------------------------------------------------


def test_names_and_texts_cannot_inject_html(show: Show) -> None:
    hostile = """</p><script>alert(1)</script><img src=x onerror="a()"> {{ 7 * 7 }} &lt; \u0000 'end'"""

    def page(text: str) -> Reader:
        return show(
            read_params(None, {"model_path": "a/" + text.replace("\0", "")}, methods=METHODS),
            evaluation={
                **EVALUATION,
                "accuracy": {text: EVALUATION["accuracy"]["piqa"]},
                "perplexity": {text: EVALUATION["perplexity"]["wikipedia"]},
            },
            title=text,
            continuations=[dict.fromkeys(("kind", "prompt", "answer", "dense", "pruned"), text)],
        )

    harmless, attacked = page("x"), page(hostile)
    assert (attacked.tags, attacked.loads) == (harmless.tags, harmless.loads)
    assert attacked.text.count('<script>alert(1)</script><img src=x onerror="a()"> {{ 7 * 7 }} &lt;') >= 10


def test_the_users_files_are_named_without_their_folders(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "private"
    for folder in (private / "my-model", private / "below"):
        folder.mkdir(parents=True)
    for file in ("notes.txt", "asked.jsonl", "below/other.txt"):
        (private / file).touch()
    monkeypatch.chdir(private)
    given = {
        "model_path": str(private / "my-model"),
        "dataset": str(private / "notes.txt"),
        "tasks": ["below/other.txt", {str(private / "asked.jsonl"): {"limit": 9}}, "/gone/away.txt"],
        "save_path": str(private / "chosen-place"),
    }
    html = show(read_params(None, given, methods=METHODS)).html
    for path in (str(tmp_path), "private", "below/", "/gone", "chosen-place"):
        assert path not in html
    for name in (
        "my-model without 2 of",
        "model_path: my-model",
        "dataset: notes.txt",
        "- other.txt",
        "- away.txt",
        "limit: 9",
    ):
        assert name in html


# --- Settings, pictures and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "own"),
    [("recommended", {"threads": 3}), ("quick", {"layers_to_skip": 8}), ("published", {"method": "cosine", "solver": "cg"})],
)
def test_the_preset_and_what_differs_from_it_make_the_same_run(preset: Any, own: Any, show: Show, tmp_path: Path) -> None:
    params = read_params(None, own, METHODS, preset)
    text = unescape(re.findall(r"<pre[^>]*><code>(.*?)</code>", show(params).html, re.DOTALL)[0])
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    assert text.startswith(f"preset: {preset}\n")
    assert text.count("\n") < 6
    assert read_params(tmp_path / "settings.yaml", methods=METHODS, preset=None) == params


def test_the_stage_writes_the_page_its_pictures_the_settings_and_the_card(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = write_run(tmp_path)
    monkeypatch.setattr(stage, "render_run_card", lambda params, work: "the card")
    stage.write_report(params, work)
    assert {path.name for path in work.report.iterdir()} == {"index.html", "params.yaml", "pictures", "model_card.md"}
    assert (work.report / "model_card.md").read_text(encoding="utf-8") == "the card"
    # The same run gives the same bytes, whatever matplotlib is set to.
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 10, "axes.grid": True}):
        page = render(params, work)
        assert matplotlib.rcParams["font.size"] == 30
    assert (work.report / "index.html").read_text(encoding="utf-8") == page.html
    assert set(page.pictures) == {"distances", "cut_residuals", "layers", "scores", "residuals"}
    for name, picture in page.pictures.items():
        assert (work.report / "pictures" / f"{name}.png").read_bytes() == picture.light
        assert picture.light.startswith(b"\x89PNG")
        assert picture.light != picture.dark
    # The page loads nothing from elsewhere, and names each picture.
    read = Reader(page.html)
    assert all(read.alternatives)
    assert len(set(read.alternatives)) == len(page.pictures)
    assert len(read.loads) > 2 * len(page.pictures)
    assert all(source.startswith("data:") for source in read.loads)
    assert not {"script", "iframe", "object", "embed"} & set(read.tags)
    assert not re.search(r"@import|url\(|\son\w+=", page.html)


def test_a_picture_is_there_only_if_it_has_something_to_show(params: Params, tmp_path: Path) -> None:
    solved = SOLVED | {"loss_start": 0.5, "converged": 1}
    work = write_run(tmp_path, solved=solved, evaluation={}, residuals="alpha,relative_residual\n")
    (work.solution / "loss.csv").write_text("iteration,loss\n0,0.5\n5,0.25\n9,0.26\n", encoding="utf-8")
    rows = "layer,linear,residual_before,residual_after\n3,mlp_output,0.5,0.25\n4,mlp_output,0.5,0.375\n"
    (work.repaired / "repairs.csv").write_text(rows, encoding="utf-8")
    (work.edits / "loss.tsv").write_text("step\tloss\n0\t2.0\n1\t1.5\n", encoding="utf-8")
    (work.edits / "held_out_loss.tsv").write_text("step\theld_out_loss\n0\t1.75\n", encoding="utf-8")
    page = render(params, work)
    assert set(page.pictures) == {"distances", "cut_residuals", "layers", "loss", "repairs", "training"}
    assert "Nothing was scored." in page.html
    assert {"loss at the start", "converged"} <= Reader(page.html).cells
