"""Calibration documents: reading every kind of local file, tokenizing, cutting, packing, and refusing bad files."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from replaceme.base.documents import Documents, split_documents
from replaceme.base.errors import DatasetError
from replaceme.base.params import Params, read_params
from replaceme.corpora import tokenization
from replaceme.corpora.corpus import Corpus, as_row
from replaceme.corpora.draw import Counts, draw_documents
from replaceme.corpora.find import find_dataset
from replaceme.corpora.tokenization import encode_in_chunks, start_of_text
from tests.conftest import CHAT_TEMPLATE, made_text, made_tokenizer

BOS = 0
CHAT = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "a river"}, {"from": "gpt", "value": "runs"}]


def draw(
    path: Path, size: int = 5, max_length: int = 16, pack: bool = False, tokenizer: Any = None, **options: Any
) -> tuple[Documents, Counts]:
    params = read_params(None, {"dataset": str(path), **options})
    corpus = find_dataset(params).open()
    return draw_documents(corpus, tokenizer or made_tokenizer(), size, max_length, pack=pack, seed=params.seed)


def rows_file(tmp_path: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def test_a_text_file_is_cut_into_full_documents_with_one_bos_each(text_file: Path) -> None:
    documents, counts = draw(text_file, size=6)
    assert [len(document) for document in documents.documents] == [16] * 6
    assert all(document[0] == BOS and (document[1:] != BOS).all() for document in documents.documents)
    assert (counts.documents, counts.tokens, counts.empty, counts.cut) == (6, 96, 0, 0)


def test_the_pieces_of_a_text_file_are_its_tokens_without_overlap(text_file: Path) -> None:
    tokenizer = made_tokenizer()
    ids = tokenizer.encode(text_file.read_text(encoding="utf-8"), add_special_tokens=False)
    pieces = {tuple(ids[start : start + 15]) for start in range(0, len(ids) - 14, 15)}
    documents, _ = draw(text_file, size=10_000)
    assert {tuple(document[1:].tolist()) for document in documents.documents} == pieces


def test_the_seed_decides_which_documents_are_drawn(text_file: Path) -> None:
    first, again, other = (draw(text_file, seed=seed)[0] for seed in (1, 1, 2))
    assert [d.tolist() for d in first.documents] == [d.tolist() for d in again.documents]
    assert [d.tolist() for d in first.documents] != [d.tolist() for d in other.documents]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_row_is_a_document(tmp_path: Path, suffix: str) -> None:
    texts = [made_text(3, seed) for seed in range(8)]
    documents, counts = draw(rows_file(tmp_path, [{"text": text, "n": 1} for text in texts], suffix), size=8, max_length=500)
    tokenizer = made_tokenizer()
    assert sorted(tokenizer.decode(d, skip_special_tokens=True) for d in documents.documents) == sorted(texts)
    assert counts.cut == 0


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    documents, counts = draw(rows_file(tmp_path, [{"text": made_text(5)}]), max_length=9)
    assert len(documents.documents[0]) == 9
    assert counts.cut == 1


def test_empty_rows_are_counted_and_skipped(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": text} for text in ["", "  ", "\n", "the river"]])
    documents, counts = draw(path)
    assert (len(documents), counts.empty) == (1, 3)


def test_rows_are_packed_until_a_document_is_full(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "the river runs"}] * 40)
    documents, counts = draw(path, size=3, max_length=20, pack=True)
    assert [len(document) for document in documents.documents] == [20, 20, 20]
    assert all((document == BOS).sum() == 1 for document in documents.documents)
    assert counts.documents == 3


def test_the_pieces_of_a_text_have_one_source(tmp_path: Path) -> None:
    texts = [made_text(12, seed) for seed in range(25)]
    documents, _ = draw_documents(Corpus(texts, running=True), made_tokenizer(), 60, 16, pack=False, seed=0)
    assert len({*documents.sources}) < len(documents) == 60
    for document, source in zip(documents.documents, documents.sources, strict=True):
        assert made_tokenizer().decode(document[1:]).strip("\ufffd") in texts[source]
    used, held_out = split_documents(documents)
    assert not {*used.sources} & {*held_out.sources}
    assert 0 < len(held_out) <= 12


def test_a_single_running_text_is_held_out_by_whole_parts(text_file: Path) -> None:
    documents, _ = draw(text_file, size=300)
    text = text_file.read_text(encoding="utf-8")
    places = [text.index(made_tokenizer().decode(document[1:])) for document in documents.documents]
    in_order = [source for _, source in sorted(zip(places, documents.sources, strict=True))]
    assert in_order == sorted(in_order)
    assert len({*in_order}) == 20


def test_rows_are_sources_of_their_own(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": f"the river {number}" if number % 3 else ""} for number in range(9)])
    for pack in (False, True):
        documents, _ = draw(path, size=9, pack=pack, max_length=4)
        assert len({*documents.sources}) == len(documents) > 1


def test_chats_go_through_the_template_with_all_turns_and_one_bos(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"conversations": CHAT, "id": 1}])
    documents, _ = draw(path, max_length=100)
    text = made_tokenizer().decode(documents.documents[0])
    assert text == "<s><system>be brief\n<user>a river\n<assistant>runs\n"


def test_a_template_with_todays_date_gives_the_same_documents_on_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "replaceme")
    tokenization._say_date.cache_clear()
    path, tokenizer = rows_file(tmp_path, [{"conversations": CHAT}] * 2), made_tokenizer()
    before, _ = draw(path, tokenizer=tokenizer, max_length=500)
    assert "date" not in caplog.text
    # As in Llama 3's template, and within a macro.
    tokenizer.chat_template = (
        "{%- macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{%- if strftime_now is defined %}"
        "{{ strftime_now('%d %b %Y') }} {{ day() }}\n{%- endif %}" + CHAT_TEMPLATE
    )
    kept = tokenizer.chat_template
    found = []
    for year in (2031, 2032):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, zone=None, year=year: datetime(year, 1, 1))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        found.append([document.tolist() for document in draw(path, tokenizer=tokenizer, max_length=500)[0].documents])
    assert found[0] == found[1] != [document.tolist() for document in before.documents]
    assert "26 Jul 2024 2024" in tokenizer.decode(found[0][0])
    assert tokenizer.chat_template == kept
    assert "today is always 26 July 2024" in str(Params.model_fields["dataset_column"].description)
    assert caplog.text.count("the chat template asks for today's date and always gets 2024-07-26") == 1


def test_the_published_column_name_falls_back_to_the_chat_column(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"conversations": CHAT, "id": 1}])
    assert len(draw(path, max_length=100, dataset_column="text")[0]) == 1


def test_chats_without_a_template_are_an_error(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"conversations": CHAT}])
    with pytest.raises(DatasetError, match="no chat template"):
        draw(path, tokenizer=made_tokenizer(chat=False))


def test_documents_get_a_bos_only_if_the_tokenizer_has_one() -> None:
    assert start_of_text(made_tokenizer(bos=False)) == []
    assert start_of_text(made_tokenizer()) == [BOS]


def test_documents_are_the_same_after_saving(tmp_path: Path, documents: Documents) -> None:
    documents.save(tmp_path)
    assert [d.tolist() for d in Documents.load(tmp_path).documents] == [d.tolist() for d in documents.documents]


def test_batches_hold_every_real_token_once(documents: Documents) -> None:
    batches = list(documents.batches(4))
    assert sum(batch.token_count for batch in batches) == documents.token_count
    assert [batch.first_token for batch in batches] == [0, 140, 200]
    restored = [row[:length].tolist() for batch in batches for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
    assert sorted(restored) == sorted(d.tolist() for d in documents.documents)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.txt", " \n", "holds only white space"),
        ("bad.jsonl", "{no json\n", "bad.jsonl can't be read as jsonl"),
        ("columns.jsonl", '{"a": "x", "b": "y"}\n', "its columns are a, b"),
        ("wrong.jsonl", '{"text": 3}\n', "neither text nor a list of chat turns"),
        ("blank.jsonl", '{"text": ""}\n', "no text is left after tokenization (1 rows were empty)"),
        ("data.xml", "<a/>", "ends in '.xml'"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        draw(path)
    assert said in str(caught.value)


def test_missing_file_and_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no file .*nowhere\.txt"):
        draw(tmp_path / "nowhere.txt")
    with pytest.raises(DatasetError, match="no column 'body'; its columns are text"):
        draw(rows_file(tmp_path, [{"text": "a"}]), dataset_column="body")


def test_non_utf8_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(DatasetError, match="isn't UTF-8 text"):
        draw(path)


def test_a_corpus_with_fewer_documents_is_used_whole() -> None:
    documents, counts = draw_documents(Corpus(["the river", "a town"]), made_tokenizer(), 10, 16, pack=False, seed=0)
    assert (len(documents), counts.documents) == (2, 2)


def test_the_seed_decides_the_order_of_rows(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": f"the river {number}"} for number in range(9)])
    tokenizer = made_tokenizer()
    orders = {tuple(tokenizer.decode(d) for d in draw(path, size=9, seed=seed)[0].documents) for seed in range(3)}
    assert len(orders) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_packed_rows_are_separated_by_a_blank_line(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "the river"}] * 3)
    documents, _ = draw(path, size=1, max_length=100, pack=True)
    assert made_tokenizer().decode(documents.documents[0]) == "<s>" + "\n\n".join(["the river"] * 3)


def test_the_text_column_is_found_if_its_first_value_is_missing(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"body": None}, {"body": "the river"}])
    documents, counts = draw(path)
    assert (len(documents), counts.empty) == (1, 1)


def test_chat_turns_with_lists_of_parts_are_refused(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}])
    with pytest.raises(DatasetError, match="a chat turn holds list, not text"):
        draw(path)


def test_tokenizing_in_chunks_gives_the_same_documents(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = draw(text_file, size=10_000)
    monkeypatch.setattr("replaceme.corpora.tokenization.CHUNK_CHARACTERS", 1000)
    chunked, _ = draw(text_file, size=10_000)
    assert [d.tolist() for d in chunked.documents] == [d.tolist() for d in whole.documents]


def test_a_text_without_line_breaks_is_tokenized_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.corpora.tokenization.CHUNK_CHARACTERS", 50)
    for text in (" ".join(["river"] * 100), "river" * 100):
        chunks = list(encode_in_chunks(text, made_tokenizer(), [BOS]))
        assert len(chunks) >= 9
        assert made_tokenizer().decode([token for chunk in chunks for token in chunk]) == text


def test_missing_values_are_empty_texts() -> None:
    assert as_row(None, "text", "x") == ""
