"""The published program's own keys, turned into ours, so that its config files run as they stand.

Keys with a value that asks for nothing (``diag: false``) are dropped; a value that asks for something this version can't
do is refused by name; keys that only mattered to the published program are ignored, and the log says so.
"""

from collections.abc import Mapping
from typing import Any

from replaceme.task import parse_tasks

# Each key with the value that asks for nothing.
STRUCTURES = {"diag": False, "two_vectors": False, "thri": False}
COSINE_ONLY = ("solver", "loss", "accurate")
PUBLISHED_KEYS = ("dataset_subset", "distances_path", "activations_save_path", *STRUCTURES, *COSINE_ONLY)


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return our parameters, notes for the log, and problems.

    Args:
        raw: keys and values as a config file or the command line gave them.
    """
    ours = dict(raw)
    notes: list[str] = []
    problems: list[str] = []

    if "token" in ours:
        ours.pop("token")
        problems.append("token: secrets don't belong in parameters; set the environment variable HF_TOKEN.")

    if "dataset_subset" in ours:
        split = ours.pop("dataset_subset")
        if ours.get("dataset_split") not in (None, split):
            problems.append(f"dataset_subset: says '{split}' and dataset_split '{ours['dataset_split']}'; keep one.")
        elif split is not None:
            ours["dataset_split"] = split
            notes.append("dataset_subset is read as dataset_split, as the published program does")

    for key, nothing in STRUCTURES.items():
        if ours.pop(key, None) not in (nothing, None):
            problems.append(f"{key}: transforms with this structure are not built yet; use false.")

    ignored = [key for key in COSINE_ONLY if ours.pop(key, None) is not None]
    if ours.get("method") != "cosine" and ignored:
        notes.append(f"{', '.join(ignored)} belong to method cosine and are ignored")

    for key in ("distances_path", "activations_save_path"):
        if ours.pop(key, None) is not None:
            notes.append(f"{key} is ignored: results are cached by content, never read from a path")

    if "tasks" in ours:
        ours["tasks"] = parse_tasks(ours["tasks"], problems)
    return ours, notes, problems
