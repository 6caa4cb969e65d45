"""Undescribed families: derive a description from the model's structure, and check that the model can lose a layer.

The structure gives the list of decoder layers and, in a layer, an attention and an MLP that end in linears of the hidden width.
The fold of a map is exact if, in every layer, the MLP returns the output of its last linear, and attention and MLP together
are all that the layer adds to its input; ``replaceme.statistics.proof`` checks both on real text. Other effects of a cut
(attention patterns, a scale by layer index) are left to the export's verification.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from replaceme.base.errors import ModelError, excerpt
from replaceme.base.files import temporary_folder
from replaceme.models.depth import cut_config
from replaceme.models.families import Family, linears_within, parameter_of

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
MLP = re.compile("mlp|feed_?forward|ffn|^ff$", re.IGNORECASE)
NORM = re.compile("norm|^ln", re.IGNORECASE)
# Attributes that hold a layer's index, which a cut renumbers.
LAYER_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


def recognise_family(model: Any) -> Family:
    """Return the description that the model's structure suggests; the weights may be on the meta device.

    Raises:
        ModelError: a part is missing or ambiguous.
    """
    config = model.config
    if not hasattr(config, "num_hidden_layers"):
        raise recognition_error(config.model_type, "its config has no num_hidden_layers, as in models of several parts")
    kind, count, width = config.model_type, int(config.num_hidden_layers), int(config.hidden_size)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise recognition_error(kind, f"no list of its {count} layers was found")
    layer = model.get_submodule(lists[0])[0]
    if any(parameter.ndim > 2 and min(parameter.shape) > 1 for parameter in layer.parameters()):
        raise recognition_error(kind, "its layers hold weights of three dimensions, as a mixture of experts does")
    attention = _find_block(kind, layer, ATTENTION, "attention")
    mlp = _find_block(kind, layer, MLP, "MLP")
    if any(isinstance(part, nn.ModuleList) for part in layer.get_submodule(mlp).modules()):
        raise recognition_error(kind, "its MLP is a list of them, as a mixture of experts is")
    attention_output, mlp_output = (_find_last_linear(kind, layer, part, width) for part in (attention, mlp))
    for other in model.get_submodule(lists[0]):
        if not {attention, mlp, attention_output, mlp_output} <= {name for name, _ in other.named_modules()}:
            raise recognition_error(kind, "its layers are not all alike")
    entries = config.to_dict().items()
    return Family(
        layers=lists[0],
        attention=attention,
        attention_output=attention_output,
        mlp=mlp,
        mlp_output=mlp_output,
        # Not looked for; what needs them is refused.
        attention_norm="",
        mlp_norm="",
        feeding_linears={},
        per_layer=tuple(name for name, value in entries if isinstance(value, list) and len(value) == count),
        detected=True,
        head_pruning_obstacle="its heads and channels are not described",
    )


def _find_block(kind: str, layer: nn.Module, name: re.Pattern[str], what: str) -> str:
    paths = [
        path for path, part in layer.named_children() if name.search(path) and not NORM.search(path) and linears_within(part)
    ]
    if len(paths) != 1:
        raise recognition_error(kind, f"its layers have {'no' if not paths else 'more than one'} {what} that ends in a linear")
    return paths[0]


def _find_last_linear(kind: str, layer: nn.Module, path: str, width: int) -> str:
    linears = linears_within(layer.get_submodule(path))
    names = [name for name, linear in linears.items() if parameter_of(linear, "weight").shape[0] == width]
    if not names:
        raise recognition_error(kind, f"no linear of width {width} ends its {path}")
    return f"{path}.{names[-1]}".removesuffix(".")


def recognition_error(kind: str, reason: str) -> ModelError:
    """Return the error for a family whose structure was not recognised."""
    return ModelError(f"model_path: the family '{kind}' is not described, and was not recognised: {reason}.")


def check_cut(build: Callable[[Any], Any], config: Any, family: Family) -> None:
    """Build the model without its first layer, and compare its layers with the kept ones of the dense model.

    Args:
        build: builds a model from a config, without memory for its weights.
        config: the dense model's.
        family: the recognised description.

    Raises:
        ModelError: the shortened model can't be built, or one of its layers has other values or shapes.
    """
    dense = family.decoder_layers(build(config))
    shorter = type(config).from_dict(config.to_dict())
    try:
        cut_config(shorter, family, [0])
        with temporary_folder("replaceme-") as folder:
            shorter.save_pretrained(folder)
            pruned = family.decoder_layers(build(type(config).from_pretrained(folder)))
    except Exception as failure:  # configs check themselves with errors of many kinds
        raise _cut_error(config, f"its config class refuses fewer layers ({excerpt(failure, 150)})") from failure
    if len(pruned) != len(dense) - 1:
        raise _cut_error(config, f"with one layer less in its config it has {len(pruned)} of {len(dense)}")
    for index, layer in enumerate(pruned, start=1):
        before, after = _values_of(dense[index]), _values_of(layer)
        if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            raise _cut_error(config, f"{different[0]} of layer {index} depends on its position")


def _values_of(layer: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a layer's modules and the shapes of its parameters, by name."""
    values: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
        values |= {f"{path}.{name}".lstrip("."): value for name, value in plain.items() if name not in LAYER_INDEX_NAMES}
    return values


def _cut_error(config: Any, reason: str) -> ModelError:
    return ModelError(f"model_path: the family '{config.model_type}' is not described, and can't lose a layer: {reason}.")
