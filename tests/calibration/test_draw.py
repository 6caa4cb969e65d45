"""Calibration documents: tokenizing, cutting, packing, and mixing sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replaceme.base.documents import Documents, split_documents
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params, read_params
from replaceme.calibration import tokenization
from replaceme.calibration.corpus import Corpus, Row
from replaceme.calibration.draw import Counts, draw_documents
from replaceme.calibration.find import find_datasets
from replaceme.calibration.own_text import count_own_documents
from replaceme.calibration.sources import list_sources
from replaceme.calibration.tokenization import encode_in_chunks, render_chat
from tests.conftest import CHAT_TEMPLATE, made_text, made_tokenizer

BOS = 0
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a river"}]


def settings(size: int, max_length: int = 16, pack: bool = False, **options: Any) -> Params:
    return read_params(None, {"dataset_size": size, "max_length": max_length, "pack": pack, **options})


def draw(dataset: Any, size: int, **options: Any) -> tuple[Documents, list[Counts]]:
    params = settings(size, dataset=dataset, **options)
    corpora = [source.open(params.seed) for source in find_datasets(params) if source]
    return draw_documents(corpora, made_tokenizer(), params)


def draw_rows(rows: list[Row], size: int = 100, tokenizer: Any = None, **options: Any) -> tuple[Documents, Counts]:
    documents, (counts,) = draw_documents([Corpus(rows)], tokenizer or made_tokenizer(), settings(size, **options))
    return documents, counts


def ids(documents: Documents) -> list[list[int]]:
    return [document.tolist() for document in documents.documents]


def test_a_text_file_is_cut_into_documents_of_its_tokens_with_one_bos_each_in_the_seeds_order(text_file: Path) -> None:
    documents, (counts,) = draw(str(text_file), 6)
    assert [len(document) for document in documents.documents] == [16] * 6
    assert all(document[0] == BOS and (document[1:] != BOS).all() for document in documents.documents)
    assert counts == Counts(documents=6, tokens=96)
    tokens = made_tokenizer().encode(text_file.read_text(encoding="utf-8"), add_special_tokens=False)
    pieces = {tuple(tokens[start : start + 15]) for start in range(0, len(tokens) - 14, 15)}
    assert {tuple(document[1:]) for document in ids(draw(str(text_file), 10_000)[0])} == pieces
    first, again, other = (ids(draw(str(text_file), 5, seed=seed)[0]) for seed in (1, 1, 2))
    assert first == again != other


def test_long_rows_are_cut_and_empty_ones_skipped_and_both_counted() -> None:
    documents, counts = draw_rows([made_text(5), "", "  ", "\n", "the river"], max_length=9)
    assert (len(documents.documents[0]), counts.cut) == (9, 1)
    assert (len(documents), counts.documents, counts.empty) == (2, 2, 3)
    with pytest.raises(DatasetError, match=r"no text is left after tokenization \(1 rows were empty\)"):
        draw_rows([""])


def test_rows_are_packed_until_a_document_is_full() -> None:
    documents, counts = draw_rows(["the river runs"] * 40, 3, max_length=20, pack=True)
    assert [len(document) for document in documents.documents] == [20, 20, 20]
    assert all((document == BOS).sum() == 1 for document in documents.documents)
    assert counts.documents == 3
    single, _ = draw_rows(["the river"] * 3, 1, max_length=100, pack=True)
    assert made_tokenizer().decode(single.documents[0]) == "<s>" + "\n\n".join(["the river"] * 3)
    assert len({*documents.sources}) == 3


def test_the_pieces_of_a_text_have_one_source() -> None:
    texts = [made_text(12, seed) for seed in range(25)]
    documents, _ = draw_documents([Corpus(texts, running=True)], made_tokenizer(), settings(60))
    assert len({*documents.sources}) < len(documents) == 60
    for document, source in zip(documents.documents, documents.sources, strict=True):
        assert made_tokenizer().decode(document[1:]).strip("\ufffd") in texts[source]
    used, held_out = split_documents(documents)
    assert not {*used.sources} & {*held_out.sources}
    assert 0 < len(held_out) <= 12


def test_a_single_running_text_is_held_out_by_whole_parts(text_file: Path) -> None:
    documents, _ = draw(str(text_file), 300)
    text = text_file.read_text(encoding="utf-8")
    starts = [text.index(made_tokenizer().decode(document[1:])) for document in documents.documents]
    in_order = [source for _, source in sorted(zip(starts, documents.sources, strict=True))]
    assert in_order == sorted(in_order)
    assert len({*in_order}) == 20


def test_little_text_is_split_so_that_whole_documents_can_be_held_out(tmp_path: Path) -> None:
    rows = [made_text(40, seed) for seed in range(3)]
    documents, counts = draw_rows([*rows], max_length=2048)
    whole, _ = draw_rows([*rows], 3, max_length=2048)
    assert len(documents) == counts.documents == 20
    assert counts.tokens == documents.token_count
    assert all(document[0] == BOS and len(document) > 16 for document in documents.documents)
    # In order, and nothing is lost.
    assert [each for row in ids(documents) for each in row[1:]] == [each for row in ids(whole) for each in row[1:]]
    assert len(split_documents(documents)[1]) == 4
    # Also of a file whose last piece is not full; documents that the user wants so few of stay whole.
    (tmp_path / "notes.txt").write_text(rows[0], encoding="utf-8")
    tokens = len(made_tokenizer().encode(rows[0], add_special_tokens=False))
    from_file, _ = draw(str(tmp_path / "notes.txt"), 64, max_length=tokens - 20)
    assert from_file.token_count == tokens + len(from_file)
    assert len(draw(str(tmp_path / "notes.txt"), 4, max_length=tokens - 20)[0]) == 1


def test_chats_go_through_the_template_with_all_turns_and_one_bos() -> None:
    documents, _ = draw_rows([CHAT], max_length=100)
    assert made_tokenizer().decode(documents.documents[0]) == "<s><system>be brief\n<user>a river\n"


def test_a_template_with_todays_date_gives_the_same_text_on_every_day(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "replaceme")
    tokenization._log_today.cache_clear()
    tokenizer = made_tokenizer()
    render_chat(CHAT, tokenizer)
    assert "date" not in caplog.text
    # As in Llama 3's template, and within a macro.
    tokenizer.chat_template = (
        "{%- macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{%- if strftime_now is defined %}"
        "{{ strftime_now('%d %b %Y') }} {{ day() }}\n{%- endif %}" + CHAT_TEMPLATE
    )
    assert {render_chat(CHAT, tokenizer).split("\n")[0] for _ in range(2)} == {"26 Jul 2024 2024<s><system>be brief"}
    assert "today is always 26 July 2024" in str(Params.model_fields["dataset_column"].description)
    assert caplog.text.count("the chat template asks for today's date and always gets 2024-07-26") == 1


def test_a_chat_without_a_template_is_an_error_unless_it_is_embedded() -> None:
    tokenizer = made_tokenizer(chat=False)
    with pytest.raises(DatasetError, match="holds chats, but the model's tokenizer has no chat template"):
        draw_rows([CHAT], tokenizer=tokenizer)
    documents, _ = draw_documents([Corpus([CHAT], plain=True)], tokenizer, settings(1, 64))
    text = tokenizer.decode(documents.documents[0], skip_special_tokens=True)
    assert text == "System: be brief\n\nUser: a river"


def test_batches_hold_every_real_token_once(documents: Documents) -> None:
    batches = list(documents.batches(4))
    assert sum(batch.token_count for batch in batches) == documents.token_count
    assert [batch.first_token for batch in batches] == [0, 140, 200]
    restored = [row[:length].tolist() for batch in batches for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
    assert sorted(restored) == sorted(ids(documents))


def test_tokenizing_in_chunks_gives_the_same_documents(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = draw(str(text_file), 10_000)
    monkeypatch.setattr(tokenization, "CHUNK_CHARACTERS", 1000)
    chunked, _ = draw(str(text_file), 10_000)
    assert ids(chunked) == ids(whole)
    monkeypatch.setattr(tokenization, "CHUNK_CHARACTERS", 50)
    for text in (" ".join(["river"] * 100), "river" * 100):
        chunks = list(encode_in_chunks(text, made_tokenizer(), [BOS]))
        assert len(chunks) >= 9
        assert made_tokenizer().decode([token for chunk in chunks for token in chunk]) == text


@pytest.fixture
def two_files(tmp_path: Path) -> Callable[[int], tuple[str, str]]:
    """Return a function that writes a long running text, and so many short rows."""

    def write(rows: int) -> tuple[str, str]:
        (long := tmp_path / "long.txt").write_text(made_text(400), encoding="utf-8")
        lines = "".join(json.dumps({"text": f"the river {number}"}) + "\n" for number in range(rows))
        (short := tmp_path / "short.jsonl").write_text(lines, encoding="utf-8")
        return str(long), str(short)

    return write


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.5, 0.25)])
def test_shares_of_the_tokens_are_met_to_a_document(
    shares: tuple[float, float], two_files: Callable[[int], tuple[str, str]]
) -> None:
    long, short = two_files(400)
    documents, counts = draw([{long: shares[0]}, {short: shares[1]}], 60, max_length=32)
    assert len(documents) == 60
    assert sum(count.tokens for count in counts) == documents.token_count
    for count, share in zip(counts, shares, strict=True):
        assert abs(count.tokens - documents.token_count * share / sum(shares)) <= 32


def test_a_source_that_ends_leaves_its_part_to_the_others(two_files: Callable[[int], tuple[str, str]]) -> None:
    long, short = two_files(1)
    documents, counts = draw([long, short], 8)
    assert (len(documents), counts[1].documents) == (8, 1)
    assert ids(draw([{long: 2}], 6)[0]) == ids(draw(long, 6)[0])


def test_an_option_that_does_not_apply_is_refused() -> None:
    params = read_params(None, {"dataset": ["wikipedia-sample", "lee-news"], "dataset_split": "calibration"})
    with pytest.raises(DatasetError, match="dataset_split: dataset is a list; use null, and give each entry its own split"):
        list_sources(params)
    for key, value, said in (
        ("split", "test", "wikipedia-sample has no split 'test'; it has calibration and held-out"),
        ("config", "en", "'en' does not apply to wikipedia-sample; use null"),
    ):
        with pytest.raises(DatasetError, match=f"dataset_{key}: {said}"):
            find_datasets(read_params(None, {"dataset": "wikipedia-sample", f"dataset_{key}": value}))


@pytest.mark.parametrize(
    ("dataset", "length", "count"),
    [("lee-news", 256, 0), ("self", 256, 10), (["self", {"lee-news": 3}], 256, 4), (["self", {"lee-news": 3}], 1024, 6)],
)
def test_the_model_writes_enough_documents_for_its_share(dataset: Any, length: int, count: int) -> None:
    # Its own documents have at most 512 tokens.
    assert count_own_documents(settings(10, length, dataset=dataset)) == count
