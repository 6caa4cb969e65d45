"""A pruned model in a form that its family's own class does not have. This file lies with the weights of such a model, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it.

It is the family's class with what `config.pruned` names:

- `operators`: layer → "dense" or "diagonal": the state behind the layer is multiplied by a (d, d) or (d,) weight.
- `without_attention`: layer → paths of its attention and of the norm in front of it: both are gone, and
  `h + MLP(norm(h))` is left.
- `shortcuts`: the state has `width` entries, in a basis of its own at each norm; what goes past attention and MLP is taken from
  one basis to the next by a (width, width) weight.
- `linears`: path → [outputs, inputs] of linears that have other shapes than the family's config says: heads and channels are
  missing in some layers.
"""

from types import MethodType
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


class NoAttention(nn.Module):
    """What stands where an attention was: it adds nothing.

    Some models take the number of tokens before from the cache of their first layer. So this one keeps a number a token there.
    """

    def __init__(self, layer_idx: int | None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, transformers.Cache)), None)
        if cache is not None:
            token = hidden_states[:, None, :, :1]
            cache.update(token, token, self.layer_idx)
        return torch.zeros_like(hidden_states), None


def operate(layer: Any, _arguments: Any, output: Any) -> Any:
    """Forward hook of a layer: what it returns goes through its operator."""
    if isinstance(output, torch.Tensor):
        return layer.operator(output)
    return (layer.operator(output[0]), *output[1:])


def computed_with_shortcuts(layer: Any, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
    """What such a layer's own forward computes, with a shortcut past its attention and one past its MLP."""
    multiplier = getattr(layer, "residual_multiplier", 1)
    added, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    hidden_states = layer.attention_shortcut(hidden_states) + multiplier * added
    added = layer.mlp(layer.post_attention_layernorm(hidden_states))
    return layer.mlp_shortcut(hidden_states) + multiplier * added


def reshape(model: nn.Module, pruned: dict[str, Any]) -> None:
    """Give a model of the family's own form the parts that `pruned` names; their weights are not set."""
    layers: Any = model.get_submodule(pruned["layers"])
    width: Any = pruned.get("width", model.config.hidden_size)  # type: ignore[union-attr]
    for index, form in pruned.get("operators", {}).items():
        layer = layers[int(index)]
        layer.operator = (Operator(width) if form == "diagonal" else Operator(width, width)).to(next(layer.parameters()))
        layer.register_forward_hook(operate)
    for index, (attention, norm) in pruned.get("without_attention", {}).items():
        layers[int(index)].set_submodule(attention, NoAttention(int(index)))
        layers[int(index)].set_submodule(norm, nn.Identity())
    for layer in layers if pruned.get("shortcuts") else ():
        for name in ("attention_shortcut", "mlp_shortcut"):
            setattr(layer, name, Operator(width, width).to(next(layer.parameters())))
        layer.forward = MethodType(computed_with_shortcuts, layer)
    for path, (outputs, inputs) in pruned.get("linears", {}).items():
        own: Any = model.get_submodule(path)
        like = {"device": own.weight.device, "dtype": own.weight.dtype}
        model.set_submodule(path, nn.Linear(inputs, outputs, bias=own.bias is not None, **like))


Config, Model = getattr(transformers, CONFIG), getattr(transformers, MODEL)


class PrunedConfig(Config):  # type: ignore[misc, valid-type]
    """The family's config, and `pruned`: what differs from its form."""

    model_type = f"pruned_{Config.model_type}"

    def validate_architecture(self) -> None:
        """The width need not be the heads' widths together."""


class PrunedForCausalLM(Model):  # type: ignore[misc, valid-type]
    """The family's model, reshaped as its config says."""

    config_class = PrunedConfig

    def __init__(self, config: Any):
        super().__init__(config)
        reshape(self, config.pruned)


# Some families' weights are stored otherwise than they are computed with (each expert by itself).
if mapping := conversion_mapping.get_checkpoint_conversion_mapping(Config.model_type):
    conversion_mapping.register_checkpoint_conversion_mapping(PrunedConfig.model_type, mapping, overwrite=True)
