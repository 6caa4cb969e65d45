"""``Edits``: a method's decisions as data. Export applies them without knowing the method.

Two changes to linears whose output is added to the residual stream (torch layout, ``y = G Wᵀ + b``):

- a transform ``y T``: ``W' = TᵀW`` and ``b' = Tᵀb`` (ReplaceMe, section 3). Where a norm follows the MLP, T acts on the norm's
  output before its weight, so that it doesn't depend on how that weight is rounded;
- a correction added to it, ``y T + G Δᵀ + δ``: ``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ``. Where a norm follows, Q replaces T
  (``W' = QᵀW + Δ``).

Changes to whole layers:

- a mixture replaces all linears of a layer, applied before the two changes above: ``W = Σ c_j W_j`` and ``b = Σ c_j b_j`` over
  itself and removed layers (LaCo, arXiv 2402.11187). The layer keeps its norms;
- an MLP can be made of other channels, some from removed layers, applied before the two changes above
  (``replaceme.edits.channels``);
- an operator P multiplies the state after a layer, ``h P`` (LinearPatch, arXiv 2505.24680; Ghosted, arXiv 2605.15491;
  Prune&Comp, arXiv 2507.18212). A scalar folds, since norms ignore scale: everything that later layers add is divided by it.
  Any other P stays an operator, and the model is saved with ``replaceme.models.modeling_pruned``.

What only one method does to a model is a ``ModelEdit`` in that method's file (``replaceme.edits.model_edit``).

A parameter that was trained has its new value itself, and no other change (``replaceme.training.distillation``).

On disk: ``edits.json`` (what is no tensor) and ``edits.safetensors`` (``transform.<layer>``, d × d float64;
``correction.<layer>.<linear>.weight``, d × inputs float32, and ``….bias``, d; ``channels.<layer>``, f × 2 int64;
``operator.<layer>``, a scalar, vector or matrix, float64; ``trained.<layer>.<name>``; and the tensors of the ``ModelEdit``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.base.files import read_json, write_json
from replaceme.edits.model_edit import ModelEdit

if TYPE_CHECKING:
    from replaceme.models.families import Linear

# Largest entry of QᵀQ − I that rounding explains.
ORTHOGONAL = 1e-6
# Stands for a layer where a parameter is in none.
OUTSIDE = -1
# Fields that are layer → tensor, and what the names of their stored tensors begin with.
PREFIXES = {"transforms": "transform", "channels": "channels", "operators": "operator"}


@dataclass(frozen=True)
class Change:
    """How one linear's output changes: ``y T + G Δᵀ + δ``; where a norm follows, Q replaces T (``rotation_and_gains``).

    Attributes:
        transform: T (d, d), or None for the identity.
        weight: Δ (d, inputs), or None for 0.
        bias: δ (d,), or None for 0; only where the linear has a bias.
    """

    transform: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def rotation_and_gains(transform: Tensor) -> tuple[Tensor, Tensor]:
    """Split a transform ``Q D`` of a norm's output before its weight: Q orthogonal (d, d), and the diagonal of D (d,).

    Raises:
        SolveError: the transform is no such product.
    """
    gains = transform.double().norm(dim=0)
    rotation = transform.double() / gains
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    # In this form NaN fails too: a column of zeros gives it.
    if not float((rotation.T @ rotation - identity).abs().max()) <= ORTHOGONAL:
        raise SolveError("transform: this map does not fold into the norm after the MLP; use transform: orthogonal.")
    return rotation, gains


@dataclass
class Edits:
    """Changes to a model. All layer indices are those of the dense model.

    Attributes:
        title: the method's name, for the model card.
        removed_layers: removed layers.
        parts: removed parts of kept layers, in words that follow "without" (``3 of 9 heads in every layer``); else empty.
        config: entries of the family's own config that differ from the dense model's with its layers cut.
        transforms: layer → T (d, d) float64, for the last linear of the layer's MLP.
        corrections: (layer, linear) → Δ (d, inputs) and δ (d,) or None; float32.
        mixtures: kept layer → coefficients of the original layers whose linears it mixes, itself included.
        channels: kept layer → its MLP's channels, (f, 2) int64: for each an original layer (itself or a removed one) and the
            index there.
        parameters: (kept layer, name within it) → the new value, in torch's layout and the dtype of the model's files; for one
            outside of the layers, (``OUTSIDE``, its name in the model). These parameters have no other change.
        operators: kept layer → P of the state after it: a scalar (), a diagonal (d,) or any map (d, d), float64.
        model_edit: what the method alone does; then there are no transforms, corrections, mixtures, channels and operators.
    """

    title: str
    removed_layers: list[int]
    transforms: dict[int, Tensor] = field(default_factory=dict)
    corrections: dict[tuple[int, Linear], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    mixtures: dict[int, dict[int, float]] = field(default_factory=dict)
    channels: dict[int, Tensor] = field(default_factory=dict)
    parameters: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    operators: dict[int, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: str = ""
    model_edit: ModelEdit | None = None

    @property
    def only_remove(self) -> bool:
        """Whether layers are removed with nothing in their place."""
        return self == Edits(self.title, self.removed_layers)

    def as_dense(self, layer: int, state: Tensor) -> Tensor:
        """Convert the pruned model's state after a kept layer, (tokens, width), to the dense model's basis and scale."""
        return self.model_edit.as_dense(layer, state) if self.model_edit else self.scale(layer + 1) * state

    def as_pruned(self, layer: int, state: Tensor) -> Tensor:
        """Convert the dense model's state before a layer, (tokens, d), to the pruned model's basis and scale."""
        return self.model_edit.as_pruned(layer, state) if self.model_edit else state / self.scale(layer)

    def scale(self, layer: int) -> float:
        """Return the product of the scalar operators before ``layer``: the factor of the state that enters it."""
        return math.prod(float(P) for at, P in self.operators.items() if P.ndim == 0 and at < layer)

    def select_layers(self, layers: Collection[int]) -> Edits:
        """Return the changes of some kept layers alone; the operators stay, since scalars act on all later layers."""
        return replace(
            self,
            transforms={at: value for at, value in self.transforms.items() if at in layers},
            corrections={at: value for at, value in self.corrections.items() if at[0] in layers},
            mixtures={at: value for at, value in self.mixtures.items() if at in layers},
            channels={at: value for at, value in self.channels.items() if at in layers},
            parameters={at: value for at, value in self.parameters.items() if at[0] in layers},
        )

    def own_form(self, layers: str) -> dict[str, Any]:
        """Return what ``replaceme.models.modeling_pruned`` changes in the family's own form; empty where that form is kept.

        Args:
            layers: path of the list of decoder layers in the model.
        """
        parts = self.model_edit.own_form(layers, self.position) if self.model_edit else {}
        if operators := {self.position(at): P.ndim for at, P in sorted(self.operators.items()) if P.ndim}:
            parts["operators"] = {str(at): "diagonal" if ndim == 1 else "dense" for at, ndim in operators.items()}
        return {"layers": layers, **parts} if parts else {}

    @property
    def has_own_form(self) -> bool:
        """Whether the result has a form that no class of transformers has."""
        return bool(self.own_form(""))

    def position(self, layer: int) -> int:
        """Return the index of a kept layer in the shortened model."""
        return layer - sum(removed < layer for removed in self.removed_layers)

    def changes(self) -> dict[tuple[int, Linear], Change]:
        """Return the transforms and corrections, by layer and linear."""
        edited: set[tuple[int, Linear]] = {*self.corrections}
        edited.update((layer, "mlp_output") for layer in self.transforms)
        return {
            (layer, linear): Change(
                self.transforms.get(layer) if linear == "mlp_output" else None,
                *self.corrections.get((layer, linear), (None, None)),
            )
            for layer, linear in sorted(edited)
        }

    def correct(self, layer: int, linear: Linear, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add Δ (d, inputs) and δ (d,) to a linear's correction."""
        if (layer, linear) in self.corrections:
            old_weight, old_bias = self.corrections[layer, linear]
            weight = old_weight + weight
            bias = old_bias if bias is None else bias if old_bias is None else old_bias + bias
        self.corrections[layer, linear] = weight.float(), None if bias is None else bias.float()

    def correct_all(self, layer: int, parts: Iterable[tuple[Linear, Tensor, Tensor | None]]) -> None:
        """Add solved corrections of a layer's linears: for each, Δ (d, inputs) and δ (d,) or None, from any device."""
        for linear, weight, bias in parts:
            own = None if bias is None else bias.cpu().clone()
            self.correct(layer, linear, weight.cpu().contiguous(), own)

    def save(self, folder: Path) -> None:
        """Write ``edits.json`` and ``edits.safetensors`` into ``folder``."""
        content: dict[str, Any] = {"title": self.title, "removed_layers": self.removed_layers, "parts": self.parts}
        content["config"] = self.config
        # JSON would make words of a mixture's layers, and sort them: their order is that of a sum.
        content["mixtures"] = [[layer, [*mixture.items()]] for layer, mixture in sorted(self.mixtures.items())]
        tensors = {
            f"{prefix}.{layer}": tensor for name, prefix in PREFIXES.items() for layer, tensor in getattr(self, name).items()
        }
        for (layer, linear), (weight, bias) in self.corrections.items():
            tensors[f"correction.{layer}.{linear}.weight"] = weight
            if bias is not None:
                tensors[f"correction.{layer}.{linear}.bias"] = bias
        tensors |= {f"trained.{layer}.{name}": value for (layer, name), value in self.parameters.items()}
        if self.model_edit:
            content["model_edit"] = {"kind": self.model_edit.kind, **self.model_edit.to_json()}
            tensors |= self.model_edit.tensors()
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous or {"none": torch.zeros(1)}, folder / "edits.safetensors")
        write_json(folder / "edits.json", content)

    @classmethod
    def load(cls, folder: Path) -> Edits:
        """Read what ``save`` wrote. The tensors are mapped from the file."""
        content, tensors = read_json(folder / "edits.json"), load_file(folder / "edits.safetensors")
        edits = cls(content["title"], content["removed_layers"], config=content["config"], parts=content["parts"])
        edits.mixtures = {layer: dict(mixture) for layer, mixture in content["mixtures"]}
        for name, prefix in PREFIXES.items():
            getattr(edits, name).update({layer: tensors[f"{prefix}.{layer}"] for layer, _ in stored_keys(tensors, prefix)})
        for layer, rest in stored_keys(tensors, "correction"):
            linear, kind = rest.split(".")
            if kind == "weight":
                bias = tensors.get(f"correction.{layer}.{linear}.bias")
                edits.corrections[layer, cast("Linear", linear)] = tensors[f"correction.{layer}.{rest}"], bias
        for layer, name in stored_keys(tensors, "trained"):
            edits.parameters[layer, name] = tensors[f"trained.{layer}.{name}"]
        if own := content.get("model_edit"):
            edits.model_edit = ModelEdit.KINDS[own["kind"]].from_stored(own, tensors)
        return edits


def stored_keys(tensors: Iterable[str], prefix: str) -> list[tuple[int, str]]:
    """Return the layer and the rest of the name of each tensor ``<prefix>.<layer>[.<rest>]``, sorted."""
    parts = (name.split(".", 2) for name in tensors if name.startswith(f"{prefix}."))
    return sorted((int(layer), "".join(rest)) for _, layer, *rest in parts)
