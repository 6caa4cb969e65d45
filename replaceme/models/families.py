"""Model families: one small description each, found by the config's ``model_type``.

A layer's MLP adds ``M = ρ N(G Wᵀ + b)`` to the residual stream: a last linear, optionally a norm ``N`` after it, and a factor
ρ. Without the norm, ReplaceMe's fold ``W' = TᵀW``, ``b' = Tᵀb`` (section 3) is exact for any T. With a norm of weight γ, a fold
is exact for ``T = diag(γ)⁻¹ Q D``, Q orthogonal and D diagonal: ``W' = QᵀW``, ``γ' = D``. A mixture of experts sums weighted
outputs, so T goes into the last linear of every expert. Settings that can't be exact are refused before any work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from replaceme.base.accelerators import to_float64
from replaceme.base.errors import ModelError
from replaceme.models.streaming import read_value

Obstacle = Literal["norm", "experts", "undescribed"]
OBSTACLES: Mapping[Obstacle, str] = {
    "norm": "the norm after the MLP of the family",
    "experts": "the mixture of experts of the family",
    "undescribed": "the undescribed family",
}


# The linears of a layer whose outputs are added to the residual stream.
Linear = Literal["attention_output", "mlp_output"]
PROJECTIONS: Mapping[Linear, tuple[str, ...]] = {
    "attention_output": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp_output": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder-only family are. All paths but the first are relative to a layer.

    Attributes:
        layers: path of the list of decoder layers in the model.
        attention: the module whose output is added to the residual stream: the attention, or the norm after it.
        attention_output: the last linear of the attention.
        attention_norm: the norm before the attention; it can go with the attention if nothing else reads it. Empty if unknown.
        mlp: the module whose output is added to the residual stream: the MLP, or the norm after it.
        mlp_output: the last linear of the MLP.
        mlp_norm: the norm before the MLP; empty if unknown, or if the linears after it can't absorb its weight and bias.
        experts: the last parameters of the experts, if the MLP is a mixture of them; a layer may lack some.
        feeding_linears: the linears whose outputs feed the last one, for attention and MLP, as far as they are known.
        head_pruning_obstacle: why heads and channels can't be removed by changing shapes alone; empty if they can.
        norm_before: whether attention, MLP and head read the residual stream through norms, so that its scale doesn't matter.
        rms_norms: the RMS norms before attention and MLP; empty unless these two are sequential, read the residual stream
            through these norms only, and ``replaceme.models.modeling_pruned`` can compute the layer.
        norm_offset: the weight of the norm after the MLP is its parameter plus this; None if there is no such norm.
        multiplier: ρ, the factor on what attention and MLP add.
        parallel: whether the MLP reads the same states as the attention, instead of the states after it.
        adds_in_place: whether the layer adds into the MLP's output tensor.
        returns_tuple: whether the layer returns its output inside a tuple.
        per_layer: config fields that are lists with one entry per layer.
        layer_bounds: config fields that hold a layer index and count the layers before it.
        layer_indices: config fields that are lists of layer indices.
        detected: whether the family was recognised by its structure (``replaceme.models.recognition``), not described.
        make_explicit: replaces a config's patterns over layer indices by lists, in place.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_output: str = "mlp.down_proj"
    mlp_norm: str = "post_attention_layernorm"
    experts: tuple[str, ...] = ()
    feeding_linears: Mapping[Linear, tuple[str, ...]] = field(default_factory=lambda: PROJECTIONS)
    head_pruning_obstacle: str = ""
    norm_before: bool = True
    rms_norms: tuple[str, ...] = ()
    norm_offset: float | None = None
    multiplier: float = 1.0
    parallel: bool = False
    adds_in_place: bool = False
    returns_tuple: bool = False
    per_layer: tuple[str, ...] = ("layer_types",)
    layer_bounds: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    detected: bool = False
    make_explicit: Callable[[Any], None] = lambda config: None

    @property
    def norm_after_mlp(self) -> bool:
        """Whether a norm stands between the MLP's last linear and the residual stream."""
        return self.norm_offset is not None

    @property
    def obstacle(self) -> Obstacle | None:
        """Why some settings are not exact, or not derived; None if all are."""
        return "norm" if self.norm_after_mlp else "experts" if self.experts else "undescribed" if self.detected else None

    def obstacle_words(self, kind: str) -> str:
        """Return the obstacle in words, with the name ``kind`` of the family."""
        assert self.obstacle is not None
        return f"{OBSTACLES[self.obstacle]} '{kind}'"

    @property
    def slicing_obstacle(self) -> str | None:
        """Why the residual stream can't be made narrower; None if it can."""
        if self.detected:
            return "the readers of its residual stream are not described"
        if self.experts:
            return "the router of its mixture of experts is not derived"
        if self.norm_after_mlp:
            return "the norm after its MLP changes with the basis"
        if self.parallel:
            return "its attention and MLP are parallel, which is not derived"
        return None if self.rms_norms else "its norms subtract a mean, which is not derived"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of decoder layers."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def linear_of(self, layer: nn.Module, linear: Linear) -> nn.Module:
        """Return the last linear of the layer's attention or MLP."""
        return layer.get_submodule(self.mlp_output if linear == "mlp_output" else self.attention_output)

    def cut_parameters(self, layer: nn.Module, linear: Linear) -> dict[str, int]:
        """Return the parameters to cut for groups of inputs of a last linear: name within the layer → dimension to cut."""
        last = self.mlp_output if linear == "mlp_output" else self.attention_output
        names = [f"{path}.{name}" for path in self.feeding_linears[linear] for name in ("weight", "bias")]
        present = dict(layer.named_parameters())
        return {**{name: 0 for name in names if name in present}, f"{last}.weight": 1}

    def transformed(self, layer: nn.Module) -> nn.Module:
        """Return the module whose output is multiplied by a transform of the MLP's contribution."""
        return layer.get_submodule(self.mlp if self.experts or self.norm_after_mlp else self.mlp_output)

    def output_parameters(self, layer: nn.Module, linear: Linear) -> list[str]:
        """Return the names, within the layer, of the last weights and biases of attention or MLP (of every expert)."""
        path = self.mlp_output if linear == "mlp_output" else self.attention_output
        names = self.experts if linear == "mlp_output" and self.experts else (f"{path}.weight", f"{path}.bias")
        present = dict(layer.named_parameters())
        return [name for name in names if name in present]

    def scaling_parameters(self, layer: nn.Module) -> list[str]:
        """Return the names, within the layer, of the parameters that scale what it adds to the residual stream."""
        if self.norm_after_mlp:
            return [f"{self.attention}.weight", f"{self.mlp}.weight"]
        return [*self.output_parameters(layer, "attention_output"), *self.output_parameters(layer, "mlp_output")]

    def norm_weight(self, layer: nn.Module) -> Tensor:
        """Return γ (d,) float64 of the norm after the layer's MLP."""
        assert self.norm_offset is not None
        return to_float64(parameter_of(layer, f"{self.mlp}.weight")) + self.norm_offset


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter in torch's layout: weights (…, d, inputs), biases (d,); ``Conv1D`` stores the transpose.

    It is a view of the parameter, or what was read for this call where a streamed layer's weights are not in memory.
    """
    return in_torch_layout(layer, name, read_value(layer.get_parameter(name)))


def in_torch_layout(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a view of ``value`` converted from a parameter's layout to torch's, or back (both are the same transpose)."""
    owner = layer.get_submodule(name.rpartition(".")[0])
    return value.T if is_conv1d(owner) and value.ndim == 2 else value


@cache
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' ``Conv1D``: a linear whose weight is (inputs, outputs)."""
    return isinstance(module, _conv1d())


def inputs_of(linear: nn.Module) -> int:
    """Return the number of a linear's inputs; the shape of a packed 4-bit weight doesn't give it."""
    return int(linear.nx if is_conv1d(linear) else linear.in_features)  # type: ignore[arg-type]


def linears_within(part: nn.Module) -> dict[str, nn.Module]:
    """Return the linears in a module by path; a module that is a linear itself has the path ''."""
    return {path: module for path, module in part.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}


def linear_parameters(layer: nn.Module) -> list[str]:
    """Return the names, within a layer, of the weights and biases of its linears."""
    linears = linears_within(layer).items()
    return [f"{path}.{name}" for path, linear in linears for name, _ in linear.named_parameters(recurse=False)]


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the model without its language-model head: it returns hidden states and computes no logits."""
    return model.get_submodule(str(model.base_model_prefix))


def _described(**parts: Any) -> Callable[[Any], Family]:
    family = Family(**parts)
    return lambda config: family


def _granite(config: Any) -> Family:
    return Family(multiplier=float(config.residual_multiplier), rms_norms=_RMS_NORMS)


def _falcon(config: Any) -> Family:
    return Family(
        layers="transformer.h", attention="self_attention", attention_output="self_attention.dense",
        # As published, its linears have no biases that could absorb those of its norms.
        mlp_output="mlp.dense_4h_to_h", mlp_norm="", parallel=bool(config.new_decoder_architecture or config.parallel_attn),
        adds_in_place=True, returns_tuple=True, head_pruning_obstacle=_FUSED,
    )  # fmt: skip


def _gpt_neox(config: Any) -> Family:
    return Family(
        layers="gpt_neox.layers", attention="attention", attention_output="attention.dense", mlp_output="mlp.dense_4h_to_h",
        parallel=bool(config.use_parallel_residual), feeding_linears={"mlp_output": ("mlp.dense_h_to_4h",)},
        head_pruning_obstacle=_FUSED,
    )  # fmt: skip


def _gpt2(config: Any) -> Family:
    if config.scale_attn_by_inverse_layer_idx:
        raise _refusal("gpt2", "a cut would change the scale of its attention (scale_attn_by_inverse_layer_idx)")
    return Family(
        layers="transformer.h", attention="attn", attention_output="attn.c_proj", attention_norm="ln_1",
        mlp_output="mlp.c_proj", mlp_norm="ln_2", feeding_linears={"mlp_output": ("mlp.c_fc",)}, head_pruning_obstacle=_FUSED,
    )  # fmt: skip


def _opt(config: Any) -> Family:
    if not config.do_layer_norm_before:
        raise _refusal("opt", "it normalises the residual stream itself (do_layer_norm_before: false)")
    affine = config.enable_bias and config.layer_norm_elementwise_affine
    return Family(
        layers="model.decoder.layers", attention_output="self_attn.out_proj", attention_norm="self_attn_layer_norm", mlp="fc2",
        mlp_output="fc2", mlp_norm="final_layer_norm" if affine else "", feeding_linears={"mlp_output": ("fc1",)},
        head_pruning_obstacle=_COUNTED, norm_before=not config._remove_final_layer_norm,
    )  # fmt: skip


def _gemma3(config: Any) -> Family:
    if config.use_bidirectional_attention:
        raise _refusal("gemma3_text", "it is an encoder, whose tokens see later ones (use_bidirectional_attention)")
    return Family(**_NORM_AFTER, norm_offset=1.0)


def _sparse_layers(config: Any) -> None:
    """List the layers without experts in ``mlp_only_layers``, instead of by the period ``decoder_sparse_step``."""
    config.mlp_only_layers = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer in (config.mlp_only_layers or []) or (layer + 1) % config.decoder_sparse_step
    ]
    config.decoder_sparse_step = 1


_RMS_NORMS = ("input_layernorm", "post_attention_layernorm")
_FUSED = "one linear makes its queries, keys and values, and its code splits them where the config says"
_COUNTED = "its attention takes its number of heads from the config"
_SPANNING = "a norm spans all its heads, so that none is independent of the others"
_ROUTED = "a router, which belongs to no channel, weighs its experts"
_NORM_AFTER: dict[str, Any] = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_QWEN_MOE = _described(
    experts=("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight", "mlp.down_proj.weight"),
    head_pruning_obstacle=_ROUTED,
    layer_bounds=("max_window_layers",),
    layer_indices=("mlp_only_layers",),
    make_explicit=_sparse_layers,
)

FAMILIES: Mapping[str, Callable[[Any], Family]] = {
    "falcon": _falcon,
    "gemma2": _described(**_NORM_AFTER, norm_offset=1.0),
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _described(
        layers="transformer.h",
        attention="attn",
        attention_output="attn.out_proj",
        mlp_output="mlp.fc_out",
        mlp_norm="ln_1",
        parallel=True,
        feeding_linears={"attention_output": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp_output": ("mlp.fc_in",)},
    ),
    "granite": _granite,
    "llama": _described(rms_norms=_RMS_NORMS),
    "mistral": _described(rms_norms=_RMS_NORMS),
    "mixtral": _described(experts=("mlp.experts.down_proj",), head_pruning_obstacle=_ROUTED),
    "olmo2": _described(**_NORM_AFTER, norm_offset=0.0, norm_before=False, head_pruning_obstacle=_SPANNING),
    "olmo3": _described(**_NORM_AFTER, norm_offset=0.0, norm_before=False, head_pruning_obstacle=_SPANNING),
    "opt": _opt,
    "phi": _described(
        attention_output="self_attn.dense",
        mlp_output="mlp.fc2",
        mlp_norm="input_layernorm",
        parallel=True,
        feeding_linears={**PROJECTIONS, "mlp_output": ("mlp.fc1",)},
    ),
    "phi3": _described(
        rms_norms=_RMS_NORMS, feeding_linears={"mlp_output": ("mlp.gate_up_proj",)}, head_pruning_obstacle=_FUSED
    ),
    "qwen2": _described(rms_norms=_RMS_NORMS, layer_bounds=("max_window_layers",)),
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _described(rms_norms=_RMS_NORMS, layer_bounds=("max_window_layers",)),
    "qwen3_moe": _QWEN_MOE,
    "smollm3": _described(
        rms_norms=_RMS_NORMS, per_layer=("layer_types", "no_rope_layers"), layer_bounds=("max_window_layers",)
    ),
}


def family_of(config: Any) -> Family:
    """Return the description of a config's family.

    Raises:
        ModelError: the family is not described, or its fold would not be exact.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(f"model_path: the family '{kind}' is not described; described are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[kind](config)


def _refusal(kind: str, reason: str) -> ModelError:
    return ModelError(f"model_path: this model of the family '{kind}' is refused: {reason}.")
