"""What the program must know of a model family: one small description each, found by the config's ``model_type``.

What a layer's MLP adds to the residual stream is ``M = ρ N(G Wᵀ + b)``: a last linear, perhaps a norm ``N`` behind it, and a
factor ρ. ReplaceMe's fold ``W' = TᵀW``, ``b' = Tᵀb`` (section 3) is exact for any T where no norm stands there; behind a norm
with weight γ it is for ``T = diag(γ)⁻¹ Q D``, Q orthogonal and D diagonal (``W' = QᵀW``, ``γ' = D``). Of a mixture of experts,
which adds up weighted outputs, every expert's last linear takes T. What can't be exact is refused before any work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from replaceme.base.errors import ModelError

Obstacle = Literal["norm", "experts", "undescribed"]
OBSTACLES: Mapping[Obstacle, str] = {
    "norm": "the norm after the MLP of the family",
    "experts": "the mixture of experts of the family",
    "undescribed": "a family that nobody described,",
}


# The linears of a layer whose outputs are added to the residual stream.
Linear = Literal["attention_output", "mlp_output"]
PROJECTIONS: Mapping[Linear, tuple[str, ...]] = {
    "attention_output": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp_output": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder-only family are. All paths but the first are within a layer.

    Attributes:
        layers: path of the list of decoder layers in the model.
        attention: the module whose output the attention adds to the residual stream (its norm, where one stands behind it).
        attention_output: the linear that ends the attention.
        attention_norm: the norm in front of the attention, where it is in front of nothing else.
        mlp: the module whose output the MLP adds to the residual stream, likewise.
        mlp_output: the linear that ends the MLP.
        mlp_norm: the norm in front of the MLP, where the linears behind it can take in its weight and bias; else empty.
        experts: the parameters that end the experts of an MLP that is a mixture of them; a layer may lack some.
        feeding: the linears whose outputs make the inputs of the last one, of attention and MLP.
        uncut: why heads and channels can't be cut out by shapes alone; empty where they can.
        norm_before: whether attention, MLP and head see the residual stream through norms, to which its scale is nothing.
        rms_norms: the RMS norms of attention and MLP, where these, one behind the other, see the stream through nothing else,
            and ``replaceme.models.modeling_pruned`` knows their layer; empty elsewhere.
        norm_offset: what the norm after the MLP adds to its parameter to have its weight; None where no norm is there.
        multiplier: ρ, the factor of what attention and MLP add.
        parallel: whether the MLP reads what the attention reads, and not what the attention has added to.
        adds_in_place: whether the layer adds into the MLP's output tensor.
        returns_tuple: whether the layer returns its output within a tuple.
        per_layer: config fields that are lists with one entry a layer.
        layer_bounds: config fields that are layer indices; they count the layers before them.
        layer_indices: config fields that are lists of layer indices.
        detected: whether nobody described the family: it was recognised by its structure (``replaceme.models.recognition``).
        make_explicit: writes into a config, as lists, what it says by a pattern over layer indices.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_output: str = "mlp.down_proj"
    mlp_norm: str = "post_attention_layernorm"
    experts: tuple[str, ...] = ()
    feeding: Mapping[Linear, tuple[str, ...]] = field(default_factory=lambda: PROJECTIONS)
    uncut: str = ""
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
        """What keeps some settings from being exact, or from being derived."""
        return "norm" if self.norm_after_mlp else "experts" if self.experts else "undescribed" if self.detected else None

    def obstacle_words(self, kind: str) -> str:
        """Return what the obstacle is, with the family's name."""
        assert self.obstacle is not None
        return f"{OBSTACLES[self.obstacle]} '{kind}'"

    @property
    def unsliced(self) -> str | None:
        """Why the residual stream can't be made narrower, or None."""
        if self.detected:
            return "nobody described what reads its residual stream"
        if self.experts:
            return "the router of its mixture of experts is not derived"
        if self.norm_after_mlp:
            return "the norm behind its MLP changes with the basis"
        if self.parallel:
            return "its attention and MLP are parallel, which is not derived"
        return None if self.rms_norms else "its norms subtract a mean, which is not derived"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of decoder layers."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def linear_of(self, layer: nn.Module, linear: Linear) -> nn.Module:
        """Return a linear of the layer, by what it ends."""
        return layer.get_submodule(self.mlp_output if linear == "mlp_output" else self.attention_output)

    def cut_parameters(self, layer: nn.Module, linear: Linear) -> dict[str, int]:
        """Return the parameters that the groups in front of a linear are made of: name within the layer → their dimension."""
        last = self.mlp_output if linear == "mlp_output" else self.attention_output
        names = [f"{path}.{name}" for path in self.feeding[linear] for name in ("weight", "bias")]
        present = dict(layer.named_parameters())
        return {**{name: 0 for name in names if name in present}, f"{last}.weight": 1}

    def transformed(self, layer: nn.Module) -> nn.Module:
        """Return the module whose output a transform of the MLP's contribution takes."""
        return layer.get_submodule(self.mlp if self.experts or self.norm_after_mlp else self.mlp_output)

    def ends(self, layer: nn.Module, linear: Linear) -> list[str]:
        """Return the names, within the layer, of the parameters that make the last output: weights and biases."""
        path = self.mlp_output if linear == "mlp_output" else self.attention_output
        names = self.experts if linear == "mlp_output" and self.experts else (f"{path}.weight", f"{path}.bias")
        present = dict(layer.named_parameters())
        return [name for name in names if name in present]

    def adding(self, layer: nn.Module) -> list[str]:
        """Return the names, within the layer, of the parameters in proportion to which it adds to the residual stream."""
        if self.norm_after_mlp:
            return [f"{self.attention}.weight", f"{self.mlp}.weight"]
        return [*self.ends(layer, "attention_output"), *self.ends(layer, "mlp_output")]

    def norm_weight(self, layer: nn.Module) -> Tensor:
        """Return γ (d,) float64 of the norm behind the layer's MLP."""
        assert self.norm_offset is not None
        return parameter_of(layer, f"{self.mlp}.weight").double() + self.norm_offset


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return a view of a parameter in torch's layout, whatever its module's is: weights (…, d, inputs), biases (d,)."""
    return in_torch_layout(layer, name, layer.get_parameter(name).detach())


def in_torch_layout(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a view in torch's layout of what has that of a layer's parameter, or the other way round."""
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
    """Return the number of a linear's inputs; a 4-bit weight is packed, so that its shape says nothing."""
    return int(linear.nx if is_conv1d(linear) else linear.in_features)  # type: ignore[arg-type]


def linears_within(part: nn.Module) -> dict[str, nn.Module]:
    """Return a module's linears by their path in it; that of a module that is one itself is empty."""
    return {path: module for path, module in part.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}


def linear_parameters(layer: nn.Module) -> list[str]:
    """Return the names, within a layer, of the weights and biases of its linears."""
    linears = linears_within(layer).items()
    return [f"{path}.{name}" for path, linear in linears for name, _ in linear.named_parameters(recurse=False)]


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the model without its language-model head: it gives hidden states and computes no logits."""
    return model.get_submodule(str(model.base_model_prefix))


def _described(**parts: Any) -> Callable[[Any], Family]:
    family = Family(**parts)
    return lambda config: family


def _granite(config: Any) -> Family:
    return Family(multiplier=float(config.residual_multiplier), rms_norms=_RMS_NORMS)


def _falcon(config: Any) -> Family:
    return Family(
        layers="transformer.h", attention="self_attention", attention_output="self_attention.dense",
        # As published, its linears have no biases that could take in those of its norms.
        mlp_output="mlp.dense_4h_to_h", mlp_norm="", parallel=bool(config.new_decoder_architecture or config.parallel_attn),
        adds_in_place=True, returns_tuple=True, uncut=_FUSED,
    )  # fmt: skip


def _gpt_neox(config: Any) -> Family:
    return Family(
        layers="gpt_neox.layers", attention="attention", attention_output="attention.dense", mlp_output="mlp.dense_4h_to_h",
        parallel=bool(config.use_parallel_residual), feeding={"mlp_output": ("mlp.dense_h_to_4h",)}, uncut=_FUSED,
    )  # fmt: skip


def _gpt2(config: Any) -> Family:
    if config.scale_attn_by_inverse_layer_idx:
        raise _refusal("gpt2", "a cut would change the scale of its attention (scale_attn_by_inverse_layer_idx)")
    return Family(
        layers="transformer.h", attention="attn", attention_output="attn.c_proj", attention_norm="ln_1",
        mlp_output="mlp.c_proj", mlp_norm="ln_2", feeding={"mlp_output": ("mlp.c_fc",)}, uncut=_FUSED,
    )  # fmt: skip


def _opt(config: Any) -> Family:
    if not config.do_layer_norm_before:
        raise _refusal("opt", "it normalises the residual stream itself (do_layer_norm_before: false)")
    affine = config.enable_bias and config.layer_norm_elementwise_affine
    return Family(
        layers="model.decoder.layers", attention_output="self_attn.out_proj", attention_norm="self_attn_layer_norm", mlp="fc2",
        mlp_output="fc2", mlp_norm="final_layer_norm" if affine else "", feeding={"mlp_output": ("fc1",)}, uncut=_COUNTED,
        norm_before=not config._remove_final_layer_norm,
    )  # fmt: skip


def _gemma3(config: Any) -> Family:
    if config.use_bidirectional_attention:
        raise _refusal("gemma3_text", "it is an encoder, whose tokens see those behind them (use_bidirectional_attention)")
    return Family(**_NORM_AFTER, norm_offset=1.0)


def _sparse_layers(config: Any) -> None:
    """Say which layers have no experts by a list, instead of by every how many layers."""
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
    uncut=_ROUTED,
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
        feeding={
            "attention_output": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "mlp_output": ("mlp.fc_in",),
        },
    ),
    "granite": _granite,
    "llama": _described(rms_norms=_RMS_NORMS),
    "mistral": _described(rms_norms=_RMS_NORMS),
    "mixtral": _described(experts=("mlp.experts.down_proj",), uncut=_ROUTED),
    "olmo2": _described(**_NORM_AFTER, norm_offset=0.0, norm_before=False, uncut=_SPANNING),
    "olmo3": _described(**_NORM_AFTER, norm_offset=0.0, norm_before=False, uncut=_SPANNING),
    "opt": _opt,
    "phi": _described(
        attention_output="self_attn.dense",
        mlp_output="mlp.fc2",
        mlp_norm="input_layernorm",
        parallel=True,
        feeding={**PROJECTIONS, "mlp_output": ("mlp.fc1",)},
    ),
    "phi3": _described(rms_norms=_RMS_NORMS, feeding={"mlp_output": ("mlp.gate_up_proj",)}, uncut=_FUSED),
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
