"""The embedded texts: values of ``dataset`` that need neither a hub nor an account.

They come inside a wheel (``replaceme.models.packages``); the extracted text is kept in the user's cache folder.

- ``wikipedia-sample``: about 100 English Wikipedia articles (CC BY-SA) from ``gensim``'s test data, split by a hash of
  the title into a calibration and a held-out half.
- ``lee-news``: 300 news documents (Lee and Pincombe, 2005), also from ``gensim``.
"""

import bz2
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from replaceme.base.errors import DatasetError
from replaceme.base.files import cache_folder, write_text
from replaceme.base.progress import progress
from replaceme.base.shared import make_once
from replaceme.models.packages import PackagedFile, fetched

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
# Increase when the extraction below yields other text.
TEXT_VERSION = 1


def text_splits(name: str) -> tuple[str, ...]:
    """Return the splits of an embedded text, the default first."""
    return tuple(TEXTS[name][0])


def text_articles(name: str, split: str | None) -> list[str]:
    """Return the documents of one split of an embedded text (None: the default), fetched on first use."""
    splits, file, extract = TEXTS[name]
    wanted = split or splits[0]
    if wanted not in splits:
        raise DatasetError(f"dataset_split: {name} has no split '{wanted}'; it has {' and '.join(splits)}.")
    cached = cache_folder() / "texts" / f"{name}-{file.sha256[:12]}-v{TEXT_VERSION}.jsonl"

    def make() -> None:
        with fetched(file) as source:
            rows = [{"text": text, "title": title} for title, text in extract(source)]
        write_text(cached, "".join(json.dumps(row) + "\n" for row in rows))

    make_once(cached, name, make)
    lines = cached.read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if len(splits) == 1 or _split_of(row["title"]) == wanted]


def text_fingerprint(name: str) -> str:
    """Return what identifies an embedded text's content, without fetching it."""
    return f"{TEXTS[name][1].sha256}-v{TEXT_VERSION}"


def _split_of(title: str) -> str:
    return "held-out" if hashlib.sha256(title.encode()).digest()[0] % 2 else "calibration"


def _wikipedia(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and prose of each article of a MediaWiki XML dump (no redirects, no disambiguation pages)."""
    with bz2.open(dump) as stream:
        pages = (element for _, element in ElementTree.iterparse(stream) if element.tag.endswith("}page"))
        for page in progress(pages, "stripping wiki markup", "pages"):
            title, text = page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
            article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            page.clear()
            if article and "disambig" not in text.lower():
                yield title, _prose(text)


# Remains of tables and links that the parser could not close.
_MARKUP_LEFT = re.compile(r"^[|!{]|\[\[|\]\]|\{\||\|\}|\|thumb\b")


def _prose(markup: str) -> str:
    """Return the running text of wiki markup, without tables, references, pictures, categories and the lists at the end."""
    import mwparserfromhell

    markup = re.split(
        r"(?m)^==+\s*(?:See also|Notes|References|Further reading|External links|Footnotes|Bibliography)\b", markup
    )[0]
    code = mwparserfromhell.parse(markup)
    # Links to these namespaces and to other languages hold captions and categories, not prose.
    for link in code.filter_wikilinks(matches=r"^\[\[\s*(File|Image|Category|[a-z\-]{2,12})\s*:"):
        _drop(code, link)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in {"ref", "table", "gallery", "math", "timeline"}):
        _drop(code, tag)
    text = code.strip_code(normalize=True, collapse=True)
    text = re.sub(r"'{2,}", "", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n\n".join(line for line in lines if len(line.split()) > 3 and not _MARKUP_LEFT.search(line))


def _drop(code: object, node: object) -> None:
    # The parser raises ValueError for a node whose parent was removed before.
    with suppress(ValueError):
        code.remove(node)  # type: ignore[attr-defined]


def _news(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.strip():
            yield f"document {number}", line.strip()


# Texts to cut into documents; in the others, each row is a document.
RUNNING = ("wikipedia-sample",)
TEXTS: dict[str, tuple[tuple[str, ...], PackagedFile, Callable[[Path], Iterator[tuple[str, str]]]]] = {
    "wikipedia-sample": (("calibration", "held-out"), WIKIPEDIA, _wikipedia),
    "lee-news": (("calibration",), NEWS, _news),
}
