"""Both models at the current layer of a repair, and what was solved for so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from replaceme.base.documents import Documents
from replaceme.base.parameters import Params
from replaceme.base.plan import Plan
from replaceme.base.scratch import copy_to_scratch
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, Linear
from replaceme.models.layers import EntryState
from replaceme.models.streaming import evict_layers
from replaceme.solvers.held_out import Shrinkage
from replaceme.statistics.walk import Observer, walk


@dataclass(frozen=True)
class Repair:
    """Linears solved for together, and the relative residual before and after, ``√(Σ w‖e‖² / Σ w‖target‖²)``.

    ``ridge`` and ``scale`` are the strength chosen on held-out text (``replaceme.solvers.held_out``).
    """

    layer: int
    linears: tuple[Linear, ...]
    before: float
    after: float
    ridge: float = 1.0
    scale: float = 1.0


@dataclass
class RepairState:
    """Both models at the current layer.

    Attributes:
        params, context, edits, plan: as in ``repair_layers``.
        kept: the kept layers from the first to the last one that changes.
        dense: (tokens, d) states of the dense model, after the last layer that it has computed.
        after_attention: (tokens, d) its states after the attention of the current layer, if this attention is repaired.
        shortened: (tokens, d) states of the shortened model, before the current layer.
        inputs: linear → (tokens, inputs) its inputs in the shortened model.
        shrinkage: of all corrections, chosen at the first one; None before it.
        attention_layer: the layer that ``inputs["attention_output"]`` belong to; None: no layer yet.
        repairs: so far, in order.
        figures: for the metrics, so far.
    """

    params: Params
    context: ModelContext
    edits: Edits
    plan: Plan
    kept: Sequence[int]
    dense: Tensor
    after_attention: Tensor
    shortened: Tensor
    inputs: Mapping[Linear, Tensor]
    attention_layer: int | None = None
    shrinkage: Shrinkage | None = None
    repairs: list[Repair] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def restore(self, repairs: Sequence[Mapping[str, Any]], figures: dict[str, Any]) -> None:
        """Take the repairs and figures of a checkpoint."""
        self.repairs = [Repair(**{**each, "linears": tuple(each["linears"])}) for each in repairs]
        self.shrinkage = Shrinkage(self.repairs[0].ridge, self.repairs[0].scale) if self.repairs else None
        self.figures = figures

    @property
    def layers(self) -> nn.ModuleList:
        """The dense model's layers."""
        return self.context.layers

    @property
    def family(self) -> Family:
        """The dense model's description."""
        return self.context.family

    def offload_corrections(self) -> None:
        """Move the corrections so far to scratch files: no later layer reads them, and they can exceed the memory."""
        for linear, (weight, bias) in self.edits.corrections.items():
            # A storage with a file name is in a scratch file already.
            if not weight.untyped_storage().filename:
                stored = copy_to_scratch(weight, self.context.folder, "repair")
                self.edits.corrections[linear] = stored, None if bias is None else bias.clone()

    def walk_dense(self, layer: int, observers: Sequence[Observer]) -> None:
        """Walk through the dense model, from a layer that its states enter."""
        walk(self.context, observers, description=f"layer {layer}, dense", start=EntryState(layer, self.dense))
        self._evict_others(layer)

    def walk_shortened(self, layer: int, observers: Sequence[Observer], documents: Documents | None = None) -> None:
        """Walk through the shortened model, from a layer that its states enter; the layer's attention runs only once."""
        known = self.inputs["attention_output"] if layer == self.attention_layer else None
        # Only this layer computes, so only its edits are needed.
        context = self.context.with_documents(documents) if documents else self.context
        with unfused(context.model, context.family, self.edits.select_layers([layer])):
            walk(context, observers, description=f"layer {layer}, shortened", start=EntryState(layer, self.shortened, known))
        self._evict_others(layer)

    def _evict_others(self, layer: int) -> None:
        """Evict the weights of all other layers: solves need their memory."""
        evict_layers(self.context.model, [self.layers[layer]])
