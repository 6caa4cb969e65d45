"""A loaded model and the text that runs through it: what every pass, fit and training takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from replaceme.base.documents import Documents
    from replaceme.models.families import Family


@dataclass(frozen=True)
class ModelContext:
    """A loaded model and the text that runs through it.

    Attributes:
        model: a causal language model, on its own device.
        family: its description.
        documents: the text.
        batch_size: documents per batch.
        folder: for scratch files; None is the system's temporary folder.
    """

    model: Any
    family: Family
    documents: Documents
    batch_size: int
    folder: Path | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The model's decoder layers."""
        return self.family.decoder_layers(self.model)

    @property
    def width(self) -> int:
        """The size d of the hidden state."""
        return int(self.model.config.hidden_size)

    def with_documents(self, documents: Documents) -> Self:
        """Return the same with other text."""
        return replace(self, documents=documents)
