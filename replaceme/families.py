"""What the program must know of a model family: one small description each, found by the config's ``model_type``.

The fold ``W' = Tᵀ W`` (ReplaceMe, section 3) is exact where the host's MLP ends in a linear layer whose output is added to
the residual stream as it is. A family that isn't described here, or of which that isn't true, is refused before any work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from replaceme.errors import ModelError

# The linears of a layer whose outputs are added to the residual stream.
Linear = Literal["attention_output", "mlp_output"]


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder-only family are.

    Attributes:
        layers: path of the list of decoder layers in the model.
        attention: path, within a layer, of the attention, whose output is added to the residual stream.
        attention_output: path, within a layer, of the linear that ends the attention (torch layout: d × heads).
        mlp: path, within a layer, of the MLP, whose output is added to the residual stream.
        mlp_output: path, within a layer, of the linear that ends the MLP (torch layout: d × f).
        per_layer: config fields that are lists with one entry a layer.
        layer_bounds: config fields that are layer indices; they count the layers before them.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_output: str = "mlp.down_proj"
    per_layer: tuple[str, ...] = ("layer_types",)
    layer_bounds: tuple[str, ...] = ()

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of decoder layers."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def linear_of(self, layer: nn.Module, linear: Linear) -> nn.Module:
        """Return a linear of the layer, by what it ends."""
        return layer.get_submodule(self.mlp_output if linear == "mlp_output" else self.attention_output)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the model without its language-model head: it gives hidden states and computes no logits."""
    return model.get_submodule(str(model.base_model_prefix))


PRE_NORM = Family()
FAMILIES: Mapping[str, Family] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": Family(layer_bounds=("max_window_layers",)),
    "qwen3": Family(layer_bounds=("max_window_layers",)),
}

_NORM_AFTER_MLP = "a norm stands between its MLP and the residual stream, where a dense map does not fold exactly"
_EXPERTS = "its MLP is a mixture of experts, into which the map is not folded yet"
REFUSED: Mapping[str, str] = {
    "gemma2": _NORM_AFTER_MLP,
    "gemma3": _NORM_AFTER_MLP,
    "gemma3_text": _NORM_AFTER_MLP,
    "olmo2": _NORM_AFTER_MLP,
    "olmo3": _NORM_AFTER_MLP,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}


def family_of(config: Any) -> Family:
    """Return the description of a config's family.

    Raises:
        ModelError: the family is not described, or its fold would not be exact.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    described = ", ".join(sorted(FAMILIES))
    if kind in REFUSED:
        raise ModelError(f"model_path: the family '{kind}' is refused: {REFUSED[kind]}; supported are {described}.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model_path: '{kind}' is an encoder-decoder, not a causal language model; supported are {described}.")
    raise ModelError(f"model_path: the family '{kind}' is not described yet; supported are {described}.")
