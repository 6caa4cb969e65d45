"""What a method decides, in a form that export can apply without knowing the method.

Two kinds of change to linears whose output is added to the residual stream (torch layout, ``y = G Wᵀ + b``):

- a transform: ``y T``, so that ``W' = TᵀW`` and ``b' = Tᵀb`` (ReplaceMe, section 3); where a norm follows, of the norm's output
  before its weight, so that it is the same however the weight is rounded;
- a correction behind it: ``y T + G Δᵀ + δ``, so that ``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ``.

And one to all linears of a layer, before these two: a mixture ``W = Σ c_j W_j`` and ``b = Σ c_j b_j`` with those of layers that
go (LaCo, arXiv 2402.11187). The layer's norms stay its own.

On disk: ``edits.json`` (title, layers and mixtures) and ``edits.safetensors`` (``transform.<layer>``, d × d float64;
``correction.<layer>.<linear>.weight``, d × inputs float32, and ``….bias``, d).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.families import Linear
from replaceme.files import read_json, write_json


@dataclass(frozen=True)
class Change:
    """How one linear's output changes: ``y T + G Δᵀ + δ``.

    Attributes:
        transform: T (d, d), or None for the identity.
        weight: Δ (d, inputs), or None for nothing.
        bias: δ (d,), or None; only where the linear has a bias.
    """

    transform: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Edits:
    """Changes to a model; all positions are those of the dense model's layers.

    Attributes:
        title: the method's name, for the model card.
        removed_layers: layers that go.
        transforms: layer → T (d, d) float64, for the linear that ends the layer's MLP.
        corrections: (layer, linear) → Δ (d, inputs) and δ (d,) or None; float32.
        mixtures: kept layer → the original layers whose linears it mixes, itself among them, with their coefficients.
    """

    title: str
    removed_layers: list[int]
    transforms: dict[int, Tensor] = field(default_factory=dict)
    corrections: dict[tuple[int, Linear], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    mixtures: dict[int, dict[int, float]] = field(default_factory=dict)

    def changes(self) -> dict[tuple[int, Linear], Change]:
        """Return what changes beside the mixtures, by layer and linear."""
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
        """Add Δ (d, inputs) and δ (d,) to what corrects a linear so far."""
        if (layer, linear) in self.corrections:
            old_weight, old_bias = self.corrections[layer, linear]
            weight = old_weight + weight
            bias = old_bias if bias is None else bias if old_bias is None else old_bias + bias
        self.corrections[layer, linear] = weight.float(), None if bias is None else bias.float()

    def save(self, folder: Path) -> None:
        """Write the edits into ``folder``."""
        tensors = {f"transform.{layer}": transform.contiguous() for layer, transform in self.transforms.items()}
        for (layer, linear), (weight, bias) in self.corrections.items():
            tensors[f"correction.{layer}.{linear}.weight"] = weight.contiguous()
            if bias is not None:
                tensors[f"correction.{layer}.{linear}.bias"] = bias.contiguous()
        save_file(tensors or {"none": torch.zeros(1)}, folder / "edits.safetensors")
        content = {
            "title": self.title,
            "removed_layers": self.removed_layers,
            "transforms": sorted(self.transforms),
            "corrections": [list(edited) for edited in sorted(self.corrections)],
            "mixtures": [[layer, [*mixture.items()]] for layer, mixture in sorted(self.mixtures.items())],
        }
        write_json(folder / "edits.json", content)

    @classmethod
    def load(cls, folder: Path) -> "Edits":
        """Read what ``save`` wrote."""
        content = read_json(folder / "edits.json")
        tensors = load_file(folder / "edits.safetensors")
        transforms = {layer: tensors[f"transform.{layer}"] for layer in content["transforms"]}
        corrections: dict[tuple[int, Linear], tuple[Tensor, Tensor | None]] = {
            (layer, linear): (
                tensors[f"correction.{layer}.{linear}.weight"],
                tensors.get(f"correction.{layer}.{linear}.bias"),
            )
            for layer, linear in content["corrections"]
        }
        mixtures: dict[int, dict[int, float]] = {layer: dict(mixture) for layer, mixture in content["mixtures"]}
        return cls(content["title"], content["removed_layers"], transforms, corrections, mixtures)
