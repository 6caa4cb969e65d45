"""Models that no class of transformers describes: how their folder says so, and how it is known to be ours.

Such a folder has ``modeling_pruned.py`` (``replaceme.modeling_pruned`` for the family at hand) beside its weights, and a config
that names it. Code from a model's folder runs only when the user says so (``trust_remote_code``); what this program wrote
itself, to the letter, is not foreign.
"""

import re
from pathlib import Path
from typing import Any

import transformers

from replaceme import modeling_pruned
from replaceme.errors import ModelError
from replaceme.files import read_json, write_json, write_text

FILE = Path(modeling_pruned.__file__).name
KIND = "pruned_"
AUTO = "AutoModelForCausalLM"
AUTO_MAP = {"AutoConfig": f"{Path(FILE).stem}.PrunedConfig", AUTO: f"{Path(FILE).stem}.PrunedForCausalLM"}
_CLASSES = re.compile(r'^(CONFIG|MODEL) = "(\w+)"$', re.MULTILINE)


def check_own_form(config: Any, kind: str) -> None:
    """Raise ModelError when a model's class is not one of transformers, on which our form is built."""
    if getattr(config, "auto_map", None):
        raise ModelError(
            f"method: the result of this method needs a modelling file of its own, and '{kind}' has one already; use a method "
            "whose result keeps the family's form, such as lstsq."
        )


def write_own_form(folder: Path, pruned: dict[str, Any]) -> None:
    """Make a saved model one of our form.

    Args:
        folder: where a reshaped model (``replaceme.modeling_pruned.reshape``) was saved as its family's own class.
        pruned: what it was reshaped by.
    """
    config = read_json(folder / "config.json")
    (model,) = config["architectures"]
    base = getattr(transformers, model).config_class.__name__
    own = {"model_type": KIND + config["model_type"], "architectures": [AUTO_MAP[AUTO].split(".")[1]], "auto_map": AUTO_MAP}
    write_json(folder / "config.json", {**config, **own, "pruned": pruned})
    write_text(folder / FILE, _rendered({"CONFIG": base, "MODEL": model}))


def is_own_form(folder: Path) -> bool:
    """Return whether a folder's model is of our form, and the code in it is what this program wrote."""
    try:
        config, text = read_json(folder / "config.json"), (folder / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    named = isinstance(config, dict) and str(config.get("model_type")).startswith(KIND) and config.get("auto_map") == AUTO_MAP
    return named and text == _rendered(dict(_CLASSES.findall(text)))


def _rendered(classes: dict[str, str]) -> str:
    text = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    return _CLASSES.sub(lambda line: f'{line[1]} = "{classes.get(line[1], line[2])}"', text)
