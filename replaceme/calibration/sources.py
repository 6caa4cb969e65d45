"""The sources that ``dataset`` names, with what identifies their content, and their record in a pruned model's folder.

The record lets an evaluation say which texts are unseen. It names the sources, without folders; it has nothing of the text. A
model that was pruned twice has the sources of both. Nothing here reads a text.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError, excerpt, renaming
from replaceme.base.files import read_json, without_folder, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.models.model_files import TEXT_RECORD

# A source, and what identifies its content: ``sha256`` or ``commits`` (``DatasetSource.fingerprint``).
IdentifiedSource = tuple[Source, Mapping[str, Any]]
IDENTITIES = ("sha256", "commits")
# Parameters of a single source, in the order of its fields.
OPTIONS = ("dataset_config", "dataset_split", "dataset_column", "dataset_revision")


def list_sources(params: Params) -> tuple[Source, ...]:
    """Return the sources of the calibration text: those of a list, or the only one with the options of its own parameters.

    Raises:
        DatasetError: a parameter of a single source is set, and ``dataset`` is a list.
    """
    if isinstance(params.dataset, str):
        return (Source(params.dataset, 1.0, *(getattr(params, key) for key in OPTIONS)),)
    for key in OPTIONS:
        if getattr(params, key) is not None:
            option = key.removeprefix("dataset_")
            raise DatasetError(f"{key}: dataset is a list; use null, and give each entry its own {option}.")
    return params.dataset


def healing_params(params: Params) -> Params:
    """Return the parameters with the text of the healing as their dataset."""
    if params.heal_dataset is None:
        return params
    return params.model_copy(update={"dataset": params.heal_dataset, **dict.fromkeys(OPTIONS)})


def naming_heal_dataset(params: Params) -> AbstractContextManager[None]:
    """Let an error inside the block that names ``dataset`` or its options name ``heal_dataset``, where that is the text."""
    return renaming({} if params.heal_dataset is None else dict.fromkeys(("dataset", *OPTIONS), "heal_dataset"))


def split_fingerprints(fingerprints: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the part of ``replaceme.calibration.find.dataset_fingerprints`` that belongs to each source, in order."""
    return fingerprints.get("sources", [fingerprints])


def identify_sources(params: Params, fingerprints: Mapping[str, Any]) -> list[IdentifiedSource]:
    """Return the sources, each with its part of the fingerprints."""
    return [*zip(list_sources(params), split_fingerprints(fingerprints), strict=True)]


def are_same_text(one: IdentifiedSource, other: IdentifiedSource) -> bool:
    """Return whether two sources name the same content; an option that one leaves to its default counts as the other's."""
    (first, known), (second, also_known) = one, other
    identities = [[each.get(key) for key in IDENTITIES] for each in (known, also_known)]
    options = [(getattr(first, key), getattr(second, key)) for key in ("config", "split", "column")]
    return identities[0] == identities[1] and any(identities[0]) and all(a == b or None in (a, b) for a, b in options)


def write_record(sources: Iterable[IdentifiedSource], dense: Path, folder: Path) -> None:
    """Write the record of a pruned model.

    Args:
        sources: of the text that it was calibrated and trained on.
        dense: the folder of the model that it was made from, whose own record counts too.
        folder: the pruned model's.
    """
    entries: list[dict[str, Any]] = []
    for source, known in (*sources, *read_record(dense)):
        # A source's share of the tokens says nothing together with an earlier text's.
        options = {key: value for key, value in source.options().items() if key != "share"}
        entry = {"name": without_folder(source.name), **options, **{key: known[key] for key in IDENTITIES if key in known}}
        if entry not in entries:
            entries.append(entry)
    write_json(folder / TEXT_RECORD, {"sources": entries})


def read_record(folder: Path) -> list[IdentifiedSource]:
    """Return the sources that a model's folder names; none where it has no record, or none that can be read."""
    path = folder / TEXT_RECORD
    if not path.is_file():
        return []
    options = [field.name for field in fields(Source)][1:]
    try:
        return [
            (
                Source(str(entry["name"]), **{key: entry[key] for key in options if key in entry}),
                {key: entry[key] for key in IDENTITIES if key in entry},
            )
            for entry in read_json(path)["sources"]
        ]
    except (OSError, ValueError, TypeError, KeyError):
        logger.warning("%s: is no record of calibration text, so that no score is marked as seen", excerpt(path, 150))
        return []
