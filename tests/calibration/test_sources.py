"""The record of the calibration text in a pruned model's folder."""

from pathlib import Path
from typing import Any

import pytest

from replaceme.base.entries import Source
from replaceme.base.parameters import read_params
from replaceme.calibration.find import dataset_fingerprints
from replaceme.calibration.sources import identify_sources, read_record, write_record
from replaceme.models.model_files import TEXT_RECORD


def recorded(dataset: Any, dense: Path, folder: Path, **options: Any) -> None:
    params = read_params(None, {"dataset": dataset, **options})
    folder.mkdir()
    write_record(identify_sources(params, dataset_fingerprints(params)), dense, folder)


def test_the_sources_are_read_as_they_were_named_and_no_folder_is(tmp_path: Path) -> None:
    (notes := tmp_path / "notes.txt").write_text("some words", encoding="utf-8")
    dataset = ["wikipedia-sample", {"bbc-news": {"share": 2, "split": "held-out"}}, {str(notes): 0.5}, "self"]
    recorded(dataset, tmp_path, tmp_path / "small")
    parts = dataset_fingerprints(read_params(None, {"dataset": dataset}))["sources"]
    assert read_record(tmp_path / "small") == [
        (Source("wikipedia-sample"), {"sha256": parts[0]["sha256"]}),
        (Source("bbc-news", split="held-out"), {"sha256": parts[1]["sha256"]}),
        (Source("notes.txt"), {"sha256": parts[2]["sha256"]}),
        (Source("self"), {}),
    ]
    assert str(tmp_path) not in (tmp_path / "small" / TEXT_RECORD).read_text(encoding="utf-8")


def test_a_dataset_of_the_hub_is_known_by_its_commits(tmp_path: Path) -> None:
    params = read_params(None, {"dataset": "owner/text", "dataset_split": "validation"})
    write_record(identify_sources(params, {"commits": {"owner/text": "1234"}}), tmp_path / "dense", tmp_path)
    assert read_record(tmp_path) == [(Source("owner/text", split="validation"), {"commits": {"owner/text": "1234"}})]


def test_a_model_that_is_pruned_again_keeps_the_earlier_text(tmp_path: Path) -> None:
    recorded(["wikipedia-sample"], tmp_path, tmp_path / "once")
    recorded(["bbc-news"], tmp_path / "once", tmp_path / "twice")
    assert [source.name for source, _ in read_record(tmp_path / "twice")] == ["bbc-news", "wikipedia-sample"]
    recorded(["wikipedia-sample"], tmp_path / "once", tmp_path / "same")
    assert [source.name for source, _ in read_record(tmp_path / "same")] == ["wikipedia-sample"]


@pytest.mark.parametrize("content", ["{", '{"sources": [{"split": "a"}]}'])
def test_a_file_that_is_no_record_marks_nothing(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_record(tmp_path) == []
    assert not caplog.records
    (tmp_path / TEXT_RECORD).write_text(content, encoding="utf-8")
    with caplog.at_level("WARNING", "replaceme"):
        assert read_record(tmp_path) == []
    assert "calibration_text.json: is no record of calibration text, so that no score is marked as seen" in caplog.text
