"""A pruned model in a form that its family's own class does not have. This file lies with the weights of such a model, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it.

It is the family's class with what `config.pruned` names:

- `operators`: layer → "dense" or "diagonal": the state behind the layer is multiplied by a (d, d) or (d,) weight.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import conversion_mapping

# The family's own classes: these two lines are the export's.
CONFIG = "LlamaConfig"
MODEL = "LlamaForCausalLM"


class Operator(nn.Module):
    """A linear map of the whole residual stream: ``h P`` with P (d, d), or its diagonal (d,)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.weight if self.weight.ndim == 1 else states @ self.weight


def operate(layer: Any, _arguments: Any, output: Any) -> Any:
    """Forward hook of a layer: what it returns goes through its operator."""
    if isinstance(output, torch.Tensor):
        return layer.operator(output)
    return (layer.operator(output[0]), *output[1:])


def reshape(model: nn.Module, pruned: dict[str, Any]) -> None:
    """Give a model of the family's own form the parts that `pruned` names; their weights are not set."""
    layers: Any = model.get_submodule(pruned["layers"])
    width: Any = model.config.hidden_size  # type: ignore[union-attr]
    for index, form in pruned.get("operators", {}).items():
        layer = layers[int(index)]
        layer.operator = (Operator(width) if form == "diagonal" else Operator(width, width)).to(next(layer.parameters()))
        layer.register_forward_hook(operate)


Config, Model = getattr(transformers, CONFIG), getattr(transformers, MODEL)


class PrunedConfig(Config):  # type: ignore[misc, valid-type]
    """The family's config, and `pruned`: what differs from its form."""

    model_type = f"pruned_{Config.model_type}"


class PrunedForCausalLM(Model):  # type: ignore[misc, valid-type]
    """The family's model, reshaped as its config says."""

    config_class = PrunedConfig

    def __init__(self, config: Any):
        super().__init__(config)
        reshape(self, config.pruned)


# Some families' weights are stored otherwise than they are computed with (each expert by itself).
if mapping := conversion_mapping.get_checkpoint_conversion_mapping(Config.model_type):
    conversion_mapping.register_checkpoint_conversion_mapping(PrunedConfig.model_type, mapping, overwrite=True)
