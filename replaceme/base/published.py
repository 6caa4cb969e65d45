"""Translate the published program's keys and spellings into ours, so that its config files run unchanged.

Keys whose value asks for nothing (``diag: false``) are dropped. A value that asks for something not offered here is refused by
name. Keys that only mattered to the published program are ignored, with a log line.
"""

from collections.abc import Mapping
from typing import Any

from replaceme.base.errors import excerpt, shown
from replaceme.base.source import parse_dataset
from replaceme.base.task import parse_tasks

# Key → the transform that it asks for.
STRUCTURES = {"diag": "diagonal", "two_vectors": "two_vectors", "thri": "triangular"}
# scipy's spellings, in lower case.
SOLVERS = {"l-bfgs": "lbfgs", "l-bfgs-b": "lbfgs", "trust-ncg": "trust_region"}
REFUSED_SOLVERS = ("newton-cg",)
PUBLISHED_KEYS = ("dataset_subset", "distances_path", "activations_save_path", *STRUCTURES)


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return our parameters, notes for the log, and problems.

    Args:
        raw: keys and values from a config file or the command line.
    """
    ours = dict(raw)
    notes: list[str] = []
    problems: list[str] = []

    if "token" in ours:
        ours.pop("token")
        problems.append("token: secrets don't belong in parameters; set the environment variable HF_TOKEN.")

    if "dataset_subset" in ours:
        split = ours.pop("dataset_subset")
        if (named := ours.get("dataset_split")) not in (None, split):
            problems.append(f"dataset_subset: says '{excerpt(split)}' and dataset_split '{excerpt(named)}'; keep one.")
        elif split is not None:
            ours["dataset_split"] = split
            notes.append("dataset_subset is read as dataset_split, as the published program does")

    _translate_structure(ours, notes, problems)
    _translate_solver(ours, notes, problems)

    for key in ("distances_path", "activations_save_path"):
        if ours.pop(key, None) is not None:
            notes.append(f"{key} is ignored: results are cached by content, never read from a path")

    if "dataset" in ours:
        ours["dataset"] = parse_dataset(ours["dataset"], problems)
    if "tasks" in ours:
        ours["tasks"] = parse_tasks(ours["tasks"], problems)
    return ours, notes, problems


def without_replaced(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's keys without those that the command line overrides under another name."""
    replaced = {key for key in STRUCTURES if key in overrides}
    if "transform" in overrides or any(overrides[key] is True for key in replaced):
        replaced |= {"transform", *STRUCTURES}
    if {"dataset_split", "dataset_subset"} & overrides.keys():
        replaced |= {"dataset_split", "dataset_subset"}
    return {key: value for key, value in raw.items() if key not in replaced}


def _translate_structure(ours: dict[str, Any], notes: list[str], problems: list[str]) -> None:
    given = {key: ours.pop(key) for key in STRUCTURES if key in ours}
    problems += [
        f"{key}: must be true or false, not {shown(value)}."
        for key, value in given.items()
        if value is not None and not isinstance(value, bool)
    ]
    asked = [key for key, value in given.items() if value is True]
    if len(asked) > 1:
        problems.append(
            f"{asked[0]}: is true and so is {' and '.join(asked[1:])}, but a transform has one structure; keep one."
        )
    elif asked:
        transform = STRUCTURES[asked[0]]
        if (named := ours.get("transform", transform)) != transform:
            problems.append(f"{asked[0]}: asks for transform {transform}, and transform says '{excerpt(named)}'; keep one.")
        ours["transform"] = transform
        notes.append(f"{asked[0]} is read as transform: {transform}")


def _translate_solver(ours: dict[str, Any], notes: list[str], problems: list[str]) -> None:
    for key in ("solver", "loss"):
        if ours.get(key, "") is None:  # null in the published files means not set
            ours.pop(key)
    solver = ours.get("solver")
    if not isinstance(solver, str):
        return
    ours["solver"] = SOLVERS.get(solver.lower(), solver.lower())
    if ours["solver"] in REFUSED_SOLVERS:
        ours.pop("solver")
        problems.append(f"solver: {solver} is not offered; trust_region uses the same second derivatives, cg none.")
    elif ours["solver"] != solver.lower():
        notes.append(f"solver {solver} is read as {ours['solver']}")
