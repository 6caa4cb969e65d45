"""Whether an undescribed family can lose layers: the shortened model is built, without weights, and its layers looked at.

A layer may hold numbers that were computed from its position: a scale, a kind, a window. Kept layers move to other positions,
so what the shortened model's layers hold must be what the kept ones held.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn

from replaceme.errors import ModelError
from replaceme.families import Family
from replaceme.surgery import cut_config

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
        raise _refusal(config, f"a config with fewer layers is none of its own ({reason})") from failure
    if len(layers) != len(whole) - 1:
        raise _refusal(config, f"with a layer less it has {len(layers)} of {len(whole)}")
    for position, (kept, now) in enumerate(zip(list(whole)[1:], layers, strict=True), start=1):
        before, after = _held(kept), _held(now)
        if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            raise _refusal(config, f"{different[0]} of layer {position} depends on its position")


def _held(layer: nn.Module) -> dict[str, Any]:
    """Return the plain values and the shapes that the modules of a layer hold, by name."""
    held: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
        held |= {f"{path}.{name}".lstrip("."): value for name, value in plain.items() if name not in INDICES}
    return held


def _refusal(config: Any, reason: str) -> ModelError:
    return ModelError(f"model_path: the family '{config.model_type}' is not described, and no layer of it can go: {reason}.")
