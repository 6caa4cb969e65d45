"""Streaming hub datasets, with a few rows in place of the hub."""

from typing import Any

import datasets
import pytest

from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params, read_params
from replaceme.calibration.find import DatasetSource, find_dataset, find_datasets
from replaceme.models import hub

SLIM = [{"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": "answer"}]} for n in range(5)]
WEB = [{"text": f"page {n}", "url": "x"} for n in range(3)]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the hub's datasets by small ones, and record the calls that open them."""
    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool, revision: str) -> datasets.IterableDataset:
        calls.append((name, config, split, streaming, revision))
        rows = SLIM if "Orca" in name else WEB
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "resolve_commit", lambda name, kind, revision, hint="": "c" * 40)
    return calls


def made(**options: Any) -> Params:
    return read_params(None, options)


def found(**options: Any) -> DatasetSource:
    """Return the only source of a dataset."""
    (source,) = find_datasets(made(**options))
    assert source
    return source


def test_published_dataset_names_are_streamed_with_their_configuration(streamed: list[tuple[Any, ...]]) -> None:
    rows = list(found(dataset="fineweb").open(42).rows)
    assert streamed == [("HuggingFaceFW/fineweb", "sample-10BT", "train", True, "c" * 40)]
    assert sorted(map(str, rows)) == ["page 0", "page 1", "page 2"]
    assert len({tuple(map(str, found(dataset="fineweb", seed=seed).open(seed).rows)) for seed in range(8)}) > 1
    assert found(dataset="owner/data").fingerprint() == {"commits": {"owner/data": "c" * 40}}


@pytest.mark.usefixtures("streamed")
def test_a_hub_text_that_could_not_be_read_is_refused_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    found(dataset="owner/data").check()
    wrong = found(dataset="owner/data", dataset_column="txt")
    with pytest.raises(DatasetError, match="txt"):
        wrong.check()
    # Without a network, it can't be known.
    monkeypatch.setattr(hub, "reachable", lambda: False)
    wrong.check()


def test_chat_datasets_give_all_turns_and_the_split_is_honoured(streamed: list[tuple[Any, ...]]) -> None:
    rows = list(found(dataset="Open-Orca/SlimOrca", dataset_column="text", dataset_split="test").open(42).rows)
    assert streamed[0][2] == "test"
    assert [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "answer"}] in rows


@pytest.mark.usefixtures("streamed")
def test_a_mix_takes_rows_from_its_parts_in_turn() -> None:
    rows = list(found(dataset="fineweb_and_orca").open(42).rows)
    assert [isinstance(row, str) for row in rows] == [True, False] * 3 + [False] * 2


@pytest.mark.usefixtures("streamed")
def test_a_missing_column_lists_the_columns() -> None:
    with pytest.raises(DatasetError, match="has no column 'body'; its columns are text, url"):
        list(found(dataset="fineweb", dataset_column="body").open(42).rows)


def test_an_unknown_configuration_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(
        DatasetError,
        match=r"owner/data could not be read \(ValueError: BuilderConfig 'x' not found\. Available: \['a', 'b'\]\)",
    ):
        list(find_dataset(Source("owner/data"), {"owner/data": "c" * 40}).open(42).rows)
