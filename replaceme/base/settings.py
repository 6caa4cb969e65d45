"""Settings of a run as others may see them: a file that repeats the run, without anything that is this machine's alone.

A local file or folder stands there by its own name, without the folder that it lies in.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from replaceme.base.params import Params
from replaceme.base.task import Task

# Where a console script puts its result: not a setting of the run. The pipeline's file must have these keys all the same.
CONSOLE_ONLY = {"save_path": None, "save_transform_only": False}


def without_folder(name: str) -> str:
    """Return a local file or folder by its own name, and any other name as it is."""
    path = Path(name).expanduser()
    return os.path.basename(os.path.abspath(path)) if path.is_absolute() or path.exists() else name


def settings_yaml(params: Params, keys: Iterable[str]) -> str:
    """Return some of the parameters as a params.yaml."""
    values: dict[str, Any] = {key: getattr(params, key) for key in keys}
    values |= {key: value for key, value in CONSOLE_ONLY.items() if key in values}
    values |= {key: without_folder(values[key]) for key in ("model_path", "dataset") if key in values}
    if "tasks" in values:
        values["tasks"] = [_plain(task) for task in params.tasks]
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _plain(task: Task) -> Any:
    plain = task.plain()
    return (
        without_folder(plain) if isinstance(plain, str) else {without_folder(name): options for name, options in plain.items()}
    )
