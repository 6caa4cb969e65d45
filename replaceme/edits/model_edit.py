"""The hook for what one method alone does to a model.

``Edits`` lists the changes that several methods make. A change of any other kind is a ``ModelEdit``: it stands whole in its
method's file, and ``edits/`` and ``export/`` know it by this interface alone. Like every edit it is computed twice: with hooks
on the dense model (``unfused``) and as new weights (``edited_parameters``). Beside it, edits hold only removed layers and
entries of the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

    from replaceme.models.families import Family


class ModelEdit(ABC):
    """A change of a model that one method makes. A subclass registers itself under its kind.

    Attributes:
        kind: its name in edits.json.
        reshapes: whether weights change their shapes, so that the model is read and saved whole.
    """

    kind: ClassVar[str]
    reshapes: ClassVar[bool] = False
    KINDS: ClassVar[dict[str, type[ModelEdit]]] = {}

    def __init_subclass__(cls) -> None:
        ModelEdit.KINDS[cls.kind] = cls

    @abstractmethod
    def unfused(self, model: nn.Module, family: Family) -> AbstractContextManager[None]:
        """Return a context in which the dense model computes with the edit."""

    @abstractmethod
    def edited_parameters(
        self, model: nn.Module, family: Family, layers: nn.ModuleList
    ) -> Iterator[tuple[int | None, str, Tensor]]:
        """Yield each parameter that changes: its layer, its name within it and its new value (float64, torch's layout).

        All values are computed from original weights. A parameter can be overwritten once it has been yielded. Outside of the
        layers, the layer is None and the name that in the model.

        Args:
            model: the dense model; its list of layers may be cut already.
            family: describes the model's parts.
            layers: all layers of the dense model.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for edits.safetensors, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return the entries for edits.json."""
        return {}

    @classmethod
    @abstractmethod
    def from_stored(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Return the edit, given what ``to_json`` returned and all tensors of edits.safetensors."""

    def own_form(self, layers: str, position: Callable[[int], int]) -> dict[str, Any]:
        """Return what ``replaceme.models.modeling_pruned`` changes in the family's form; empty where that form is kept.

        Args:
            layers: path of the list of decoder layers in the model.
            position: returns the index of a kept layer in the shortened model.
        """
        return {}

    def as_dense(self, layer: int, state: Tensor) -> Tensor:
        """Convert the pruned model's state after a kept layer, (tokens, width), to the dense model's basis and scale."""
        return state

    def as_pruned(self, layer: int, state: Tensor) -> Tensor:
        """Convert the dense model's state before a layer, (tokens, d), to the pruned model's basis and scale."""
        return state

    def sentences(self) -> list[str]:
        """Return what the model card says about the edit, in addition to the removed layers and parts."""
        return []
