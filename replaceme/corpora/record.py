"""The record of the calibration text in a pruned model's folder, so that an evaluation can say which texts are unseen.

It names the sources, without folders, and what identifies their content (as ``artifacts/inputs/dataset.json``); it has nothing
of the text. A model that was pruned twice has the sources of both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from replaceme.base.errors import ModelError
from replaceme.base.files import read_json, write_json
from replaceme.base.params import Params
from replaceme.base.settings import without_folder
from replaceme.base.source import OPTIONS, Source
from replaceme.corpora.find import by_source, sources_of
from replaceme.models.model import TEXT_RECORD

# A source, and what identifies its content (``DatasetSource.fingerprint``).
Known = tuple[Source, Mapping[str, Any]]


def write_record(params: Params, found: Mapping[str, Any], dense: Path, folder: Path) -> None:
    """Write the record of a pruned model.

    Args:
        params: the parameters of the dataset.
        found: what identifies its content (``replaceme.corpora.find.fingerprints``).
        dense: the folder of the model that it was made from, whose own record counts too.
        folder: the pruned model's.
    """
    own = [
        {"name": without_folder(source.name), **source.options(), **known}
        for source, known in zip(sources_of(params), by_source(found), strict=True)
    ]
    earlier = [{"name": source.name, **source.options(), **known} for source, known in read_record(dense)]
    write_json(folder / TEXT_RECORD, {"sources": [*own, *(each for each in earlier if each not in own)]})


def read_record(folder: Path) -> Sequence[Known]:
    """Return the sources that a model's folder names; none where it has no record.

    Raises:
        ModelError: the record can't be read.
    """
    path = folder / TEXT_RECORD
    if not path.is_file():
        return []
    try:
        entries = [dict(entry) for entry in read_json(path)["sources"]]
        options = [{key: entry.pop(key) for key in ("name", *OPTIONS) if key in entry} for entry in entries]
        return [(Source(**own), entry) for own, entry in zip(options, entries, strict=True)]
    except (OSError, ValueError, TypeError, KeyError) as failure:
        raise ModelError(
            f"{path}: is no record of calibration text; remove it, and nothing is marked as seen or unseen."
        ) from failure
