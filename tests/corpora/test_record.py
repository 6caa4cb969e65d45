"""The record of the calibration text in a pruned model's folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from replaceme.base.errors import ModelError
from replaceme.base.params import read_params
from replaceme.corpora.find import fingerprints, sources_of
from replaceme.corpora.record import read_record, write_record
from replaceme.models.model import TEXT_RECORD


def recorded(dataset: Any, dense: Path, folder: Path, **options: Any) -> None:
    params = read_params(None, {"dataset": dataset, **options})
    folder.mkdir()
    write_record(params, fingerprints(params), dense, folder)


def test_the_sources_are_read_as_they_were_named_and_no_folder_is(tmp_path: Path) -> None:
    (notes := tmp_path / "notes.txt").write_text("some words", encoding="utf-8")
    dataset = ["wikipedia-sample", {"bbc-news": {"share": 2, "split": "held-out"}}, {str(notes): 0.5}, "self"]
    recorded(dataset, tmp_path, tmp_path / "small")
    params = read_params(None, {"dataset": dataset})
    named, identities = zip(*read_record(tmp_path / "small"), strict=True)
    assert [source.name for source in named] == ["wikipedia-sample", "bbc-news", "notes.txt", "self"]
    assert [source.options() for source in named] == [source.options() for source in sources_of(params)]
    for identity, known in zip(identities, fingerprints(params)["sources"], strict=True):
        assert identity.items() == {key: known[key] for key in known.keys() & {"sha256", "form", "self"}}.items()
    assert str(tmp_path) not in (tmp_path / "small" / TEXT_RECORD).read_text(encoding="utf-8")


def test_one_source_has_the_options_of_its_own_parameters(tmp_path: Path) -> None:
    recorded("bbc-news", tmp_path, tmp_path / "small", dataset_split="held-out")
    ((source, known),) = read_record(tmp_path / "small")
    assert (source.name, source.split, [*known]) == ("bbc-news", "held-out", ["sha256"])


def test_a_model_that_is_pruned_again_keeps_the_earlier_text(tmp_path: Path) -> None:
    recorded(["wikipedia-sample"], tmp_path, tmp_path / "once")
    recorded(["bbc-news"], tmp_path / "once", tmp_path / "twice")
    assert [source.name for source, _ in read_record(tmp_path / "twice")] == ["bbc-news", "wikipedia-sample"]
    recorded(["wikipedia-sample"], tmp_path / "once", tmp_path / "same")
    assert [source.name for source, _ in read_record(tmp_path / "same")] == ["wikipedia-sample"]


def test_no_record_is_no_calibration_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_record(tmp_path) == []
    for damage in ("{", "[]", '{"sources": [1]}', json.dumps({"sources": [{"split": "a"}]})):
        (tmp_path / TEXT_RECORD).write_text(damage, encoding="utf-8")
        with pytest.raises(ModelError, match="is no record of calibration text; remove it"):
            read_record(tmp_path)
