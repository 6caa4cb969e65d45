"""docs/parameters.md, made from the definitions of the parameters and the methods: ``python -m replaceme.reference``."""

import sys

from replaceme.base.params import Params
from replaceme.base.published_keys import PUBLISHED_KEYS
from replaceme.methods.registry import FIELDS, METHODS
from replaceme.selection.criteria import CRITERIA


def reference() -> str:
    """Return the page: the parameters, the methods with their own ones, and the criteria, one table row each."""
    own = [
        f"| `{name}` | {_opener(name)} | {', '.join(f'`{key}`' for key in method.settings.model_fields) or '—'} |"
        for name, method in METHODS.items()
    ]
    criteria = [f"| `{name}` | {criterion.words} |" for name, criterion in CRITERIA.items()]
    published = ", ".join(f"`{key}`" for key in PUBLISHED_KEYS)
    return "\n".join(
        [
            "# Parameters",
            "",
            "Made by `python -m replaceme.reference` from `replaceme/base/params.py` and the methods' files. The defaults "
            "are the published behaviour; the repository's `params.yaml` states other values where we found better ones.",
            "",
            *_table(Params.model_fields),
            "",
            "## Methods",
            "",
            "| method | what it is | its own parameters |",
            "| --- | --- | --- |",
            *own,
            "",
            *_table(FIELDS.keys() - Params.model_fields.keys()),
            "",
            "## Criteria",
            "",
            "Values of `selection`. A block is chosen by:",
            "",
            "| selection | by |",
            "| --- | --- |",
            *criteria,
            "",
            f"The published program's other keys are accepted too, and mapped or reported as ignored: {published}.",
            "",
        ]
    )


def _table(names: object) -> list[str]:
    rows = [
        f"| `{name}` | {_default(info.default)} | {info.description} |"
        for name, info in FIELDS.items()
        if name in names  # type: ignore[operator]
    ]
    return ["| key | default | meaning |", "| --- | --- | --- |", *rows]


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(task.name for task in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _opener(name: str) -> str:
    """Return the first sentence of a method's file, without the reference to another file."""
    module = sys.modules[f"replaceme.methods.{name}"]
    return " ".join(str(module.__doc__).split("\n\n")[0].split()).split(" (``")[0].rstrip(".")


if __name__ == "__main__":
    print(reference(), end="")
