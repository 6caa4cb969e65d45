"""Pruned models in a form that no class of transformers has: write their folder, recognise it, and load its classes.

Such a folder has ``modeling_pruned.py`` (``replaceme.models.modeling_pruned`` for its family) beside its weights, and a config
that names it. Code in a model's folder runs only with ``trust_remote_code``. Without it, if the file equals the text that this
program would write, the classes are built from the program's own text. Nothing in the folder runs then: neither this file, nor
code for its tokenizer or for generation.
"""

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json, write_json, write_text

# Read as text; transformers or ``_build_classes`` runs it.
MODELING = Path(__file__).with_name("modeling_pruned.py")
FILE = MODELING.name
KIND = "pruned_"
AUTO = "AutoModelForCausalLM"
AUTO_MAP = {"AutoConfig": f"{Path(FILE).stem}.PrunedConfig", AUTO: f"{Path(FILE).stem}.PrunedForCausalLM"}
_CLASSES = re.compile(r'^(CONFIG|MODEL) = "(\w+)"$', re.MULTILINE)


def check_own_form(config: Any) -> None:
    """Raise ParameterError when the model's class is not from transformers: our form subclasses one of those."""
    if getattr(config, "auto_map", None):
        raise ParameterError(
            f"method: the result of this method needs a modelling file of its own, and '{config.model_type}' has one already; "
            "use a method whose result keeps the family's form, such as lstsq."
        )


def write_own_form(folder: Path, pruned: dict[str, Any], tokenizer: str) -> None:
    """Convert a saved model's folder to our form: change its config and add ``modeling_pruned.py``.

    Args:
        folder: a reshaped model (``replaceme.models.modeling_pruned.reshape``), saved as its family's own class.
        pruned: the description that it was reshaped by.
        tokenizer: the class of its tokenizer; transformers finds it by the family's name, which changes here.
    """
    import transformers

    config = read_json(folder / "config.json")
    (model,) = config["architectures"]
    base = getattr(transformers, model).config_class.__name__
    own = {"model_type": KIND + config["model_type"], "architectures": [AUTO_MAP[AUTO].split(".")[1]], "auto_map": AUTO_MAP}
    own |= {**own_config(pruned), "tokenizer_class": tokenizer, "pruned": pruned}
    write_json(folder / "config.json", {**config, **own})
    write_text(folder / FILE, _render({"CONFIG": base, "MODEL": model}))


def own_config(pruned: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that a config gets only in our form: the family's own class may refuse this width."""
    return {"hidden_size": pruned["width"]} if "width" in pruned else {}


def is_own_form(folder: Path) -> bool:
    """Return whether a folder's model is of our form, with exactly the code that this program writes."""
    return _read_class_names(folder) is not None


def own_classes(folder: Path) -> tuple[Any, Any] | None:
    """Return config and model class for a folder of our form, built from this program's own text; None for other folders."""
    names = _read_class_names(folder)
    return None if names is None else _build_classes(names["CONFIG"], names["MODEL"])


def _read_class_names(folder: Path) -> dict[str, str] | None:
    """Return the family's classes that a folder's code names; None if it differs from what this program writes."""
    try:
        config, text = read_json(folder / "config.json"), (folder / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    named = isinstance(config, dict) and str(config.get("model_type")).startswith(KIND) and config.get("auto_map") == AUTO_MAP
    names = dict(_CLASSES.findall(text))
    return names if named and text == _render(names) else None


@cache
def _build_classes(config: str, model: str) -> tuple[Any, Any]:
    module = ModuleType(f"replaceme.models.{MODELING.stem}_{model}")
    exec(_render({"CONFIG": config, "MODEL": model}), vars(module))
    # transformers looks up a class's module there.
    sys.modules[module.__name__] = module
    return module.PrunedConfig, module.PrunedForCausalLM


def _render(classes: dict[str, str]) -> str:
    text = MODELING.read_text(encoding="utf-8")
    return _CLASSES.sub(lambda line: f'{line[1]} = "{classes.get(line[1], line[2])}"', text)
