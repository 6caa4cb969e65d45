"""The entries of the lists ``dataset`` and ``tasks``: sources of calibration text and tasks, each a name with options.

dataset: [wikipedia-sample, {notes.jsonl: 2}, {c4: {share: 0.5, split: validation}}, self]
tasks: [wikipedia, {winogrande: {fewshots: 5, limit: 200}}, my-questions.jsonl]
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

# The source of text that the model writes itself.
SELF = "self"
# Options of a task that name a column of a file.
COLUMNS = ("text", "question", "choices", "answer")

Text = Annotated[StrictStr, Field(min_length=1)]
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_CONFIG)
class Entry:
    """A name with options."""

    name: Text

    def options(self) -> dict[str, Any]:
        """Return the options that are set."""
        return {field.name: value for field in fields(self)[1:] if (value := getattr(self, field.name)) is not None}

    def plain(self) -> str | dict[str, Any]:
        """Return the entry as written in params.yaml."""
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options().items()}
        if options.get("share") == 1:
            del options["share"]
        return {self.name: options} if options else self.name


@dataclass(frozen=True, config=_CONFIG)
class Source(Entry):
    """A source of calibration text: a file, a hub id, an embedded text's name, or ``self``.

    Attributes:
        share: its share of the tokens, relative to the others'.
        config, split, column, revision: as ``dataset_config`` and so on, for this source.
    """

    share: Annotated[float, Field(gt=0, strict=True)] = 1.0
    config: Text | None = None
    split: Text | None = None
    column: Text | None = None
    revision: Text | None = None


@dataclass(frozen=True, config=_CONFIG)
class Task(Entry):
    """An evaluation task: an embedded one, a task or group of lm-eval, or a .jsonl or .txt file.

    Attributes:
        fewshots: solved examples before each item; None is the task's own number.
        limit: score only the first items, this many (in a group: of each task); None scores all.
        text: column of a file that holds the text; None is ``text``.
        question: column of a file that holds the question; None is ``question``.
        choices: column of a file that holds the list of choices, or the columns that hold one each; None is ``choices``.
        answer: column of a file that holds the right choice's position, from 0; None is ``answer``.
    """

    fewshots: Annotated[StrictInt, Field(ge=0)] | None = None
    limit: Annotated[StrictInt, Field(ge=1)] | None = None
    text: Text | None = None
    question: Text | None = None
    choices: Text | Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    answer: Text | None = None


def dataset_title(dataset: str | tuple[Source, ...]) -> str:
    """Return a value of ``dataset`` in words: a name, or names with their shares of the tokens."""
    if isinstance(dataset, str) or len(dataset) == 1:
        return dataset if isinstance(dataset, str) else dataset[0].name
    whole = sum(source.share for source in dataset)
    return ", ".join(f"{source.name} ({100 * source.share / whole:.0f} %)" for source in dataset)


def _split_entry(entry: Any, number: str | None = None) -> Any:
    """Return the fields that ``name``, ``{name: options}`` or ``{name: number}`` stands for; those of an entry unchanged.

    Args:
        entry: as in params.yaml.
        number: the option that a number after the name sets, if one does.

    Raises:
        PydanticCustomError: it has none of these forms.
    """
    if isinstance(entry, str):
        return {"name": entry}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(options, Mapping):
            return {"name": name, **{str(key): value for key, value in options.items()}}
        if number or options is None:
            return {"name": name, number: options} if number else {"name": name}
    elif isinstance(entry, Entry) or (isinstance(entry, Mapping) and "name" in entry):
        return entry
    raise PydanticCustomError(
        "entry", f"a name, or one with options: {'{notes.jsonl: 2}' if number else '{piqa: {fewshots: 5}}'}"
    )


def _read_count(value: Any) -> Any:
    """Return the number that 250k or 1.5M stands for; another value unchanged."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM])", value) if isinstance(value, str) else None
    return round(float(match[1]) * {"k": 10**3, "M": 10**6}[match[2]]) if match else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_sources(dataset: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
    """Raise PydanticCustomError for a source that is named twice, and for options that text of the model can't have."""
    if isinstance(dataset, str):
        return (Source(SELF),) if dataset == SELF else dataset
    names = [source.name for source in dataset]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PydanticCustomError("sentence", "names {name} twice; keep one.", {"name": twice})
    for source in dataset:
        if source.name == SELF and (given := source.options().keys() - {"share"}):
            text = "{option} does not apply to self, which the model writes; leave it out."
            raise PydanticCustomError("sentence", text, {"option": " and ".join(sorted(given))})
    if not dataset:
        raise PydanticCustomError("sentence", "must be a name, or a list of names with shares, not [].")
    return dataset


# The types of the two parameters: they take what the file writes.
Sources = tuple[Annotated[Source, BeforeValidator(lambda entry: _split_entry(entry, number="share"))], ...]
Dataset = Annotated[
    Annotated[Text, Tag("name")] | Annotated[Sources, Tag("list")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "list"),
    BeforeValidator(_as_tuple),
    AfterValidator(_check_sources),
]
# A number of tokens: 250000, or 250k, or 1.5M.
TokenCount = Annotated[int, BeforeValidator(_read_count)]
Tasks = Annotated[tuple[Annotated[Task, BeforeValidator(_split_entry)], ...], BeforeValidator(_as_tuple)]


def is_own_text(dataset: Any) -> bool:
    """Return whether a value of ``dataset``, as the file writes it, names the model's own text alone; a wrong one doesn't."""
    try:
        sources = TypeAdapter(Dataset).validate_python(dataset)
    except ValidationError:
        return False
    return not isinstance(sources, str) and all(source.name == SELF for source in sources)
