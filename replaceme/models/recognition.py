"""A family that nobody described: propose where its parts are from a model's structure, and prove it on real text.

The proposal looks for the list of decoder layers and, in a layer, for an attention and an MLP that end in linears of the hidden
width. It holds when, in every layer, what leaves each linear is what its block returns, and what both return is what the layer
adds to its input: then the fold of a map is exact. What else a cut may change (attention patterns, a scale of the layer's
index) is for the export's verification.
"""

import re
import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn

from replaceme.base.errors import ModelError
from replaceme.models.depth import cut_config
from replaceme.models.families import Family, linears_within, parameter_of

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
MLP = re.compile("mlp|feed_?forward|ffn|^ff$", re.IGNORECASE)
NORM = re.compile("norm|^ln", re.IGNORECASE)


def proposed_family(model: Any) -> Family:
    """Return what the structure suggests; the weights may be on the meta device.

    Raises:
        ModelError: a part was not found.
    """
    config = model.config
    if not hasattr(config, "num_hidden_layers"):
        raise unrecognised(config.model_type, "its config has no num_hidden_layers, as where one model is made of several")
    kind, count, width = config.model_type, int(config.num_hidden_layers), int(config.hidden_size)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise unrecognised(kind, f"no list of its {count} layers was found")
    layer = model.get_submodule(lists[0])[0]
    if any(parameter.ndim > 2 and min(parameter.shape) > 1 for parameter in layer.parameters()):
        raise unrecognised(kind, "its layers hold weights of three dimensions, as a mixture of experts does")
    attention = _block(kind, layer, ATTENTION, "attention")
    mlp = _block(kind, layer, MLP, "MLP")
    if any(isinstance(part, nn.ModuleList) for part in layer.get_submodule(mlp).modules()):
        raise unrecognised(kind, "its MLP is a list of them, as a mixture of experts is")
    ends = _last_linear(kind, layer, attention, width), _last_linear(kind, layer, mlp, width)
    for other in model.get_submodule(lists[0]):
        if not {attention, mlp, *ends} <= {name for name, _ in other.named_modules()}:
            raise unrecognised(kind, "its layers are not all alike")
    lengths = {name: len(value) for name, value in config.to_dict().items() if isinstance(value, list)}
    return Family(
        layers=lists[0],
        attention=attention,
        attention_output=ends[0],
        mlp=mlp,
        mlp_output=ends[1],
        per_layer=tuple(name for name, length in lengths.items() if length == count),
        detected=True,
        uncut="nobody described its parts",
    )


def _block(kind: str, layer: nn.Module, name: re.Pattern[str], what: str) -> str:
    found = [
        path for path, part in layer.named_children() if name.search(path) and not NORM.search(path) and linears_within(part)
    ]
    if len(found) != 1:
        raise unrecognised(kind, f"its layers have {'no' if not found else 'more than one'} {what} that ends in a linear")
    return found[0]


def _last_linear(kind: str, layer: nn.Module, path: str, width: int) -> str:
    linears = linears_within(layer.get_submodule(path))
    fitting = [name for name, linear in linears.items() if parameter_of(linear, "weight").shape[0] == width]
    if not fitting:
        raise unrecognised(kind, f"no linear of width {width} ends its {path}")
    return f"{path}.{fitting[-1]}".removesuffix(".")


def unrecognised(kind: str, reason: str) -> ModelError:
    return ModelError(f"model_path: the family '{kind}' is not described, and was not recognised: {reason}.")


# What a layer may know its position by.
INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


def check_cut(build: Callable[[Any], Any], config: Any, family: Family) -> None:
    """Build a model with its first layer gone and compare the layers.

    Args:
        build: makes a model of a config, without memory for its weights.
        config: the dense model's.
        family: what was recognised.

    Raises:
        ModelError: the shortened model can't be built, or its layers hold something else than the kept ones.
    """
    whole = family.decoder_layers(build(config))
    shorter = type(config).from_dict(config.to_dict())
    try:
        cut_config(shorter, family, [0])
        with tempfile.TemporaryDirectory() as folder:
            shorter.save_pretrained(folder)
            layers = family.decoder_layers(build(type(config).from_pretrained(folder)))
    except Exception as failure:  # configs check themselves with errors of many kinds
        reason = " ".join(str(failure).split())[:200]
        raise _uncut(config, f"a config with fewer layers is none of its own ({reason})") from failure
    if len(layers) != len(whole) - 1:
        raise _uncut(config, f"with a layer less it has {len(layers)} of {len(whole)}")
    for position, (kept, now) in enumerate(zip(list(whole)[1:], layers, strict=True), start=1):
        before, after = _held(kept), _held(now)
        if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            raise _uncut(config, f"{different[0]} of layer {position} depends on its position")


def _held(layer: nn.Module) -> dict[str, Any]:
    """Return the plain values and the shapes that the modules of a layer hold, by name."""
    held: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
        held |= {f"{path}.{name}".lstrip("."): value for name, value in plain.items() if name not in INDICES}
    return held


def _uncut(config: Any, reason: str) -> ModelError:
    return ModelError(f"model_path: the family '{config.model_type}' is not described, and no layer of it can go: {reason}.")
