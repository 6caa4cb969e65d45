"""Sources of calibration text: one name, or a list of names with shares, as given in params.yaml or on the command line.

    dataset: wikipedia-sample
    dataset: [wikipedia-sample, {notes.jsonl: 2}, {c4: {share: 0.5, split: validation}}, self]

Shares are of the tokens, relative to each other; a name without one has share 1. ``self`` is text that the model writes itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from replaceme.base.errors import excerpt, shown
from replaceme.base.task import unusable_text

SELF = "self"
LARGEST_SHARE = 1e9


@dataclass(frozen=True)
class Source:
    """A source of calibration text.

    Attributes:
        name: a file, a hub id, an embedded text's name, or ``self``.
        share: its share of the tokens, relative to the others'.
        config, split, column, revision: as ``dataset_config`` and so on, for this source.
    """

    name: str
    share: float = 1.0
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that are set, the share among them."""
        return {field: value for field in OPTIONS if (value := getattr(self, field)) is not None}

    def plain(self) -> str | dict[str, Any]:
        """Return the source as written in params.yaml."""
        options = self.options()
        if set(options) == {"share"}:
            return self.name if self.share == 1 else {self.name: self.share}
        return {self.name: options}


def dataset_title(dataset: "str | tuple[Source, ...]") -> str:
    """Return a value of ``dataset`` in words: a name, or names with their shares of the tokens."""
    if isinstance(dataset, str) or len(dataset) == 1:
        return dataset if isinstance(dataset, str) else dataset[0].name
    whole = sum(source.share for source in dataset)
    return ", ".join(f"{source.name} ({100 * source.share / whole:.0f} %)" for source in dataset)


OPTIONS = tuple(field.name for field in fields(Source) if field.name != "name")


def parse_dataset(raw: Any, problems: list[str]) -> Any:
    """Return a value of ``dataset``, a list's entries as sources; append a sentence to ``problems`` for each mistake."""
    if raw == SELF:
        return (Source(SELF),)
    if isinstance(raw, str) and raw:
        return raw
    if not isinstance(raw, list | tuple) or not raw:
        given = "null" if raw is None else shown(raw)
        problems.append(f"dataset: must be a name, or a list of names with shares, not {given}.")
        return ()
    sources = tuple(source for entry in raw if (source := _parse_one(entry, problems)))
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        problems.append(f"dataset: names {excerpt(twice)} twice; keep one.")
    return sources


def _parse_one(entry: Any, problems: list[str]) -> Source | None:
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, str) and entry:
        entry = {entry: 1.0}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(name := next(iter(entry)), str) or not name:
        problems.append(f"dataset: an entry must be a name or one {{name: share}}, not {shown(entry)}.")
        return None
    if wanted := unusable_text(name):
        problems.append(f"dataset: a name in the list must be {wanted}, not {shown(name)}.")
        return None
    options = entry[name] if isinstance(entry[name], Mapping) else {"share": entry[name]}
    wrong = [sentence for key, value in options.items() if (sentence := _wrong_option(name, key, value))]
    problems += wrong
    return None if wrong else Source(name, **options)


def _wrong_option(name: str, key: Any, value: Any) -> str | None:
    if key not in OPTIONS:
        return f"dataset: {excerpt(name)} has no option '{excerpt(key)}'; there are {', '.join(OPTIONS)}."
    if name == SELF and key != "share":
        return f"dataset: {key} does not apply to self, which the model writes; leave it out."
    if key == "share":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < LARGEST_SHARE:
            return f"dataset: the share of {excerpt(name)} must be a number above 0, not {shown(value)}."
    elif value is not None and (not isinstance(value, str) or unusable_text(value)):
        return f"dataset: {key} of {excerpt(name)} must be a text, not {shown(value)}."
    return None
