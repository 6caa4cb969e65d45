"""The settings of a run for publication: a params.yaml that reproduces it and reveals nothing about this machine.

Local files and folders appear by name only, without the path to them.
"""

import io
import os
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML

from replaceme.base.files import local_path
from replaceme.base.parameters import Params
from replaceme.base.source import Source
from replaceme.base.task import Task

# Where a console script puts its result, and how much memory and how many processes it takes, are no settings of the run, but a
# params.yaml must have these keys.
WITHOUT_EFFECT = {"save_path": None, "save_transform_only": False, "memory": "auto", "processes": 1}


def without_folder(name: str) -> str:
    """Return the last part of a local path, and any other name unchanged."""
    path = local_path(name)
    return os.path.basename(os.path.abspath(path)) if path.is_absolute() or path.exists() else name


def settings_yaml(params: Params, keys: Iterable[str]) -> str:
    """Return these parameters as the text of a params.yaml."""
    values: dict[str, Any] = {key: getattr(params, key) for key in keys}
    values |= {key: value for key, value in WITHOUT_EFFECT.items() if key in values}
    values |= {key: without_folder(values[key]) for key in ("model_path", "dataset") if isinstance(values.get(key), str)}
    if isinstance(params.dataset, tuple) and "dataset" in values:
        values["dataset"] = [_plain(source) for source in params.dataset]
    if "tasks" in values:
        values["tasks"] = [_plain(task) for task in params.tasks]
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _plain(entry: Task | Source) -> Any:
    plain = entry.plain()
    return (
        without_folder(plain) if isinstance(plain, str) else {without_folder(name): options for name, options in plain.items()}
    )
