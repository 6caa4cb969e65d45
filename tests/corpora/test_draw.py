"""Calibration documents: reading every kind of local file, tokenizing, cutting, packing, and refusing bad files."""

import json
import os
import signal
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from replaceme.base.config import settings_yaml
from replaceme.base.documents import Documents, seeded_order, split_documents
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params, read_params
from replaceme.base.workspace import Workspace
from replaceme.corpora import tokenization
from replaceme.corpora.corpus import Corpus, as_row
from replaceme.corpora.draw import Counts, draw_documents
from replaceme.corpora.find import find_datasets, own_documents
from replaceme.corpora.local import read_rows
from replaceme.corpora.sources import sources_of
from replaceme.corpora.tokenization import encode_in_chunks, start_of_text
from replaceme.pipeline.calibrate import calibrate
from replaceme.pipeline.inputs import inspect_inputs
from tests.conftest import CHAT_TEMPLATE, made_text, made_tokenizer

BOS = 0
CHAT = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "a river"}, {"from": "gpt", "value": "runs"}]


def draw(
    path: Path, size: int = 5, max_length: int = 16, pack: bool = False, tokenizer: Any = None, **options: Any
) -> tuple[Documents, Counts]:
    params = read_params(None, {"dataset": str(path), **options})
    corpora = [source.open(params.seed) for source in find_datasets(params) if source]
    documents, (counts,) = draw_documents(
        corpora, [1.0], tokenizer or made_tokenizer(), size, max_length, pack=pack, seed=params.seed
    )
    return documents, counts


def draw_mixture(dataset: list[Any], size: int, max_length: int = 32) -> tuple[Documents, list[Counts]]:
    params = read_params(None, {"dataset": dataset})
    corpora = [source.open(params.seed) for source in find_datasets(params) if source]
    shares = [source.share for source in sources_of(params)]
    return draw_documents(corpora, shares, made_tokenizer(), size, max_length, pack=False, seed=params.seed)


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
    documents, _ = draw_documents([Corpus(texts, running=True)], [1.0], made_tokenizer(), 60, 16, pack=False, seed=0)
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


NESTED_LOOPS = f"{'{% for i in range(99999) %}' * 4}{'{% endfor %}' * 4}"
TREE = "{% macro tree(n) %}{% for i in range(9) %}{{ tree(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ tree(40) }}"


@pytest.mark.parametrize("template", [NESTED_LOOPS, TREE], ids=["nested loops", "recursion"])
def test_a_chat_template_that_does_not_end_is_stopped(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.corpora.tokenization.TEMPLATE_SECONDS", 0.2)
    path, before = rows_file(tmp_path, [{"conversations": CHAT}]), signal.getsignal(signal.SIGPROF)
    tokenizer = made_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        DatasetError, match=r"the model's chat template takes more than 0\.2 s for a chat; choose a text column"
    ):
        draw(path, tokenizer=tokenizer)
    assert (signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)) == (before, (0.0, 0.0))


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
        ("bad.jsonl", "{no json\n", "bad.jsonl isn't JSON text"),
        ("columns.jsonl", '{"a": "x", "b": "y"}\n', "its columns are a, b"),
        ("wrong.jsonl", '{"text": 3}\n', "neither text nor a list of chat turns"),
        ("blank.jsonl", '{"text": ""}\n', "no text is left after tokenization (1 rows were empty)"),
        ("binary.txt", "PAR1\0\0", "{path} isn't text: it has a zero byte"),
        ("data.xml", "<a/>", "ends in '.xml'"),
        ("latin.jsonl", b'{"text": "\xff"}\n', "line 1 of {path} isn't UTF-8 text (byte 10)"),
        ("latin.csv", "text\ndéjà vu\n".encode("latin-1"), "{path} isn't UTF-8 text"),
        (
            "deep.jsonl",
            '{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 2 of {path} nests too many lists",
        ),
        ("deep.json", "[" * 100_000, "line 1 of {path} nests too many lists"),
        ("list.jsonl", '{"text": "a"}\n["b"]\n', "line 2 of {path} must be an object with columns, not list"),
        ("list.json", '[{"text": "a"}, 3]', "row 2 of {path} must be an object with columns, not int"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": true}\n', "'text' of line 2 of {path} holds bool, neither text nor a list"),
        ("mixed.csv", "text\nhello\n12\n", "'text' of line 3 of {path} holds float, neither text nor a list"),
        ("semicolons.csv", "id;text\n1;hello, you\n2;b\n", "{path} separates its columns by ';'; write it with commas"),
        ("tabs.csv", "id\ttext\n1\thello\n", r"{path} separates its columns by '\t'; write it with commas"),
        (
            "fields.csv",
            "text\na,b\nc,d\n",
            "line 2 of {path} has 2 fields, not the header's 1; quote a text that holds a comma",
        ),
        ("short.csv", "id,text\n1,a\n2\n", "line 3 of {path} has 1 fields, not the header's 2"),
        ("twins.csv", "text,text\na,b\n", "{path} has two columns of one name; its header is text, text"),
        ("quotes.csv", 'text\n"a\n', "{path} can't be read as CSV (unexpected end of data)"),
        ("header.csv", "text\n", "{path} has no rows"),
        ("zip.csv", b"PK\x03\x04\x14\x00\xff\xfe" * 9, "{path} isn't UTF-8 text"),
        (
            "zip.parquet",
            b"PK\x03\x04\x14\x00" * 9,
            "{path} can't be read as Parquet (after row 0: Parquet magic bytes not found",
        ),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as caught:
        draw(path, size=100)
    assert said.replace("{path}", str(path)) in str(caught.value)


def test_a_changed_byte_of_a_parquet_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path, texts = tmp_path / "rows.parquet", [made_text(1, seed) for seed in range(20)]
    pd.DataFrame({"text": texts}).to_parquet(path, write_page_checksum=True)
    whole, refusals = path.read_bytes(), []
    for position in range(0, len(whole), 23):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            assert list(read_rows(path, "text", None)) == texts
        except DatasetError as refusal:
            refusals.append(str(refusal))
    assert len(refusals) > 10
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize("name", ["a[1]*.csv", "a::b.jsonl", "zip::c?.parquet", "{x}.json"])
def test_a_file_name_is_taken_literally(tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    path = rows_file(tmp_path, [{"text": "the river"}], ".jsonl" if suffix == ".json" else suffix)
    assert len(draw(path.rename(tmp_path / name))[0]) == 1


def test_a_csv_field_is_a_text_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('\ufeffn,body\n1,NA\n2,"two\nlines, ""quoted"""\n\n3,nan\n4,\n', encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.csv", None, None)) == ["NA", 'two\nlines, "quoted"', "nan", ""]


def test_a_json_file_is_a_list_of_rows_or_one_a_line(tmp_path: Path) -> None:
    for content in (
        '[{"text": "a"}, {"text": "b", "n": 1}]',
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff{"text": "a"}\n{"text": "b"}',
    ):
        (tmp_path / "rows.json").write_text(content, encoding="utf-8")
        assert list(read_rows(tmp_path / "rows.json", None, None)) == ["a", "b"]


def test_the_order_of_rows_is_the_seeded_permutation(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(300)]
    for suffix in (".jsonl", ".csv", ".parquet"):
        rows = list(read_rows(rows_file(tmp_path, [{"text": text} for text in texts], suffix), None, 7))
        assert rows == [texts[index] for index in seeded_order(300, 7).tolist()]


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_a_file_that_is_no_regular_file_is_refused_without_waiting(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        Path("rows.jsonl").mkdir()
    elif kind == "pipe":
        os.mkfifo("rows.jsonl")
    else:
        socket.socket(socket.AF_UNIX).bind("rows.jsonl")
    with pytest.raises(DatasetError, match=r"dataset: rows\.jsonl is (no regular file|a folder); give a \.txt, "):
        draw(Path("rows.jsonl"))


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
    documents, (counts,) = draw_documents(
        [Corpus(["the river", "a town"])], [1.0], made_tokenizer(), 10, 16, pack=False, seed=0
    )
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


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.5, 0.25)])
def test_shares_of_the_tokens_are_met_to_a_document(tmp_path: Path, shares: tuple[float, float]) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.jsonl"
    long.write_text(made_text(400), encoding="utf-8")
    short.write_text("".join(json.dumps({"text": f"the river {n}"}) + "\n" for n in range(400)), encoding="utf-8")
    documents, counts = draw_mixture([{str(long): shares[0]}, {str(short): shares[1]}], 60)
    assert len(documents) == 60
    whole, total = documents.token_count, sum(shares)
    assert sum(count.tokens for count in counts) == whole
    for count, share in zip(counts, shares, strict=True):
        assert abs(count.tokens - whole * share / total) <= 32


def test_a_source_that_ends_leaves_its_place_to_the_others(tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.jsonl"
    long.write_text(made_text(100), encoding="utf-8")
    short.write_text(json.dumps({"text": "the river"}) + "\n", encoding="utf-8")
    documents, counts = draw_mixture([str(long), str(short)], 8)
    assert (len(documents), counts[1].documents) == (8, 1)


def test_one_source_in_a_list_is_the_same_as_its_name(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(made_text(100), encoding="utf-8")
    alone, _ = draw(path, size=6, max_length=32)
    listed, _ = draw_mixture([{str(path): 2}], 6)
    assert [document.tolist() for document in listed.documents] == [document.tolist() for document in alone.documents]


def test_an_option_of_a_single_source_is_refused_beside_a_list() -> None:
    params = read_params(None, {"dataset": ["wikipedia-sample", "lee-news"], "dataset_split": "calibration"})
    with pytest.raises(DatasetError, match="dataset_split: dataset is a list; use null, and give each entry its own split"):
        sources_of(params)


def test_the_model_writes_enough_documents_for_its_share() -> None:
    def wanted(dataset: Any, length: int = 256) -> int:
        return own_documents(read_params(None, {"dataset": dataset, "dataset_size": 10, "max_length": length}))

    assert wanted("lee-news") == 0
    assert wanted("self") == 10
    assert wanted(["self", {"lee-news": 3}]) == 4
    # Its own documents are shorter than these.
    assert wanted(["self", {"lee-news": 3}], 1024) == 6


def test_settings_hold_a_list_of_sources_as_it_was_written(tmp_path: Path) -> None:
    dataset = ["lee-news", {str(tmp_path / "private" / "notes.jsonl"): 0.5}, {"self": {"share": 2.0}}]
    text = settings_yaml(read_params(None, {"dataset": dataset}), ["dataset"])
    assert YAML(typ="safe").load(text) == {"dataset": ["lee-news", {"notes.jsonl": {"share": 0.5}}, {"self": {"share": 2.0}}]}


def test_an_embedded_chat_is_plain_text_for_a_model_without_a_chat_template() -> None:
    chat = [{"role": "user", "content": "a river"}, {"role": "assistant", "content": "runs"}]
    tokenizer = made_tokenizer()
    tokenizer.chat_template = None
    documents, _ = draw_documents([Corpus([chat], plain=True)], [1.0], tokenizer, 1, 64, pack=False, seed=0)
    assert tokenizer.decode(documents.documents[0], skip_special_tokens=True).split() == [
        "User:",
        "a",
        "river",
        "Assistant:",
        "runs",
    ]
    with pytest.raises(DatasetError, match="holds chats, but the model's tokenizer has no chat template"):
        draw_documents([Corpus([chat])], [1.0], tokenizer, 1, 64, pack=False, seed=0)


@pytest.mark.parametrize(("size", "few"), [(1, True), (8, False)])
def test_fewer_tokens_than_the_model_is_wide_are_told_before_any_pass(
    size: int, few: bool, params: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params, work = params.model_copy(update={"method": "uidl", "dataset_size": size, "max_length": 12}), Workspace(tmp_path)
    inspect_inputs(params, work)
    with caplog.at_level("WARNING", "replaceme"):
        calibrate(params, work)
    said = "12 tokens are fewer than the model's width of 32: maps by least squares need more text, or an alpha"
    assert (said in caplog.text) == few
