"""What a method decides, in a form that export can apply without knowing the method.

On disk: ``edits.json`` (title and layers) and ``edits.safetensors`` (one ``transform.<layer>`` each, d × d float64).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.files import read_json, write_json

_PREFIX = "transform."


@dataclass
class Edits:
    """Changes to a model; all positions are those of the dense model's layers.

    Attributes:
        title: the method's name, for the model card.
        removed_layers: layers that go.
        transforms: layer → T (d, d) float64, to be folded into the linear that ends the layer's MLP.
    """

    title: str
    removed_layers: list[int]
    transforms: dict[int, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the edits into ``folder``."""
        tensors = {f"{_PREFIX}{layer}": transform.contiguous() for layer, transform in self.transforms.items()}
        save_file(tensors or {"none": torch.zeros(1)}, folder / "edits.safetensors")
        content = {"title": self.title, "removed_layers": self.removed_layers, "transforms": sorted(self.transforms)}
        write_json(folder / "edits.json", content)

    @classmethod
    def load(cls, folder: Path) -> "Edits":
        """Read what ``save`` wrote."""
        content = read_json(folder / "edits.json")
        tensors = load_file(folder / "edits.safetensors")
        transforms = {layer: tensors[f"{_PREFIX}{layer}"] for layer in content["transforms"]}
        return cls(content["title"], content["removed_layers"], transforms)
