"""The sources that ``dataset`` names, and what identifies the content of each. Nothing here reads a text."""

from collections.abc import Mapping
from typing import Any

from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params

# A source, and what identifies its content (``DatasetSource.fingerprint``).
Known = tuple[Source, Mapping[str, Any]]


def sources_of(params: Params) -> tuple[Source, ...]:
    """Return the sources of the calibration text: those of a list, or the only one with the options of its own parameters.

    Raises:
        DatasetError: a parameter of a single source is set beside a list.
    """
    if isinstance(params.dataset, str):
        options = params.dataset_config, params.dataset_split, params.dataset_column, params.dataset_revision
        return (Source(params.dataset, 1.0, *options),)
    for key in ("dataset_config", "dataset_split", "dataset_column", "dataset_revision"):
        if getattr(params, key) is not None:
            option = key.removeprefix("dataset_")
            raise DatasetError(f"{key}: dataset is a list; use null, and give each entry its own {option}.")
    return params.dataset


def by_source(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the part of ``replaceme.corpora.find.fingerprints`` that belongs to each source, in order."""
    parts: list[Mapping[str, Any]] = found.get("sources", [found])
    return parts


def known_sources(params: Params, found: Mapping[str, Any]) -> list[Known]:
    """Return the sources, each with its part of ``fingerprints``."""
    return [*zip(sources_of(params), by_source(found), strict=True)]
