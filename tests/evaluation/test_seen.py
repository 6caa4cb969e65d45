"""Evaluation text that is the calibration text: the same source, and copies by runs of 13 words."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.entries import Task
from replaceme.base.parameters import Params, read_params
from replaceme.corpora import embedded
from replaceme.corpora.find import fingerprints
from replaceme.corpora.sources import known_sources
from replaceme.corpora.tokenization import rendered
from replaceme.evaluation import seen
from replaceme.evaluation.comparison import compare, comparison_rows, comparison_table, scores_table
from replaceme.evaluation.retrieval import retrieval_items
from replaceme.evaluation.scores import score_model
from replaceme.evaluation.seen import Calibration, hashes_of_runs, known_runs
from replaceme.evaluation.tasks import EMBEDDED, task_fingerprints
from replaceme.models.model import Model
from tests.conftest import made_text, made_tokenizer


def calibrated_on(*texts: str, found: dict[str, Any] | None = None, **options: Any) -> Calibration:
    return Calibration(known_sources(read_params(None, options), found or {"sha256": "another"}), known_runs(texts))


def windows(calibration: Calibration, texts: list[str], name: str = "text.txt", found: Any = "this") -> dict[str, float]:
    return calibration.in_windows(name.split(".")[0], Task(name), found, texts)


def runs_by_hand(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


def test_shared_runs_are_those_of_thirteen_words_whatever_case_and_marks() -> None:
    known = made_text(40)
    runs, kept = runs_by_hand(known), known_runs([known])
    assert len(kept) == len(runs)
    words = known.split()
    for start in range(0, 60, 7):
        for count in (12, 13, 20):
            text = "Quite — other; " + " ".join(words[start : start + count]).upper().replace(".", "?!")
            expected = bool(runs_by_hand(text) & runs)
            assert expected == (count > 12)
            assert bool(set(hashes_of_runs(text).tolist()) & set(kept.tolist())) == expected


def test_characters_of_scripts_without_spaces_are_words() -> None:
    text = "深い森の中に小さな家がありました"
    assert len(hashes_of_runs(text)) == len(text) - 12


def test_the_share_of_copies_is_that_of_the_items_and_a_tenth_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    calibration = calibrated_on(made_text(30), dataset="known.txt")
    copy = made_text(30).split("\n\n")[0]
    others = [made_text(3, seed) for seed in range(100, 139)]
    with caplog.at_level("WARNING", "replaceme"):
        assert windows(calibration, [*others, copy]) == {"seen": 0, "same_domain": 0, "overlap": 1 / 40}
        assert not caplog.records
        assert windows(calibration, [*others[:9], copy]) == {"seen": 1, "same_domain": 0, "overlap": 0.1}
    (record,) = caplog.records
    assert record.message == (
        "tasks: text is no unseen text: 10 % of its items share 13 words in a row with the calibration text (known.txt); take "
        "its score for no other text"
    )


def test_a_file_with_the_same_content_is_seen_without_any_run(caplog: pytest.LogCaptureFixture) -> None:
    calibration = calibrated_on("few words", found={"sha256": "this", "form": ".txt"}, dataset="known.txt")
    with caplog.at_level("WARNING", "replaceme"):
        assert windows(calibration, ["few words"]) == {"seen": 1, "same_domain": 0, "overlap": 0}
    assert "tasks: text is no unseen text: its source is the calibration text (known.txt)" in caplog.text
    assert windows(calibration, ["few words"], found="that") == {"seen": 0, "same_domain": 0, "overlap": 0}


@pytest.mark.parametrize(("split", "same"), [("held-out", 1), ("calibration", 0), (None, 0)])
def test_an_embedded_task_is_seen_by_a_calibration_on_its_split(split: str | None, same: int) -> None:
    params = read_params(None, {"dataset": "wikipedia-sample", "dataset_split": split})
    calibration = calibrated_on(found=fingerprints(params), dataset_split=split)
    identity = embedded.text_fingerprint("wikipedia-sample")
    assert windows(calibration, ["other"], "wikipedia", identity)["seen"] == same
    items = SimpleNamespace(eval_docs=[{"query": "other"}])
    assert (
        calibration.in_items("wikipedia_continuation", Task("wikipedia_continuation"), identity, [items], None)["seen"] == same
    )


@pytest.mark.parametrize(
    ("options", "task", "same"),
    [
        ({}, {"test_split": "train"}, 1),
        ({}, {"test_split": "test"}, 0),
        ({"dataset_split": "test[:5%]"}, {"test_split": "test"}, 1),
        ({"dataset_split": "validation"}, {"validation_split": "validation"}, 1),
        ({"dataset_split": "validation"}, {"validation_split": "validation", "test_split": "test"}, 0),
        ({"dataset_split": "test", "dataset_config": "b"}, {"test_split": "test", "dataset_name": "a"}, 0),
        ({"dataset_split": "test", "dataset_config": "a"}, {"test_split": "test", "dataset_name": "a"}, 1),
        ({"dataset_split": "test"}, {"test_split": "test", "dataset_path": "owner/other"}, 0),
    ],
)
def test_a_task_of_lm_eval_is_seen_by_a_calibration_on_its_split(options: Any, task: Any, same: int) -> None:
    form = {"dataset_path": "Owner/text", "dataset_name": None, "test_split": None, "validation_split": None, **task}
    single = SimpleNamespace(
        config=SimpleNamespace(**form), has_test_docs=lambda: form["test_split"] is not None, eval_docs=[{"a": "b"}]
    )
    calibration = calibrated_on("words", found={"commits": {"owner/text": "1234"}}, dataset="owner/text", **options)
    assert calibration.in_items("piqa", Task("piqa"), {}, [single], None)["seen"] == same


def test_items_are_searched_in_all_their_texts_up_to_the_limit() -> None:
    calibration, copy = calibrated_on(made_text(30)), made_text(30).split("\n\n")[0]
    docs = [{"a": 1, "b": ["x", {"c": copy}]}, {"a": "x"}, {"a": "y"}, {"a": copy}]
    singles = [SimpleNamespace(eval_docs=docs, config=SimpleNamespace(), has_test_docs=lambda: True)]
    for limit, share in ((None, 0.5), (3, 1 / 3), (1, 1.0), (9, 0.5)):
        assert calibration.in_items("piqa", Task("piqa"), {}, singles, limit)["overlap"] == share


def test_memory_is_bounded_and_copies_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MOST", 40)
    texts = [made_text(20, seed) for seed in range(30)]
    calibration = calibrated_on(*texts)
    assert len(calibration.runs) == 40
    everything = sorted(set().union(*(hashes_of_runs(text).tolist() for text in texts)))
    assert calibration.runs.tolist() == everything[:40]
    assert windows(calibration, ["\n\n".join(texts)]) == {"seen": 1, "same_domain": 0, "overlap": 1}


def test_a_model_knows_only_the_calibration_that_it_is_given(params: Params, tiny: Model, tmp_path: Path) -> None:
    text = Path(params.tasks[0].name).read_text(encoding="utf-8")
    rows = [{"question": made_text(4, 200 + seed), "choices": ["a b", "c d"], "answer": 0} for seed in range(8)]
    rows[3]["question"] = " ".join(text.split()[40:60])
    (questions := tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    params = params.model_copy(update={"tasks": (*params.tasks, Task(str(questions), limit=6))})
    found, tokenizer = task_fingerprints(params), made_tokenizer()
    documents = Documents([torch.tensor(tokenizer.encode(text))])
    known = Calibration.of(known_sources(params, fingerprints(params)), documents, tokenizer)
    dense = score_model(params, tiny, "dense", found, is_dense=True)
    assert "calibration_text" not in dense.figures
    pruned = score_model(params, tiny, "pruned", found, dense, known)
    expected = {
        "text": {"seen": 1, "same_domain": 0, "overlap": 1.0},
        "questions": {"seen": 1, "same_domain": 0, "overlap": 1 / 6},
    }
    assert pruned.figures["calibration_text"] == expected
    comparison = compare(dense.figures, pruned.figures, dense.items, pruned.items)
    assert comparison["calibration_text"] == expected
    names = [row[0] for row in comparison_rows(comparison)]
    assert {"text perplexity (seen)", "questions accuracy (seen)"} <= set(names)
    assert comparison_table(comparison).endswith("\nSeen: text, questions (are scored on calibration text).")


def test_the_table_of_one_model_has_the_marks_too() -> None:
    scored = {"accuracy": 0.5, "fewshots": 0, "metric": "acc"}
    figures = {
        "perplexity": {"a": {"token": 9.0}, "b": {"token": 9.0}}, "accuracy": {"c": scored},
        "calibration_text": {"a": {"seen": 1, "same_domain": 0}, "b": {"seen": 0, "same_domain": 1}, "c": {"seen": 1}},
    }  # fmt: skip
    table = scores_table(figures)
    assert re.search(r"(?m)^a perplexity \(seen\) +9", table)
    assert re.search(r"(?m)^b perplexity \(domain seen\) +9", table)
    assert re.search(r"(?m)^c accuracy \(seen\) +50.0 %", table)


def test_an_average_over_a_seen_task_says_so() -> None:
    pair = {"dense": 0.5, "pruned": 0.4, "removed_percent": 1.0}
    comparison = {
        "accuracy": {"a": pair, "b": pair}, "average_accuracy": pair, "parameters": pair,
        "calibration_text": {task: {"seen": 0, "same_domain": 0, "overlap": 0.0} for task in "ab"},
    }  # fmt: skip
    assert [row[0] for row in comparison_rows(comparison)][1:4] == ["a accuracy", "b accuracy", "average accuracy"]
    assert "Seen" not in comparison_table(comparison)
    comparison["calibration_text"]["b"]["seen"] = 1
    marked = [row[0] for row in comparison_rows(comparison)][1:4]
    assert marked == ["a accuracy", "b accuracy (seen)", "average accuracy (in part seen)"]


def test_other_text_of_a_calibrated_domain_is_not_unseen() -> None:
    params = read_params(None, {"dataset": ["wikipedia-sample", {"lee-news": 2}, "self"]})
    calibration = calibrated_on(dataset=params.dataset, found=fingerprints(params))

    def figures(name: str) -> dict[str, float]:
        return windows(calibration, ["other"], name, embedded.text_fingerprint(str(EMBEDDED[name][1])))

    assert figures("wikipedia") == {"seen": 0, "same_domain": 1, "overlap": 0}
    assert figures("bbc_news") == {"seen": 0, "same_domain": 1, "overlap": 0}
    assert figures("python_code") == {"seen": 0, "same_domain": 0, "overlap": 0}


def test_items_made_by_code_are_unseen_whatever_is_calibrated_on() -> None:
    params = read_params(None, {"dataset": ["wikipedia-sample", "python-code", "self"]})
    calibration = calibrated_on(made_text(30), dataset=params.dataset, found=fingerprints(params))
    items = SimpleNamespace(eval_docs=retrieval_items())
    task = Task("retrieval_exact")
    found = calibration.in_items(task.name, task, task_fingerprints(read_params(None, {"tasks": [task.name]})), [items], None)
    assert found == {"seen": 0, "same_domain": 0, "overlap": 0}


def test_texts_of_one_wheel_are_told_apart() -> None:
    names = ("bbc-news", "finance-answers", "medical-abstracts")
    assert len({embedded.text_fingerprint(name) for name in names}) == len(names)


def test_the_headline_is_of_unseen_domains_alone() -> None:
    texts = {"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (0, 0)}
    ratios = {"a": 2.0, "b": 9.0, "c": 1.1, "d": 8.0}
    sides: list[dict[str, Any]] = [
        {
            "perplexity": {task: {"token": 10 * ratio**place} for task, ratio in ratios.items()},
            "accuracy": {task: {"accuracy": accuracy, "by_size": True} for task, accuracy in accuracies.items()},
            "parameters": 4,
        }
        for place, accuracies in enumerate(({"b": 0.5, "d": 0.5}, {"b": 0.1, "d": 0.4}))
    ]
    sides[1]["calibration_text"] = {
        task: {"seen": seen, "same_domain": same, "overlap": 0.0} for task, (seen, same) in texts.items()
    }
    found = compare(*sides, {}, {})
    assert found["unseen"] == pytest.approx({"texts": 2, "perplexity_ratio": 4.0, "tasks": 1, "retention_percent": 80.0})
    table = comparison_table(found)
    assert "2 unseen texts, geometric mean" in table
    assert "b perplexity (domain seen)" in table
    assert "c perplexity (seen)" in table
    del sides[1]["calibration_text"]
    assert "unseen" not in compare(*sides, {}, {})


def test_the_words_of_the_chat_template_are_no_copies() -> None:
    tokenizer = made_tokenizer()
    system = " ".join(["be", "brief", "and", "kind"] * 5)
    turns = "{% for turn in messages %}{{ ' user says ' + turn['content'] }}{% endfor %}"
    tokenizer.chat_template = "{{ '" + system + " ' }}" + turns

    def written(content: str) -> list[int]:
        chat = [{"role": "user", "content": content}]
        return list(tokenizer.encode(rendered(chat, tokenizer), add_special_tokens=False))

    params = read_params(None, {"dataset": "known.txt"})
    one, other = (" ".join(made_text(4, seed).split()[:20]) for seed in (1, 2))
    calibration = Calibration.of(known_sources(params, {"sha256": "it"}), Documents([torch.tensor(written(one))]), tokenizer)
    seen_windows = [tokenizer.decode(written(content)) for content in (one, other)]
    assert len(hashes_of_runs(seen_windows[1])) > 10
    assert [windows(calibration, [window])["overlap"] for window in seen_windows] == [1, 0]
