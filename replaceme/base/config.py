"""Config files: YAML 1.2 (``1e-6`` is a number, ``no`` is a text), one ``key: value`` a line."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode

from replaceme.base.errors import ParameterError
from replaceme.base.files import without_folder
from replaceme.base.progress import logger

# Where a console script puts its result, and how much memory and how many processes it takes, are no settings of the run, but a
# params.yaml must have these keys.
WITHOUT_EFFECT = {"save_path": None, "save_transform_only": False, "memory": "auto", "processes": 1}


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a file's keys and values, and a sentence for each key that is given twice with different values.

    Raises:
        ParameterError: there is no such file, it can't be read, or it isn't YAML with one ``key: value`` a line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            text = "".join(lines)  # line by line: of a large file of weights, the first line already fails
    except FileNotFoundError:
        raise ParameterError(f"{path}: there is no such file; give the path of a YAML file of parameters.") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path}: can't be read as UTF-8 text; give the path of a YAML file of parameters.") from None
    except OSError as problem:
        raise ParameterError(f"{path}: can't be read ({problem.strerror}); give the path of a YAML file.") from None
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        pairs = root.value if isinstance(root, MappingNode) else []
        given = [(str(key.value), yaml.constructor.construct_object(value, deep=True)) for key, value in pairs]
    except Exception as invalid:  # besides YAMLError whatever a converter raises, as for the date 2024-99-99
        raise ParameterError(f"{path}: isn't valid YAML: {' '.join(str(invalid).split())}.") from None
    if root is not None and not isinstance(root, MappingNode):
        raise ParameterError(f"{path}: must hold one `key: value` a line.")
    content: dict[str, Any] = {}
    problems = []
    for key, value in given:
        if key not in content:
            content[key] = value
        elif content[key] == value:  # the published cosine file has such a key
            logger.warning("%s: %s is given twice with the same value.", path, key)
        else:
            problems.append(f"{path}: {key}: is given twice, as {content[key]} and as {value}; keep one.")
    return content, problems


def parse_value(text: str) -> Any:
    """Parse one value of the command line, as it would stand in a config; what is no YAML is a text."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception:  # as above
        return text


def settings_yaml(params: BaseModel, keys: Iterable[str]) -> str:
    """Return these parameters as the text of a params.yaml for publication: it names local files without their folder."""
    values = {key: WITHOUT_EFFECT.get(key, getattr(params, key)) for key in keys}
    named = ("model_path", "dataset", "heal_dataset", "tasks")
    values |= {key: _hide_folders(values[key]) for key in named if values.get(key) is not None}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _hide_folders(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_hide_folders(entry.plain()) for entry in value]
    return (
        {without_folder(name): options for name, options in value.items()} if isinstance(value, dict) else without_folder(value)
    )
