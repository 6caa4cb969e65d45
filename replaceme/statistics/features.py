"""The features of one least squares over a layer's last linears: the inputs of these linears, side by side.

With row vectors, a layer adds ``A W_oᵀ + G W_dᵀ`` (and biases) to the residual stream, where ``A`` (tokens, inputs) enters the
attention's last linear and ``G`` the MLP's. A change of both weights is one linear map of ``[A | G | 1]``; the column of ones
exists if a linear has a bias. If the family multiplies what a layer adds by ρ, the features are multiplied by ρ too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replaceme.models.families import Family, Linear, inputs_of
from replaceme.statistics.walk import Signal

LINEARS: tuple[Linear, ...] = ("attention_output", "mlp_output")
SIGNAL: Mapping[Linear, Signal] = {"attention_output": "attention_features", "mlp_output": "mlp_features"}


@dataclass(frozen=True)
class Features:
    """The layout of the columns.

    Attributes:
        widths: number of inputs of each linear, in the order of the columns.
        biased: the linear whose bias is solved for by the last column, of ones; None if there is no such column.
        multiplier: ρ.
    """

    widths: Mapping[Linear, int]
    biased: Linear | None
    multiplier: float = 1.0

    @classmethod
    def of(cls, layer: nn.Module, family: Family, linears: Sequence[Linear], mlp_width: int | None = None) -> "Features":
        """Return the features of some linears of a layer, whose MLP has ``mlp_width`` channels (None: as many as it has)."""
        modules = {linear: family.linear_of(layer, linear) for linear in LINEARS if linear in linears}
        # Both biases add to the same states: one column of ones is enough.
        biased = [linear for linear, module in modules.items() if getattr(module, "bias", None) is not None]
        widths = {linear: inputs_of(module) for linear, module in modules.items()}
        if mlp_width and "mlp_output" in widths:
            widths["mlp_output"] = mlp_width
        return cls(widths, biased[-1] if biased else None, family.multiplier)

    @classmethod
    def from_tensor(cls, layout: Tensor) -> "Features":
        """Read what ``as_tensor`` wrote."""
        *widths, biased = layout.tolist()
        return cls(
            {linear: width for linear, width in zip(LINEARS, widths, strict=True) if width},
            LINEARS[biased] if biased >= 0 else None,
        )

    def as_tensor(self) -> Tensor:
        """Return the layout as 3 int64: the width of each linear (0 if absent) and the index of the biased one (−1: none)."""
        biased = LINEARS.index(self.biased) if self.biased else -1
        return torch.tensor([*(self.widths.get(linear, 0) for linear in LINEARS), biased])

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The signals of the inputs."""
        return tuple(SIGNAL[linear] for linear in self.widths)

    @property
    def constant(self) -> bool:
        """Whether the last column is the column of ones."""
        return self.biased is not None

    def __len__(self) -> int:
        return sum(self.widths.values()) + self.constant

    def columns(self, *inputs: Tensor) -> Tensor:
        """Return the features (tokens, columns), a new float32 tensor, from each linear's inputs (tokens, width)."""
        ones = [inputs[0].new_ones(len(inputs[0]), 1)] if self.constant else []
        columns = torch.cat([*inputs, *ones], dim=1).float()
        return columns if self.multiplier == 1 else columns.mul_(self.multiplier)

    def per_column(self, values: Mapping[Linear, float]) -> Tensor:
        """Return (columns,) float64: each linear's value for all its columns, 0 for the column of ones."""
        widths = torch.tensor([*self.widths.values()])
        columns = torch.tensor([values[linear] for linear in self.widths], dtype=torch.float64).repeat_interleave(widths)
        return torch.cat([columns, columns.new_zeros(int(self.constant))])

    def only(self, linear: Linear) -> tuple["Features", slice]:
        """Return the features of the last linear alone, its bias included, and the slice of their columns."""
        assert linear == list(self.widths)[-1]
        alone = Features({linear: self.widths[linear]}, self.biased if self.biased == linear else None)
        start = sum(self.widths.values()) - self.widths[linear]
        return alone, slice(start, start + len(alone))

    def parts(self, change: Tensor) -> Iterator[tuple[Linear, Tensor, Tensor | None]]:
        """Split a change (columns, d): yield the linear, the change of its weight (d, inputs), and of its bias (d,) or None."""
        for linear, rows in zip(self.widths, change.split([*self.widths.values(), int(self.constant)]), strict=False):
            yield linear, rows.T, change[-1] if self.biased == linear else None
