"""The tasks that ``tasks`` can name, and their items from text and files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetInfo, Features, Value
from datasets.arrow_writer import ArrowWriter
from datasets.splits import SplitDict, SplitInfo

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, ParameterError, ReplaceMeError
from replaceme.base.parameters import read_params
from replaceme.base.published import PUBLISHED_TASKS as PUBLISHED
from replaceme.evaluation.accuracy import score_suite
from replaceme.evaluation.requests import Suite
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.tasks import task_fingerprints, task_items, task_kind, task_name, task_texts
from replaceme.models import hub
from tests.conftest import made_model, made_tokenizer

ROW = {"question": "Which?", "choices": ["one", "two"], "answer": 1}


def fingerprints(*tasks: Any) -> dict[str, Any]:
    return task_fingerprints(read_params(None, {"tasks": list(tasks)}))


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        (["a", "b"], (Task("a"), Task("b"))),
        ("a", (Task("a"),)),
        (None, ()),
        ({"a": {"fewshots": 5}, "b": None}, (Task("a", fewshots=5), Task("b"))),
        (["a", {"b": {"limit": 3, "fewshots": 0}}], (Task("a"), Task("b", limit=3, fewshots=0))),
        ([{"q.jsonl": {"question": "goal", "choices": ["x", "y"]}}], (Task("q.jsonl", question="goal", choices=("x", "y")),)),
        ("default", tuple(map(Task, PUBLISHED))),
        ({"default": {"fewshots": 5}}, tuple(Task(name, fewshots=5) for name in PUBLISHED)),
        (["a", "default"], (Task("a"), *map(Task, PUBLISHED))),
    ],
)
def test_every_form_of_the_list_is_understood(given: Any, tasks: tuple[Task, ...]) -> None:
    assert read_params(None, {"tasks": given}).tasks == tasks
    assert read_params(None, {"tasks": [task.plain() for task in tasks]}).tasks == tasks


def test_files_are_tasks_under_their_own_name(tmp_path: Path) -> None:
    text = Task(write_rows(tmp_path / "my.notes.jsonl", {"text": "one"}, {"text": ""}, {"text": "two"}))
    assert (task_name(text), task_kind(text), task_texts(text)) == ("my_notes", "perplexity", ["one", "two"])
    questions = Task(write_rows(tmp_path / "q.jsonl", ROW))
    assert (task_kind(questions), task_items(questions)) == (
        "items",
        [{"query": "Which?", "choices": ["one", "two"], "gold": 1}],
    )
    assert set(fingerprints(text.name, questions.name)) == {"my_notes", "q"}


def test_columns_of_any_name_can_be_mapped(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "piqa.jsonl", {"goal": "Boil", "sol1": "heat", "sol2": "cool", "label": 0, "body": "running text"}
    )
    mapped = Task(path, question="goal", choices=("sol1", "sol2"), answer="label")
    assert task_items(mapped) == [{"query": "Boil", "choices": ["heat", "cool"], "gold": 0}]
    assert task_texts(Task(path, text="body")) == ["running text"]
    fingerprints({path: {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label", "limit": 1, "fewshots": 0}})


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("t.jsonl", '{"body": "x", "n": 1}', {}, "neither question, choices and answer nor text; their columns are body, n"),
        ("t.jsonl", "{", {}, "line 1 of "),
        ("t.jsonl", '{"text": "x"}\n[]', {}, "must be an object with columns, not list"),
        ("t.jsonl", '{"text": "x"}\n\n{"text": 3}', {}, "line 3 of "),
        ("t.jsonl", json.dumps(ROW | {"answer": "B"}), {}, "'answer' must be the right choice's position, 0 to 1, not 'B'"),
        ("t.jsonl", json.dumps(ROW | {"answer": 2}), {}, "0 to 1, not 2"),
        ("t.jsonl", json.dumps(ROW | {"choices": ["one"]}), {}, "'choices' must give at least two texts"),
        ("t.jsonl", json.dumps(ROW | {"question": " "}), {}, "'question' must be a text"),
        ("t.jsonl", json.dumps(ROW), {"answer": "label"}, "has no column 'label'; its columns are question, choices, answer"),
        ("t.jsonl", '{"text": " "}', {}, "has no text in column 'text'"),
        ("t.jsonl", '{"text": "\\ud800"}', {}, "isn't JSON text"),
        ("t.txt", "", {}, "is empty"),
        ("t.txt", "text", {"limit": 5}, "limit counts items, of which t has none; eval_tokens bounds a perplexity task"),
        ("t.txt", "text", {"fewshots": 5}, "fewshots counts items, of which t has none"),
        ("t.txt", "text", {"text": "body"}, "is a .txt file and has no column 'body'"),
        ("t.jsonl", json.dumps(ROW), {"text": "question", "answer": "answer"}, "answer is for the columns of a file"),
    ],
)
def test_an_error_in_a_file_is_reported_before_any_work(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], said: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ReplaceMeError) as caught:
        fingerprints({str(path): options})
    assert str(caught.value).startswith("tasks: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_and_clashing_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"'wikipedi' is no task \(did you mean 'wikipedia'"):
        fingerprints("wikipedi")
    with pytest.raises(ParameterError, match=r"'winogrand' is no task \(did you mean 'winogrande' or '"):
        fingerprints("winogrand")
    with pytest.raises(
        ParameterError, match="tasks: question is for the columns of a file, of which wikipedia_continuation has"
    ):
        fingerprints({"wikipedia_continuation": {"question": "goal"}})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ParameterError, match="two tasks are named 't'"):
        fingerprints(str(tmp_path / "a" / "t.txt"), str(tmp_path / "b" / "t.txt"))


@pytest.mark.parametrize("name", [*PUBLISHED, "winogrande", "race", "lambada_openai"])
def test_the_published_tasks_are_known_and_need_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(DatasetError, match=f"tasks: '{name}' needs the dataset .*, the hub can't be reached"):
        fingerprints(name)


def test_hub_tasks_are_identified_by_their_datasets_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(hub, "resolve_commit", lambda name, kind, revision: asked.append(name) or f"commit of {name}")
    found = fingerprints("piqa", {"mmlu": {"fewshots": 5}})
    assert found["piqa"]["datasets"] == {"baber/piqa": "commit of baber/piqa"}
    assert found["mmlu"]["datasets"] == {"cais/mmlu": "commit of cais/mmlu"}
    assert asked == ["baber/piqa", "cais/mmlu"]
    assert found["mmlu"]["lm_eval"]
    with pytest.raises(ParameterError, match=r"tasks: mmlu_\w+ is in 'mmlu' and in 'mmlu_stem'; keep one"):
        fingerprints("mmlu", "mmlu_stem")
    with pytest.raises(ParameterError, match="tasks: humaneval runs code that the model writes"):
        fingerprints("humaneval")
    path = write_rows(tmp_path / "mmlu_anatomy.jsonl", ROW)
    with pytest.raises(ParameterError, match=r"tasks: mmlu_anatomy is in 'mmlu' and in '.*mmlu_anatomy\.jsonl'"):
        fingerprints("mmlu", path)


def test_datasets_are_read_at_the_commit_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    asked: list[dict[str, Any]] = []

    def read(path: str, **options: Any) -> None:
        asked.append({"path": path, **options})
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("datasets.load_dataset", read)
    with pytest.raises(DatasetError, match=r"tasks: 'piqa' can't be loaded \(ConnectionError: no network in tests\)"):
        Suite().add(Task("piqa"), {"datasets": {"baber/piqa": "abc"}})
    assert asked[0]["path"] == "baber/piqa"
    assert asked[0]["revision"] == "abc"


def cache_piqa(folder: Path, commit: str, goal: str) -> None:
    """Put a few rows into a cache of hub datasets, as if PIQA had been loaded at a commit."""
    place = folder / "baber___piqa" / "default" / "0.0.0" / commit
    place.mkdir(parents=True)
    features = Features({"goal": Value("string"), "sol1": Value("string"), "sol2": Value("string"), "label": Value("int64")})
    splits = SplitDict(dataset_name="piqa")
    for split in ("train", "validation"):
        with ArrowWriter(features=features, path=str(place / f"piqa-{split}.arrow")) as writer:
            for number in range(6):
                writer.write({"goal": goal, "sol1": "the river", "sol2": "a boat", "label": number % 2})
            examples, size = writer.finalize()
        splits[split] = SplitInfo(name=split, num_bytes=size, num_examples=examples, dataset_name="piqa")
    info = DatasetInfo(
        features=features, splits=splits, builder_name="parquet", dataset_name="piqa", config_name="default", version="0.0.0"
    )
    info.write_to_directory(str(place))


def test_a_cached_hub_task_is_scored_offline_at_its_commit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    cache_piqa(tmp_path, "a" * 40, "Cross the water.")
    known = fingerprints({"piqa": {"limit": 4}})
    assert known["piqa"]["datasets"] == {"baber/piqa": "a" * 40}
    suite = Suite()
    suite.add(Task("piqa", limit=4), known["piqa"])
    accuracy = score_suite(CausalScorer(made_model(), made_tokenizer(), 1, "test"), suite).accuracy["piqa"]
    assert (accuracy["items"], accuracy["metric"]) == (4, "acc_norm")
    shutil.rmtree(tmp_path / "baber___piqa")
    cache_piqa(tmp_path, "b" * 40, "Cross another water.")
    with pytest.raises(DatasetError, match="the cache holds another version of baber/piqa than 'piqa' was checked with"):
        Suite().add(Task("piqa"), known["piqa"])
