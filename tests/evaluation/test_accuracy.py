"""Accuracies of files of questions, of lm-eval's tasks, groups and tags, compared with lm-eval's own."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from replaceme.base.entries import Task
from replaceme.base.errors import ParameterError, ReplaceMeError
from replaceme.base.parameters import Params
from replaceme.evaluation import catalogue, requests
from replaceme.evaluation.accuracy import SuiteScores, score_suite
from replaceme.evaluation.requests import Suite
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.scores import score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model
from tests.conftest import made_model, made_text, made_tokenizer


def question_rows(count: int = 40) -> list[dict[str, Any]]:
    sentences = [made_text(1, seed).strip() for seed in range(5 * count)]
    return [
        {"question": sentences[5 * n], "choices": sentences[5 * n + 1 : 5 * n + 2 + n % 3 + 1], "answer": n % 2}
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", question_rows())


@pytest.fixture
def library(tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that adds tasks to a catalogue of lm-eval with no others: YAML files over the questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    form = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}}, "test_split": "test",
        "fewshot_split": "test", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip

    def add(name: str, **config: Any) -> None:
        content = {"task": name, **form, **config} if "group" not in config else config
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(catalogue, "task_manager", lambda: TaskManager(include_path=str(folder), include_defaults=False))
    return add


def suite_of(*tasks: Task) -> Suite:
    suite = Suite()
    for task in tasks:
        suite.add(task, {})
    return suite


def run(model: Any, *tasks: Task) -> SuiteScores:
    return score_suite(CausalScorer(model, made_tokenizer(), 1, "test"), suite_of(*tasks))


def lm_evals_own(model: Any, suite: Suite) -> Any:
    reference = HFLM(pretrained=model, tokenizer=made_tokenizer(), batch_size=4, add_bos_token=True)
    return evaluate(reference, {"tasks": suite.tasks, "groups": suite.groups}, bootstrap_iters=1)["results"]


@pytest.mark.parametrize("fewshots", [0, 2])
def test_a_file_of_questions_scores_as_lm_evals_own_task_of_that_form(
    fewshots: int, questions: Path, library: Callable[..., None]
) -> None:
    library("reference")
    model = made_model(max_position_embeddings=1024)
    accuracy = run(model, Task(str(questions), fewshots=fewshots)).accuracy["questions"]
    expected = lm_evals_own(model, suite_of(Task("reference", fewshots=fewshots)))["reference"]
    assert accuracy["accuracy"] == expected["acc_norm,none"]
    assert accuracy["stderr"] == pytest.approx(expected["acc_norm_stderr,none"])
    assert (accuracy["items"], accuracy["metric"], accuracy["fewshots"]) == (40, "acc_norm", fewshots)
    assert accuracy["chance"] == pytest.approx(sum(1 / len(row["choices"]) for row in question_rows()) / 40)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_accuracies_of_embedded_items_equal_lm_evals_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {
        "wikipedia_last_word": [{"context": f"{made_text(3, seed)} The river", "word": "runs"} for seed in range(12)],
        "wikipedia_continuation": [
            {"query": made_text(2, n), "choices": [made_text(1, n + 50 + c) for c in range(4)], "gold": n % 4}
            for n in range(20)
        ],
    }
    monkeypatch.setattr(requests, "task_items", lambda task: items[task.name])
    model, tasks = made_model(family), [*map(Task, items)]
    scores, expected = run(model, *tasks), lm_evals_own(model, suite_of(*tasks))
    assert scores.accuracy["wikipedia_last_word"]["accuracy"] == expected["wikipedia_last_word"]["acc,none"]
    assert scores.accuracy["wikipedia_continuation"]["accuracy"] == expected["wikipedia_continuation"]["acc_norm,none"]
    for name, figures in scores.accuracy.items():
        assert float(scores.items[f"accuracy/{name}"].mean()) == pytest.approx(figures["accuracy"])


def test_a_group_has_lm_evals_aggregate_and_a_tag_is_reported_by_task(library: Callable[..., None]) -> None:
    library("one", tag="both")
    library("two", tag="both", doc_to_text="{{question}}")
    library("group", group="all", task=["one", "two"], aggregate_metric_list=[{"metric": "acc_norm", "weight_by_size": True}])
    library("loose", group="loose", task=["one", "two"])
    assert catalogue.list_single_tasks("all") == catalogue.list_single_tasks("both") == ["one", "two"]
    model = made_model(max_position_embeddings=1024)
    assert set(run(model, Task("both")).accuracy) == set(run(model, Task("loose")).accuracy) == {"one", "two"}
    whole, parts = run(model, Task("all", limit=10)), run(model, Task("both", limit=10))
    assert set(whole.accuracy) == {"all"}
    assert whole.accuracy["all"]["items"] == 20
    assert whole.accuracy["all"]["accuracy"] == pytest.approx(sum(each["accuracy"] for each in parts.accuracy.values()) / 2)
    variances = [each["stderr"] ** 2 * 10 for each in parts.accuracy.values()]
    assert whole.accuracy["all"]["stderr"] == pytest.approx((sum(variances) / 2 / 20) ** 0.5)
    assert whole.items["accuracy/all"].tolist() == [*parts.items["accuracy/one"], *parts.items["accuracy/two"]]


def test_a_group_weights_its_tasks_equally_if_lm_eval_defines_it_so(library: Callable[..., None], tmp_path: Path) -> None:
    library("one")
    few = {
        "task": "few", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_rows(tmp_path / "few.jsonl", question_rows(5)))}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc_norm"}],
    }  # fmt: skip
    aggregate = [{"metric": "acc_norm", "weight_by_size": False}]
    library("group", group="all", task=["one", few], aggregate_metric_list=aggregate)
    assert catalogue.list_single_tasks("all") == ["one", "all::few"]
    scores = run(made_model(max_position_embeddings=1024), Task("all"))
    parts, accuracy = scores.items["accuracy/all"].split([40, 5]), scores.accuracy["all"]
    assert not accuracy["by_size"]
    assert accuracy["accuracy"] == pytest.approx(sum(float(part.mean()) for part in parts) / 2)
    assert accuracy["stderr"] == pytest.approx(sum(float(part.var()) / len(part) for part in parts) ** 0.5 / 2)


def test_items_that_share_a_passage_are_known_in_files_and_in_tasks_of_lm_eval(
    library: Callable[..., None], questions: Path
) -> None:
    write_rows(questions, [{**row, "passage": f"passage {number // 4}"} for number, row in enumerate(question_rows(20))])
    library("theirs")
    scores = run(made_model(max_position_embeddings=1024), Task(str(questions)), Task("theirs"))
    for name in ("questions", "theirs"):
        articles, items = scores.items[f"articles/{name}"], scores.items[f"accuracy/{name}"]
        assert len(articles.unique()) == 5
        assert articles.tolist() == articles[::4].repeat_interleave(4).tolist()
        assert scores.accuracy[name]["stderr"] == pytest.approx(float(items.reshape(5, 4).mean(dim=1).std()) / 5**0.5)
    # Passages of one item each, or a single one, are no clusters.
    for passages in ([str(number) for number in range(40)], ["same"] * 40, ["same"] * 39):
        rows = [{**row, "passage": passage} for row, passage in zip(question_rows(), [*passages, ""], strict=False)]
        write_rows(questions, rows)
        assert run(made_model(max_position_embeddings=1024), Task(str(questions))).items["articles/questions"].unique() == -1


def test_tasks_that_shuffle_give_the_same_items_each_time(library: Callable[..., None], tmp_path: Path) -> None:
    code = """
import random

def order(docs):
    drawn = [random.randrange(2) for _ in docs]
    return docs.remove_columns("answer").add_column("answer", drawn)
"""
    (tmp_path / "tasks" / "shuffled.py").write_text(code, encoding="utf-8")
    library("drawn")
    path = tmp_path / "tasks" / "drawn.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "process_docs: !function shuffled.order\n", encoding="utf-8")
    answers = [[*suite_of(Task("drawn")).tasks["drawn"].eval_docs["answer"]] for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 2


def test_generated_answers_and_perplexity_tasks_of_lm_eval_are_scored_too(library: Callable[..., None]) -> None:
    library(
        "answers", output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None}
    metrics = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]
    library("pages", **text, doc_to_target="{{question}}", metric_list=metrics)
    # One word of so many tokens that its perplexity overflows loses no accuracy.
    library("endless", **text, doc_to_target="{{'ab' * 900}}", metric_list=metrics)
    model = made_model(max_position_embeddings=2048)
    scores = run(model, Task("answers", limit=5), Task("pages"))
    assert scores.accuracy["answers"] | {"accuracy": 0, "stderr": 0} == {
        "accuracy": 0, "chance": 0, "stderr": 0, "items": 5, "metric": "exact_match", "fewshots": 0, "by_size": True,
    }  # fmt: skip
    expected = lm_evals_own(model, suite_of(Task("pages")))["pages"]
    assert scores.perplexity["pages"]["word"] == pytest.approx(expected["word_perplexity,none"], rel=1e-4)
    assert scores.perplexity["pages"]["byte"] == pytest.approx(expected["byte_perplexity,none"], rel=1e-4)
    overflowing = run(model, Task("answers", limit=5), Task("endless", limit=1))
    assert overflowing.perplexity == {}
    assert overflowing.accuracy == scores.accuracy


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_every_kind_of_request_fits_the_positions_that_a_model_has(
    family: str, library: Callable[..., None], params: Params, save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    library("pages", output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None,
            doc_to_target="{{(question + ' ') * 20}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    library("choices", doc_to_text="{{(question + ' ') * 20}}", doc_to_choice="{{choices}}")
    (text := tmp_path / "long.txt").write_text(made_text(60), encoding="utf-8")
    asked = params.model_copy(update={"tasks": (Task("pages", limit=2), Task("choices", limit=3), Task(str(text)))})
    figures = score_model(asked, save_tiny(family, max_position_embeddings=64), task_fingerprints(asked)).figures
    assert figures["accuracy"]["choices"]["items"] == 3
    assert min(figures["perplexity"]["pages"]["word"], figures["perplexity"]["long"]["token"]) > 1


GENERATED = {
    "output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}",
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
LIKELY = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LIKELY, "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]},
         "own measures perplexity, which is neither an accuracy"),
        ({"metric_list": [{"metric": "mcc"}]}, "own measures mcc, which is neither an accuracy"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/at/all.jsonl"}}}, "'own' can't be loaded"),
        (GENERATED, "own generates up to 256 tokens, and the model takes 64 with"),
        ({**GENERATED, "generation_kwargs": {"until": ["."], "max_gen_toks": 64}}, "own generates up to 64 tokens"),
        ({**GENERATED, "generation_kwargs": {"until": ["."], "max_gen_toks": 63}}, ""),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_scored_is_refused_before_a_model_is_loaded(
    config: dict[str, Any], said: str, library: Callable[..., None]
) -> None:
    library("own", **config)
    with pytest.raises(ReplaceMeError, match=f"tasks: {said}") if said else nullcontext():
        Suite().add(Task("own"), {}, positions=64)


def test_a_name_that_is_taken_and_more_examples_than_items_are_refused(library: Callable[..., None], questions: Path) -> None:
    library("questions")
    with pytest.raises(ParameterError, match="tasks: questions is there twice"):
        suite_of(Task("questions"), Task(str(questions)))
    with pytest.raises(ParameterError, match="tasks: fewshots of questions must be at most its 39 examples, not 40"):
        suite_of(Task(str(questions), fewshots=40))
