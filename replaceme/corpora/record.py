"""The record of the calibration text in a pruned model's folder, so that an evaluation can say which texts are unseen.

It names the sources, without folders, and what identifies their content (as ``artifacts/inputs/dataset.json``); it has nothing
of the text. A model that was pruned twice has the sources of both.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from replaceme.base.errors import excerpt
from replaceme.base.files import read_json, write_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.settings import without_folder
from replaceme.base.source import OPTIONS, Source, parse_dataset
from replaceme.corpora.sources import Known, known_sources
from replaceme.models import hub
from replaceme.models.model_files import TEXT_RECORD

IDENTITIES = ("sha256", "commits")


def write_record(params: Params, found: Mapping[str, Any], dense: Path, folder: Path) -> None:
    """Write the record of a pruned model.

    Args:
        params: the parameters of the dataset.
        found: what identifies its content (``replaceme.corpora.find.fingerprints``).
        dense: the folder of the model that it was made from, whose own record counts too.
        folder: the pruned model's.
    """
    entries = [_entry(*known) for known in (*known_sources(params, found), *read_record(dense))]
    write_json(folder / TEXT_RECORD, {"sources": [each for place, each in enumerate(entries) if each not in entries[:place]]})


def read_record(folder: Path) -> Sequence[Known]:
    """Return the sources that a model's folder names; none where it has no record, or none that can be read."""
    path = folder / TEXT_RECORD
    if not path.is_file():
        return []
    try:
        return [*_parsed(read_json(path)["sources"])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        logger.warning("%s: is no record of calibration text, so that no score is marked as seen", excerpt(path, 150))
        return []


def _entry(source: Source, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source as the record has it: without its share, which says nothing beside those of an earlier text."""
    options = {key: value for key, value in source.options().items() if key != "share"}
    return {"name": without_folder(source.name), **options, **{key: known[key] for key in IDENTITIES if key in known}}


def _parsed(entries: Iterable[Mapping[str, Any]]) -> Iterator[Known]:
    problems: list[str] = []
    for entry in entries:
        options = {key: entry[key] for key in OPTIONS if key in entry}
        known = {key: entry[key] for key in IDENTITIES if key in entry}
        parsed = parse_dataset([{entry["name"]: options}], problems)
        repositories = known.get("commits", {})
        if problems or not isinstance(known.get("sha256", ""), str) or not all(map(hub.is_repository_id, repositories)):
            raise ValueError
        yield parsed[0], known
