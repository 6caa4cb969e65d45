"""The entry of a family's config that says how wide the MLPs are."""

from typing import Any

import torch

from replaceme.models.families import Family, inputs_of

# As the families name it; some configs have several and read one.
NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def mlp_width_entry(config: Any, family: Family, width: int) -> dict[str, int]:
    """Return the entry of the config that makes every MLP so wide; empty if the family's class can't be told by one entry.

    Args:
        config: of the dense model; it is left unchanged.
        family: its description.
        width: the number of channels.
    """
    from transformers import AutoModelForCausalLM

    for name in NAMES:
        if not hasattr(config, name):
            continue
        try:
            changed = type(config).from_dict({**config.to_dict(), name: width})
            with torch.device("meta"):
                layers = family.decoder_layers(AutoModelForCausalLM.from_config(changed))
            if {inputs_of(family.linear_of(layer, "mlp_output")) for layer in layers} == {width}:
                return {name: width}
        except Exception:  # configs and models check themselves with errors of many kinds
            continue
    return {}
