"""Models of a family with another config, to learn what the config can say; without memory for their weights."""

from typing import Any

import torch

from replaceme.models.families import Family, inputs_of

# The entry that says how wide the MLPs are, as the families name it; some configs have several and read one.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def build_changed(config: Any, entries: dict[str, Any]) -> Any:
    """Return the family's own class with these entries of its config changed, on the meta device; None if it refuses them."""
    from transformers import AutoModelForCausalLM

    try:
        changed = type(config).from_dict({**config.to_dict(), **entries})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(changed)
    except Exception:  # configs and models check themselves with errors of many kinds
        return None


def mlp_width_entry(config: Any, family: Family, width: int) -> dict[str, int]:
    """Return the entry of the config that makes every MLP so wide; empty if the family's class can't be told by one entry.

    Args:
        config: of the dense model; it is left unchanged.
        family: its description.
        width: the number of channels.
    """
    for name in WIDTHS:
        if hasattr(config, name) and (model := build_changed(config, {name: width})) is not None:
            layers = family.decoder_layers(model)
            if {inputs_of(family.linear_of(layer, "mlp_output")) for layer in layers} == {width}:
                return {name: width}
    return {}
