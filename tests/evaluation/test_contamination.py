"""Evaluation text that is the calibration text: the same source, and copies by 13-grams."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.entries import Task
from replaceme.base.parameters import Params, read_params
from replaceme.calibration import embedded
from replaceme.calibration.find import dataset_fingerprints
from replaceme.calibration.sources import identify_sources
from replaceme.calibration.tokenization import render_chat
from replaceme.evaluation.contamination import CalibrationText, hash_ngrams
from replaceme.evaluation.embedded_tasks import EMBEDDED
from replaceme.evaluation.scores import score_model
from replaceme.evaluation.tasks import task_fingerprints
from replaceme.models.model import Model
from tests.conftest import made_text, made_tokenizer


def calibrated_on(*texts: str, fingerprints: dict[str, Any] | None = None, **options: Any) -> CalibrationText:
    sources = identify_sources(read_params(None, options), fingerprints or {"sha256": "another"})
    return CalibrationText(sources, np.unique(np.concatenate([np.empty(0, np.int64), *map(hash_ngrams, texts)])))


def compare(
    calibration: CalibrationText, texts: list[str], name: str = "text.txt", fingerprint: Any = "this"
) -> dict[str, float]:
    return calibration.measure_contamination(name.split(".")[0], Task(name), fingerprint, [[text] for text in texts])


def ngrams_by_hand(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


def test_common_ngrams_are_those_of_thirteen_words_whatever_case_and_marks() -> None:
    known = made_text(40)
    calibration, ngrams = calibrated_on(known), ngrams_by_hand(known)
    assert calibration.ngrams is not None
    assert len(calibration.ngrams) == len(ngrams)
    words = known.split()
    for start in range(0, 60, 7):
        for count in (12, 13, 20):
            text = "Quite — other; " + " ".join(words[start : start + count]).upper().replace(".", "?!")
            expected = bool(ngrams_by_hand(text) & ngrams)
            assert expected == (count > 12)
            assert compare(calibration, [text])["overlap"] == expected


def test_characters_of_scripts_without_spaces_are_words() -> None:
    text = "深い森の中に小さな家がありました"
    assert len(hash_ngrams(text)) == len(text) - 12


def test_the_overlap_is_that_of_the_items_and_a_tenth_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    calibration = calibrated_on(made_text(30), dataset="known.txt")
    copy = made_text(30).split("\n\n")[0]
    others = [made_text(3, seed) for seed in range(100, 139)]
    with caplog.at_level("WARNING", "replaceme"):
        assert compare(calibration, [*others, copy]) == {"seen": 0, "same_domain": 0, "overlap": 1 / 40}
        assert not caplog.records
        assert compare(calibration, [*others[:9], copy]) == {"seen": 1, "same_domain": 0, "overlap": 0.1}
    (record,) = caplog.records
    assert record.message == (
        "tasks: text is no unseen text: 10 % of its items share 13 words in a row with the calibration text (known.txt); take "
        "its score for no other text"
    )


def test_a_file_with_the_same_content_is_seen_without_any_ngram(caplog: pytest.LogCaptureFixture) -> None:
    calibration = calibrated_on("few words", fingerprints={"sha256": "this", "form": ".txt"}, dataset="known.txt")
    with caplog.at_level("WARNING", "replaceme"):
        assert compare(calibration, ["few words"]) == {"seen": 1, "same_domain": 0, "overlap": 0}
    assert "tasks: text is no unseen text: its source is the calibration text (known.txt)" in caplog.text
    assert compare(calibration, ["few words"], fingerprint="that") == {"seen": 0, "same_domain": 0, "overlap": 0}


@pytest.mark.parametrize(("split", "same"), [("held-out", 1), ("calibration", 0), (None, 0)])
def test_an_embedded_task_is_seen_by_a_calibration_on_its_split(split: str | None, same: int) -> None:
    params = read_params(None, {"dataset": "wikipedia-sample", "dataset_split": split})
    calibration = calibrated_on(fingerprints=dataset_fingerprints(params), dataset_split=split)
    for name in ("wikipedia", "wikipedia_continuation"):
        assert compare(calibration, ["other"], name, embedded.fingerprint_text("wikipedia-sample"))["seen"] == same


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
    single = SimpleNamespace(config=SimpleNamespace(**form), has_test_docs=lambda: form["test_split"] is not None)
    calibration = calibrated_on("words", fingerprints={"commits": {"owner/text": "1234"}}, dataset="owner/text", **options)
    assert calibration.measure_contamination("piqa", Task("piqa"), {}, [["b"]], [single])["seen"] == same


def test_a_model_knows_only_the_calibration_that_it_is_given(params: Params, tiny: Model, tmp_path: Path) -> None:
    text = Path(params.tasks[0].name).read_text(encoding="utf-8")
    rows = [{"question": made_text(4, 200 + seed), "choices": ["a b", "c d"], "answer": 0} for seed in range(8)]
    for number in (3, 7):
        rows[number]["question"] = " ".join(text.split()[40:60])
    (questions := tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # The seventh item isn't scored.
    params = params.model_copy(update={"tasks": (*params.tasks, Task(str(questions), limit=6))})
    fingerprints, tokenizer = task_fingerprints(params), made_tokenizer()
    documents = Documents([torch.tensor(tokenizer.encode(text))])
    sources = identify_sources(params, dataset_fingerprints(params))
    dense = score_model(params, tiny, fingerprints, is_dense=True)
    assert "calibration_text" not in dense.figures
    calibration = CalibrationText.of_documents(sources, documents, tokenizer)
    assert score_model(params, tiny, fingerprints, dense, calibration).figures["calibration_text"] == {
        "text": {"seen": 1, "same_domain": 0, "overlap": 1.0},
        "questions": {"seen": 1, "same_domain": 0, "overlap": 1 / 6},
    }


def test_other_text_of_a_calibrated_domain_is_not_unseen() -> None:
    params = read_params(None, {"dataset": ["wikipedia-sample", {"lee-news": 2}, "self"]})
    calibration = calibrated_on(dataset=params.dataset, fingerprints=dataset_fingerprints(params))
    for name, same in {"wikipedia": 1, "bbc_news": 1, "python_code": 0, "retrieval_exact": 0}.items():
        text = EMBEDDED[name].text
        figures = compare(calibration, ["other"], name, embedded.fingerprint_text(text) if text else "retrieval_exact-v1")
        assert figures == {"seen": 0, "same_domain": same, "overlap": 0}


def test_the_words_of_the_chat_template_are_no_copies() -> None:
    tokenizer = made_tokenizer()
    system = " ".join(["be", "brief", "and", "kind"] * 5)
    turns = "{% for turn in messages %}{{ ' user says ' + turn['content'] }}{% endfor %}"
    tokenizer.chat_template = "{{ '" + system + " ' }}" + turns
    one, other = (
        tokenizer.encode(
            render_chat([{"role": "user", "content": " ".join(made_text(4, seed).split()[:20])}], tokenizer),
            add_special_tokens=False,
        )
        for seed in (1, 2)
    )
    calibration = CalibrationText.of_documents([], Documents([torch.tensor(one)]), tokenizer)
    windows = [tokenizer.decode(ids) for ids in (one, other)]
    assert len(hash_ngrams(windows[1])) > 10
    pieces = [calibration.split_at_template(window) for window in windows]
    assert [calibration.measure_contamination("t", Task("t.txt"), "", [piece])["overlap"] for piece in pieces] == [1, 0]
