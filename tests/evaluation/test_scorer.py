"""Accuracy: our scorer compared with lm-eval's own, and with one plain pass per request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, ParameterError
from replaceme.base.parameters import Params
from replaceme.evaluation import catalogue, harness
from replaceme.evaluation.requests import Encodings, Requests
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.scores import score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model
from tests.conftest import made_model, made_text, made_tokenizer


def scorer_of(model: Any, batch_size: int = 1) -> CausalScorer:
    return CausalScorer(model, made_tokenizer(), batch_size, "test", Encodings())


def plain_score(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        predictions = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    pairs = list(zip(places, continuation, strict=True))
    return sum(float(predictions[place, token]) for place, token in pairs), all(
        int(predictions[place].argmax()) == token for place, token in pairs
    )


PAIRS = [
    ([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [11]), ([3, 4], [5, 6, 7]), ([12], [13, 14]), ([9, 8, 7, 6], [5]),
    ([3, 4], [5, 6, 7]), ([7, 7, 7, 7], [1, 2, 3]), ([6, 5], [4]), ([2, 2], [3, 3]),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_each_likelihood_equals_one_plain_pass(family: str, batch_size: int) -> None:
    model = made_model(family, dtype=torch.float64)
    found = scorer_of(model, batch_size)._loglikelihood_tokens([(("", ""), *pair) for pair in PAIRS])
    for pair, (likelihood, greedy) in zip(PAIRS, found, strict=True):
        expected = plain_score(model, *pair)
        assert likelihood == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_contexts_longer_than_a_sliding_window_are_shared_too(family: str) -> None:
    model = made_model(family, dtype=torch.float64)
    pairs = [(list(range(2, 2 + length)), [length, 5, 6][:size]) for length in (9, 14, 30) for size in (1, 2, 3)]
    found = scorer_of(model)._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for pair, score in zip(pairs, found, strict=True):
        assert score[0] == pytest.approx(plain_score(model, *pair)[0], rel=1e-5)


def test_a_model_without_a_cache_to_share_is_scored_row_by_row() -> None:
    model = made_model(dtype=torch.float64)
    scorer = scorer_of(model)
    scorer.shares = False
    found = scorer._loglikelihood_tokens([(("", ""), *pair) for pair in PAIRS])
    for pair, (likelihood, _) in zip(PAIRS, found, strict=True):
        assert likelihood == pytest.approx(plain_score(model, *pair)[0], rel=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_context_is_read_as_lm_eval_reads_it(bos: bool) -> None:
    model, tokenizer = made_model(), made_tokenizer(bos=bos)
    requests = [Instance("loglikelihood", {}, ("", text), 0) for text in ("the river", "a boat")]
    ours = CausalScorer(model, tokenizer, 1, "test", Encodings()).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-4)


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(DatasetError, match="tasks: the answer 'x' of an item has no tokens"):
        scorer_of(made_model())._loglikelihood_tokens([(("", "x"), [5], [])])


def test_no_request_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(made_model())
    seen: list[tuple[Any, ...]] = []
    score = scorer._score

    def watched(contexts: Any, rows: Any, continuations: Any) -> Any:
        seen.extend((contexts[row], tail) for row, tail in zip(rows, continuations, strict=True))
        return score(contexts, rows, continuations)

    monkeypatch.setattr(scorer, "_score", watched)
    scorer._loglikelihood_tokens([(("", ""), *pair) for pair in [*PAIRS, *PAIRS]])
    assert len(seen) == len(set(seen)) == len({(tuple(a), tuple(b)) for a, b in PAIRS})


def test_logits_are_computed_at_scored_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_model()
    positions: list[int] = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: (positions.append(states.shape[1]), head(states))[1])
    scorer_of(model)._loglikelihood_tokens([(("", ""), list(range(2, 40)), [5, 6]), (("", ""), list(range(3, 41)), [7, 8])])
    assert positions == [2]


def test_contexts_longer_than_the_model_are_cut_at_the_left() -> None:
    model = made_model(max_position_embeddings=16)
    long, short = list(range(2, 60)), list(range(2, 60))[-15:]
    found = scorer_of(model)._loglikelihood_tokens([(("", ""), long, [5, 6]), (("", ""), short, [5, 6])])
    assert found[0] == found[1]


def question_rows(count: int = 40) -> list[dict[str, Any]]:
    sentences = [made_text(1, seed).strip() for seed in range(5 * count)]
    return [
        {"question": sentences[5 * n], "choices": sentences[5 * n + 1 : 5 * n + 2 + n % 3 + 1], "answer": n % 2}
        for n in range(count)
    ]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in question_rows()), encoding="utf-8")
    return path


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
    monkeypatch.setattr(catalogue, "_manager", lambda: TaskManager(include_path=str(folder), include_defaults=False))
    return add


def run(model: Any, *tasks: Task) -> harness.Outcome:
    suite = harness.Suite()
    for task in tasks:
        suite.add(task, {})
    return harness.run(scorer_of(model), suite)


@pytest.mark.parametrize("fewshots", [0, 2])
def test_a_file_of_questions_scores_as_lm_evals_own_task_of_that_form(
    fewshots: int, questions: Path, library: Callable[..., None]
) -> None:
    library("reference")
    model = made_model(max_position_embeddings=1024)
    found = run(model, Task(str(questions), fewshots=fewshots)).accuracy["questions"]
    single = catalogue.load(Task("reference", fewshots=fewshots), {})["tasks"]["reference"]
    reference = HFLM(pretrained=model, tokenizer=made_tokenizer(), batch_size=4, add_bos_token=True)
    expected = evaluate(reference, {"tasks": {"reference": single}}, bootstrap_iters=1)["results"]["reference"]
    assert found["accuracy"] == expected["acc_norm,none"]
    assert found["stderr"] == pytest.approx(expected["acc_norm_stderr,none"])
    assert (found["items"], found["metric"], found["fewshots"]) == (40, "acc_norm", fewshots)
    assert found["chance"] == pytest.approx(sum(1 / len(row["choices"]) for row in question_rows()) / 40)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_accuracies_of_choices_and_of_words_equal_lm_evals_own(family: str, tmp_path: Path) -> None:
    model, tokenizer = made_model(family), made_tokenizer()
    items = [{"context": f"{made_text(3, seed)} The river", "word": "runs"} for seed in range(12)]
    choices = [
        {"query": made_text(2, n), "choices": [made_text(1, n + 50 + c) for c in range(4)], "gold": n % 4} for n in range(20)
    ]
    suite = harness.Suite()
    suite.singles = {
        "words": harness._task_of("words", items, harness.WORD),
        "choices": harness._task_of("choices", choices, harness.CONTINUATION),
    }
    for single in suite.singles.values():
        catalogue.configure(single, None)
    suite.reported = {name: harness.Reported((name,), "acc" if name == "words" else "acc_norm") for name in suite.singles}
    found = harness.run(scorer_of(model), suite)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=True)
    expected = evaluate(reference, {"tasks": suite.singles}, bootstrap_iters=1)["results"]
    assert found.accuracy["words"]["accuracy"] == expected["words"]["acc,none"]
    assert found.accuracy["choices"]["accuracy"] == expected["choices"]["acc_norm,none"]
    for name in suite.singles:
        (part,) = found.items[name]
        assert float(part.mean()) == pytest.approx(found.accuracy[name]["accuracy"])


def test_a_group_has_lm_evals_aggregate_and_a_tag_is_reported_by_task(library: Callable[..., None]) -> None:
    library("one", tag="both")
    library("two", tag="both", doc_to_text="{{question}}")
    library("group", group="all", task=["one", "two"], aggregate_metric_list=[{"metric": "acc_norm", "weight_by_size": True}])
    library("loose", group="loose", task=["one", "two"])
    assert catalogue.members("all") == catalogue.members("both") == ["one", "two"]
    model = made_model(max_position_embeddings=1024)
    apart = run(model, Task("both")).accuracy
    assert set(apart) == set(run(model, Task("loose")).accuracy) == {"one", "two"}
    together = run(model, Task("all", limit=10))
    assert set(together.accuracy) == {"all"}
    assert together.accuracy["all"]["items"] == 20
    limited = run(model, Task("both", limit=10))
    mean = sum(score["accuracy"] for score in limited.accuracy.values()) / 2
    assert together.accuracy["all"]["accuracy"] == pytest.approx(mean)
    parts = [score["stderr"] ** 2 * 10 for score in limited.accuracy.values()]  # variances of the items
    assert together.accuracy["all"]["stderr"] == pytest.approx((sum(parts) / 2 / 20) ** 0.5)
    assert all(map(torch.equal, together.items["all"], [*limited.items["one"], *limited.items["two"]]))


def test_a_group_weights_its_tasks_equally_if_lm_eval_defines_it_so(library: Callable[..., None], questions: Path) -> None:
    library("one")
    few = {
        "task": "few", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.with_name("few.jsonl"))}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc_norm"}],
    }  # fmt: skip
    aggregate = [{"metric": "acc_norm", "weight_by_size": False}]
    library("group", group="all", task=["one", few], aggregate_metric_list=aggregate)
    questions.with_name("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in question_rows(5)), encoding="utf-8")
    assert catalogue.members("all") == ["one", "all::few"]
    found = run(made_model(max_position_embeddings=1024), Task("all"))
    parts = found.items["all"]
    assert [len(part) for part in parts] == [40, 5]
    score = found.accuracy["all"]
    assert not score["by_size"]
    assert score["accuracy"] == pytest.approx(sum(float(part.mean()) for part in parts) / 2)
    assert score["stderr"] == pytest.approx(sum(float(part.var()) / len(part) for part in parts) ** 0.5 / 2)


@pytest.mark.parametrize("column", ["article", "passage", "context"])
def test_items_that_share_a_passage_are_known_in_files_and_in_tasks_of_lm_eval(
    column: str, library: Callable[..., None], questions: Path
) -> None:
    rows = [{**row, column: f"passage {number // 4}"} for number, row in enumerate(question_rows(20))]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    library("theirs")
    found = run(made_model(max_position_embeddings=1024), Task(str(questions)), Task("theirs"))
    for name in ("questions", "theirs"):
        (own,), (part,) = found.articles[name], found.items[name]
        assert own is not None
        assert [int((own == each).sum()) for each in own.unique()] == [4] * 5
        assert torch.equal(own, own[::4].repeat_interleave(4))
        assert found.accuracy[name]["stderr"] == pytest.approx(float(part.reshape(5, 4).mean(dim=1).std()) / 5**0.5)


def test_items_without_a_shared_passage_are_independent(questions: Path) -> None:
    for passages in ([""] * 40, [str(number) for number in range(40)], ["same"] * 39):
        rows = question_rows()
        for row, passage in zip(rows, passages, strict=False):
            row["passage"] = passage
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert run(made_model(max_position_embeddings=1024), Task(str(questions))).articles["questions"] == [None]


def test_a_name_that_is_taken_is_refused(library: Callable[..., None], questions: Path) -> None:
    library("questions")
    with pytest.raises(ParameterError, match="tasks: questions is there twice"):
        run(made_model(), Task("questions"), Task(str(questions)))


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
    answers = [catalogue.load(Task("drawn"), {})["tasks"]["drawn"].eval_docs["answer"] for _ in range(2)]
    assert list(answers[0]) == list(answers[1])
    assert len(set(answers[0])) == 2


def test_a_perplexity_that_overflows_loses_no_other_score(library: Callable[..., None], questions: Path) -> None:
    library("pages", output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None, doc_to_target="{{'ab' * 900}}",
            metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    found = run(made_model(max_position_embeddings=2048), Task("pages", limit=1), Task(str(questions)))
    assert found.perplexity == {}
    assert found.accuracy["questions"]["items"] == 40


def test_generated_answers_and_perplexity_tasks_of_lm_eval_are_scored_too(
    library: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    library(
        "answers", output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    library(
        "pages", output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None, doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    )  # fmt: skip
    model = made_model(max_position_embeddings=1024)
    found = run(model, Task("answers", limit=5), Task("pages"))
    assert found.accuracy["answers"] | {"accuracy": 0, "stderr": 0} == {
        "accuracy": 0, "chance": 0, "stderr": 0, "items": 5, "metric": "exact_match", "fewshots": 0, "by_size": True,
    }  # fmt: skip
    assert found.perplexity["pages"]["word"] > found.perplexity["pages"]["byte"] > 1
    # lm-eval's own bars count requests.
    assert "requests" not in capfd.readouterr().err


@pytest.mark.parametrize(("wanted", "said"), [(None, 256), (64, 64), (63, None)])
def test_answers_longer_than_the_model_are_refused_before_it_is_loaded(
    wanted: int | None, said: int | None, library: Callable[..., None], params: Params, save_tiny: Callable[..., Model]
) -> None:
    generation = {"until": ["\n"]} | ({} if wanted is None else {"max_gen_toks": wanted})
    library("answers", output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[0]}}",
            generation_kwargs=generation, metric_list=[{"metric": "exact_match"}])  # fmt: skip
    short = save_tiny("gpt2", max_position_embeddings=64)
    asked = params.model_copy(update={"tasks": (Task("answers", limit=2),)})
    if said is None:
        assert score_model(asked, short, "dense", {"answers": {}}).figures["accuracy"]["answers"]["items"] == 2
    else:
        with pytest.raises(ParameterError, match=f"tasks: answers generates up to {said} tokens, and the model takes 64 with"):
            score_model(asked, short, "dense", {"answers": {}})


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_every_kind_of_request_fits_the_positions_that_a_model_has(
    family: str, library: Callable[..., None], params: Params, save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    library("pages", output_type="loglikelihood_rolling", doc_to_text="", doc_to_choice=None,
            doc_to_target="{{(question + ' ') * 20}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    library("choices", doc_to_text="{{(question + ' ') * 20}}", doc_to_choice="{{choices}}")
    (text := tmp_path / "long.txt").write_text(made_text(60), encoding="utf-8")
    asked = params.model_copy(update={"tasks": (Task("pages", limit=2), Task("choices", limit=3), Task(str(text)))})
    short = save_tiny(family, max_position_embeddings=64)
    scores = score_model(asked, short, "dense", task_fingerprints(asked))
    found, requests = scores.figures, scores.requests
    assert max(map(len, requests.windows["long"].windows)) == 64
    assert max(len(context) + len(tail) for context, tail in requests.encodings.pairs.values()) > 200
    assert found["accuracy"]["choices"]["items"] == 3
    assert min(found["perplexity"]["pages"]["word"], found["perplexity"]["long"]["token"]) > 1


def test_a_task_without_accuracy_and_perplexity_is_refused(library: Callable[..., None]) -> None:
    library("likely", output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{choices[0]}}",
            metric_list=[{"metric": "perplexity", "higher_is_better": False, "aggregation": "perplexity"}])  # fmt: skip
    library("correlated", metric_list=[{"metric": "mcc"}])
    for name, metric in (("likely", "perplexity"), ("correlated", "mcc")):
        with pytest.raises(DatasetError, match=f"tasks: {name} measures {metric}, which is neither an accuracy"):
            harness.Suite().add(Task(name, limit=2), {})


def test_a_task_that_cannot_be_loaded_is_reported_in_a_sentence(library: Callable[..., None]) -> None:
    library("broken", dataset_kwargs={"data_files": {"test": "/nowhere/at/all.jsonl"}})
    with pytest.raises(DatasetError, match="tasks: 'broken' can't be loaded"):
        run(made_model(), Task("broken"))


def test_more_examples_than_items_are_refused(questions: Path) -> None:
    with pytest.raises(ParameterError, match="tasks: fewshots of questions must be at most its 39 examples, not 40"):
        run(made_model(), Task(str(questions), fewshots=40))


def test_encodings_are_made_once_and_survive_the_disk(tmp_path: Path, questions: Path) -> None:
    model, requests = made_model(), Requests()
    suite = harness.Suite()
    suite.add(Task(str(questions)), {})
    first = harness.run(CausalScorer(model, made_tokenizer(), 1, "test", requests.encodings), suite)
    requests.save(tmp_path)
    loaded = Requests.load(tmp_path)
    assert loaded.encodings.pairs == requests.encodings.pairs
    tokenizer = made_tokenizer()
    scorer = CausalScorer(model, tokenizer, 1, "test", loaded.encodings)
    scorer.tok_encode = None  # type: ignore[assignment,method-assign]  # no request may be encoded again
    suite = harness.Suite()
    suite.add(Task(str(questions)), {})
    assert harness.run(scorer, suite).accuracy == first.accuracy
